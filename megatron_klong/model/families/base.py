"""What a family says of its Hugging Face config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_klong.model.decoder import DecoderConfig

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """How one family's ``config.json`` is read.

    A field that the file leaves out has the default of transformers, which leaves out what equals it.

    Attributes:
        model_type, architecture: as in the file.
        defaults: the fields that are used, with their defaults, whose types the values must have.
        only: fields that are implemented with one value, with that value.
        ignored: fields without influence on training, beside those of every model.
        renamed: other names of fields.
        may_be_zero: integer fields that need not be positive.
        head_dim_default: of a file without ``head_dim``; None: hidden size / heads.
        build: the decoder, from the values of all fields in ``defaults``.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    only: Mapping[str, Any]
    build: Callable[[Values], DecoderConfig]
    ignored: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = field(default_factory=dict)
    may_be_zero: frozenset[str] = frozenset()
    head_dim_default: int | None = None


def decoder_values(values: Values) -> dict[str, Any]:
    """The fields that have the same name and meaning in all families."""
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta",
        "tie_word_embeddings", "initializer_range",
    )  # fmt: skip
    return {name: values[name] for name in names}
