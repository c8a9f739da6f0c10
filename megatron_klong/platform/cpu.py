"""Makes Megatron-Core 0.16 run on a CPU with gloo.

Megatron-Core names CUDA in many places where any device would do. Everything that has to be
replaced for a machine without a GPU is in this one module, and nothing of it is active before
:func:`install` is called. None of Megatron's files is changed.

What is replaced, and why:

* ``torch.cuda.current_device`` answers ``torch.device("cpu")``: Megatron passes the answer as
  ``device=`` of new tensors.
* Streams, events and ``synchronize`` become no-ops: a CPU runs its work in order.
* The RNG calls of ``torch.cuda`` act on the CPU generator, and so do the copies that
  ``megatron.core.tensor_parallel.random`` keeps.
* ``Tensor.cuda`` and ``Tensor.record_stream`` return without effect.
* Factory functions (``torch.tensor``, ``torch.zeros``, ...) read ``device="cuda"`` as CPU.
* ``Tensor.type()`` answers ``torch.cuda.FloatTensor`` and so on: the distributed optimizer sorts
  parameters by that string.
* ``torch.distributed.all_to_all_single`` takes its split sizes as lists: on a CPU the MoE token
  dispatcher hands over tensors.
* ``te_general_gemm`` of the MoE utilities becomes ``None`` (it is undefined where Transformer
  Engine is absent).
* ``torch.compile`` gives functions back as they are: Megatron compiles a few of a few lines, which takes
  a compiler for C++ and seconds on every rank.
* Transformer Engine's state of FP8, which recomputing norms asks for (``recompute_modules`` with
  ``layernorm``), becomes one that says there is no FP8.

The module refuses to load where CUDA is usable, so that a GPU run can never meet it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch

from megatron_klong.platform.base import Platform

SUPPORTED_MEGATRON = "0.16."
"""Prefix of the megatron-core versions that these replacements were written and tested for."""

_FACTORIES = ("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn")

_CPU = torch.device("cpu")


class NullStream:
    """Stands in for a CUDA stream or event: a CPU has one queue, so there is nothing to order."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        pass

    def __enter__(self) -> NullStream:
        return self

    def __exit__(self, *_exc: object) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NullStream)

    __hash__ = object.__hash__

    def wait_stream(self, _stream: object) -> None:
        pass

    def wait_event(self, _event: object) -> None:
        pass

    def record_event(self, *_args: object) -> NullStream:
        return self

    def record(self, *_args: object) -> None:
        pass

    def wait(self, *_args: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


def install() -> Platform:
    """Replace the CUDA calls that Megatron-Core makes; may be called again without effect.

    Raises:
        RuntimeError: CUDA is usable here, or megatron-core is of a version that this module was
            not written for.
    """
    _refuse_unfit()
    if not getattr(torch.cuda, "_klong_cpu", False):
        # Not by the environment: torch reads it when it is imported, which Megatron has done by now.
        torch.compiler.set_stance("force_eager")
        _replace_devices_and_streams()
        _replace_rng()
        _replace_tensor_methods()
        _replace_factories()
        _replace_all_to_all()
        _define_missing_gemm()
        _define_missing_fp8()
        torch.cuda._klong_cpu = True  # type: ignore[attr-defined]
    return Platform(name="cpu", device=_CPU, backend="gloo")


def _refuse_unfit() -> None:
    if torch.cuda.is_available() or torch.cuda.is_initialized():
        raise RuntimeError(
            "platform.cpu replaces torch.cuda functions and must not load where CUDA is in use; "
            "use platform.cuda, or hide the GPUs with CUDA_VISIBLE_DEVICES= for a CPU run"
        )
    version = importlib.metadata.version("megatron-core")
    if not version.startswith(SUPPORTED_MEGATRON):
        raise RuntimeError(
            f"platform.cpu is written for megatron-core {SUPPORTED_MEGATRON}* and found {version}; "
            "install a supported version or port the replacements in megatron_klong/platform/cpu.py"
        )


def _replace_devices_and_streams() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.Stream = cuda.Event = NullStream
    cuda.stream = lambda stream: NullStream()
    cuda.current_stream = cuda.default_stream = lambda *args: NullStream()
    cuda.synchronize = cuda.empty_cache = lambda *args: None


def _replace_rng() -> None:
    cuda: Any = torch.cuda
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed

    from megatron.core.tensor_parallel import random as megatron_random

    # It warns when work under the "GPU" generator moves the CPU's; here they are one and the same.
    megatron_random.logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _replace_tensor_methods() -> None:
    tensor: Any = torch.Tensor
    original_type = tensor.type

    def type_as_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    tensor.type = type_as_cuda
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.record_stream = lambda self, stream: None


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def build(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is not None and torch.device(device).type == "cuda":
            device = _CPU
        return factory(*args, device=device, **kwargs)

    return build


def _replace_factories() -> None:
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _replace_all_to_all() -> None:
    original = torch.distributed.all_to_all_single

    def as_list(sizes: Any) -> list[int] | None:
        return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes

    @functools.wraps(original)
    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        splits = as_list(output_split_sizes), as_list(input_split_sizes)
        return original(output, input, *splits, group=group, async_op=async_op)

    torch.distributed.all_to_all_single = all_to_all_single


def _define_missing_gemm() -> None:
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


class NoFp8:
    """Stands in for Transformer Engine's ``FP8GlobalStateManager``."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def _define_missing_fp8() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    if not hasattr(megatron_random, "FP8GlobalStateManager"):
        megatron_random.FP8GlobalStateManager = NoFp8
        for name in ("activation_recompute_forward", "fp8_autocast"):
            setattr(megatron_random, name, lambda *args, **kwargs: contextlib.nullcontext())
