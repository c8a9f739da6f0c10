"""Config files, overrides, and errors that a person can act on."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from megatron_klong.config import (
    ParallelConfig,
    SftConfig,
    StrictModel,
    config_keys,
    dump_config,
    load_config,
)

EXAMPLE = Path(__file__).parents[1] / "examples" / "quickstart" / "sft.yaml"


def test_the_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(
        SftConfig, EXAMPLE, ["optimizer.lr=1e-3", "parallel.nproc=8", "model.weights=some/where"]
    )
    assert (config.optimizer.lr, config.parallel.nproc) == (1e-3, 8)
    assert config.model.weights == Path("some/where")
    file = tmp_path / "resolved.yaml"
    file.write_text(dump_config(config))
    assert load_config(SftConfig, file) == config


def test_a_file_overrides_the_keys_that_it_has(tmp_path: Path) -> None:
    """In the order of the command line; lists are values, sections are merged."""
    other = tmp_path / "other.yaml"
    other.write_text(
        "optimizer: {lr: 5.0e-4}\nmodel: {hf_config: null, preset: tiny-qwen3, recompute: [mlp]}"
    )
    config = load_config(SftConfig, EXAMPLE, ["optimizer.lr=1", f"@{other}", "model.recompute=full"])
    plain = load_config(SftConfig, EXAMPLE)
    assert (config.optimizer.lr, config.model.preset, config.model.recompute) == (5e-4, "tiny-qwen3", "full")
    assert config.optimizer.min_lr == plain.optimizer.min_lr and config.data == plain.data


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("@/no.yaml", "config /no.yaml: No such file or directory"),
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        ("data.max_tokens=9", "unknown key 'data.max_tokens'; did you mean 'data.window.max_tokens'?"),
        ("optimiser.lr=1", "unknown key 'optimiser'; did you mean 'optimizer'?"),
        ("data.window.overlap=9", "did you mean 'data.window.overlap_tokens'?"),
        ("run.xyzzy=1", "unknown key 'run.xyzzy'; valid here: dir, seed, check_memory"),
        ("optimizer.lr=fast", "optimizer.lr='fast': Input should be a valid number"),
        ("optimizer.lr=-1", "optimizer.lr=-1: Input should be greater than 0"),
        ("data.window.prefix=all", "data.window.prefix='all': Input should be 'task', 'reading' or 'marked'"),
        ("optimizer.lr", "override 'optimizer.lr': write it as key=value"),
        ("optimizer.lr.x=1", "override 'optimizer.lr.x=1': lr is a value, not a section"),
        ("data.row_tokens=128", "data.row_tokens=128 is less than the window's max_tokens=256"),
        ("data.row_tokens=257", "data.row_tokens=257 is no multiple of 2, which parallel.tensor=2"),
        ("model.preset=tiny-qwen3", "name either model.hf_config or model.preset"),
        ("run.dir=[", "override value '[': not YAML"),
        ("run.seed=-1", "run.seed=-1: Input should be greater than or equal to 0"),
        ("optimizer.lr=.inf", "optimizer.lr=inf: Input should be a finite number"),
        ("optimizer.min_lr=1", "optimizer.min_lr=1.0 must not exceed optimizer.lr=0.003"),
        (
            "parallel.nproc=6",
            "6 ranks cannot hold tensor=2 x context=1 x pipeline=2 with expert=2; use a mult",
        ),
        (
            "parallel={pipeline: 1, virtual: 2}",
            "virtual=2 interleaves stages of a pipeline, and pipeline is 1",
        ),
        ("optimizer.warmup_steps=200", "warmup_steps=200 must be below the run's 200 optimizer steps"),
    ],
)
def test_errors_name_the_key_and_the_remedy(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^(config|override) .*") as caught:
        load_config(SftConfig, EXAMPLE, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_typo_in_a_required_key_is_named(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for right, wrong, hint in (
        ("  lr:", "  lrr:", "optimizer.lr"),
        ("optimizer:", "optimiser:", "optimizer"),
    ):
        file.write_text(EXAMPLE.read_text().replace(right, wrong))
        with pytest.raises(ValueError, match=f"unknown key '.*{wrong.strip(' :')}'; did you mean '{hint}'"):
            load_config(SftConfig, file)


def test_batch_must_divide_over_data_parallel_ranks() -> None:
    with pytest.raises(
        ValueError, match="global_batch_rows=3 is no multiple of the 2 data-parallel ranks; use 4"
    ):
        load_config(SftConfig, EXAMPLE, ["parallel.nproc=8", "training.global_batch_rows=3"])
    interleaved = ["parallel.virtual=2", "training.global_batch_rows=3"]
    with pytest.raises(ValueError, match=r"1 data-parallel ranks times parallel\.pipeline=2, .*; use 4"):
        load_config(SftConfig, EXAMPLE, interleaved)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not YAML"), ("- 1", "must be a mapping"), ("run: {}", "key 'run.dir' is missing")],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(SftConfig, file)
    file.write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match=r"c\.yaml: not UTF-8 at byte 3"):
        load_config(SftConfig, file)
    with pytest.raises(ValueError, match=r"none\.yaml: No such file"):
        load_config(SftConfig, tmp_path / "none.yaml")


def test_the_fewest_ranks_a_layout_allows() -> None:
    assert ParallelConfig(tensor=2, pipeline=2, expert=4).world_size == 8
    assert ParallelConfig(tensor=4, expert=2).world_size == 4
    assert ParallelConfig().world_size == 1


def models(model: type[BaseModel]) -> list[type[BaseModel]]:
    found = [model]
    for field in model.model_fields.values():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, StrictModel):
                found += models(kind)
    return found


def test_every_field_has_a_docstring() -> None:
    sections = set(SftConfig.model_fields)
    for model in models(SftConfig):
        for name, field in model.model_fields.items():
            assert field.description or name in sections | {"window"}, f"{model.__name__}.{name}"
    assert "data.window.max_tokens" in config_keys(SftConfig)
