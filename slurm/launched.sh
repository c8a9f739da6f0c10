# shellcheck shell=bash
# Sourced by the batch scripts of `klong launch` before their tasks start: KLONG_HOME, KLONG_STATE, KLONG_STEP and
# KLONG_COMMAND are set. Nodes are checked as sft.sbatch does it, and what comes after the tasks follows from their end.
[[ -f "$KLONG_HOME/slurm/common.sh" ]] || { echo "error: no checkout in home=$KLONG_HOME" >&2; exit 2; }
source "$KLONG_HOME/slurm/common.sh"

mkdir -p "$ATTEMPT_LOGS" || fail "state=$KLONG_STATE cannot be written from $(hostname)"
if [[ "$(cat "$KLONG_STATE/$KLONG_STEP.done" 2>/dev/null)" == "$KLONG_COMMAND" ]]; then
    say "$KLONG_STEP is done already"
    exit 0
fi
rm -f "$KLONG_STATE/$KLONG_STEP.failed"
if [[ "${SLURM_HET_SIZE:-1}" == 1 ]]; then
    check_nodes "$SLURM_JOB_NUM_NODES"
else
    rm -rf "$KLONG_STATE/$KLONG_STEP.ended"
    mkdir "$KLONG_STATE/$KLONG_STEP.ended" # where roles say that they have
    for ((group = 0; group < SLURM_HET_SIZE; group++)); do
        nodes="SLURM_JOB_NUM_NODES_HET_GROUP_$group"
        check_nodes "${!nodes}" --het-group="$group"
    done
fi

# launched_ended STATUS: 143 is how klong ends after SIGTERM; but when a task fails, srun ends the others by it, so a
# failure is known by the file that the failed task leaves.
launched_ended() {
    local status="$1"
    trap - EXIT
    if [[ "$status" == 0 ]]; then
        printf '%s\n' "$KLONG_COMMAND" >"$KLONG_STATE/$KLONG_STEP.done"
        say "done"
    elif [[ "$status" == 143 && -z "$ENDED_BY_SLURM" && ! -e "$KLONG_STATE/$KLONG_STEP.failed" ]]; then
        ((ATTEMPT < KLONG_REQUEUES)) || fail "stopped before the time limit; not queued again (slurm.requeues)"
        say "stopped before the time limit; queued again, to go on from its checkpoint"
        scontrol requeue "$SLURM_JOB_ID" || fail "job $SLURM_JOB_ID could not be queued again; launch again"
        sleep 60
    elif [[ -e "$KLONG_STATE/$KLONG_STEP.failed" ]]; then
        status="$(<"$KLONG_STATE/$KLONG_STEP.failed")"
        say "failed with exit code $status; the tasks' log is beside this one"
    fi
    exit "$status"
}
trap 'launched_ended $?' EXIT
