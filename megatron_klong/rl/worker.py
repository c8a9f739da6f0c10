"""One rank of a reinforcement learning trainer: ``python -m megatron_klong.rl.worker RUN_DIR``."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from megatron_klong.config import RlConfig, load_config
from megatron_klong.platform.lifetime import die_with_parent


def main(run_dir: Path) -> int:
    """Train; returns the exit code, 2 for an error of the user's."""
    try:
        train(load_config(RlConfig, run_dir / "config.yaml"))
    except ValueError as error:
        traceback.print_exc()  # to the rank's log; the last line is what the person sees
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def train(config: RlConfig) -> None:
    """Join the process group as torchrun's environment says and run the loop."""
    from megatron_klong.platform import quiet_imports

    quiet_imports()
    from megatron_klong.rl.trainer import run_rl_trainer
    from megatron_klong.training.initialize import distributed

    with distributed(config.parallel, config.run.seed) as platform:
        run_rl_trainer(config, platform)


if __name__ == "__main__":
    if "KLONG_LAUNCHER" in os.environ:
        die_with_parent(int(os.environ["KLONG_LAUNCHER"]))
    sys.exit(main(Path(sys.argv[1])))
