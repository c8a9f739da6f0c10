"""Loaded into vLLM's workers in tests (``--worker-extension-cls``): takes the cure of CPU experts away."""

from __future__ import annotations


class Faults:
    """Methods that a test calls in the worker over vLLM's ``/collective_rpc``."""

    def take_the_cure_away(self) -> None:
        from megatron_klong.inference import shm_engine

        shm_engine.forget_kernels = lambda _model, _version: 0

    def bring_the_cure_back(self) -> None:
        from megatron_klong.inference import cpu_moe, shm_engine

        shm_engine.forget_kernels = cpu_moe.forget_kernels
