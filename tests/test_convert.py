"""Conversion on real checkpoints: bit for bit, at every layout, and refused by name where it does not fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Glm4MoeForCausalLM

from benchmarks.conversion import PeakMemory
from megatron_klong.checks.tiny import write_tiny_model
from megatron_klong.checks.verify import verify
from megatron_klong.config import ParallelConfig
from megatron_klong.convert import stored
from megatron_klong.convert.checkpoint_reader import CheckpointReader
from megatron_klong.convert.compare import compare_weights
from megatron_klong.convert.exporting import export_checkpoint
from megatron_klong.convert.importing import import_checkpoint
from megatron_klong.convert.stored import stored_tensors
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.model.weight_map import take_shard, weight_rules
from megatron_klong.model.weights import rank_tensors
from megatron_klong.platform import Platform
from megatron_klong.training.checkpointing import save_checkpoint
from megatron_klong.training.losses import sft_objective
from megatron_klong.training.sft import SftProgress
from megatron_klong.training.step import evaluate, train_step
from megatron_klong.training.trainer import build_trainer
from tests import reference
from tests.families import CONFIGS, ReferenceModel, changed
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


@pytest.mark.parametrize("family", [name for name in CONFIGS if name != "glm"])
def test_every_family_round_trips(family: str, tmp_path: Path) -> None:
    """Prediction layers with their copies, tied embeddings, norms of queries and keys; in shards too."""
    folder = ReferenceModel(family).save(tmp_path / "hf")
    original = tensors_of(folder)
    import_checkpoint(folder, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", shard_bytes=100_000)
    assert_same(tensors_of(tmp_path / "back"), original)
    export_checkpoint(tmp_path / "megatron", tmp_path / "fused", layout="fused")
    import_checkpoint(tmp_path / "fused", tmp_path / "again")
    export_checkpoint(tmp_path / "again", tmp_path / "once-more")
    assert_same(tensors_of(tmp_path / "once-more"), original)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["architectures"] == [type(ReferenceModel(family).model).__name__]


def test_large_tensors_are_converted_in_pieces(
    per_expert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "PIECE_BYTES", 1000)
    import_checkpoint(per_expert, tmp_path / "megatron")
    reader = CheckpointReader(tmp_path / "megatron")
    (head,) = [t for t in stored_tensors(load_hf_config(per_expert)) if t.key == "output_layer.weight"]
    assert len(head.pieces(2)) == 14  # 96 rows of 128 bytes, 7 at a time
    assert len(reader.metadata.state_dict_metadata[head.key].chunks) == 14
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(per_expert))


COPY = "model.layers.4.shared_head.head.weight"


def test_copies_may_lack_and_must_be_equal(tmp_path: Path) -> None:
    """A prediction layer's embedding and head, and the head of tied embeddings, repeat other tensors."""
    predicting = ReferenceModel("glm-prediction").save(tmp_path / "hf")
    original = tensors_of(predicting)
    import_checkpoint(change(predicting, tmp_path / "without", **{COPY: None}), tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), original)
    other = change(predicting, tmp_path / "other", **{COPY: original[COPY] + 1e-6})
    with pytest.raises(ValueError, match=r"shared_head\.head\.weight' differs from 'lm_head\.weight'"):
        import_checkpoint(other, tmp_path / "refused")

    tied = ReferenceModel("qwen3-tied").save(tmp_path / "tied")
    embedding = tensors_of(tied)["model.embed_tokens.weight"]
    repeated = change(tied, tmp_path / "repeated", **{"lm_head.weight": embedding.clone()})
    import_checkpoint(repeated, tmp_path / "tied-megatron")
    export_checkpoint(tmp_path / "tied-megatron", tmp_path / "tied-back")
    assert_same(tensors_of(tmp_path / "tied-back"), tensors_of(tied))
    with pytest.raises(ValueError, match=r"'lm_head\.weight' differs from 'model\.embed_tokens\.weight'"):
        import_checkpoint(
            change(tied, tmp_path / "untied", **{"lm_head.weight": embedding * 2}), tmp_path / "refused"
        )


def test_prediction_layers_that_are_missing_are_named(tmp_path: Path) -> None:
    folder = ReferenceModel("glm-prediction").save(tmp_path / "hf")
    broken = change(folder, tmp_path / "broken", **{"model.layers.4.eh_proj.weight": None})
    with pytest.raises(ValueError, match=r"layers\.4\.eh_proj\.weight' is missing"):
        import_checkpoint(broken, tmp_path / "megatron")


def train_and_save(platform: Platform, folder: Path, out: Path, parallel: ParallelConfig) -> float:
    """Three steps from a start, saved; the loss after them."""
    config = reference.sft_config(parallel, folder)
    trainer = build_trainer(reference.trainer_settings(config), load_hf_config(folder), platform)
    ways = parallel.data(torch.distributed.get_world_size())
    rows = reference.packed(reference.batch())[torch.distributed.get_rank() % ways :: ways]
    for _ in range(3):
        train_step(trainer, rows, sft_objective)
    save_checkpoint(trainer, SftProgress(3), out, keep_last=1)
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


def train_and_dump(platform: Platform, folder: Path, out: Path, parallel: ParallelConfig) -> None:
    """Two steps in which everything learns; the checkpoint, and each rank's own tensors beside it."""
    settings = changed(reference.settings(parallel, folder), prediction="train")
    trainer = build_trainer(settings, load_hf_config(folder), platform)
    ways, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    rows = reference.packed(reference.batch())[rank::ways]
    for _ in range(2):
        train_step(trainer, rows, sft_objective)
    save_checkpoint(trainer, SftProgress(2), out, keep_last=1)
    model = trainer.model
    group = model[0].pg_collection.tp
    held = {name: tensor.detach().clone() for name, tensor in rank_tensors(model).items()}
    torch.save((group.rank(), group.size(), held), out / f"rank-{torch.distributed.get_rank()}.pt")


@pytest.mark.parametrize(
    ("family", "parallel", "world"),
    [
        ("glm-prediction", FULL, 4),
        ("glm-prediction", ParallelConfig(context=2, expert=4), 4),
        ("qwen3-moe", FULL, 4),
        ("qwen3-tied", ParallelConfig(tensor=2, pipeline=2), 4),
        ("glm", ParallelConfig(tensor=2), 2),
    ],
    ids=str,
)
def test_trained_weights_leave_as_the_ranks_hold_them(
    ranks: RankPool, tmp_path: Path, family: str, parallel: ParallelConfig, world: int
) -> None:
    folder = ReferenceModel(family).save(tmp_path / "hf")
    import_checkpoint(folder, tmp_path / "start")
    ranks.run(
        train_and_dump, parallel, world, folder=tmp_path / "start", out=tmp_path / "run", parallel=parallel
    )
    export_checkpoint(tmp_path / "run", tmp_path / "back")
    exported, before = tensors_of(tmp_path / "back"), tensors_of(folder)
    assert exported.keys() == before.keys()
    rules = weight_rules(load_hf_config(folder))
    seen = set()
    for number in range(world):
        tp_rank, tp_size, held = torch.load(tmp_path / "run" / f"rank-{number}.pt")
        for name, tensor in held.items():
            rule = rules[name]
            whole = rule.join.join([exported[part.name] for part in rule.hf])
            assert torch.equal(take_shard(rule.shard, whole, tp_rank, tp_size), tensor), name
            seen |= {part.name for part in rule.hf} | {
                copy.name for copy in rule.copies if rule.writes_copies
            }
    assert seen == exported.keys()
    import_checkpoint(tmp_path / "back", tmp_path / "again")
    assert compare_weights(tmp_path / "run", tmp_path / "again").differences == ()  # cut otherwise
    still = {name for name in before if torch.equal(before[name], exported[name])}
    assert all("correction_bias" in name for name in still)  # everything else has learned


def first_loss(platform: Platform, folder: Path, parallel: ParallelConfig) -> float:
    trainer = build_trainer(reference.settings(parallel, folder), load_hf_config(folder), platform)
    return evaluate(trainer, reference.packed(reference.batch()), sft_objective).loss


@pytest.mark.parametrize(
    ("family", "parallel"),
    [
        ("glm-prediction", FULL),
        ("glm", ParallelConfig(pipeline=2, virtual=2)),
        ("glm", ParallelConfig(expert=4)),
        ("qwen3-tied", ParallelConfig(tensor=2, pipeline=2)),
    ],
    ids=str,
)
def test_an_imported_checkpoint_is_the_folder_at_any_layout(
    ranks: RankPool, tmp_path: Path, family: str, parallel: ParallelConfig
) -> None:
    folder = ReferenceModel(family).save(tmp_path / "hf")
    import_checkpoint(folder, tmp_path / "megatron")
    world = parallel.world_size
    imported = ranks.run(first_loss, parallel, world, folder=tmp_path / "megatron", parallel=parallel)
    direct = ranks.run(first_loss, parallel, world, folder=folder, parallel=parallel)
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


def test_prediction_layers_are_left_out_and_counted(tmp_path: Path) -> None:
    """Where the config says that there are none; other layers beyond the last are refused."""
    folder = ReferenceModel("glm-prediction").save(tmp_path / "hf")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"num_nextn_predict_layers": 0}))
    report = import_checkpoint(folder, tmp_path / "megatron")
    assert report.left_out == {"multi-token prediction layers": 44}
    assert compare_weights(folder, tmp_path / "megatron").left_out == (report.left_out, {})
    for family in ("qwen3", "glm"):
        folder = ReferenceModel(family).save(tmp_path / family)
        raw = json.loads((folder / "config.json").read_text())
        shorter = raw | {"num_hidden_layers": 3} | ({"layer_types": None} if family == "qwen3" else {})
        (folder / "config.json").write_text(json.dumps({k: v for k, v in shorter.items() if v is not None}))
        with pytest.raises(ValueError, match=r"tensor 'model\.layers\.3\..* is none of the config's model"):
            import_checkpoint(folder, tmp_path / "refused")


def test_the_index_says_which_files_are_read(per_expert: Path, tmp_path: Path) -> None:
    import_checkpoint(per_expert, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "hf", shard_bytes=200_000)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    stale = tmp_path / "hf" / "model-00001-of-00099.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(files[0]).items()}, stale)
    assert compare_weights(tmp_path / "hf", per_expert).differences == ()
    index = tmp_path / "hf" / "model.safetensors.index.json"
    text = index.read_text()
    index.unlink()
    with pytest.raises(ValueError, match=r"tensor '.*' is in two files; remove those of another save"):
        import_checkpoint(tmp_path / "hf", tmp_path / "refused")
    index.write_text(text)
    files[2].unlink()
    with pytest.raises(ValueError, match=rf"{files[2].name}: missing, damaged or cut short"):
        import_checkpoint(tmp_path / "hf", tmp_path / "refused")
    index.write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json: cannot be read: KeyError"):
        import_checkpoint(tmp_path / "hf", tmp_path / "refused")


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Ten times the layers, of 13 MB each in pieces of up to 4 MB."""
    peaks = {}
    for layers in (3, 30):
        shape = {"num_hidden_layers": layers, "hidden_size": 512, "moe_intermediate_size": 256}
        folder = write_tiny_model(tmp_path / f"{layers}", "fp32", **shape)
        with PeakMemory() as importing:
            import_checkpoint(folder, tmp_path / f"{layers}-megatron")
        with PeakMemory() as exporting:
            export_checkpoint(tmp_path / f"{layers}-megatron", tmp_path / f"{layers}-back")
        peaks[layers] = max(importing.megabytes, exporting.megabytes)
    assert peaks[30] < peaks[3] + 40


def test_a_file_cut_short_is_refused(per_expert: Path, tmp_path: Path) -> None:
    shutil.copytree(per_expert, tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: missing, damaged or cut short"):
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

    def fail(done: int, total: int) -> None:
        if done > total // 2:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "hf", on_bytes=fail)
    with pytest.raises(OSError, match="No space"):
        import_checkpoint(per_expert, tmp_path / "megatron-2", on_bytes=fail)

    def meanwhile(_done: int, _total: int) -> None:
        with pytest.raises(ValueError, match="megatron-3: another process is making it"):
            import_checkpoint(per_expert, tmp_path / "megatron-3")

    import_checkpoint(per_expert, tmp_path / "megatron-3", on_bytes=meanwhile)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron", "megatron-3"]


def test_no_room_is_said_before_anything_is_written(
    per_expert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_checkpoint(per_expert, tmp_path / "megatron")
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: full)
    with pytest.raises(ValueError, match=r"hf: 0\.00 GB will be written, and the disk has 0\.00 GB left"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
    with pytest.raises(ValueError, match="the disk has"):
        import_checkpoint(per_expert, tmp_path / "megatron-2")
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


@pytest.mark.parametrize("damage", ["cut", "gone", "metadata", "bytes"])
def test_a_damaged_checkpoint_is_refused(per_expert: Path, tmp_path: Path, damage: str) -> None:
    import_checkpoint(per_expert, tmp_path / "megatron")
    (data,) = (tmp_path / "megatron").glob("*.distcp")
    if damage == "cut":
        data.write_bytes(data.read_bytes()[:-2000])
        message = r"'.*' ends at byte \d+ of __0_0\.distcp, which has \d+ bytes: missing, or cut short"
    elif damage == "gone":
        data.unlink()
        message = "of __0_0\\.distcp, which has 0 bytes"
    elif damage == "metadata":
        (tmp_path / "megatron" / ".metadata").write_bytes(b"junk")
        message = r"its \.metadata cannot be read"
    else:
        data.write_bytes(b"\xff" * data.stat().st_size)
        message = r"__0_0\.distcp: tensor '.*' is damaged"
    with pytest.raises(ValueError, match=message):
        export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
    assert not list(tmp_path.glob("*hf*"))


def test_verify_compares_bits_logits_and_tokens(per_expert: Path, tmp_path: Path) -> None:
    import_checkpoint(per_expert, tmp_path / "megatron")
    same = verify(per_expert, tmp_path / "megatron", generate=4)
    assert same.passed and same.by == ("transformers", "Megatron-Core")
    assert (same.weights.tensors, same.weights.differences) == (129, ())
    assert same.logits is not None and same.logits < 1e-4
    assert same.tokens is not None and same.tokens[0] == same.tokens[1] and len(same.tokens[0]) == 4
    name = "model.layers.3.mlp.experts.7.down_proj.weight"
    tensor = tensors_of(per_expert)[name].clone()
    tensor[5, 7] += 0.5
    other = change(per_expert, tmp_path / "other", **{name: tensor})
    differs = verify(tmp_path / "megatron", other, weights_only=True)
    assert not differs.passed and differs.not_run == "not asked for"
    (difference,) = differs.weights.differences
    assert difference.name == name and difference.largest == pytest.approx(0.5, rel=0.02)
    spoken = verify(tmp_path / "megatron", other, generate=4)
    assert not spoken.passed and spoken.logits is not None and spoken.logits > 1e-3
    assert not replace(spoken, weights=same.weights).passed  # the logits alone would do
    assert not replace(same, tokens=((1, 2), (1, 3))).passed
    assert not replace(same, not_run="broken", failed=True).passed
    with pytest.raises(ValueError, match=r"prompt: ids must be from 0 to 95, got \[5, 96\]"):
        verify(per_expert, per_expert, prompt=[5, 96])
    shape = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(shape | {"rms_norm_eps": 1e-6}))
    with pytest.raises(ValueError, match=r"models of other shapes: rms_norm_eps is 1e-05 in .* and 1e-06 in"):
        verify(tmp_path / "megatron", other)


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
    verified = run("-m", "megatron_klong.cli", "convert", "verify", str(per_expert), megatron)
    assert "bits: all the same" in verified and "greedy tokens: 16 of 16 the same" in verified
    wrong = run("-m", "megatron_klong.cli", "convert", "verify", megatron, back, "--prompt", "5,x")
    assert wrong == "error: --prompt '5,x': write token ids with commas between, such as 5,17,3"
    name = "lm_head.weight"
    altered = change(per_expert, tmp_path / "altered", **{name: tensors_of(per_expert)[name] * 2})
    arguments = ["-m", "megatron_klong.cli", "convert", "verify", str(altered), megatron, "--weights-only"]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "bits: lm_head.weight differs by up to" in done.stdout
    unfit = run(
        "-m", "megatron_klong.cli", "convert", "export", megatron, back + "3", "--tokenizer", str(tmp_path)
    )
    assert "has none of tokenizer.json" in unfit
    nothing = run("-m", "megatron_klong.cli", "convert", "export", str(per_expert), back + "2")
    assert "no Megatron checkpoint here" in nothing
