"""One rank of a sync check: ``python -m megatron_klong.checks.sync_worker JOB.json``."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path

from megatron_klong.checks.sync import SyncJob
from megatron_klong.platform import quiet_imports
from megatron_klong.platform.lifetime import die_with_parent


def main(file: Path) -> int:
    """Run the check; returns the exit code, 2 for numbers that do not agree."""
    quiet_imports()
    from megatron_klong.checks.sync_ranks import DisagreementError, check_on_rank
    from megatron_klong.inference.sync import SyncError
    from megatron_klong.training.initialize import distributed

    job = SyncJob.model_validate_json(file.read_text())
    try:
        with distributed(job.check.parallel, seed=1) as platform:
            check_on_rank(job, platform)
    except (SyncError, DisagreementError, ValueError) as error:
        traceback.print_exc()  # to the rank's log; the last line is what the person sees
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    die_with_parent(int(os.environ["KLONG_LAUNCHER"]), signal.SIGTERM)
    sys.exit(main(Path(sys.argv[1])))
