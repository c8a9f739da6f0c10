"""What vLLM loads in each of its processes (entry point ``vllm.general_plugins``)."""

from __future__ import annotations


def register() -> None:
    """Make the shared-memory transfer known to vLLM; vLLM calls this more than once per process."""
    from vllm.distributed.weight_transfer.factory import (
        WeightTransferEngineFactory,
        WeightTransferTrainerFactory,
    )

    for factory, name in (
        (WeightTransferEngineFactory, "SharedMemoryEngine"),
        (WeightTransferTrainerFactory, "SharedMemoryTrainerEngine"),
    ):
        if "shm" not in factory._registry:
            factory.register_engine("shm", "megatron_klong.inference.shm_engine", name)
