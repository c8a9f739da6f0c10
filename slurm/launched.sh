# shellcheck shell=bash
# Sourced by the batch scripts of `klong launch` before their tasks start: KLONG_HOME, KLONG_STATE, KLONG_STEP,
# KLONG_DIGEST and KLONG_REQUEUES are set. Nodes are checked as sft.sbatch does it, and what comes after the tasks follows
# from what they say of their end.
[[ -f "$KLONG_HOME/slurm/common.sh" ]] || { echo "error: no checkout in home=$KLONG_HOME" >&2; exit 2; }
# shellcheck source=slurm/common.sh
source "$KLONG_HOME/slurm/common.sh"

# Where tasks say how they ended; srun passes it on.
export KLONG_OUTCOME="$KLONG_STATE/$KLONG_STEP.outcome/$SLURM_JOB_ID-$ATTEMPT"
mkdir -p "$ATTEMPT_LOGS" "$KLONG_OUTCOME" || fail "state=$KLONG_STATE cannot be written from $(hostname)"
if [[ "$(cat "$KLONG_STATE/$KLONG_STEP.done" 2>/dev/null)" == "$KLONG_DIGEST" ]]; then
    say "$KLONG_STEP is done already"
    exit 0
fi
check_all_nodes

# launched_ended STATUS: srun's status is the highest of all tasks, and when one fails it ends the others by SIGTERM; so
# the first failure is known by the file that it leaves. 143 is how klong ends after SIGTERM.
launched_ended() {
    local status="$1" failed="$KLONG_OUTCOME/failed"
    trap - EXIT
    if [[ -e "$failed" ]]; then
        status="$(<"$failed")"
        status="${status:-1}"
        say "failed with exit code $status; the tasks' log is beside this one"
    elif grep -qsx 143 "$KLONG_OUTCOME"/ended-*; then
        status=143 # a role was stopped, whatever the one says that ended first
    fi
    if [[ "$status" == 0 ]]; then
        echo "$KLONG_DIGEST" >"$KLONG_STATE/$KLONG_STEP.done"
        say "done"
    elif [[ "$status" == 143 && -z "$ENDED_BY_SLURM" ]]; then
        ((ATTEMPT < KLONG_REQUEUES)) || fail "stopped before the time limit; not queued again (slurm.requeues)"
        say "stopped before the time limit; queued again, to go on from its checkpoint"
        scontrol requeue "$SLURM_JOB_ID" || fail "job $SLURM_JOB_ID could not be queued again; launch again"
        sleep 60
    fi
    exit "$status"
}
trap 'launched_ended $?' EXIT
