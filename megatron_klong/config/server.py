"""Settings of a vLLM server."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_klong.config.base import StrictModel

TransferBackend = Literal["shm", "nccl", "ipc"]


class ServerConfig(StrictModel):
    """One vLLM server process, which generates token ids and takes new weights while it runs."""

    model: Path
    """Hugging Face folder: the config, and the weights it starts with."""

    host: str = "127.0.0.1"
    """Address to bind to. The server has routes that change its weights and asks nobody for a
    password: bind it to a network only where every machine on it is trusted."""

    address: str | None = None
    """By which others reach it, where that is not `host`: a server of several machines binds to 0.0.0.0 and
    is called by its node's name."""

    port: int = Field(default=0, ge=0, le=65535)
    """Port to bind to; 0 takes a free one."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of its weights and activations."""

    max_model_len: int = Field(gt=0)
    """Longest context, prompt and answer together."""

    max_num_seqs: int = Field(default=64, gt=0)
    """Requests generated at the same time."""

    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs that share the model."""

    devices: str | None = None
    """GPUs it may see, as in CUDA_VISIBLE_DEVICES, such as `0,1`. Default: all. If they are more than
    `tensor_parallel`, the servers of a machine share them out."""

    kv_cache_gib: int = Field(default=1, ge=1)
    """Memory for keys and values on a CPU machine, GiB."""

    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory that the server may take."""

    block_size: int = Field(default=32, gt=0)
    """Tokens of a cache block; vLLM's CPU attention wants a multiple of 32."""

    transfer: TransferBackend = "shm"
    """How new weights arrive: `shm` (shared memory of one machine), `nccl`, or `ipc` (one GPU)."""

    start_seconds: float = Field(default=600.0, gt=0)
    """How long loading may take."""

    extra_args: tuple[str, ...] = ()
    """Further arguments for vLLM's `serve`."""

    @model_validator(mode="after")
    def _all_workers_can_take_weights(self) -> ServerConfig:
        if self.transfer == "shm" and self.tensor_parallel > 1:
            raise ValueError(
                f"server.tensor_parallel={self.tensor_parallel} with server.transfer=shm: vLLM loses count "
                "of its workers' answers when several refuse an update; use nccl, or tensor_parallel 1"
            )
        return self
