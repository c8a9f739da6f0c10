"""Counted operations against those that torch counts while a published model runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_klong.model.flops import Work, training_flops
from megatron_klong.model.hf_config import load_hf_config
from tests.families import ReferenceModel

TOKENS = 24


@pytest.mark.parametrize("name", ["glm", "qwen3-moe", "qwen3"])
def test_products_are_those_of_the_published_model(name: str, tmp_path: Path) -> None:
    """torch counts whole squares of attention, and the head for every token; both are told to the formula."""
    reference = ReferenceModel(name)
    folder = reference.save(tmp_path / "hf")
    config = load_hf_config(folder)
    model = reference.model
    model.config._experts_implementation = "eager"  # one after the other: torch does not count grouped ones
    tokens = torch.randint(0, config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        loss = model(tokens, labels=tokens).loss
        loss.backward()
    work = Work(tokens=TOKENS, attended_pairs=TOKENS**2, trained_tokens=TOKENS)
    assert counter.get_total_flops() == pytest.approx(training_flops(config, work), rel=1e-3)


def test_prediction_layers_by_hand(tmp_path: Path) -> None:
    """A layer like the last one, the product that joins two states, and the head again."""
    config = load_hf_config(ReferenceModel("glm-prediction").save(tmp_path / "hf"))
    assert config.prediction_layers == 1
    work = Work(tokens=100, attended_pairs=3000, trained_tokens=40)
    extra = training_flops(config, work, prediction=True) - training_flops(config, work)
    one, two = (replace(config, num_hidden_layers=config.num_hidden_layers - less) for less in (1, 0))
    layer = training_flops(two, work) - training_flops(one, work)
    head = 3 * 2 * 40 * config.hidden_size * config.vocab_size
    assert extra == layer + head + 3 * 2 * 100 * 2 * config.hidden_size**2


def test_work_that_is_not_needed_is_not_counted(tmp_path: Path) -> None:
    config = load_hf_config(ReferenceModel("glm-prediction").save(tmp_path / "hf"))
    full = training_flops(config, Work(100, 5050, 100))
    assert (
        full - training_flops(config, Work(100, 5050, 10))
        == 3 * 2 * 90 * config.hidden_size * config.vocab_size
    )
    pair = 3 * 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    assert full - training_flops(config, Work(100, 5000, 100)) == 50 * pair
