"""A Hugging Face folder with safetensors, checked before it is read."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_klong.convert.stored import stored_tensors
from megatron_klong.model.decoder import DecoderConfig
from megatron_klong.model.weights import WeightSource, safetensors_weights

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class HfFolder:
    """Names, shapes and data types of a folder's tensors, and the tensors one by one.

    Raises:
        ValueError: no safetensors, or a file that is damaged or cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._headers: dict[str, Any] = {}
        for file in sorted(path.glob("*.safetensors")):
            try:
                opened = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{file}: damaged or cut short: {error}") from error
            self._headers |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        if not self._headers:
            raise ValueError(f"{path}: no *.safetensors here")

    @cached_property
    def weights(self) -> WeightSource:
        """The tensors by per-expert name, whichever way the folder holds experts."""
        return safetensors_weights(self.path)

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a tensor, by its per-expert name."""
        kind = self._headers[self._held_as(name)].get_dtype()
        if kind not in _DTYPES:
            raise ValueError(f"{self.path}: tensor {name!r} has data type {kind}, not one of {list(_DTYPES)}")
        return _DTYPES[kind]

    def check(self, config: DecoderConfig) -> dict[str, int]:
        """Compare names and shapes with what the config wants; counts of what is left out.

        Raises:
            ValueError: names the first missing, misshapen or unknown tensor.
        """
        expected: dict[str, tuple[int, ...]] = {}
        for stored in stored_tensors(config):
            fused = stored.stacked and stored.hf_tensors("fused")[0].name in self._headers
            expected |= {
                part.name: part.shape for part in stored.hf_tensors("fused" if fused else "per-expert")
            }
        for name, shape in expected.items():
            if name not in self._headers:
                raise ValueError(f"{self.path}: tensor {name!r} is missing")
            found = tuple(self._headers[name].get_shape())
            if found != shape:
                raise ValueError(f"{self.path}: tensor {name!r} has shape {found}, the config wants {shape}")
        others = self._headers.keys() - expected.keys()
        prediction = {name for name in others if _is_prediction_layer(name, config)}
        if others - prediction:
            raise ValueError(
                f"{self.path}: tensor {min(others - prediction)!r} is none of the config's model"
            )
        return {"multi-token prediction layers": len(prediction)} if prediction else {}

    def _held_as(self, name: str) -> str:
        if name in self._headers:
            return name
        layer, _, rest = name.partition(".experts.")
        return f"{layer}.experts.{'down_proj' if '.down_proj.' in rest else 'gate_up_proj'}"


def _is_prediction_layer(name: str, config: DecoderConfig) -> bool:
    match = _LAYER.match(name)
    return match is not None and int(match[1]) >= config.num_hidden_layers
