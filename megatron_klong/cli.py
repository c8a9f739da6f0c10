"""The ``klong`` command. Thin: it parses, calls one function, and prints."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel

from megatron_klong.config import RlConfig, SftConfig, WindowConfig, load_config, validate_config
from megatron_klong.inference.wire import ServerError
from megatron_klong.platform.lifetime import die_with_parent

if TYPE_CHECKING:
    from megatron_klong.convert.folders import ConversionReport

app = typer.Typer(
    help="A training stack for agents that work for hours.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data = typer.Typer(help="Trajectories in, windows out.", no_args_is_help=True)
factory = typer.Typer(help="Tasks and expert trajectories.", no_args_is_help=True)
convert = typer.Typer(help="Checkpoints from and to Hugging Face, bit for bit.", no_args_is_help=True)
app.add_typer(data, name="data")
app.add_typer(convert, name="convert")
app.add_typer(factory, name="factory")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a machine.")]
Renderer = Annotated[str, typer.Option(help="Chat format: glm-4.5 or qwen3.")]
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


@data.command("import")
def import_(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="OpenAI chat JSONL files.")],
    out: Annotated[Path, typer.Option(help="JSONL file to write.")],
    as_json: AsJson = False,
) -> None:
    """Read trajectories; refused records go to OUT.quarantine.jsonl with the reason.

    Example: klong data import chats.jsonl --out trajectories.jsonl
    """
    from megatron_klong.trajectory.importing import import_trajectories

    with _counter("importing", "records") as tick:
        report = import_trajectories(files, out, tick)
    if as_json:
        _print_json(report)
        return
    print(
        f"{report.kept} of {report.read} trajectories ({report.messages} messages, "
        f"{report.assistant_messages} of assistants) -> {report.out}"
    )
    for refusal in report.refusals:
        print(f"refused {refusal}")
    if report.quarantine:
        print(f"{report.refused} refused records -> {report.quarantine}")


@data.command()
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


@data.command()
def tokenize(
    file: Annotated[Path, typer.Argument(help="File written by `klong data import`.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder with tokenizer.json.")],
    out: Annotated[Path, typer.Option(metavar="PREFIX", help="Prefix of the store's files.")],
    renderer: Renderer = "glm-4.5",
    as_json: AsJson = False,
) -> None:
    """Render every message once and store tokens, loss mask and block boundaries.

    Example: klong data tokenize trajectories.jsonl --tokenizer GLM-4.5-Air --out store/agent
    """
    _quiet()
    from megatron_klong.data.tokenize import tokenize as run

    with _counter("tokenizing", "trajectories") as tick:
        header = run(file, out, renderer=renderer, tokenizer=tokenizer, on_record=tick)
    if as_json:
        _print_json(header)
        return
    print(
        f"{header.trajectories} trajectories, {header.tokens:,} tokens ({header.trained_tokens:,} "
        f"carry loss) -> {out}.bin"
    )


@data.command()
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
    --reserve-generation 4096 --reserve-observation 8192
    """
    _quiet()
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
        _print_json({"store": str(store), "settings": reports})
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


@data.command()
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
    """Lay one trajectory's windows open: spans, and with --json token ids and loss mask.

    Example: klong data show store/agent django-13964 --max-tokens 32768 --overlap 4096
    --reserve-generation 4096 --reserve-observation 8192 --json
    """
    _quiet()
    from megatron_klong.data.show import show_trajectory
    from megatron_klong.data.store import TokenStore

    window = _window(max_tokens, overlap, reserve_generation, reserve_observation, prefix, reading_tool,
                     max_prefix_fraction, untrainable)  # fmt: skip
    view = show_trajectory(TokenStore(store), trajectory_id, window)
    if as_json:
        _print_json(view)
        return
    print(
        f"{view.id}: {view.tokens:,} tokens, {view.turns} turns, {view.assistant_tokens:,} assistant tokens"
    )
    for shown in view.windows:
        print(f"window {shown.window}: {shown.tokens:,} tokens, {shown.trained_tokens:,} trained")
        for span in shown.spans:
            where = "inserted" if span.start is None else f"{span.start}..{span.stop}"
            turn = "" if span.turn is None else f"turn {span.turn}"
            print(f"  {span.kind:<8} {turn:<9} {where:<16} {span.length:>6} tokens, {span.trained} trained")
    for number, reason in view.not_trained.items():
        print(f"turn {number} is not trained: {reason}")


@factory.command()
def generate(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    tasks: Annotated[int, typer.Option(help="How many tasks.")] = 200,
    seed: Annotated[int, typer.Option(help="Draws the tasks.")] = 0,
    min_experiments: Annotated[int, typer.Option(help="Fewest experiments of a task.")] = 30,
    max_experiments: Annotated[int, typer.Option(help="Most experiments of a task.")] = 50,
    hurried: Annotated[
        float, typer.Option(help="Share of the trajectories whose expert hands in early.")
    ] = 0.0,
    renderer: Renderer = "glm-4.5",
    as_json: AsJson = False,
) -> None:
    """Generate replication tasks (paper, rubric), an expert's trajectories and their tokenizer.

    Example: klong factory generate --tasks 200 --out runs/domain
    """
    from megatron_klong.data.header import MARKER_TEXT, NOTE_TEXT
    from megatron_klong.factory.generate import generate_domain

    with _counter("generating", "tasks") as tick:
        report = generate_domain(
            out, count=tasks, seed=seed, renderer=renderer,
            inserted_texts=(MARKER_TEXT, NOTE_TEXT), experiments=(min_experiments, max_experiments),
            hurried=hurried, on_task=tick,
        )  # fmt: skip
    if as_json:
        _print_json(report)
        return
    print(
        f"{report.count} tasks, {report.messages} messages of the expert (mean grade "
        f"{report.mean_grade:.2f}), tokenizer of {report.vocab_size} tokens -> {out}"
    )


@convert.command("export")
def export(
    megatron_dir: Annotated[Path, typer.Argument(help="Checkpoint, or run directory (the newest is taken).")],
    hf_dir: Annotated[Path, typer.Argument(help="Folder to make.")],
    hf_config: Annotated[
        Path | None, typer.Option(help="config.json, where the checkpoint has none.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder whose tokenizer files are copied.")] = None,
    fused: Annotated[bool, typer.Option("--fused", help="One tensor for all experts of a layer.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint's weights, saved at any TP, PP and EP, as a Hugging Face folder.

    Example: klong convert export runs/quickstart/sft exported --tokenizer runs/quickstart/domain/tokenizer
    """
    _quiet()
    from megatron_klong.convert.exporting import export_checkpoint

    with _counter("exporting", "tensors") as tick:
        report = export_checkpoint(
            megatron_dir, hf_dir, hf_config=hf_config, tokenizer=tokenizer,
            layout="fused" if fused else "per-expert", on_tensor=tick,
        )  # fmt: skip
    _print_conversion(report, as_json)


@convert.command("import")
def import_weights(
    hf_dir: Annotated[Path, typer.Argument(help="Folder with config.json and safetensors.")],
    megatron_dir: Annotated[Path, typer.Argument(help="Folder to make.")],
    as_json: AsJson = False,
) -> None:
    """Write Hugging Face weights as a Megatron checkpoint that is read at any TP, PP and EP.

    Example: klong convert import exported glm-megatron
    """
    _quiet()
    from megatron_klong.convert.importing import import_checkpoint

    with _counter("importing", "tensors") as tick:
        report = import_checkpoint(hf_dir, megatron_dir, on_tensor=tick)
    _print_conversion(report, as_json)


@app.command()
def sft(
    config: Annotated[Path, typer.Argument(help="YAML file; see examples/quickstart/sft.yaml.")],
    overrides: Annotated[list[str], typer.Argument(metavar="[KEY=VALUE]...", help="Override settings.")] = [],  # noqa: B006
    nproc: Annotated[int | None, typer.Option(help="Ranks to start here (parallel.nproc).")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier run in run.dir first.")] = False,
) -> None:
    """Fine-tune on split trajectories; started again, it resumes from the last checkpoint.

    Starts its own ranks on this node; under torchrun it is one rank.

    Example: klong sft examples/quickstart/sft.yaml optimizer.lr=1e-3
    """
    from megatron_klong.training.start import start_sft

    if nproc is not None:
        overrides = [*overrides, f"parallel.nproc={nproc}"]
    raise typer.Exit(start_sft(load_config(SftConfig, config, overrides), fresh=fresh))


@app.command()
def rl(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[trainer|server|orchestrator] CONFIG [KEY=VALUE]...",
            help="YAML file, see examples/quickstart/rl.yaml; settings to override.",
        ),
    ],
    number: Annotated[int, typer.Option(min=0, help="Which of the servers, from 0; with `server`.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier run in run.dir first.")] = False,
) -> None:
    """Reinforcement learning: rollouts by vLLM in sandboxes, graded, trained on by Megatron.

    Starts trainer, servers and orchestrator here, and starts again those that die. With a role's name
    before CONFIG it is that role alone, as on a cluster; they meet in run.dir. Started again, all go on
    where they were.

    Example: klong rl examples/quickstart/rl.yaml optimizer.lr=1e-3
    """
    if "KLONG_PARENT" in os.environ:
        die_with_parent(int(os.environ.pop("KLONG_PARENT")))
    role = arguments[0] if arguments[0] in ("trainer", "server", "orchestrator") else None
    if role and len(arguments) == 1:
        raise ValueError(f"klong rl {role}: name the CONFIG")
    file, *overrides = arguments[1:] if role else arguments
    config = load_config(RlConfig, Path(file), overrides)
    if role and fresh:
        raise ValueError(f"--fresh is for `klong rl CONFIG`; a {role} joins a run")
    raise typer.Exit(_rl_role(role, config, number, fresh=fresh))


def _rl_role(role: str | None, config: RlConfig, number: int, *, fresh: bool) -> int:
    from megatron_klong.rl import roles
    from megatron_klong.rl.display import terminal_display
    from megatron_klong.rl.supervisor import supervise

    if role == "trainer":
        return roles.run_trainer(config)
    if role == "server":
        return roles.run_server(config, number)
    with terminal_display() as display:
        if role == "orchestrator":
            return roles.run_orchestrator(config, display)
        return supervise(config, fresh=fresh, say=display.say)


@app.command()
def sync_check(
    hf_dir: Annotated[
        Path, typer.Argument(help="Hugging Face folder, such as `klong convert export` makes.")
    ],
    tensor: Annotated[int, typer.Option(help="TP of the Megatron ranks.")] = 1,
    pipeline: Annotated[int, typer.Option(help="PP.")] = 1,
    expert: Annotated[int, typer.Option(help="EP.")] = 1,
    syncs: Annotated[int, typer.Option(help="Optimizer steps, each followed by a sync.")] = 3,
    precision: Annotated[str, typer.Option(help="fp32 or bf16, of Megatron and vLLM.")] = "fp32",
    transfer: Annotated[str, typer.Option(help="How weights travel: shm, nccl or ipc.")] = "shm",
    server_devices: Annotated[
        str | None, typer.Option(help="GPUs of the server, as in CUDA_VISIBLE_DEVICES; nccl needs others.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder that keeps logs and result.json.")] = None,
    as_json: AsJson = False,
) -> None:
    """Serve a model by vLLM beside Megatron ranks: compare log-probs, then train and sync, and compare.

    Megatron, transformers and vLLM start from the same weights. Then Megatron trains on random
    tokens, its weights go into the running server, and after each sync probes must agree.

    Example: klong sync-check exported --tensor 2 --pipeline 2 --expert 2
    """
    from megatron_klong.checks.sync import SyncCheck, check_sync

    values = {
        "model": hf_dir, "parallel": {"tensor": tensor, "pipeline": pipeline, "expert": expert},
        "syncs": syncs, "precision": precision, "transfer": transfer, "server_devices": server_devices,
    }  # fmt: skip
    check = validate_config(SyncCheck, values, "of the sync check")
    with _counter("waiting for the server and the ranks,", "looks") as tick:
        result = check_sync(check, out, tick)
    if as_json:
        _print_json(result)
        return
    for prompt in result.parity:
        pairs = (("Megatron - transformers", prompt.megatron_transformers),
                 ("Megatron - vLLM", prompt.megatron_vllm))  # fmt: skip
        shown = ", ".join(
            f"{pair} {'not run' if value is None else format(value, '.1e')}" for pair, value in pairs
        )
        print(f"parity, {prompt.tokens:>4} tokens: {shown}")
    for sync in result.syncs:
        seconds = sum(sync.seconds.values())
        print(
            f"sync {sync.version}: {sync.tensors} tensors, {sync.bytes / 1e6:,.1f} MB in {seconds:.2f} s "
            f"(sending {sync.seconds['send']:.2f} s); largest difference {sync.difference:.1e}"
        )
    if not result.syncs:
        return
    shown = "would have shown" if result.moved > result.tolerance else "could have passed"
    print(
        f"all within {result.tolerance:g}; every step moved log-probs by {result.moved:.2g} or more, so a "
        f"sync that did nothing {shown}"
    )


@app.command()
def gpu_check(
    out: Annotated[Path, typer.Option(help="Folder for the logs and gpu-check.json.")] = Path("gpu-check"),
    as_json: AsJson = False,
) -> None:
    """Run whatever of parity, train steps and weight syncs this machine can, and print a table.

    Rows that lack a package or a GPU are not run, and say so. Exit code 1 when a row failed.

    Example: klong gpu-check --out gpu-check-h100
    """
    from rich.console import Console
    from rich.table import Table

    from megatron_klong.checks.gpu import ROWS, gpu_check

    console = Console(stderr=True)
    with console.status(f"{ROWS[0].title} ...") as status:
        done = 0

        def on_row(_outcome: object) -> None:
            nonlocal done
            done += 1
            if done < len(ROWS):
                status.update(f"{ROWS[done].title} ...")

        result = gpu_check(out, on_row)
    if as_json:
        _print_json(result)
    else:
        table = Table("check", "", "s", "found")
        for row in result.rows:
            table.add_row(row.title, row.status, f"{row.seconds:.0f}" if row.seconds else "", row.detail)
        versions = [f"{name} {found or 'absent'}" for name, found in result.machine.packages.items()]
        print(f"{', '.join(result.machine.gpus) or 'no GPU on this machine'}; {', '.join(versions)}")
        Console().print(table)
        print(f"written to {out / 'gpu-check.json'}")
    raise typer.Exit(int(any(row.status == "failed" for row in result.rows)))


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


def _print_conversion(report: ConversionReport, as_json: bool) -> None:
    if as_json:
        _print_json(report)
        return
    left = "".join(f"; left out: {count} tensors of {what}" for what, count in report.left_out.items())
    print(f"{report.tensors} tensors, {report.bytes:,} bytes: {report.source} -> {report.target}{left}")


def _print_json(value: Any) -> None:
    print(json.dumps(value, default=_jsonable, ensure_ascii=False))


def _jsonable(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        # One level at a time, so that models inside records come through here too.
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    raise TypeError(f"{type(value).__name__} is no JSON")


@contextmanager
def _counter(doing: str, what: str) -> Iterator[Callable[[], None]]:
    """A live count on a terminal's stderr; silent elsewhere."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn(f"{doing} {{task.completed:.0f}} {what}"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda: bar.advance(task)


def _quiet() -> None:
    from megatron_klong.platform import quiet_imports

    quiet_imports()


def main() -> None:
    """Entry point: a user's error is one line and exit code 2."""
    try:
        app()
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except (ValueError, OSError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
