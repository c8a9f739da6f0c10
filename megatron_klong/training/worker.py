"""One rank of a training run: ``python -m megatron_klong.training.worker RUN_DIR``.

Started by ``klong sft`` on one node; reads the resolved config of the run directory.
"""

from __future__ import annotations

from megatron_klong.config import SftConfig, load_config
from megatron_klong.training.rank_entry import run_rank


def train(config: SftConfig) -> None:
    """Join the process group as torchrun's environment says and run the loop."""
    from megatron_klong.platform import import_megatron

    import_megatron()
    from megatron_klong.training.initialize import distributed
    from megatron_klong.training.sft import run_sft

    # The watchdog comes first and says who hangs; after it, torch would say who waited.
    limit = 2 * config.training.hang_seconds + 60
    with distributed(config.parallel, config.run.seed, timeout_seconds=limit) as platform:
        run_sft(config, platform)


if __name__ == "__main__":
    run_rank(lambda run_dir: train(load_config(SftConfig, run_dir / "config.yaml")))
