"""The model against transformers, and every layout against one rank, on real Megatron and gloo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from transformers import AutoConfig, AutoModelForCausalLM, Glm4MoeConfig, Qwen3Config, Qwen3MoeConfig

from megatron_klong.config import ModelConfig, ParallelConfig, preset_file, preset_names
from megatron_klong.model.hf_config import load_hf_config, parse_hf_config
from megatron_klong.model.layout import check_layout, check_settings
from megatron_klong.model.parameters import parameter_counts
from megatron_klong.model.weight_map import weight_rules
from megatron_klong.model.weights import check_known, rank_tensors
from megatron_klong.platform import Platform
from megatron_klong.training.checkpointing import load_checkpoint, save_checkpoint
from megatron_klong.training.losses import sft_objective
from megatron_klong.training.sft import SftProgress
from megatron_klong.training.step import evaluate, forward_backward, train_step
from megatron_klong.training.trainer import build_trainer
from tests import reference
from tests.families import CONFIGS, ReferenceModel, rank_gradients
from tests.ranks import RankPool

ONE = ParallelConfig()
LAYOUTS = [
    (ParallelConfig(tensor=2), 2),
    (ParallelConfig(tensor=2, expert=2), 2),
    (ParallelConfig(tensor=2, expert=2), 4),
    (ParallelConfig(pipeline=2), 2),
    (ParallelConfig(expert=2), 2),
    (ParallelConfig(), 4),
    (ParallelConfig(tensor=2, pipeline=2, expert=2), 4),
    (ParallelConfig(tensor=2, expert=4), 4),
    (ParallelConfig(pipeline=4), 4),
    (ParallelConfig(context=2), 2),
    (ParallelConfig(context=2, tensor=2, expert=2), 4),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model saved by transformers: what a run starts from."""
    folder = tmp_path_factory.mktemp("weights")
    reference.reference_model().save_pretrained(folder)
    return folder


def loss_and_gradients(platform: Platform, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Ours on one rank: the batch loss, and its gradients under their Hugging Face names."""
    hf = load_hf_config(folder)
    trainer = build_trainer(reference.settings(ONE, folder), hf, platform)
    trainer.zero_gradients()
    sums = forward_backward(trainer, reference.packed(reference.batch()), sft_objective, forward_only=False)
    rules, gradients = weight_rules(hf), {}
    for name, gradient in rank_gradients(trainer).items():
        rule = rules[name]
        parts = rule.join.split(gradient)
        gradients |= {part.name: grad.clone() for part, grad in zip(rule.hf, parts, strict=True)}
    return sums.loss, gradients


def test_loss_and_gradients_equal_transformers(ranks: RankPool, weights: Path) -> None:
    ((loss, gradients),) = ranks.run(loss_and_gradients, ONE, 1, folder=weights)
    model = reference.reference_model()
    expected = reference.reference_loss(model, reference.batch())
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    checked = 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        ours = _fused(gradients, name)
        error = float((ours - parameter.grad).norm() / parameter.grad.norm())
        assert error < 1e-5, f"{name}: {error:.1e}"
        checked += ours.numel()
    assert checked == parameter_counts(reference.hf_config()).total


def _fused(gradients: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A gradient by the name transformers has in memory: experts in one tensor."""
    if ".experts." not in name:
        return gradients[name]
    experts, _, kind = name.rpartition(".")
    parts = ["gate", "up"] if kind == "gate_up_proj" else ["down"]
    count = reference.SHAPE["n_routed_experts"]
    return torch.stack(
        [
            torch.cat([gradients[f"{experts}.{index}.{part}_proj.weight"] for part in parts])
            for index in range(count)  # type: ignore[call-overload]
        ]
    )


def few_steps(platform: Platform, parallel: ParallelConfig, folder: Path) -> list[tuple[float, float, int]]:
    """Loss, gradient norm and trained tokens of three steps, and the loss after them."""
    trainer = build_trainer(reference.settings(parallel, folder), load_hf_config(folder), platform)
    rank, ways = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    mine = reference.packed(reference.batch())[rank::ways]
    results = [train_step(trainer, mine, sft_objective) for _ in range(3)]
    after = evaluate(trainer, mine, sft_objective)
    return [
        *((result.loss, result.grad_norm, result.trained_tokens) for result in results),
        (after.loss, 0.0, after.trained_tokens),
    ]


@pytest.fixture(scope="module")
def one_rank(ranks: RankPool, weights: Path) -> list[tuple[float, float, int]]:
    return ranks.run(few_steps, ONE, 1, parallel=ONE, folder=weights)[0]


@pytest.mark.parametrize(
    ("parallel", "world"), LAYOUTS, ids=lambda value: str(value) if isinstance(value, int) else
    f"TP{value.tensor}CP{value.context}PP{value.pipeline}EP{value.expert}",
)  # fmt: skip
def test_every_layout_equals_one_rank(
    ranks: RankPool, weights: Path, one_rank: list[tuple[float, float, int]],
    parallel: ParallelConfig, world: int,
) -> None:  # fmt: skip
    answers = ranks.run(few_steps, parallel, world, parallel=parallel, folder=weights)
    assert all(answer == answers[0] for answer in answers)  # every rank reports the same
    assert one_rank[0][0] > one_rank[-1][0]  # and the steps do something
    for ours, expected in zip(answers[0], one_rank, strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)


def packed_and_apart(platform: Platform, folder: Path) -> tuple[float, float]:
    """The batch packed in four rows, and in a row for each sample."""
    config = reference.sft_config(ONE, folder)
    trainer = build_trainer(reference.trainer_settings(config), load_hf_config(folder), platform)
    rows = reference.batch()
    apart = [[sample] for samples in rows for sample in samples]
    return (
        evaluate(trainer, reference.packed(rows), sft_objective).loss,
        evaluate(trainer, reference.packed(apart), sft_objective).loss,
    )


def test_the_loss_does_not_depend_on_packing(ranks: RankPool, weights: Path) -> None:
    ((together, apart),) = ranks.run(packed_and_apart, ONE, 1, folder=weights)
    assert together == pytest.approx(apart, rel=1e-6)


def influence(platform: Platform, folder: Path) -> np.ndarray:
    """How much each embedding input of a packed row moves the loss of its second document only."""
    trainer = build_trainer(reference.settings(ONE, folder), load_hf_config(folder), platform)
    inputs: list[torch.Tensor] = []

    def keep(_module: object, _arguments: object, output: torch.Tensor) -> torch.Tensor:
        inputs.append(output.detach().requires_grad_(True))
        return inputs[-1]

    trainer.model[0].embedding.register_forward_hook(keep)
    first, second = reference.random_samples(1, 30, 20)
    row = reference.packed([[first, second]])[0]
    row.loss_mask_R[:30] = 0
    forward_backward(trainer, [row], sft_objective, forward_only=False)
    gradient = inputs[0].grad
    assert gradient is not None
    return gradient.squeeze(1).abs().sum(1).numpy()


def test_no_document_of_a_row_sees_another(ranks: RankPool, weights: Path) -> None:
    (moved,) = ranks.run(influence, ONE, 1, folder=weights)
    assert (moved[:30] == 0).all()  # the document before
    assert (moved[50:] == 0).all()  # the padding behind
    last_trained = np.flatnonzero(reference.random_samples(1, 30, 20)[1].loss_mask_T)[-1]
    assert (moved[30 : 30 + last_trained] > 0).all()


def fresh_weights(platform: Platform, parallel: ParallelConfig, folder: Path) -> float:
    """The first loss of a run that starts from fresh weights."""
    config = reference.sft_config(parallel, folder)
    config = config.model_copy(update={"model": config.model.model_copy(update={"weights": None})})
    trainer = build_trainer(reference.trainer_settings(config), reference.hf_config(), platform)
    return evaluate(trainer, reference.packed(reference.batch()), sft_objective).loss


def test_fresh_weights_are_the_same_at_every_layout(ranks: RankPool, weights: Path) -> None:
    layout = ParallelConfig(tensor=2, pipeline=2, expert=2)
    (alone,) = ranks.run(fresh_weights, ONE, 1, parallel=ONE, folder=weights)
    together = ranks.run(fresh_weights, layout, 4, parallel=layout, folder=weights)
    assert together[0] == pytest.approx(alone, rel=1e-6)
    assert alone == pytest.approx(np.log(96), rel=0.05)


def bf16_loss(platform: Platform, folder: Path) -> tuple[float, set[torch.dtype]]:
    config = reference.sft_config(ONE, folder)
    config = config.model_copy(update={"model": config.model.model_copy(update={"precision": "bf16"})})
    trainer = build_trainer(reference.trainer_settings(config), load_hf_config(folder), platform)
    rows = reference.packed(reference.batch())
    for _ in range(3):
        train_step(trainer, rows, sft_objective)
    tensors = rank_tensors(trainer.model)
    biases = {tensor.dtype for name, tensor in tensors.items() if "expert_bias" in name}
    return evaluate(trainer, rows, sft_objective).loss, biases


def test_bf16_trains_close_to_fp32(
    ranks: RankPool, weights: Path, one_rank: list[tuple[float, float, int]]
) -> None:
    ((loss, biases),) = ranks.run(bf16_loss, ONE, 1, folder=weights)
    assert loss == pytest.approx(one_rank[-1][0], rel=2e-2)
    assert biases == {torch.float32}  # the router's bias stays fp32


def test_a_missing_tensor_is_named(ranks: RankPool, weights: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights / "model.safetensors")
    tensors.pop("model.layers.2.self_attn.k_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((weights / "config.json").read_text())
    with pytest.raises(
        AssertionError, match=r"tensor 'model\.layers\.2\.self_attn\.k_proj\.weight' is missing"
    ):
        ranks.run(few_steps, ONE, 1, parallel=ONE, folder=tmp_path)


def test_a_tensor_that_the_config_does_not_know_is_named(
    ranks: RankPool, weights: Path, tmp_path: Path
) -> None:
    """Trained without it, the model would be another one."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights / "model.safetensors")
    tensors["model.layers.2.self_attn.o_proj.bias"] = torch.ones(64)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((weights / "config.json").read_text())
    with pytest.raises(AssertionError, match=r"'model\.layers\.2\.self_attn\.o_proj\.bias' is none of the"):
        ranks.run(few_steps, ONE, 1, parallel=ONE, folder=tmp_path)
    for family in CONFIGS:
        folder = ReferenceModel(family).save(tmp_path / family)
        check_known(folder, load_hf_config(folder))
    raw = json.loads((tmp_path / "glm-prediction" / "config.json").read_text())
    without = parse_hf_config(raw | {"num_nextn_predict_layers": 0}, "x")
    check_known(tmp_path / "glm-prediction", without)


def test_parameters_of_glm_45_air() -> None:
    """The shape of the design, section 4; the figures were counted on transformers' implementation."""
    counts = parameter_counts(load_hf_config(preset_file("glm-4.5-air")))
    assert counts.total == 106_852_245_504
    assert counts.active == 13_424_123_904
    assert counts.prediction == 2_375_059_456


@pytest.mark.parametrize("name", preset_names())
def test_parameters_of_presets_equal_transformers(name: str) -> None:
    config = AutoConfig.from_pretrained(preset_file(name))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    ours = load_hf_config(preset_file(name))
    counts = parameter_counts(ours)
    assert counts.total == sum(tensor.numel() for tensor in model.parameters())
    experts = sum(tensor.numel() for key, tensor in model.named_parameters() if ".mlp.experts." in key)
    idle = experts * (1 - config.num_experts_per_tok / ours.moe.experts) if ours.moe else 0
    assert counts.active == counts.total - idle


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; known are 'glm4_moe', 'qwen3_moe', 'qwen3'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented; only 'silu' is"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False is not implemented; only True is"),
        ({"tie_word_embeddings": True, "num_nextn_predict_layers": 1}, "prediction layers with tie_word"),
        ({"n_group": 4}, "n_group=4 is not implemented"),
        ({"model_type": ["glm4_moe"]}, r"model_type is \['glm4_moe'\]; known are"),
        ({"num_mtp_layers": 1}, "num_nextn_predict_layers=0 and num_mtp_layers=1 contradict each other"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf must be a number above 0"),
        (
            {"rope_parameters": {"partial_rotary_factor": 2.0}},
            "rotates 64 dimensions; an even",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.01}}, "rotates 0 dimensions"),
        ({"rope_parameters": {"factor": 4}}, r"field 'rope_parameters\.factor' is not known"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling=.* is not implemented"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn' is not implemented"),
        ({"sliding_window": 4}, "field 'sliding_window' is not known"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1 must be from 2 to the 8 experts"),
        ({"num_key_value_heads": 3}, "num_attention_heads=8 is no multiple of num_key_value_heads=3"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 must be 0"),
        ({"vocab_size": "320"}, "vocab_size='320' must be an integer of at least 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be an integer of at least 1"),
        ({"hidden_size": 128.5}, "hidden_size=128.5 must be an integer"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None must be a number above 0"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\] is no JSON object"),
    ],
)
def test_configs_that_are_not_implemented_are_refused(change: dict[str, object], message: str) -> None:
    raw = {"model_type": "glm4_moe", **reference.SHAPE}
    raw["num_nextn_predict_layers"] = raw.pop("num_mtp_layers")
    parse_hf_config(raw, "x")
    with pytest.raises(ValueError, match=message):
        parse_hf_config({**raw, **change}, "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window=True is not implemented; only False is"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ({"layer_types": "full"}, "layer_types has 'full'; only 'full_attention'"),
        ({"attention_bias": True}, "attention_bias=True is not implemented"),
        ({"mlp_only_layers": [1.5]}, r"mlp_only_layers=\[1\.5\] must be a list of integers"),
        (
            {"n_routed_experts": 8},
            "'n_routed_experts' is not known to this package in a qwen3_moe model",
        ),
        ({"num_local_experts": 4}, "num_experts=8 and num_local_experts=4 contradict each other"),
    ],
)
def test_configs_of_qwen_that_are_not_implemented_are_refused(
    change: dict[str, object], message: str
) -> None:
    raw = json.loads(preset_file("tiny-qwen3-moe").read_text())
    parse_hf_config(raw | {"mlp_only_layers": None, "layer_types": ["full_attention"] * 4}, "x")
    with pytest.raises(ValueError, match=message):
        parse_hf_config(raw | change, "x")


@pytest.mark.parametrize("kind", [Glm4MoeConfig, Qwen3Config, Qwen3MoeConfig])
def test_a_field_that_is_left_out_has_the_default_of_transformers(kind: type[Any]) -> None:
    """The whole config of theirs, and what is read from a file that says the family only."""
    whole = kind().to_diff_dict()
    assert {"vocab_size", "rope_parameters", "initializer_range"} <= whole.keys()
    bare = {"model_type": kind.model_type, "head_dim": 128}  # what is derived is not even in GLM's
    assert parse_hf_config(bare, "x") == parse_hf_config(whole | {"head_dim": 128}, "x")


@pytest.mark.parametrize(
    ("preset", "model", "message"),
    [
        ("tiny-qwen3", {"prediction": "train"}, "model.prediction=train: the model has no prediction layers"),
        ("tiny-qwen3", {"router": {"replay": True}}, "model.router.replay=true: the model has no experts"),
        (
            "tiny-qwen3-moe",
            {"router": {"bias_update_rate": 0.1}},
            "bias_update_rate=0.1: the model has no bias for choosing experts",
        ),
        (
            "tiny-qwen3",
            {"router": {"balancing": "aux_loss", "balancing_coefficient": 0.1}},
            "model.router.balancing=aux_loss: the model has no experts; leave the setting out",
        ),
    ],
)
def test_settings_without_effect_are_refused(preset: str, model: dict[str, Any], message: str) -> None:
    settings = ModelConfig.model_validate({"preset": preset, **model})
    with pytest.raises(ValueError, match=message):
        check_settings(load_hf_config(settings.shape), settings)
    check_settings(load_hf_config(preset_file("tiny-glm-4.5")), settings)


def test_a_model_is_named_once() -> None:
    for given, message in (
        ({}, "name either model.hf_config or model.preset"),
        ({"preset": "tiny-qwen3", "hf_config": "x"}, "name either"),
        ({"preset": "tiny"}, "model.preset='tiny': known are glm-4.5-air, "),
        ({"preset": "tiny-qwen3", "router": {"balancing": "aux_loss"}}, "name both, or neither"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelConfig.model_validate(given)


def leave_and_resume(
    platform: Platform, folder: Path, out: Path, parallel: ParallelConfig, resume: bool
) -> tuple[float, bool, int]:
    """Two steps with prediction layers left alone (or what was saved then): loss, unchanged?, how many."""
    trainer = build_trainer(reference.settings(parallel, folder), load_hf_config(folder), platform)
    model = trainer.model
    start = {n: t.clone() for n, t in rank_tensors(model).items() if n.startswith("mtp.")}
    rank, ways = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    rows = reference.packed(reference.batch())[rank::ways]
    if resume:
        assert load_checkpoint(trainer, out / "step_00000002", SftProgress) == SftProgress(2)
    else:
        for _ in range(2):
            train_step(trainer, rows, sft_objective)
        save_checkpoint(trainer, SftProgress(2), out, keep_last=1)
    after = rank_tensors(model)
    same = all(torch.equal(after[name], tensor) for name, tensor in start.items())
    return train_step(trainer, rows, sft_objective).loss, same, len(start)


def test_prediction_layers_that_are_left_alone_stay_and_are_saved(ranks: RankPool, tmp_path: Path) -> None:
    folder = ReferenceModel("glm-prediction").save(tmp_path / "hf")
    first, second = ParallelConfig(tensor=2, pipeline=2, expert=2), ParallelConfig(context=2, expert=2)
    arguments = {"folder": folder, "out": tmp_path / "run"}
    saved = ranks.run(leave_and_resume, first, 4, parallel=first, resume=False, **arguments)
    resumed = ranks.run(leave_and_resume, second, 2, parallel=second, resume=True, **arguments)
    assert all(same for _, same, _ in (*saved, *resumed))
    assert sum(count for _, _, count in saved) > 0 < resumed[0][2]
    assert resumed[0][0] == pytest.approx(saved[0][0], rel=1e-5)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (ParallelConfig(tensor=8), "parallel.tensor=8 does not divide the model's num_key_value_heads=4"),
        (ParallelConfig(tensor=4, expert=16), "parallel.expert=16 does not divide the model's number of exp"),
        (ParallelConfig(pipeline=5), "parallel.pipeline=5 exceeds the model's num_hidden_layers=4"),
        (ParallelConfig(expert=3), "parallel.expert=3 does not divide the model's number of experts=8"),
    ],
)
def test_layouts_that_do_not_divide_are_refused(parallel: ParallelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_layout(reference.hf_config(), parallel)
