"""``klong model``: what shapes there are, and what a shape comes to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_klong.cli.shared import AsJson, print_json, quiet
from megatron_klong.config import preset_file, preset_names

if TYPE_CHECKING:
    from megatron_klong.model.decoder import DecoderConfig
    from megatron_klong.model.parameters import ParameterCounts

app = typer.Typer(help="Shapes of models and their parameters.", no_args_is_help=True)


@dataclass(frozen=True)
class _Shown:
    """A model as printed."""

    name: str
    parameters: ParameterCounts
    shape: DecoderConfig


@app.command("list")
def list_presets(as_json: AsJson = False) -> None:
    """The shapes that come with this package, for `model.preset`."""
    shown = [_show(name) for name in preset_names()]
    if as_json:
        print_json(shown)
        return
    for each in shown:
        print(f"{each.name:<16} {each.shape.family:<10} {_parameters(each.parameters)}")


@app.command("show")
def show(
    model: Annotated[str, typer.Argument(help="Name of a preset, a config.json, or the folder of one.")],
    as_json: AsJson = False,
) -> None:
    """What a Hugging Face config comes to: the shape as it is understood, and exact parameter counts.

    Example: klong model show glm-4.5-air
    """
    shown = _show(model)
    if as_json:
        print_json(shown)
        return
    shape = shown.shape
    print(f"{shown.name}: {shape.family}, {_parameters(shown.parameters)}")
    print(
        f"{shape.num_hidden_layers} layers of {shape.hidden_size}, {shape.num_attention_heads} heads of "
        f"{shape.head_dim} with {shape.num_key_value_heads} for keys and values, {shape.vocab_size} tokens"
    )
    if shape.moe is not None:
        moe = shape.moe
        print(
            f"{sum(moe.layers)} layers with {moe.experts} experts of {moe.width}, {moe.top_k} for a token "
            f"({moe.scores})" + (f"; shared experts of {moe.shared_width}" if moe.shared_width else "")
        )


def _show(model: str) -> _Shown:
    quiet()
    from megatron_klong.model.hf_config import load_hf_config
    from megatron_klong.model.parameters import parameter_counts

    file = preset_file(model) if model in preset_names() else Path(model)
    shape = load_hf_config(file)
    return _Shown(model, parameter_counts(shape), shape)


def _parameters(counts: ParameterCounts) -> str:
    prediction = f", and {counts.prediction:,} of prediction layers" if counts.prediction else ""
    return f"{counts.total:,} parameters, {counts.active:,} active{prediction}"
