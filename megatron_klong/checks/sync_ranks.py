"""What every rank of a sync check does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_klong.checks.sync import TOLERANCE, PromptParity, SyncCheckResult, SyncJob, SyncOutcome
from megatron_klong.checks.trainer import RandomTokens
from megatron_klong.inference.agreement import differences, largest
from megatron_klong.inference.fleet import Fleet
from megatron_klong.inference.sync import Probe, WeightSync
from megatron_klong.inference.transfers import trainer_init_info
from megatron_klong.inference.weight_source import SENDER, MegatronWeightSource
from megatron_klong.platform import Platform
from megatron_klong.training.score import score_tokens


class DisagreementError(RuntimeError):
    """Implementations of the same model differ by more than the tolerance."""


def check_on_rank(job: SyncJob, platform: Platform) -> None:
    """Parity, then optimizer steps, each followed by a sync; the sender writes the result.

    Raises:
        DisagreementError, SyncError: on all ranks alike.
    """
    check, rank = job.check, torch.distributed.get_rank()
    tolerance = TOLERANCE[check.precision]
    model = RandomTokens(platform, check.model, check.parallel, check.precision, check.prompt_tokens)
    prompts = job.prompts
    fleet = Fleet([job.url]) if rank == SENDER else None
    before = score_tokens(model.trainer, prompts)
    parity = [] if fleet is None else _parity(job, fleet, prompts, before)
    _require_agreement(parity, tolerance)

    source = MegatronWeightSource(model.trainer.model, model.hf, everywhere=check.transfer == "ipc")
    init_info = trainer_init_info(check.transfer, rank, fleet, source, check.chunk_bytes)
    sync = WeightSync(source, init_info, fleet, tolerance)
    outcomes, moves, now = [], [], before
    for number in range(1, check.syncs + 1):
        model.step()
        earlier, now = now, score_tokens(model.trainer, prompts)
        moves.append(max(largest(differences(a, b)) for a, b in zip(earlier, now)))
        report = sync.run(f"step-{number}", [Probe(ids, given) for ids, given in zip(prompts, now)])
        outcomes.append(SyncOutcome(**vars(report)))
    if fleet is not None:
        result = SyncCheckResult(
            check=check, tolerance=tolerance, parity=parity, syncs=outcomes, moved=min(moves, default=0.0)
        )
        job.result.write_text(result.model_dump_json(indent=1))


def _parity(
    job: SyncJob, fleet: Fleet, prompts: Sequence[tuple[int, ...]], megatron: Sequence[Sequence[float]]
) -> list[PromptParity]:
    served = [fleet.score(ids)[0] for ids in prompts]
    reference: Sequence[Sequence[float] | None] = job.transformers or [None] * len(prompts)
    return [
        PromptParity(
            tokens=len(ids),
            megatron_transformers=None if theirs is None else largest(differences(ours, theirs)),
            megatron_vllm=largest(differences(ours, answer)),
            vllm_transformers=None if theirs is None else largest(differences(answer, theirs)),
        )
        for ids, ours, answer, theirs in zip(prompts, megatron, served, reference)
    ]


def _require_agreement(parity: Sequence[PromptParity], tolerance: float) -> None:
    """Before anything is trained: who disagrees already must not look as if a sync had done it."""
    found = [
        f"{pair.replace('_', ' and ')} differ by {value:.3g} on a prompt of {prompt.tokens} tokens "
        f"(tolerance {tolerance:g})"
        for prompt in parity
        for pair, value in prompt.model_dump(exclude={"tokens"}).items()
        if value is not None and not value <= tolerance  # a NaN does not pass either
    ]
    shared = [found]
    torch.distributed.broadcast_object_list(shared, SENDER)
    if shared[0]:
        raise DisagreementError(shared[0][0])
