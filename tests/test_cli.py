"""The commands as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WINDOW = [
    "--overlap", "48", "--reserve-generation", "16", "--reserve-observation", "16",
    "--prefix", "reading", "--max-prefix-fraction", "0.4",
]  # fmt: skip


def klong(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_klong.cli", *map(str, arguments)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done


def as_json(*arguments: str | Path) -> Any:
    done = klong(*arguments, "--json")
    assert done.stderr == ""  # nothing beside the answer
    return json.loads(done.stdout)


def test_generate_import_tokenize_split_show(tmp_path: Path) -> None:
    made = as_json("factory", "generate", "--tasks", "2", "--seed", "3", "--out", tmp_path / "domain")
    assert (made["count"], made["mean_grade"]) == (2, 1.0)
    imported = as_json("data", "import", made["trajectories"], "--out", tmp_path / "all.jsonl")
    assert (imported["read"], imported["kept"], imported["quarantine"]) == (2, 2, None)
    header = as_json(
        "data",
        "tokenize",
        tmp_path / "all.jsonl",
        "--tokenizer",
        made["tokenizer"],
        "--out",
        tmp_path / "store",
    )
    assert header["trajectories"] == 2
    report = as_json(
        "data", "split", tmp_path / "store", "--max-tokens", "256", "--max-tokens", "512", *WINDOW
    )
    short, long = report["settings"]
    assert (short["window"]["max_tokens"], long["window"]["max_tokens"]) == (256, 512)
    assert short["windows"] > long["windows"]
    for setting in (short, long):
        assert setting["trajectories"] == 2
        assert setting["assistant_tokens"] == setting["trained_once"] == header["trained_tokens"]
        assert setting["trained_more_than_once"] == 0
        assert set(setting["not_trained"].values()) == {0}
        packing = setting["packing"]
        assert 0 < packing["efficiency"] <= packing["efficiency_at_most"] <= 1
        assert setting["omitted_tokens_per_window"] > 0
    names = [json.loads(line)["id"] for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    views = [
        as_json("data", "show", tmp_path / "store", name, "--max-tokens", "256", *WINDOW) for name in names
    ]
    recounted = sum(sum(window["loss_mask"]) for view in views for window in view["windows"])
    assert recounted == short["trained_once"]
    assert sum(len(view["windows"]) for view in views) == short["windows"]
    told = klong("data", "split", tmp_path / "store", "--max-tokens", "256", *WINDOW).stdout
    assert f"trained once {recounted:,}, more than once 0" in told
    shown = klong("data", "show", tmp_path / "store", names[0], "--max-tokens", "256", *WINDOW).stdout
    assert shown.count("window ") == len(views[0]["windows"])
    assert "[gMASK]<sop>" in shown and "</tool_call><|observation|>" in shown
    looked = as_json("data", "check", tmp_path / "store", "--max-tokens", "256", *WINDOW)
    assert looked["problems"] == [] and looked["untrained"]["share"] == 0
    told = klong("data", "check", tmp_path / "store", "--samples", "1").stdout
    assert "0.00% of" in told and "⟦" in told
    back = as_json("data", "export", tmp_path / "all.jsonl", "--to", "atif", "--out", tmp_path / "atif")
    assert back["files"] == 2
    again = as_json("data", "import", *sorted((tmp_path / "atif").iterdir()), "--out", tmp_path / "2.jsonl")
    assert again["formats"] == {"atif": 2}
    lines = [(tmp_path / name).read_text().splitlines() for name in ("all.jsonl", "2.jsonl")]
    assert sorted(lines[0]) == sorted(lines[1])


def test_a_trained_tokenizer_serves(domain: Path, tmp_path: Path) -> None:
    klong(
        "data",
        "train-tokenizer",
        domain / "trajectories.jsonl",
        "--vocab-size",
        "500",
        "--out",
        tmp_path / "bpe",
    )
    header = as_json(
        "data",
        "tokenize",
        domain / "trajectories.jsonl",
        "--tokenizer",
        tmp_path / "bpe",
        "--out",
        tmp_path / "s",
    )
    assert header["vocab_size"] == 500


def test_refused_records_are_told_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text('{"messages": [{"role": "assistant", "content": "a"}]}\n{"messages": []}\n')
    told = klong("data", "import", file, "--out", tmp_path / "all.jsonl").stdout
    assert "1 of 2 trajectories" in told
    assert f"refused {file}:2: messages: List should have at least 1 item" in told
    assert "1 refused records -> " in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "import", "none.jsonl", "--out", "x.jsonl"], "none.jsonl: No such file or directory"),
        (["data", "tokenize", "none.jsonl", "--tokenizer", "t", "--out", "x"], "no tokenizer.json in t"),
        (["data", "split", "nope", "--max-tokens", "9", *WINDOW], "store nope: no readable header nope.json"),
        (["data", "split", "nope", "--max-tokens", "9", *WINDOW, "--prefix", "all"], "prefix='all'"),
        (["factory", "generate", "--tasks", "0", "--out", "x"], "--tasks 0: must be at least 1"),
        (
            ["factory", "generate", "--renderer", "llama", "--out", "x"],
            "renderer 'llama' is not registered (there are: glm-4.5, qwen3)",
        ),
        (["data", "import", "pyproject.toml", "--out", "/proc/x.jsonl"], "/proc/x.jsonl: No such file"),
        (["factory", "generate", "--out", "/proc/x"], "/proc/x"),
        (["sft", "none.yaml"], "config none.yaml: No such file or directory"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(arguments: list[str], message: str) -> None:
    done = klong(*arguments, code=2)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_unwritable_store_is_one_line(domain: Path) -> None:
    done = klong(
        "data", "tokenize", domain / "trajectories.jsonl", "--tokenizer", domain / "tokenizer",
        "--out", "/proc/store", code=2,
    )  # fmt: skip
    assert done.stderr == "error: store /proc/store: cannot be written: No such file or directory\n"


def test_wrong_usage_exits_2() -> None:
    assert (
        "--row-tokens"
        in klong("data", "split", "s", "--max-tokens", "9", *WINDOW, "--row-tokens", "0", code=2).stderr
    )
    assert "--max-tokens" in klong("data", "split", "store", code=2).stderr
    assert "No such command" in klong("dance", code=2).stderr


@pytest.mark.parametrize(
    "command",
    [
        ["data", "import"], ["data", "train-tokenizer"], ["data", "tokenize"], ["data", "split"],
        ["data", "show"], ["data", "check"], ["data", "export"], ["factory", "generate"], ["sft"],
    ],
)  # fmt: skip
def test_every_command_has_help_with_an_example(command: list[str]) -> None:
    assert f"Example: klong {' '.join(command)}" in klong(*command, "--help").stdout
