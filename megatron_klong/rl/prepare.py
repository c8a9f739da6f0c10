"""Everything about a run that can be wrong before a process of it is started. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_klong.agent.tools import describe_tools
from megatron_klong.config import RlConfig
from megatron_klong.model.decoder import DecoderConfig
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.model.layout import check_layout, check_settings
from megatron_klong.rl.exchange import Exchange
from megatron_klong.rl.live import live_rule
from megatron_klong.rollout.task import read_task, task_folders
from megatron_klong.sandbox.bubblewrap import check_hidden
from megatron_klong.training.fingerprint import fingerprint, weights_fingerprint
from megatron_klong.training.memory_check import check_memory
from megatron_klong.training.run_directory import RunDirectory, identity_of
from megatron_klong.trajectory.render import Renderer, load_renderer

_CHANGEABLE = (
    "max_restarts",
    "model.deterministic",
    "model.hf_config",
    "model.loss_chunk_tokens",
    "model.preset",
    "model.recompute*",
    "model.weights",
    "optimizer.offload",
    "parallel.*",
    "rollout.concurrent",
    "run.check_memory",
    "run.dir",
    "sandbox.command_seconds",
    "server*",
    "tasks.*",
    "tokenizer",
    "trainer.chunk_bytes",
    "trainer.keep_last",
    "trainer.sync_seconds",
)
"""Keys that may differ on a resume: where inputs stand, and how a run is executed. What stands there is
compared by content."""

_LOCK_SECONDS = 30.0


@dataclass(frozen=True)
class CheckedRl:
    """What a run is about to use.

    Attributes:
        model: its shape.
        contents: fingerprints of weights, tokenizer and tasks.
    """

    model: DecoderConfig
    contents: dict[str, str]


def check_rl(config: RlConfig) -> CheckedRl:
    """Check model, layout, tokenizer, server and every task against one another; before anything is started.

    Raises:
        ValueError: names the field and the remedy.
    """
    hf = load_hf_config(config.model.shape)
    check_layout(hf, config.parallel)
    check_settings(hf, config.model)
    renderer = load_renderer(config.renderer, config.tokenizer)
    if renderer.vocab_size > hf.vocab_size:
        raise ValueError(
            f"tokenizer={config.tokenizer}: has {renderer.vocab_size} tokens, more than the model's "
            f"vocab_size={hf.vocab_size}; use the model's own tokenizer"
        )
    if load_hf_config(config.server.model) != hf:
        raise ValueError(
            f"server.model={config.server.model} is a model of another shape than "
            f"the trained one ({config.model.shape})"
        )
    check_hidden("run.dir", config.run.dir)
    contents = {"tokenizer.content": renderer.fingerprint}
    seen: dict[str, Path] = {}
    for name, root in (("train", config.tasks.train), ("held_out", config.tasks.held_out)):
        if root is not None:
            check_hidden(f"tasks.{name}", root)
            contents[f"tasks.{name}.content"] = _check_tasks(root, config, renderer, seen)
    assert config.model.weights is not None
    contents["model.weights.content"] = weights_fingerprint(config.model.weights)
    return CheckedRl(hf, contents)


def check_trainer(config: RlConfig, ranks: int, ranks_here: int) -> None:
    """Check the trainer's layout and memory at so many ranks, of which ``ranks_here`` are on this machine.

    Raises:
        ValueError: names the field and the remedy.
    """
    config.parallel.check(ranks)
    hf = load_hf_config(config.model.shape)
    check_layout(hf, config.parallel)
    if config.run.check_memory:
        check_memory(hf, config.trainer_settings, ranks, ranks_here, None)


def _check_tasks(root: Path, config: RlConfig, renderer: Renderer, seen: dict[str, Path]) -> str:
    """Read every task; the fingerprint of them all.

    Args:
        seen: ids of tasks that were read before; added to.
    """
    rule, _ = live_rule(config.window, renderer)
    tools = describe_tools()
    folders = task_folders(root)
    for folder in folders:
        task = read_task(folder).agent
        if task.id in seen:
            raise ValueError(
                f"task {folder}: its id {task.id!r} is that of {seen[task.id]}; ids must differ, and "
                "held-out tasks are never trained on"
            )
        seen[task.id] = folder
        try:
            rule.open(len(renderer.initial_ids(task.messages, tools)))
        except ValueError as error:
            raise ValueError(f"task {folder}: {error}") from error
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    return fingerprint({str(file.relative_to(root)): file for file in files}, whole=True)


def claim_run(run: RunDirectory, config: RlConfig, checked: CheckedRl, *, fresh: bool, role: bool) -> None:
    """Claim the run directory for this run; every process of it does, and the first one makes it.

    Args:
        role: this process is one of several that may be started with settings of their own; the first
            config stays.

    Raises:
        ValueError: the directory holds another run.
    """
    identity = identity_of(config, _CHANGEABLE, checked.model) | checked.contents
    with run.locked("prepare", wait_seconds=_LOCK_SECONDS):
        run.prepare(config, identity, fresh=fresh, keep_config=role)
    Exchange(run.exchange)
