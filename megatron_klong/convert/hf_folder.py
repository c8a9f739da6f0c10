"""A Hugging Face folder with safetensors, checked before it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_klong.convert.safetensors_file import DTYPES
from megatron_klong.convert.stored import stored_tensors
from megatron_klong.model.decoder import DecoderConfig
from megatron_klong.model.weight_map import HfTensor
from megatron_klong.model.weights import (
    WeightSource,
    file_weights,
    open_safetensors,
    unused_prediction,
)

_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


class HfFolder:
    """Names, shapes and data types of a folder's tensors, and the tensors one by one.

    Raises:
        ValueError: no safetensors, or a file that is missing, damaged or cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        files = open_safetensors(path)
        self._headers: dict[str, Any] = {name: file.get_slice(name) for name, file in files.items()}
        self.weights: WeightSource = file_weights(files, str(path))
        """The tensors by per-expert name, whichever way the folder holds experts."""

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a tensor, by its per-expert name."""
        kind = self._headers[self._held_as(name)].get_dtype()
        if kind not in _BY_NAME:
            raise ValueError(
                f"{self.path}: tensor {name!r} has data type {kind}, not one of {list(_BY_NAME)}"
            )
        return _BY_NAME[kind]

    def check(self, config: DecoderConfig) -> dict[str, int]:
        """Compare names and shapes with what the config wants; counts of what is left out.

        Raises:
            ValueError: names the first missing, misshapen or unknown tensor.
        """
        expected: dict[str, tuple[int, ...]] = {}
        copies: dict[str, HfTensor] = {}
        for stored in stored_tensors(config):
            copies |= {copy.name: stored.rules[0].hf[0] for copy in stored.copies}
            fused = stored.stacked and stored.hf_tensors("fused")[0].name in self._headers
            expected |= {
                part.name: part.shape for part in stored.hf_tensors("fused" if fused else "per-expert")
            }
        expected |= {name: copy.shape for name, copy in copies.items() if name in self._headers}
        for name, shape in expected.items():
            if name not in self._headers:
                raise ValueError(f"{self.path}: tensor {name!r} is missing")
            found = tuple(self._headers[name].get_shape())
            if found != shape:
                raise ValueError(f"{self.path}: tensor {name!r} has shape {found}, the config wants {shape}")
        others = self._headers.keys() - expected.keys()
        prediction = unused_prediction(others, config)
        if others - prediction:
            raise ValueError(
                f"{self.path}: tensor {min(others - prediction)!r} is none of the config's model"
            )
        for name, original in copies.items():
            if name in self._headers and not self._equal(name, original.name):
                raise ValueError(
                    f"{self.path}: tensor {name!r} differs from {original.name!r}, which the model uses in "
                    "its place"
                )
        return {"multi-token prediction layers": len(prediction)} if prediction else {}

    def _equal(self, name: str, other: str) -> bool:
        """Whether two tensors have the same bits, looked at in pieces."""
        one, two = self._headers[name], self._headers[other]
        if one.get_dtype() != two.get_dtype():
            return False
        rows = one.get_shape()[0]
        bounds = range(0, rows, 4096)
        return all(bitwise_equal(one[at : at + 4096], two[at : at + 4096]) for at in bounds)

    def _held_as(self, name: str) -> str:
        if name in self._headers:
            return name
        layer, _, rest = name.partition(".experts.")
        return f"{layer}.experts.{'down_proj' if '.down_proj.' in rest else 'gate_up_proj'}"


def bitwise_equal(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors of one shape and type have the same bits (NaNs too)."""
    return torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))
