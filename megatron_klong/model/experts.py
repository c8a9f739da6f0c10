"""The experts of a layer as two stacked matrices, multiplied group by group by torch alone."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import grouped_mm, silu


class StackedWeight(torch.nn.Module):
    """``weight [experts, out, in]``: the linear layers of all experts on this rank."""

    def __init__(self, config: TransformerConfig, experts: int, rows: int, columns: int) -> None:
        super().__init__()
        # Without values: they come from a checkpoint, or from the weight map's generators.
        self.weight = torch.nn.Parameter(
            torch.empty(
                experts, rows, columns, dtype=config.params_dtype, device=torch.cuda.current_device()
            )
        )  # fmt: skip
        # No rank holds a copy of it for tensor parallelism: all count in the gradient norm.
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, tokens_TI: Tensor, ends_E: Tensor) -> Tensor:
        """``[T, in]`` to ``[T, out]``; the tokens of expert e end before ``ends_E[e]``."""
        return _Contiguous.apply(grouped_mm(tokens_TI, self.weight.transpose(1, 2), offs=ends_E))


class _Contiguous(torch.autograd.Function):
    """Nothing forward; backward, what :func:`grouped_mm` asks of its gradient."""

    @staticmethod
    def forward(_context: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


class GroupedExperts(MegatronModule):
    """Takes the place of Megatron's ``SequentialMLP``, which runs one expert after the other.

    A layer has two parameters and not two for each expert. In checkpoints it looks like Megatron's own:
    ``experts.experts.linear_fc1.weight``, all experts of the model along the first dimension.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None and config.gated_linear_unit and not config.add_bias_linear
        assert config.activation_func is silu, "the families so far have SwiGLU"
        hidden, width = config.hidden_size, config.moe_ffn_hidden_size
        self._expert_group, self._data_group = pg_collection.ep, pg_collection.expt_dp
        self._local = num_local_experts
        self.linear_fc1 = StackedWeight(config, num_local_experts, 2 * width, hidden)
        self.linear_fc2 = StackedWeight(config, num_local_experts, hidden, width)
        self._register_load_state_dict_pre_hook(_drop_extra_states)

    def forward(self, tokens_TH: Tensor, tokens_per_expert: Tensor, weights_T: Tensor) -> tuple[Tensor, None]:
        """Tokens sorted by expert, and the router's weight of each, to the weighted outputs ``[T, H]``."""
        ends_E = tokens_per_expert.to(tokens_TH.device).cumsum(0).to(torch.int32)
        gate, up = self.linear_fc1(tokens_TH, ends_E).chunk(2, dim=-1)
        inner = (silu(gate) * up * weights_T.unsqueeze(-1)).to(tokens_TH.dtype)
        return self.linear_fc2(inner, ends_E), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The keys of Megatron's own experts, with the empty objects that they keep beside their weights."""
        assert not sharded_offsets, "the layer's number is in the prefix"
        rank, ways = self._expert_group.rank(), self._expert_group.size()
        replica = (0, 0, self._data_group.rank())
        state: dict[str, Any] = {}
        for name in ("linear_fc1", "linear_fc2"):
            key, weight = f"{prefix}experts.{name}", getattr(self, name).weight
            state[f"{prefix}{name}.weight"] = ShardedTensor.from_rank_offsets(
                f"{key}.weight", weight, (0, rank, ways), replica_id=replica
            )
            for local in range(self._local):
                place = (rank * self._local + local,)
                state[f"{prefix}{name}._extra_state{local}"] = ShardedObject(
                    f"{key}._extra_state", None, (ways * self._local,), place, replica
                )
        return state


def _drop_extra_states(state: dict[str, Any], prefix: str, *_others: Any) -> None:
    for name in [name for name in state if name.startswith(prefix) and "._extra_state" in name]:
        del state[name]
