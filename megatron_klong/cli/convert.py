"""``klong convert``: checkpoints from and to Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_klong.cli.shared import AsJson, counter, print_json, quiet

if TYPE_CHECKING:
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
    quiet()
    from megatron_klong.convert.exporting import export_checkpoint

    with counter("exporting", "tensors") as tick:
        report = export_checkpoint(
            megatron_dir, hf_dir, hf_config=hf_config, tokenizer=tokenizer,
            layout="fused" if fused else "per-expert", on_tensor=tick,
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
    quiet()
    from megatron_klong.convert.importing import import_checkpoint

    with counter("importing", "tensors") as tick:
        report = import_checkpoint(hf_dir, megatron_dir, on_tensor=tick)
    _print_conversion(report, as_json)


def _print_conversion(report: ConversionReport, as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    left = "".join(f"; left out: {count} tensors of {what}" for what, count in report.left_out.items())
    print(f"{report.tensors} tensors, {report.bytes:,} bytes: {report.source} -> {report.target}{left}")
