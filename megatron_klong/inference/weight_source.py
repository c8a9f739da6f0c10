"""The trainer's weights under their Hugging Face names, gathered over TP, PP and EP one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from megatron_klong.model.decoder import DecoderConfig
from megatron_klong.model.row_model import RankModel
from megatron_klong.model.weight_map import Rule, is_prediction, put_shard, take_shard, weight_rules
from megatron_klong.model.weights import rank_tensors

SENDER = 0
"""The global rank that talks to the servers, as in all of vLLM's trainer-side engines."""


@dataclass(frozen=True)
class _Holding:
    """Who holds a Megatron tensor: the rank of each tensor-parallel share (one rank, if whole)."""

    ranks: tuple[int, ...]
    dtype: torch.dtype


class MegatronWeightSource(WeightSource):
    """vLLM's ``WeightSource`` over a model that is spread over ranks.

    All ranks construct it, and all iterate it, in the same order. Each share of a tensor goes
    straight from the rank that holds it to the sender, once; of data-parallel copies the lowest
    rank's is taken. At most one full Megatron tensor, one share and the parts it splits into are in
    memory beside the model.

    Args:
        model: of this rank; its tensors are read anew in every pass.
        config: the model's shape.
        everywhere: give every rank the full tensors, not only the sender, for an engine that sends
            from each rank's own GPU as vLLM's ``ipc`` does (so far used with one rank only).
            Otherwise the other ranks' tensors are empty.
    """

    def __init__(self, model: RankModel, config: DecoderConfig, *, everywhere: bool = False) -> None:
        self._rules = [rule for rule in weight_rules(config).values() if not is_prediction(rule)]
        self._own = rank_tensors(model)
        self._everywhere = everywhere
        self._tp_size = parallel_state.get_tensor_model_parallel_world_size()
        self._holdings = self._ask_all_ranks()
        self._next = 0
        self._sums: dict[str, int] = {}

    def metadata(self) -> list[ParamMeta]:
        """Name, data type and full shape of everything an iteration yields, in its order."""
        return [
            ParamMeta(part.name, self._holdings[rule.megatron].dtype, part.shape)
            for rule in self._rules
            for part in rule.hf
        ]

    def prepare(self) -> None:
        """Before a pass, collective: note what the ranks hold, to compare what arrives with it.

        Compared is the sum of all elements, read as integers: no order of gathering, joining or
        splitting changes it, and a value lost, doubled or altered does. (Values that changed places
        do not show; the probe is for that.) A probe alone could miss an expert that none of its
        tokens is sent to.

        Raises:
            RuntimeError: on all ranks, when one could not read its tensors.
        """
        rank = torch.distributed.get_rank()
        mine: dict[str, int] | str
        try:
            mine = {
                name: element_sum(tensor)
                for name, tensor in self._own.items()
                if rank in self._holdings[name].ranks
            }
        except RuntimeError as error:
            mine = f"rank {rank}: {error}"  # the others wait for an answer
        answers: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(answers, mine)
        for answer in answers:
            if isinstance(answer, str):
                raise RuntimeError(answer)
        self._sums = {
            rule.megatron: sum(
                answers[holder][rule.megatron] for holder in self._holdings[rule.megatron].ranks
            )
            for rule in self._rules
        }
        self._next = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """A pass over all tensors; collective. Tensors are valid until the next one is taken.

        Raises:
            RuntimeError: after :meth:`prepare`, a tensor is not what its ranks held then.
        """
        self._next = 0
        yield from self._rest()

    def drain(self) -> None:
        """Take part in what is left of a pass that was broken off on this rank alone.

        The other ranks go on with theirs; without a partner for each share they would wait.
        """
        self._sums = {}  # nothing of it is used
        for _ in self._rest():
            pass

    def _rest(self) -> Iterator[tuple[str, Tensor]]:
        while self._next < len(self._rules):
            rule = self._rules[self._next]
            full = self._gather(rule)
            self._next += 1
            if full is not None and self._sums and element_sum(full) != self._sums[rule.megatron]:
                raise RuntimeError(f"tensor {rule.megatron!r} did not arrive as its ranks hold it")
            if full is None:
                yield from ((part.name, torch.empty(0)) for part in rule.hf)
            else:
                parts = rule.join.split(full)
                yield from ((hf.name, part) for hf, part in zip(rule.hf, parts, strict=True))

    def _gather(self, rule: Rule) -> Tensor | None:
        """The full tensor on the sender (or everywhere), None on other ranks."""
        holding, rank = self._holdings[rule.megatron], torch.distributed.get_rank()
        own = self._own[rule.megatron].detach() if rule.megatron in self._own else None
        full: Tensor | None = None
        if rank == SENDER:
            full = self._collect(rule, holding, own)
        elif rank in holding.ranks:
            assert own is not None
            _pass_on(torch.distributed.isend, own.contiguous(), SENDER)
        if self._everywhere and torch.distributed.get_world_size() > 1:
            full = full if full is not None else self._empty(rule.shape, holding.dtype)
            torch.distributed.broadcast(full, SENDER)
        return full

    def _collect(self, rule: Rule, holding: _Holding, own: Tensor | None) -> Tensor:
        ways = len(holding.ranks)
        if holding.ranks == (SENDER,):
            assert own is not None
            return own
        full = self._empty(rule.shape, holding.dtype)
        if ways == 1:
            _pass_on(torch.distributed.irecv, full, holding.ranks[0])
            return full
        # All memory is taken before the first share is, so that want of it fails between tensors.
        shape = take_shard(rule.shard, torch.empty(rule.shape, device="meta"), 0, ways).shape
        arrived = self._empty(tuple(shape), holding.dtype)
        for share, holder in enumerate(holding.ranks):
            if holder == SENDER:
                assert own is not None
                put_shard(rule.shard, full, own, share, ways)
            else:
                _pass_on(torch.distributed.irecv, arrived, holder)
                put_shard(rule.shard, full, arrived, share, ways)
        return full

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        device = next(iter(self._own.values())).device
        return torch.empty(shape, dtype=dtype, device=device)

    def _ask_all_ranks(self) -> dict[str, _Holding]:
        share = parallel_state.get_tensor_model_parallel_rank()
        mine = {name: (share, tensor.dtype) for name, tensor in self._own.items()}
        answers: list[dict[str, tuple[int, torch.dtype]]] = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(answers, mine)
        return {rule.megatron: self._holding(rule, answers) for rule in self._rules}

    def _holding(self, rule: Rule, answers: list[dict[str, tuple[int, torch.dtype]]]) -> _Holding:
        held = [
            (*answer[rule.megatron], rank) for rank, answer in enumerate(answers) if rule.megatron in answer
        ]
        assert held, f"no rank holds {rule.megatron}"
        whole = take_shard(rule.shard, torch.empty(rule.shape, device="meta"), 0, self._tp_size).shape
        ways = 1 if tuple(whole) == rule.shape else self._tp_size
        if ways == 1:
            return _Holding((min(rank for _, _, rank in held),), held[0][1])
        ranks = tuple(min(rank for share, _, rank in held if share == way) for way in range(ways))
        return _Holding(ranks, held[0][1])


def _pass_on(way: Callable[..., Any], tensor: Tensor, peer: int) -> None:
    """Send or receive, and wait. As a batch of one: NCCL then takes the communicator that all ranks have, and
    makes none for this pair of ranks, which would keep its buffers for good."""
    for work in torch.distributed.batch_isend_irecv([torch.distributed.P2POp(way, tensor, peer)]):
        work.wait()


def element_sum(tensor: Tensor) -> int:
    """Sum of a tensor's elements, their bits read as signed integers; the same in any order."""
    kind = {4: torch.int32, 2: torch.int16}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(kind)
    if bits.is_cuda:
        # In pieces: torch makes a widened copy of what it sums.
        return sum(int(piece.sum(dtype=torch.int64)) for piece in bits.flatten().split(1 << 24))
    # torch widens integers on CPU at a tenth of numpy's speed
    return int(bits.numpy().sum(dtype=np.int64))
