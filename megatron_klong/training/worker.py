"""One rank of a training run: ``python -m megatron_klong.training.worker RUN_DIR``.

Started by ``klong sft`` on one node; reads the resolved config of the run directory.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from megatron_klong.config import SftConfig, load_config
from megatron_klong.platform.lifetime import die_with_parent


def main(run_dir: Path) -> int:
    """Train; returns the exit code, 2 for an error of the user's."""
    try:
        train(load_config(SftConfig, run_dir / "config.yaml"))
    except ValueError as error:
        traceback.print_exc()  # to the rank's log; the last line is what the person sees
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def train(config: SftConfig) -> None:
    """Join the process group as torchrun's environment says and run the loop."""
    from megatron_klong.platform import quiet_imports

    quiet_imports()
    from megatron_klong.training.initialize import distributed
    from megatron_klong.training.sft import run_sft

    with distributed(config.parallel, config.run.seed) as platform:
        run_sft(config, platform)


if __name__ == "__main__":
    if "KLONG_LAUNCHER" in os.environ:
        die_with_parent(int(os.environ["KLONG_LAUNCHER"]))
    sys.exit(main(Path(sys.argv[1])))
