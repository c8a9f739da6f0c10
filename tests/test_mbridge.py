"""The weight map against mbridge, a converter of other people (https://github.com/ISEEKYAN/mbridge).

Its models need Transformer Engine, so its names and joins are asked one by one, for the names that
Transformer Engine's layers have.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mbridge.models.glm4moe import GLM4MoEBridge
from mbridge.models.qwen3 import Qwen3Bridge
from mbridge.models.qwen3moe import Qwen3MoEBridge
from safetensors.torch import load_file

from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.model.weight_map import weight_rules
from megatron_klong.model.weights import canonical_name
from tests.families import CONFIGS, ReferenceModel

BRIDGES = {"glm-prediction": GLM4MoEBridge, "qwen3-moe": Qwen3MoEBridge, "qwen3": Qwen3Bridge}


def engine_name(name: str, is_moe: bool) -> str:
    """What Transformer Engine's layers call a parameter of the map."""
    name = name.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight")
    if not is_moe:
        name = name.replace(".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight")
    return re.sub(r"local_experts\.(\d+)\.(linear_fc\d)\.weight", r"\2.weight\1", name)


@pytest.mark.parametrize("family", BRIDGES)
def test_mbridge_makes_the_same_tensors(family: str, tmp_path: Path) -> None:
    folder = ReferenceModel(family).save(tmp_path)
    published = load_file(folder / "model.safetensors")
    # Its constructor asks for process groups and a GPU; what is asked here needs neither.
    bridge = BRIDGES[family].__new__(BRIDGES[family])
    bridge.hf_config, bridge.dtype, bridge.make_vocab_size_divisible_by = CONFIGS[family], torch.float32, None
    bridge.config = SimpleNamespace(num_layers=CONFIGS[family].num_hidden_layers)
    config = load_hf_config(folder)
    checked = set()
    for rule in weight_rules(config).values():
        layer = re.search(r"layers\.(\d+)\.", rule.hf[0].name)
        name = engine_name(rule.megatron, layer is not None and config.is_moe_layer(int(layer[1])))
        assert canonical_name(name) == rule.megatron
        names = bridge._weight_name_mapping_mcore_to_hf(name)
        assert names == [part.name for part in rule.hf]
        theirs = bridge._weight_to_mcore_format(name, [published[part] for part in names])
        ours = rule.join.join([published[part.name] for part in rule.hf])
        assert torch.equal(ours, theirs), name
        checked |= set(names)
    copies = {copy.name for rule in weight_rules(config).values() for copy in rule.copies}
    assert checked == published.keys() - copies
