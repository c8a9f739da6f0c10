"""Everything about a run that can be wrong before a process of it is started. Imports no torch."""

from __future__ import annotations

from megatron_klong.config import RlConfig
from megatron_klong.model.hf_config import Glm4MoeConfig, load_hf_config
from megatron_klong.model.layout import check_layout
from megatron_klong.rl.exchange import Exchange
from megatron_klong.rollout.task import task_folders
from megatron_klong.training.run_directory import RunDirectory, identity_of
from megatron_klong.trajectory.render import load_renderer

_CHANGEABLE = (
    "evaluation.",
    "max_restarts",
    "model.hf_config",
    "parallel",
    "rollout.concurrent",
    "run.dir",
    "sandbox.command_seconds",
    "server",
    "tasks.",
    "tokenizer",
    "trainer.chunk_bytes",
    "trainer.keep_last",
)
"""Keys that may differ on a resume: where inputs stand, and how a run is executed."""


def check_rl(config: RlConfig) -> Glm4MoeConfig:
    """Check model, layout, tokenizer, server and tasks against one another; before anything is started.

    Raises:
        ValueError: names the field and the remedy.
    """
    hf = load_hf_config(config.model.hf_config)
    check_layout(hf, config.parallel)
    renderer = load_renderer(config.renderer, config.tokenizer)
    if renderer.vocab_size > hf.vocab_size:
        raise ValueError(
            f"tokenizer={config.tokenizer}: has {renderer.vocab_size} tokens, more than the model's "
            f"vocab_size={hf.vocab_size}; use the model's own tokenizer"
        )
    for folder in (config.tasks.train, config.tasks.held_out):
        if folder is not None:
            task_folders(folder)
    if load_hf_config(config.server.model) != hf:
        raise ValueError(
            f"server.model={config.server.model} is a model of another shape than "
            f"model.hf_config={config.model.hf_config}"
        )
    return hf


def prepare_run(config: RlConfig, *, fresh: bool = False) -> RunDirectory:
    """Claim the run directory for this run; every role does, and the first one makes it.

    Raises:
        ValueError: the config is wrong, or the directory holds another run.
    """
    hf = check_rl(config)
    run = RunDirectory(config.run.dir)
    with run.locked("prepare", wait=True):
        run.prepare(config, identity_of(config, _CHANGEABLE, hf), fresh=fresh)
    Exchange(run.exchange)
    return run
