"""``klong convert``: checkpoints from and to Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_klong.cli.shared import AsJson, byte_bar, print_json
from megatron_klong.platform import import_megatron

if TYPE_CHECKING:
    from megatron_klong.checks.verify import Verification
    from megatron_klong.convert.folders import ConversionReport

app = typer.Typer(help="Checkpoints from and to Hugging Face, bit for bit.", no_args_is_help=True)


@app.command("export")
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
    import_megatron()
    from megatron_klong.convert.exporting import export_checkpoint

    with progress("exporting") as on_bytes:
        report = export_checkpoint(
            megatron_dir, hf_dir, hf_config=hf_config, tokenizer=tokenizer,
            layout="fused" if fused else "per-expert", on_bytes=on_bytes,
        )  # fmt: skip
    _print_conversion(report, as_json)


@app.command("import")
def import_weights(
    hf_dir: Annotated[Path, typer.Argument(help="Folder with config.json and safetensors.")],
    megatron_dir: Annotated[Path, typer.Argument(help="Folder to make.")],
    as_json: AsJson = False,
) -> None:
    """Write Hugging Face weights as a Megatron checkpoint that is read at any TP, PP and EP.

    Example: klong convert import exported glm-megatron
    """
    import_megatron()
    from megatron_klong.convert.importing import import_checkpoint

    with progress("importing") as on_bytes:
        report = import_checkpoint(hf_dir, megatron_dir, on_bytes=on_bytes)
    _print_conversion(report, as_json)


@app.command("verify")
def verify_checkpoints(
    one: Annotated[Path, typer.Argument(help="Hugging Face folder, Megatron checkpoint or run directory.")],
    two: Annotated[Path, typer.Argument(help="The same, of either kind.")],
    prompt: Annotated[
        str | None, typer.Option(help="Token ids with commas between. Default: 24 random ones.")
    ] = None,
    generate: Annotated[int, typer.Option(min=1, help="Tokens that both models go on with.")] = 16,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Do not compute the models.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints: names, shapes, bits, then logits on a prompt, then greedy tokens.

    A Hugging Face folder is computed by transformers, a Megatron checkpoint by Megatron-Core, both in fp32.
    Exit code 1 when they differ.

    Example: klong convert verify exported glm-megatron
    """
    import_megatron()
    from megatron_klong.checks.verify import verify

    ids = _token_ids(prompt) if prompt is not None else None
    with progress("comparing") as on_bytes:
        result = verify(one, two, prompt=ids, generate=generate, weights_only=weights_only, on_bytes=on_bytes)
    if as_json:
        print_json(result)
    else:
        _print_verification(result)
    if not result.passed:
        raise typer.Exit(1)


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--prompt {text!r}: write token ids with commas between, such as 5,17,3") from None


def _print_verification(result: Verification) -> None:
    weights = result.weights
    print(
        f"names and shapes: {weights.tensors} tensors, {weights.bytes:,} bytes, as the config wants in both"
    )
    if not weights.differences:
        print("bits: all the same")
    for each in weights.differences[:20]:
        print(f"bits: {each.name} differs by up to {each.largest:.3g} ({each.dtypes[0]}, {each.dtypes[1]})")
    if len(weights.differences) > 20:
        print(f"bits: {len(weights.differences) - 20} more tensors differ")
    for side, left in zip(("first", "second"), weights.left_out):
        for what, count in left.items():
            print(f"not looked at in the {side}: {count} tensors of {what}")
    if result.not_run:
        print(f"logits and tokens: not compared: {result.not_run}")
        return
    assert result.by is not None and result.tokens is not None
    print(
        f"logits ({result.by[0]} and {result.by[1]}, fp32): differ by up to {result.logits:.2g}, "
        f"standard deviation {result.scale:.2g}"
    )
    same = sum(a == b for a, b in zip(*result.tokens))
    print(f"greedy tokens: {same} of {len(result.tokens[0])} the same")


@contextmanager
def progress(doing: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes."""
    with byte_bar(doing) as bar:
        yield lambda done, total: bar(done, total, "")


def _print_conversion(report: ConversionReport, as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    left = "".join(f"; left out: {count} tensors of {what}" for what, count in report.left_out.items())
    print(f"{report.tensors} tensors, {report.bytes:,} bytes: {report.source} -> {report.target}{left}")
