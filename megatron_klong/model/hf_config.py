"""The Hugging Face config of a model, read without transformers.

Every field of the file is either used, known to be without influence on training, or refused by
name: a field that this package silently ignored would give a model that is not the published one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megatron_klong.model.decoder import DecoderConfig
from megatron_klong.model.families import FAMILIES, Family

_WITHOUT_INFLUENCE = frozenset(
    {
        "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache",
        "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "max_position_embeddings",
        "_name_or_path", "output_attentions", "output_hidden_states", "return_dict", "rope_parameters",
    }
)  # fmt: skip

_MAY_BE_NULL = frozenset({"head_dim", "mlp_only_layers"})
"""Used fields for which null means the default."""


def config_json(path: Path) -> Path:
    """The file meant by itself or by its folder."""
    return path / "config.json" if path.is_dir() else path


def load_hf_config(path: Path) -> DecoderConfig:
    """Read ``config.json``, given as the file or the folder that holds it.

    Raises:
        ValueError: the file is missing, is of no known family, or has a field or value that this
            package does not implement; the message names it.
    """
    file = config_json(path)
    if not file.is_file():
        raise ValueError(f"{path}: no config.json here")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: is no JSON object")
    return parse_hf_config(raw, str(file))


def parse_hf_config(raw: dict[str, Any], origin: str) -> DecoderConfig:
    """The same from a parsed JSON object; ``origin`` names it in errors."""
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        raise ValueError(
            f"{origin}: model_type is {raw.get('model_type')!r}; known are {', '.join(map(repr, FAMILIES))}"
        )
    given = {name: value for name, value in raw.items() if value is not None and name not in family.renamed}
    for other, name in family.renamed.items():
        value = raw.get(other)
        if value is not None and given.setdefault(name, value) != value:
            raise ValueError(f"{origin}: {name}={given[name]!r} and {other}={value!r} contradict each other")
    given |= _rope_values(raw, origin)
    _refuse_unimplemented(family, given, origin)
    values = dict(family.defaults)
    values |= {name: value for name, value in given.items() if name in family.defaults}
    values |= {name: None for name in family.defaults.keys() - _MAY_BE_NULL if raw.get(name, 0) is None}
    for name in ("hidden_size", "num_attention_heads"):
        _check_type(family, name, values[name], origin)
    if "head_dim" not in given:
        derived = values["hidden_size"] // values["num_attention_heads"]
        values["head_dim"] = family.head_dim_default or derived
    for name, value in values.items():
        _check_type(family, name, value, origin)
    config = family.build(values)
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
    unknown = rope.keys() - {"rope_type", "rope_theta", "partial_rotary_factor"}
    if unknown:
        raise ValueError(f"{origin}: field 'rope_parameters.{min(unknown)}' is not known to this package")
    return {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}


def _check_type(family: Family, name: str, value: Any, origin: str) -> None:
    default = family.defaults[name]
    least = 0 if name in family.may_be_zero else 1
    if isinstance(default, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        wanted = f"an integer of at least {least}"
    elif isinstance(default, list):
        fits = isinstance(value, list) and all(type(item) is int for item in value)
        wanted = "a list of integers"
    else:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
        wanted = "a number above 0"
    if not fits:
        raise ValueError(f"{origin}: {name}={value!r} must be {wanted}")


def _refuse_unimplemented(family: Family, given: dict[str, Any], origin: str) -> None:
    for name, wanted in family.only.items():
        if given.get(name, wanted) != wanted:
            raise ValueError(f"{origin}: {name}={given[name]!r} is not implemented; only {wanted!r} is")
    known = family.defaults.keys() | family.only.keys() | family.ignored | _WITHOUT_INFLUENCE
    unknown = sorted(given.keys() - known)
    if unknown:
        raise ValueError(
            f"{origin}: field {unknown[0]!r} is not known to this package in a {family.model_type} model"
        )
    kinds = given.get("layer_types", [])
    other_layers = sorted(set(map(str, kinds if isinstance(kinds, list) else [kinds])) - {"full_attention"})
    if other_layers:
        raise ValueError(
            f"{origin}: layer_types has {other_layers[0]!r}; only 'full_attention' is implemented"
        )
    if given.get("attention_dropout"):
        raise ValueError(f"{origin}: attention_dropout={given['attention_dropout']} must be 0")


def _check_consistency(config: DecoderConfig, origin: str) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"{origin}: num_attention_heads={config.num_attention_heads} is no multiple of "
            f"num_key_value_heads={config.num_key_value_heads}"
        )
    if config.partial_rotary_factor > 1 or config.rotary_dim % 2 or not config.rotary_dim:
        raise ValueError(
            f"{origin}: head_dim={config.head_dim} with partial_rotary_factor="
            f"{config.partial_rotary_factor} rotates {config.rotary_dim} dimensions; an even number is needed"
        )
    moe = config.moe
    if moe is not None and not 2 <= moe.top_k <= moe.experts:
        raise ValueError(
            f"{origin}: num_experts_per_tok={moe.top_k} must be from 2 to the {moe.experts} experts"
        )
    if config.prediction_layers and config.tie_word_embeddings:
        raise ValueError(f"{origin}: prediction layers with tie_word_embeddings=true are not implemented")
