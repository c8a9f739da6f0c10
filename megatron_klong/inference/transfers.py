"""The trainer's settings of each way that weights can go."""

from __future__ import annotations

import socket

import torch
from vllm.distributed.weight_transfer.base import TrainerInitInfo

from megatron_klong.config import TransferBackend
from megatron_klong.inference.fleet import Fleet
from megatron_klong.inference.plugin import register


def trainer_init_info(
    transfer: TransferBackend, rank: int, fleet: Fleet | None, chunk_bytes: int
) -> TrainerInitInfo:
    """Settings for this rank; collective, since only the sender can ask the servers their sizes.

    Args:
        transfer: the way; the servers must have been started with the same.
        rank: this rank.
        fleet: the servers, on the sender.
        chunk_bytes: memory of a chunk, for ``shm``.
    """
    register()
    if transfer == "shm":
        from megatron_klong.inference.shm_engine import SharedMemoryTrainerInitInfo

        return SharedMemoryTrainerInitInfo(rank=rank, chunk_bytes=chunk_bytes)
    if transfer == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(rank=rank, packed=True)
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    meeting = [("", 0, 0)]
    if fleet is not None:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        address = socket.gethostbyname(socket.gethostname())
        meeting = [(address, port, 1 + sum(fleet.world_sizes()))]
    torch.distributed.broadcast_object_list(meeting, 0)
    address, port, world_size = meeting[0]
    return NCCLTrainerInitInfo(
        rank=rank, master_address=address, master_port=port, world_size=world_size, packed=True
    )
