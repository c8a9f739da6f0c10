"""The Hugging Face config of a GLM-4.5-MoE model, read without transformers.

Every field of the file is either used, known to be without influence on training, or refused by
name: a field that this package silently ignored would give a model that is not the published one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

_WITHOUT_INFLUENCE = frozenset(
    {
        "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache",
        "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "max_position_embeddings",
        "_name_or_path", "output_attentions", "output_hidden_states", "return_dict",
    }
)  # fmt: skip

_MAY_BE_ZERO = frozenset({"n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"})

_REQUIRED_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "use_qk_norm": False,
    "tie_word_embeddings": False,
    "rope_scaling": None,
}
"""Fields that this model accepts with one value only, until the others are implemented."""


@dataclass(frozen=True, kw_only=True)
class Glm4MoeConfig:
    """Shape of a GLM-4.5-MoE decoder, field names as in the Hugging Face config (design, 4).

    A field that the file leaves out has the default of transformers' ``Glm4MoeConfig``, since
    transformers leaves out what equals its default.
    """

    vocab_size: int = 151552
    hidden_size: int = 4096
    intermediate_size: int = 10944
    num_hidden_layers: int = 46
    num_attention_heads: int = 96
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    partial_rotary_factor: float = 0.5
    attention_bias: bool = False
    moe_intermediate_size: int = 1408
    n_routed_experts: int = 128
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    first_k_dense_replace: int = 1
    routed_scaling_factor: float = 1.0
    initializer_range: float = 0.02
    num_nextn_predict_layers: int = 1

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer ``layer`` (0-based) has routed experts; the first ones are dense."""
        return layer >= self.first_k_dense_replace


def config_json(path: Path) -> Path:
    """The file meant by itself or by its folder."""
    return path / "config.json" if path.is_dir() else path


def load_hf_config(path: Path) -> Glm4MoeConfig:
    """Read ``config.json``, given as the file or the folder that holds it.

    Raises:
        ValueError: the file is missing, is not GLM-4.5-MoE, or has a field or value that this
            package does not implement; the message names it.
    """
    file = config_json(path)
    if not file.is_file():
        raise ValueError(f"model.hf_config: no config.json at {path}")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model.hf_config: {file} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"model.hf_config: {file} is no JSON object")
    return parse_hf_config(raw, str(file))


def parse_hf_config(raw: dict[str, Any], origin: str) -> Glm4MoeConfig:
    """The same from a parsed JSON object; ``origin`` names it in errors."""
    if raw.get("model_type") != "glm4_moe":
        raise ValueError(
            f"{origin}: model_type is {raw.get('model_type')!r}; the only family so far is 'glm4_moe'"
        )
    values = {**raw, **_rope_values(raw, origin)}
    if "num_mtp_layers" in values:
        values.setdefault("num_nextn_predict_layers", values.pop("num_mtp_layers"))
    if "head_dim" not in values and {"hidden_size", "num_attention_heads"} <= values.keys():
        for name in ("hidden_size", "num_attention_heads"):
            _check_type(name, values[name], origin)
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    _refuse_unimplemented(values, origin)
    names = [field.name for field in fields(Glm4MoeConfig) if field.name in values]
    for name in names:
        _check_type(name, values[name], origin)
    config = Glm4MoeConfig(**{name: values[name] for name in names})
    _check_consistency(config, origin)
    return config


def _rope_values(raw: dict[str, Any], origin: str) -> dict[str, Any]:
    """RoPE fields from either layout: flat (transformers 4) or ``rope_parameters`` (5)."""
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{origin}: rope_parameters={rope!r} is no JSON object")
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"{origin}: rope_parameters.rope_type={kind!r} is not implemented")
    return {
        "rope_theta": rope.get("rope_theta", raw.get("rope_theta", 1e6)),
        "partial_rotary_factor": rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 0.5)),
    }


def _check_type(name: str, value: Any, origin: str) -> None:
    default = getattr(Glm4MoeConfig, name)
    least = 0 if name in _MAY_BE_ZERO else 1
    if isinstance(default, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        wanted = f"an integer of at least {least}"
    else:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        wanted = "a number above 0"
    if not fits:
        raise ValueError(f"{origin}: {name}={value!r} must be {wanted}")


def _refuse_unimplemented(values: dict[str, Any], origin: str) -> None:
    for name, wanted in _REQUIRED_VALUES.items():
        if values.get(name, wanted) != wanted:
            raise ValueError(f"{origin}: {name}={values[name]!r} is not implemented; only {wanted!r} is")
    known = {field.name for field in fields(Glm4MoeConfig)}
    known |= _WITHOUT_INFLUENCE | _REQUIRED_VALUES.keys() | {"rope_parameters"}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ValueError(f"{origin}: field {unknown[0]!r} is not known to this package")
    if values.get("attention_dropout"):
        raise ValueError(f"{origin}: attention_dropout={values['attention_dropout']} must be 0")


def _check_consistency(config: Glm4MoeConfig, origin: str) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"{origin}: num_attention_heads={config.num_attention_heads} is no multiple of "
            f"num_key_value_heads={config.num_key_value_heads}"
        )
    if not 2 <= config.num_experts_per_tok <= config.n_routed_experts:
        raise ValueError(
            f"{origin}: num_experts_per_tok={config.num_experts_per_tok} must be from 2 to "
            f"n_routed_experts={config.n_routed_experts}"
        )
    if config.num_nextn_predict_layers:
        raise ValueError(
            f"{origin}: num_nextn_predict_layers={config.num_nextn_predict_layers}: multi-token "
            "prediction layers are not trained yet; set it to 0 to leave them out"
        )
