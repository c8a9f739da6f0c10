"""Writes the generated domain: papers, rubrics, expert trajectories and a tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_klong.factory.replication import (
    RUN_PROGRAM,
    SYSTEM_PROMPT,
    ReplicationTask,
    experiments_done,
    expert_trajectory,
    generate_tasks,
)
from megatron_klong.trajectory.formats import chat_format
from megatron_klong.trajectory.importing import written_when_complete
from megatron_klong.trajectory.interchange.openai_chat import write_openai_chat
from megatron_klong.trajectory.render import Piece, Text
from megatron_klong.trajectory.tokenizer import (
    block_texts,
    phrase_tokenizer,
    save_tokenizer,
    trajectory_texts,
)


@dataclass(frozen=True)
class GenerationReport:
    """What was written.

    Attributes:
        mean_grade: of the expert's work; 1.0, or the expert is wrong or hurried.
    """

    tasks: str
    trajectories: str
    tokenizer: str
    vocab_size: int
    count: int
    messages: int
    mean_grade: float


def generate_domain(
    out: Path,
    *,
    count: int,
    seed: int,
    renderer: str,
    inserted_texts: Iterable[str],
    experiments: tuple[int, int] = (30, 50),
    hurried: float = 0.0,
    on_task: Callable[[], None] = lambda: None,
) -> GenerationReport:
    """Draw tasks, let the expert solve them, and make a tokenizer for what it saw and wrote.

    Args:
        out: folder for ``tasks/``, ``trajectories.jsonl`` and ``tokenizer/``; what an earlier call
            wrote there is replaced.
        count: how many tasks.
        seed: draws them.
        renderer: the chat format that the tokenizer serves.
        inserted_texts: texts that the window rule inserts; they become tokens too.
        experiments: fewest and most of a task.
        hurried: share of the trajectories whose expert hands in early.

    Raises:
        ValueError: unknown renderer, or ``count`` below 1.
    """
    if count < 1:
        raise ValueError(f"--tasks {count}: must be at least 1")
    if not 0 <= hurried <= 1:
        raise ValueError(f"--hurried {hurried}: must be a share, from 0 to 1")
    family = chat_format(renderer)
    asides: list[list[Piece]] = [[Text(text)] for text in inserted_texts]
    asides += [family.aside(text) for text in inserted_texts]
    texts = {text for aside in asides for text in block_texts(aside)}
    messages, grades = 0, 0.0
    file = out / "trajectories.jsonl"
    for earlier in (out / "tasks").glob("*/task.json"):
        shutil.rmtree(earlier.parent)
    with written_when_complete(file) as stream:
        for task in generate_tasks(count, seed, experiments):
            trajectory = expert_trajectory(task, experiments_done(task, hurried))
            stream.write(write_openai_chat(trajectory) + "\n")
            texts.update(trajectory_texts(trajectory, family))
            messages += len(trajectory.messages)
            grades += trajectory.reward or 0.0
            _write_task(task, out / "tasks" / task.id)
            on_task()
    tokenizer = phrase_tokenizer(texts, family)
    save_tokenizer(tokenizer, out / "tokenizer")
    return GenerationReport(
        tasks=str(out / "tasks"),
        trajectories=str(file),
        tokenizer=str(out / "tokenizer"),
        vocab_size=tokenizer.get_vocab_size(),
        count=count,
        messages=messages,
        mean_grade=grades / count,
    )


def _write_task(task: ReplicationTask, folder: Path) -> None:
    """The folder that :func:`megatron_klong.rollout.task.read_task` reads."""
    program = folder / "public" / "bin" / "run"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(RUN_PROGRAM)
    program.chmod(0o755)
    (folder / "public" / "measurements").write_text(task.measurement_table())
    (folder / "paper.md").write_text(task.paper)
    (folder / "rubric.json").write_text(json.dumps(task.rubric(), indent=1) + "\n")
    (folder / "checks.json").write_text(json.dumps(task.checks(), indent=1) + "\n")
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": task.prompt}]
    record = {"id": task.id, "messages": messages, "path": ["bin"]}
    (folder / "task.json").write_text(json.dumps(record) + "\n")
