"""One rank of a reinforcement learning trainer: ``python -m megatron_klong.rl.worker RUN_DIR``."""

from __future__ import annotations

from megatron_klong.config import RlConfig, load_config
from megatron_klong.training.rank_entry import run_rank

_TIMEOUT_SECONDS = 1800.0
"""Of a collective: well above what the first rank waits for a server that does not answer."""


def train(config: RlConfig) -> None:
    """Join the process group as torchrun's environment says and run the loop."""
    from megatron_klong.platform import import_megatron

    import_megatron()
    from megatron_klong.rl.trainer import run_rl_trainer
    from megatron_klong.training.initialize import distributed

    with distributed(config.parallel, config.run.seed, timeout_seconds=_TIMEOUT_SECONDS) as platform:
        run_rl_trainer(config, platform)


if __name__ == "__main__":
    run_rank(lambda run_dir: train(load_config(RlConfig, run_dir / "config.yaml")))
