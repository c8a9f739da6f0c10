"""The trainer's settings of each way that weights can go."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

import torch
from vllm.distributed.weight_transfer.base import TrainerInitInfo, WeightSource

from megatron_klong.config import TransferBackend
from megatron_klong.inference.fleet import Fleet
from megatron_klong.inference.plugin import register
from megatron_klong.inference.wire import ServerError


def trainer_init_info(
    transfer: TransferBackend, rank: int, fleet: Fleet | None, source: WeightSource, chunk_bytes: int
) -> TrainerInitInfo:
    """Settings for this rank; collective, since only the sender can ask the servers their sizes.

    Args:
        transfer: the way; the servers must have been started with the same.
        rank: this rank.
        fleet: the servers, on the sender.
        source: the weights.
        chunk_bytes: memory of a chunk, for ``shm``.

    Raises:
        ValueError: ``ipc`` with several ranks.
        ServerError: a server did not say its size; on all ranks.
    """
    register()
    if transfer == "shm":
        from megatron_klong.inference.shm_engine import SharedMemoryTrainerInitInfo

        return SharedMemoryTrainerInitInfo(rank=rank, chunk_bytes=chunk_bytes)
    if transfer == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        if torch.distributed.get_world_size() > 1:
            # vLLM's engine meets all ranks at every chunk; a refused chunk would leave them waiting.
            raise ValueError("transfer=ipc is for a trainer of one rank; use nccl")
        # A tensor larger than the buffer would be refused: GLM-4.5-Air's embedding is 1.2 GB.
        largest = max(torch.Size(meta.shape).numel() * meta.dtype.itemsize for meta in source.metadata())
        return IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=max(chunk_bytes, largest))
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    meeting: list[tuple[str, int, int] | str] = [""]
    if fleet is not None:
        try:
            meeting = [_meeting(fleet)]
        except ServerError as error:
            meeting = [str(error)]  # the others wait for an answer
    torch.distributed.broadcast_object_list(meeting, 0)
    if isinstance(meeting[0], str):
        raise ServerError(meeting[0])
    address, port, world_size = meeting[0]
    return NCCLTrainerInitInfo(
        rank=rank, master_address=address, master_port=port, world_size=world_size, packed=True
    )


def _meeting(fleet: Fleet) -> tuple[str, int, int]:
    """Address, port and size of the process group of trainer and servers."""
    size = 1 + sum(fleet.world_sizes())
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = int(probe.getsockname()[1])
    return own_address([urlsplit(url).hostname or "" for url in fleet.urls]), port, size


def own_address(hosts: Sequence[str]) -> str:
    """This machine's address as others see it, whom its own name often does not tell: that is its loopback's.

    Args:
        hosts: the others; the loopback's address is given only if all of them are on this machine.
    """
    found = []
    for host in hosts:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # chooses an interface; nothing is sent
            found.append(str(probe.getsockname()[0]))
    return next((address for address in found if not address.startswith("127.")), found[0])
