"""One rank of a sync check: ``python -m megatron_klong.checks.sync_worker JOB.json``."""

from __future__ import annotations

from pathlib import Path

from megatron_klong.checks.sync import SyncJob
from megatron_klong.platform import import_megatron
from megatron_klong.training.rank_entry import RankError, run_rank


def check(file: Path) -> None:
    """Run the check; numbers that do not agree are a RankError."""
    import_megatron()
    from megatron_klong.checks.sync_ranks import DisagreementError, check_on_rank
    from megatron_klong.inference.sync import SyncError
    from megatron_klong.training.initialize import distributed

    job = SyncJob.model_validate_json(file.read_text())
    try:
        with distributed(job.check.parallel, seed=1) as platform:
            check_on_rank(job, platform)
    except (SyncError, DisagreementError) as error:
        raise RankError(str(error)) from error


if __name__ == "__main__":
    run_rank(check)
