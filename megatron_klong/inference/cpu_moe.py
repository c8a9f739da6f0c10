"""The one change to vLLM itself: its CPU mixture-of-experts must repack weights at every reload.

vLLM 0.31 and 0.32 on CPU run experts on a repacked copy of their weights, which is made only while
the layer has no kernel. A reload fills the parameters and leaves the copy as it was: the server then
answers from old (or unpacked) experts without any error. Taking the kernel away before a reload
makes vLLM build it anew. On a GPU nothing is repacked, and captured graphs need the kernel to stay.
"""

from __future__ import annotations

from typing import Any

from torch import nn

PATCHED_VERSIONS = ("0.31.", "0.32.")


def forget_kernels(model: nn.Module, vllm_version: str) -> int:
    """Take the kernels of all expert layers away, so that the reload under way builds new ones.

    Returns:
        How many layers it was.

    Raises:
        RuntimeError: another vLLM than this was written for; look whether it still needs it.
    """
    if not vllm_version.startswith(PATCHED_VERSIONS):
        raise RuntimeError(
            f"vLLM {vllm_version}: the reload of CPU experts was examined for {PATCHED_VERSIONS} only; "
            "see megatron_klong/inference/cpu_moe.py"
        )
    methods: list[Any] = [getattr(module, "quant_method", None) for module in model.modules()]
    with_kernel = [method for method in methods if getattr(method, "moe_kernel", None) is not None]
    for method in with_kernel:
        method.moe_kernel = None
    return len(with_kernel)
