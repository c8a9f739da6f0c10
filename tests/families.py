"""Tiny models of every family in transformers: losses and gradients under Hugging Face names."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Qwen3Config, Qwen3MoeConfig
from transformers.modeling_layers import MtpLayer
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeDecoderLayer, Glm4MoeRMSNorm

from megatron_klong.model.weights import by_global_name
from megatron_klong.training.trainer import Trainer
from tests import reference

_QWEN = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
_QWEN_MOE = _QWEN | {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 3}

CONFIGS = {
    "glm": Glm4MoeConfig(**reference.SHAPE),
    "glm-qk-norm": Glm4MoeConfig(**reference.SHAPE | {"use_qk_norm": True, "attention_bias": False}),
    "glm-prediction": Glm4MoeConfig(**reference.SHAPE | {"num_mtp_layers": 1}),
    "qwen3-moe": Qwen3MoeConfig(**_QWEN_MOE, norm_topk_prob=True),
    "qwen3-moe-unnormalized": Qwen3MoeConfig(**_QWEN_MOE, norm_topk_prob=False, mlp_only_layers=[1]),
    "qwen3": Qwen3Config(**_QWEN),
    "qwen3-tied": Qwen3Config(**_QWEN, tie_word_embeddings=True),
}

PREDICTION_LOSS_WEIGHT = 0.3


class ReferenceModel:
    """A model of transformers in fp32 with its prediction layer; no bias and no norm at a trivial value."""

    def __init__(self, name: str) -> None:
        config = copy.deepcopy(CONFIGS[name])
        config._attn_implementation = "eager"
        torch.manual_seed(5)
        self.model = AutoModelForCausalLM.from_config(config).float()
        self.prediction: MtpLayer | None = None
        if getattr(config, "num_nextn_predict_layers", 0):
            self.prediction = MtpLayer(config, Glm4MoeDecoderLayer, Glm4MoeRMSNorm, config.num_hidden_layers)
        with torch.no_grad():
            for key, tensor in self._tensors().items():
                if "norm" in key:
                    tensor.normal_(1, 0.1)
                elif "bias" in key:
                    tensor.normal_(0, 0.1)
                elif "inv_freq" not in key:
                    tensor.normal_(0, 0.05)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        if self.prediction is not None:
            tensors |= {f"mtp.{key}": tensor for key, tensor in self.prediction.named_parameters()}
            tensors |= {f"mtp.{key}": tensor for key, tensor in self.prediction.named_buffers()}
        return tensors

    def save(self, folder: Path) -> Path:
        """As a published checkpoint: experts one by one, the prediction layer with its copies."""
        self.model.save_pretrained(folder)
        if self.prediction is None:
            return folder
        tensors = load_file(folder / "model.safetensors")
        extra = {key: tensor for key, tensor in self._tensors().items() if key.startswith("mtp.")}
        tensors |= {key: tensor.detach().clone() for key, tensor in self._published(extra).items()}
        layer = f"model.layers.{self.model.config.num_hidden_layers}"
        tensors[f"{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{layer}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        raw = json.loads((folder / "config.json").read_text())
        raw["num_nextn_predict_layers"] = 1
        (folder / "config.json").write_text(json.dumps(raw))
        return folder

    def loss(self) -> Tensor:
        """Mean over the trained tokens of the batch, and the weighted loss of the prediction layer."""
        total, predicted, count = torch.zeros(()), torch.zeros(()), 0
        for samples in reference.batch():
            for sample in samples:
                tokens = torch.from_numpy(sample.tokens_T)
                mask = torch.from_numpy(sample.loss_mask_T)
                states = self.model.model(tokens[None]).last_hidden_state
                total = total + _masked(self.model.lm_head(states)[0], tokens, mask, 1)
                count += int(mask[1:].sum())
                if self.prediction is not None and len(tokens) > 2:
                    predicted = predicted + _masked(self._predict(tokens, states), tokens, mask, 2)
        return (total + PREDICTION_LOSS_WEIGHT * predicted) / count

    def _predict(self, tokens: Tensor, states: Tensor) -> Tensor:
        """Logits of the token after the next one, from transformers' own prediction layer."""
        assert self.prediction is not None
        length = len(tokens) - 1  # the last place has no next token to look at
        embedded = self.model.model.embed_tokens(tokens[None, 1:])
        places = torch.arange(length)[None]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        output = self.prediction(
            embedded, states[:, :length], self.model.model.rotary_emb(embedded, places), mask, places, None
        )
        return self.model.lm_head(output)[0]

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """The loss, and its gradients under published names, experts one by one."""
        loss = self.loss()
        loss.backward()
        found = {key: tensor.grad for key, tensor in self._tensors().items() if tensor.requires_grad}
        return float(loss.detach()), self._published(
            {k: grad for k, grad in found.items() if grad is not None}
        )

    def _published(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            name = _prediction_name(key, self.model.config.num_hidden_layers)
            experts, _, kind = name.rpartition(".")
            if kind == "gate_up_proj" and tensor.dim() == 3:
                for number, both in enumerate(tensor):
                    gate, up = both.chunk(2)
                    named[f"{experts}.{number}.gate_proj.weight"] = gate
                    named[f"{experts}.{number}.up_proj.weight"] = up
            elif kind == "down_proj" and tensor.dim() == 3:
                named |= {f"{experts}.{number}.down_proj.weight": one for number, one in enumerate(tensor)}
            else:
                named[name] = tensor
        return named


def _prediction_name(key: str, layers: int) -> str:
    if not key.startswith("mtp."):
        return key
    rest = key.removeprefix("mtp.").removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
    return f"model.layers.{layers}.{rest}"


def _masked(logits: Tensor, tokens: Tensor, mask: Tensor, ahead: int) -> Tensor:
    """Sum of the losses of predicting ``ahead`` places further, where that token is trained."""
    targets, trained = tokens[ahead:], mask[ahead:]
    losses = torch.nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="none")
    return losses[trained].sum()


def changed(settings: Any, **model: Any) -> Any:
    """Trainer settings with other fields of their model."""
    return settings.model_copy(update={"model": settings.model.model_copy(update=model)})


def rank_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """The gradient buffers of a rank's parameters, by the map's names."""
    model = trainer.model
    return by_global_name(model, {name: each.main_grad for name, each in model.named_parameters()})
