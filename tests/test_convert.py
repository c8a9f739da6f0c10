"""Conversion on real checkpoints: bit for bit, at every layout, and refused by name where it does not fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Glm4MoeForCausalLM

from megatron_klong.config import ParallelConfig
from megatron_klong.convert.exporting import export_checkpoint
from megatron_klong.convert.importing import import_checkpoint
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.platform import Platform
from megatron_klong.training.checkpointing import SftProgress, save_checkpoint
from megatron_klong.training.losses import sft_objective
from megatron_klong.training.step import evaluate, train_step
from megatron_klong.training.trainer import build_trainer
from tests import reference
from tests.ranks import RankPool

FULL = ParallelConfig(tensor=2, pipeline=2, expert=2)
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def per_expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model as transformers saves it: experts one by one; bf16, router bias fp32."""
    folder = tmp_path_factory.mktemp("per-expert")
    reference.reference_model().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    assert "model.layers.1.mlp.experts.0.gate_proj.weight" in tensors
    half = {name: t if "correction_bias" in name else t.bfloat16() for name, t in tensors.items()}
    save_file(half, folder / "model.safetensors")
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts of a layer in one tensor, made here without the weight map."""
    others = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(1, 4):
        experts = [f"model.layers.{layer}.mlp.experts.{number}" for number in range(8)]
        both = [
            torch.cat([tensors[f"{e}.gate_proj.weight"], tensors[f"{e}.up_proj.weight"]]) for e in experts
        ]
        others[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(both)
        others[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(
            [tensors[f"{e}.down_proj.weight"] for e in experts]
        )
    return others


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def test_round_trips_are_bitwise_in_both_expert_layouts(per_expert: Path, tmp_path: Path) -> None:
    original = tensors_of(per_expert)
    assert original[BIAS].dtype == torch.float32
    assert original["lm_head.weight"].dtype == torch.bfloat16
    import_checkpoint(per_expert, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), original)
    export_checkpoint(tmp_path / "megatron", tmp_path / "fused", layout="fused", shard_bytes=200_000)
    assert_same(tensors_of(tmp_path / "fused"), fused(original))
    import_checkpoint(tmp_path / "fused", tmp_path / "again")
    export_checkpoint(tmp_path / "again", tmp_path / "once-more")
    assert_same(tensors_of(tmp_path / "once-more"), original)


def test_shards_have_an_index_and_keep_to_their_size(per_expert: Path, tmp_path: Path) -> None:
    import_checkpoint(per_expert, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "sharded", shard_bytes=200_000)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert len(files) > 3
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "sharded" / file)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(per_expert).values())
    # transformers reads it, from its own knowledge of names and of the index
    model = Glm4MoeForCausalLM.from_pretrained(tmp_path / "sharded")
    assert torch.equal(model.lm_head.weight, tensors_of(per_expert)["lm_head.weight"])


def train_and_save(platform: Platform, folder: Path, out: Path, parallel: ParallelConfig) -> float:
    """Three steps from a start, saved; the loss after them."""
    config = reference.sft_config(parallel, folder)
    trainer = build_trainer(config.trainer_settings, load_hf_config(folder), platform)
    ways = parallel.data(torch.distributed.get_world_size())
    rows = reference.packed(reference.batch())[torch.distributed.get_rank() % ways :: ways]
    for _ in range(3):
        train_step(trainer, rows, sft_objective)
    save_checkpoint(trainer, SftProgress(3, 12), out, keep_last=1)
    return evaluate(trainer, rows, sft_objective).loss


@pytest.mark.parametrize("parallel", [ParallelConfig(), FULL], ids=["one-rank", "TP2PP2EP2"])
def test_trained_weights_leave_for_transformers(
    ranks: RankPool, per_expert: Path, tmp_path: Path, parallel: ParallelConfig
) -> None:
    """The start is an imported checkpoint, so this also reads one at the layout."""
    import_checkpoint(per_expert, tmp_path / "start")
    results = ranks.run(
        train_and_save, parallel, parallel.world_size,
        folder=tmp_path / "start", out=tmp_path / "run", parallel=parallel,
    )  # fmt: skip
    report = export_checkpoint(tmp_path / "run", tmp_path / "hf")
    assert report.left_out["optimizer state"] > 0
    model = Glm4MoeForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    assert model.dtype == torch.float32  # the training's, not the start's
    with torch.no_grad():
        loss = float(reference.reference_loss(model, reference.batch()))
    assert loss == pytest.approx(results[0], rel=1e-5)
    assert not torch.equal(model.lm_head.weight.bfloat16(), tensors_of(per_expert)["lm_head.weight"])
    assert torch.equal(tensors_of(tmp_path / "hf")[BIAS], tensors_of(per_expert)[BIAS])


def first_loss(platform: Platform, folder: Path, parallel: ParallelConfig) -> float:
    trainer = build_trainer(reference.settings(parallel, folder), load_hf_config(folder), platform)
    return evaluate(trainer, reference.packed(reference.batch()), sft_objective).loss


@pytest.mark.parametrize("parallel", [FULL, ParallelConfig(pipeline=4), ParallelConfig(expert=4)], ids=str)
def test_an_imported_checkpoint_is_the_folder_at_any_layout(
    ranks: RankPool, per_expert: Path, tmp_path: Path, parallel: ParallelConfig
) -> None:
    import_checkpoint(per_expert, tmp_path / "megatron")
    world = parallel.world_size
    imported = ranks.run(first_loss, parallel, world, folder=tmp_path / "megatron", parallel=parallel)
    direct = ranks.run(first_loss, parallel, world, folder=per_expert, parallel=parallel)
    assert imported == direct


def change(folder: Path, copy: Path, **edits: Tensor | None) -> Path:
    """A copy with tensors replaced (or, with None, removed)."""
    shutil.copytree(folder, copy)
    tensors = {name: t for name, t in (tensors_of(folder) | edits).items() if t is not None}
    save_file(tensors, copy / "model.safetensors")
    return copy


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("lm_head.weight", None, r"tensor 'lm_head\.weight' is missing"),
        ("model.layers.1.mlp.experts.3.up_proj.weight", None, r"experts\.3\.up_proj\.weight' is missing"),
        ("model.norm.weight", torch.ones(63), r"'model\.norm\.weight' has shape \(63,\), .* wants \(64,\)"),
        ("model.layers.0.q_norm.weight", torch.ones(4), r"'model\.layers\.0\.q_norm\.weight' is none of"),
        (BIAS, torch.ones(8, dtype=torch.int32), "has data type I32, not one of"),
        (
            "model.layers.2.mlp.experts.5.down_proj.weight",
            torch.ones(64, 64),
            r"experts\.5\.down_proj\.weight' is torch\.float32, but .*experts\.0\.down.* is torch\.bfloat16",
        ),
    ],
)
def test_folders_that_do_not_fit_are_refused_by_name(
    per_expert: Path, tmp_path: Path, name: str, tensor: Tensor | None, message: str
) -> None:
    folder = change(per_expert, tmp_path / "hf", **{name: tensor})
    with pytest.raises(ValueError, match=message):
        import_checkpoint(folder, tmp_path / "megatron")
    assert not list(tmp_path.glob("*megatron*"))


def test_prediction_layers_are_left_out_and_counted(per_expert: Path, tmp_path: Path) -> None:
    folder = change(per_expert, tmp_path / "hf", **{"model.layers.4.eh_proj.weight": torch.ones(2)})
    report = import_checkpoint(folder, tmp_path / "megatron")
    assert report.left_out == {"multi-token prediction layers": 1}


def test_a_file_cut_short_is_refused(per_expert: Path, tmp_path: Path) -> None:
    shutil.copytree(per_expert, tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged or cut short"):
        import_checkpoint(tmp_path / "hf", tmp_path / "megatron")


def test_another_shape_of_model_is_refused_at_export(per_expert: Path, tmp_path: Path) -> None:
    import_checkpoint(per_expert, tmp_path / "megatron")
    raw = json.loads((tmp_path / "megatron" / "config.json").read_text())
    fewer, wider = tmp_path / "fewer.json", tmp_path / "wider.json"
    fewer.write_text(json.dumps(raw | {"num_hidden_layers": 3}))
    wider.write_text(json.dumps(raw | {"vocab_size": 128}))
    with pytest.raises(ValueError, match=r"'decoder\.layers\.3\..* is none of the config's model"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "hf", hf_config=fewer)
    with pytest.raises(ValueError, match=r"word_embeddings\.weight' has shape \(96, 64\), .* \(128, 64\)"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "hf", hf_config=wider)
    assert not list(tmp_path.glob("*hf*"))


def test_nothing_is_overwritten_and_nothing_half_is_left(
    per_expert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_checkpoint(per_expert, tmp_path / "megatron")
    with pytest.raises(ValueError, match="megatron exists already"):
        import_checkpoint(per_expert, tmp_path / "megatron")
    count = 0

    def fail() -> None:
        nonlocal count
        count += 1
        if count == 20:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "hf", on_tensor=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


def test_the_commands_and_the_tools_are_one(per_expert: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else done.stderr.splitlines()[-1]

    tools = Path(__file__).parents[1] / "tools"
    megatron, back = str(tmp_path / "megatron"), str(tmp_path / "back")
    said = run(str(tools / "convert_hf_to_megatron.py"), str(per_expert), megatron)
    assert said.startswith("43 tensors, ")
    report = json.loads(run("-m", "megatron_klong.cli", "convert", "export", megatron, back, "--json"))
    assert report["tensors"] == 129
    assert_same(tensors_of(Path(back)), tensors_of(per_expert))
    again = run(str(tools / "convert_megatron_to_hf.py"), megatron, back)
    assert again == f"error: {back} exists already; name a new folder, or delete it first"
    nothing = run("-m", "megatron_klong.cli", "convert", "export", str(per_expert), back + "2")
    assert "no Megatron distributed checkpoint here" in nothing
