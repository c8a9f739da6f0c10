"""``klong data``: trajectories in, windows out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_klong.cli.shared import AsJson, Renderer, byte_bar, counter, print_json, quiet
from megatron_klong.config import WindowConfig, validate_config

FORMATS = "openai, sharegpt, atif, swe-agent, mini-swe-agent, openhands-v0, openhands-v1, inspect, tau-bench"

if TYPE_CHECKING:
    from megatron_klong.data.check import StoreCheck

app = typer.Typer(help="Trajectories in, windows out.", no_args_is_help=True)

Store = Annotated[
    Path, typer.Argument(metavar="PREFIX", help="Token store, as given to `klong data tokenize --out`.")
]
Overlap = Annotated[int, typer.Option("--overlap", help="O: history a new window takes over.")]
Generation = Annotated[int, typer.Option("--reserve-generation", help="G: room for one action.")]
Observation = Annotated[int, typer.Option("--reserve-observation", help="B: cap of an answer block.")]
Prefix = Annotated[str, typer.Option("--prefix", help="task, reading or marked.")]
ReadingTool = Annotated[list[str], typer.Option("--reading-tool", help="Tool of reading turns; repeatable.")]
PrefixFraction = Annotated[
    float, typer.Option("--max-prefix-fraction", help="Cap of the prefix, share of L.")
]
Untrainable = Annotated[str, typer.Option("--untrainable", help="drop or error.")]


@app.command("import")
def import_(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files of any known format.")],
    out: Annotated[Path, typer.Option(help="JSONL file to write.")],
    format: Annotated[str, typer.Option(help=f"auto, or of all files one of {FORMATS}.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Read trajectories; refused records go to OUT.quarantine.jsonl with the reason.

    Example: klong data import chats.jsonl runs/*.traj --out trajectories.jsonl
    """
    from megatron_klong.trajectory.importing import import_trajectories

    with counter("importing", "records") as tick:
        report = import_trajectories(files, out, format=format, on_record=tick)
    if as_json:
        print_json(report)
        return
    print(
        f"{report.kept} of {report.read} trajectories ({report.messages} messages, "
        f"{report.assistant_messages} of assistants) -> {report.out}"
    )
    if report.formats:
        print("read as " + ", ".join(f"{name} {count}" for name, count in report.formats.items()))
    for refusal in report.refusals:
        print(f"refused {refusal}")
    if report.refused > len(report.refusals):
        print(f"... and {report.refused - len(report.refusals)} more")
    if report.quarantine:
        print(f"{report.refused} refused records -> {report.quarantine}")


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(help="File written by `klong data import`, or run directory of `klong rl`.")
    ],
    to: Annotated[str, typer.Option(help="openai or atif.")],
    out: Annotated[Path, typer.Option(help="A .jsonl file; for atif also a folder, a file for each.")],
    as_json: AsJson = False,
) -> None:
    """Write trajectories as OpenAI chat JSONL or ATIF 1.7; importing them gives equal ones back.

    Of a run of reinforcement learning, all graded rollouts, with the token ids and log-probs sampled.

    Example: klong data export trajectories.jsonl --to atif --out atif/
    """
    from megatron_klong.rollout.export import is_run, rollout_trajectories
    from megatron_klong.trajectory.exporting import export_trajectories
    from megatron_klong.trajectory.importing import read_imported

    if source.resolve() == out.resolve():
        raise ValueError(f"--out {out}: is the input")
    trajectories = rollout_trajectories(source) if is_run(source) else read_imported(source)
    with counter("exporting", "trajectories") as tick:
        report = export_trajectories(trajectories, to, out, tick)
    if as_json:
        print_json(report)
        return
    print(f"{report.trajectories} trajectories -> {report.out} ({report.files} files)")


@app.command()
def train_tokenizer(
    file: Annotated[Path, typer.Argument(help="File written by `klong data import`.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    vocab_size: Annotated[int, typer.Option(min=300, help="Tokens, control tokens included.")] = 4096,
    renderer: Renderer = "glm-4.5",
) -> None:
    """Make a small byte-level BPE tokenizer, to try data where a model's own is not at hand.

    Example: klong data train-tokenizer trajectories.jsonl --vocab-size 1024 --out tokenizer
    """
    from megatron_klong.trajectory.formats import chat_format
    from megatron_klong.trajectory.importing import read_imported
    from megatron_klong.trajectory.tokenizer import save_tokenizer, train_bpe_tokenizer, trajectory_texts

    family = chat_format(renderer)
    texts = (text for item in read_imported(file) for text in trajectory_texts(item, family))
    tokenizer = train_bpe_tokenizer(texts, family, vocab_size)
    save_tokenizer(tokenizer, out)
    print(f"{tokenizer.get_vocab_size()} tokens -> {out}")


@app.command()
def tokenize(
    file: Annotated[Path, typer.Argument(help="File written by `klong data import`.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder with tokenizer.json.")],
    out: Annotated[Path, typer.Option(metavar="PREFIX", help="Prefix of the store's files.")],
    renderer: Renderer = "glm-4.5",
    processes: Annotated[int | None, typer.Option(min=1, help="At one time; default all cores.")] = None,
    as_json: AsJson = False,
) -> None:
    """Render every message once and store tokens, loss mask and block boundaries.

    Interrupted, it goes on where it was when it is run again.

    Example: klong data tokenize trajectories.jsonl --tokenizer GLM-4.5-Air --out store/agent
    """
    quiet()
    from megatron_klong.data.tokenize import tokenize as run

    with byte_bar("tokenizing") as advance:
        header = run(
            file, out, renderer=renderer, tokenizer=tokenizer, processes=processes,
            on_progress=lambda at: advance(at.done, at.total, f"{at.trajectories} trajectories"),
        )  # fmt: skip
    if as_json:
        print_json(header)
        return
    print(
        f"{header.trajectories} trajectories, {header.tokens:,} tokens ({header.trained_tokens:,} "
        f"carry loss) -> {out}.bin"
    )


@app.command()
def split(
    store: Store,
    max_tokens: Annotated[list[int], typer.Option("--max-tokens", help="L: context length; repeatable.")],
    overlap: Overlap,
    reserve_generation: Generation,
    reserve_observation: Observation,
    prefix: Prefix = "task",
    reading_tool: ReadingTool = ["read_paper"],  # noqa: B006 (typer copies it)
    max_prefix_fraction: PrefixFraction = 0.5,
    untrainable: Untrainable = "drop",
    row_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a packed row; default L.")] = None,
    as_json: AsJson = False,
) -> None:
    """Cut a store into windows and account for every assistant token. Writes nothing.

    Example: klong data split store/agent --max-tokens 32768 --overlap 4096
    --reserve-generation 4096 --reserve-observation 4096
    """
    quiet()
    from megatron_klong.data.report import split_report
    from megatron_klong.data.store import TokenStore

    settings = [
        _window(length, overlap, reserve_generation, reserve_observation, prefix, reading_tool,
                max_prefix_fraction, untrainable)
        for length in max_tokens
    ]  # fmt: skip
    opened = TokenStore(store)
    reports = [split_report(opened, window, row_tokens or window.max_tokens) for window in settings]
    if as_json:
        print_json({"store": str(store), "settings": reports})
        return
    for report in reports:
        packing = report.packing
        print(
            f"L={report.window.max_tokens}: {report.trajectories} trajectories (longest "
            f"{report.longest_trajectory_tokens:,} tokens) -> {report.windows} windows (longest "
            f"{report.longest_window_tokens:,}; up to {report.windows_per_trajectory_max} each)\n"
            f"  assistant tokens {report.assistant_tokens:,}: trained once {report.trained_once:,}, "
            f"more than once {report.trained_more_than_once:,}, not trained "
            + ", ".join(f"{reason} {count:,}" for reason, count in report.not_trained.items())
            + f"\n  omitted tokens per window {report.omitted_tokens_per_window:,.1f}; rows of "
            f"{packing.row_tokens}: {packing.rows} at {packing.efficiency:.1%} (no packing can exceed "
            f"{packing.efficiency_at_most:.1%})"
        )


@app.command()
def check(
    store: Store,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="L; with it, what its windows would not train.")
    ] = None,
    overlap: Overlap = 0,
    reserve_generation: Generation = 4096,
    reserve_observation: Observation = 4096,
    prefix: Prefix = "task",
    reading_tool: ReadingTool = ["read_paper"],  # noqa: B006 (typer copies it)
    max_prefix_fraction: PrefixFraction = 0.5,
    samples: Annotated[int, typer.Option(min=0, help="Trajectories to print as text.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Look through a whole store before training: counts, duplicates, longest turns, and what is wrong.

    Prints samples with what carries loss between brackets. Exit code 1 when something is wrong.

    Example: klong data check store/agent --max-tokens 32768 --overlap 4096
    """
    quiet()
    from megatron_klong.data.check import check_store, shown_text
    from megatron_klong.data.store import TokenStore

    window = None
    if max_tokens is not None:
        window = _window(max_tokens, overlap, reserve_generation, reserve_observation, prefix, reading_tool,
                         max_prefix_fraction, "drop")  # fmt: skip
    opened = TokenStore(store)
    found = check_store(opened, window)
    if as_json:
        print_json(found)
        raise typer.Exit(int(bool(found.problems)))
    _print_check(found)
    if samples and not found.problems:
        renderer = opened.renderer()
        for number in range(0, len(opened), max(1, len(opened) // samples)):
            print(f"--- {opened.labels[number].id}")
            print(shown_text(opened.trajectory(number), renderer, 400))
    for problem in found.problems:
        print(f"problem: {problem}")
    raise typer.Exit(int(bool(found.problems)))


@app.command()
def show(
    store: Store,
    trajectory_id: Annotated[str, typer.Argument(metavar="ID", help="Trajectory id.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="L: context length.")],
    overlap: Overlap,
    reserve_generation: Generation,
    reserve_observation: Observation,
    prefix: Prefix = "task",
    reading_tool: ReadingTool = ["read_paper"],  # noqa: B006 (typer copies it)
    max_prefix_fraction: PrefixFraction = 0.5,
    untrainable: Untrainable = "drop",
    as_json: AsJson = False,
) -> None:
    """Lay one trajectory's windows open: spans with their text, and with --json token ids and loss mask.

    Example: klong data show store/agent django-13964 --max-tokens 32768 --overlap 4096
    --reserve-generation 4096 --reserve-observation 4096 --json
    """
    quiet()
    from megatron_klong.data.show import show_trajectory
    from megatron_klong.data.store import TokenStore

    window = _window(max_tokens, overlap, reserve_generation, reserve_observation, prefix, reading_tool,
                     max_prefix_fraction, untrainable)  # fmt: skip
    view = show_trajectory(TokenStore(store), trajectory_id, window)
    if as_json:
        print_json(view)
        return
    print(
        f"{view.id}: {view.tokens:,} tokens, {view.turns} turns, {view.assistant_tokens:,} assistant tokens"
    )
    for shown in view.windows:
        print(f"window {shown.window}: {shown.tokens:,} tokens, {shown.trained_tokens:,} trained")
        for span in shown.spans:
            where = "inserted" if span.start is None else f"{span.start}..{span.stop}"
            turn = "" if span.turn is None else f"turn {span.turn}"
            loss = f"{span.trained:>6} with loss" if span.trained else " " * 16
            print(f"  {span.kind:<8} {turn:<9} {where:<16} {span.length:>6} tokens {loss}  {span.text}")
    for number, reason in view.not_trained.items():
        print(f"turn {number} is not trained: {reason}")


def _print_check(found: StoreCheck) -> None:
    print(f"{found.trajectories:,} trajectories, {found.turns:,} turns, {found.tokens:,} tokens")
    for kind, count in found.kinds.items():
        print(f"  {kind:<10} {count.tokens:>14,} tokens {count.trained:>14,} with loss")
    for name, quantiles in (("actions", found.action_quantiles), ("answers", found.answer_quantiles)):
        print(f"tokens of {name}: " + ", ".join(
            f"{q} {size:,}" for q, size in zip(("median", "90%", "99%", "longest"), quantiles)))  # fmt: skip
    for turn in found.longest:
        print(
            f"  long: {turn.trajectory} turn {turn.turn}: action {turn.action_tokens:,}, answer "
            f"{turn.answer_tokens:,}"
        )
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in found.untrained.by_reason.items())
    print(
        f"never trained on: {found.untrained.share:.2%} of {found.untrained.assistant_tokens:,} assistant "
        f"tokens ({reasons})"
    )
    print(
        f"duplicates: {found.duplicate_trajectories} trajectories repeat another; {found.same_start} share "
        "their initial messages with another"
    )
    for ids in found.duplicates:
        print(f"  the same: {', '.join(ids)}")


def _window(
    max_tokens: int, overlap: int, generation: int, observation: int, prefix: str,
    reading_tools: list[str], max_prefix_fraction: float, untrainable: str,
) -> WindowConfig:  # fmt: skip
    values = {
        "max_tokens": max_tokens,
        "overlap_tokens": overlap,
        "reserve_generation": generation,
        "reserve_observation": observation,
        "prefix": prefix,
        "reading_tools": reading_tools,
        "max_prefix_fraction": max_prefix_fraction,
        "untrainable": untrainable,
    }
    return validate_config(WindowConfig, values, "of the window")
