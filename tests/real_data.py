"""Real trajectories as OpenAI chat JSONL, converted here because their readers are not built yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def mini_swe_agent(folder: Path, out: Path) -> Path:
    """Two single-user runs of 165 and 188 actions; the harness's closing `exit` record becomes metadata."""
    with out.open("w") as stream:
        for file in sorted((folder / "trajectories" / "mini-swe-agent").glob("*.traj.json")):
            raw = json.loads(file.read_text())
            messages = [_without_nulls(message) for message in raw["messages"]]
            ended = messages.pop() if messages[-1]["role"] == "exit" else None
            record = {"id": raw["instance_id"], "messages": messages, "metadata": {"exit": ended}}
            stream.write(json.dumps(record) + "\n")
    return out


def tau_bench(folder: Path, out: Path) -> Path:
    """200 conversations with several user messages and tool calls."""
    file = folder / "trajectories" / "tau-bench" / "gpt-4o-airline.json"
    with out.open("w") as stream:
        for raw in json.loads(file.read_text()):
            record = {
                "id": f"airline-{raw['task_id']}-{raw['trial']}",
                "task_id": raw["task_id"],
                "reward": raw["reward"],
                "messages": raw["traj"],
            }
            stream.write(json.dumps(record) + "\n")
    return out


def _without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    """The chat fields; harness records (`extra`) repeat them at many times the size."""
    return {key: value for key, value in message.items() if value is not None and key != "extra"}
