# shellcheck shell=bash
# What the batch scripts share. They source it first; it reads the settings in env.sh.

say() { echo "[$(date '+%F %T')] $*"; }

fail() {
    echo "error: $*" >&2
    exit 1
}

[[ -n "${SLURM_JOB_ID:-}" ]] || fail "this is a batch script: submit it with sbatch"
[[ -f "$KLONG_HOME/slurm/env.sh" ]] ||
    fail "no slurm/env.sh in $KLONG_HOME; submit from the checkout's top folder, or set KLONG_HOME to it"
# shellcheck source=slurm/env.sh
source "$KLONG_HOME/slurm/env.sh"

ATTEMPT="${SLURM_RESTART_COUNT:-0}"
ATTEMPT_LOGS="$KLONG_LOGS/$SLURM_JOB_NAME-$SLURM_JOB_ID/attempt-$ATTEMPT"

# Slurm ends the job: cancelled, preempted, or requeued by somebody. Steps are told by Slurm as well; without a
# handler bash would die before they have saved.
ENDED_BY_SLURM=""
trap 'ENDED_BY_SLURM=yes' TERM

# The command that a task runs, `klong` as the site has it, in COMMAND; options for srun in SRUN.
prepare_software() {
    SRUN=(--kill-on-bad-exit=1 --wait=0)
    case "$KLONG_CONTAINER" in
    none)
        [[ -x "$KLONG_VENV/bin/klong" ]] ||
            fail "KLONG_VENV=$KLONG_VENV has no bin/klong; run make install there, or set KLONG_CONTAINER"
        COMMAND=("$KLONG_VENV/bin/klong")
        ;;
    pyxis)
        [[ -n "$KLONG_IMAGE" ]] || fail "KLONG_CONTAINER=pyxis needs KLONG_IMAGE"
        # Asked before grep, which would end srun early and so fail the pipe.
        local options
        options="$(srun --help 2>&1)"
        [[ "$options" == *--container-image* ]] ||
            fail "KLONG_CONTAINER=pyxis: this cluster's srun has no --container-image; use apptainer or none"
        [[ "$KLONG_IMAGE" != /* || -f "$KLONG_IMAGE" ]] || fail "KLONG_IMAGE=$KLONG_IMAGE: no such file"
        # The home would bring packages of its own; values of the image would win over those in env.sh.
        SRUN+=(--container-image="$KLONG_IMAGE" --container-mounts="$KLONG_MOUNTS" --no-container-mount-home
            --container-writable --container-workdir="$KLONG_HOME"
            --container-env="OMP_NUM_THREADS,CUDA_DEVICE_MAX_CONNECTIONS")
        COMMAND=(klong)
        ;;
    apptainer)
        [[ -f "$KLONG_IMAGE" ]] || fail "KLONG_CONTAINER=apptainer: KLONG_IMAGE=$KLONG_IMAGE: no such file"
        command -v apptainer >/dev/null || fail "KLONG_CONTAINER=apptainer: no apptainer on $(hostname)"
        COMMAND=(apptainer exec --no-home --bind "$KLONG_MOUNTS" --pwd "$KLONG_HOME")
        [[ "${SLURM_GPUS_ON_NODE:-0}" == 0 ]] || COMMAND+=(--nv)
        COMMAND+=("$KLONG_IMAGE" klong)
        ;;
    *) fail "KLONG_CONTAINER=$KLONG_CONTAINER: choose none, pyxis or apptainer" ;;
    esac
    # Slurm from 22.05 to 23.02 does not hand the job's --cpus-per-task on to srun.
    [[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || SRUN+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
}

begin() {
    mkdir -p "$ATTEMPT_LOGS" || fail "KLONG_LOGS=$KLONG_LOGS cannot be written from $(hostname)"
    prepare_software
    say "job $SLURM_JOB_ID ($SLURM_JOB_NAME), attempt $ATTEMPT; logs in $ATTEMPT_LOGS"
}

# check_nodes NODES [SRUN OPTION]...: refuse to start on a node that is not fit; every reason is printed.
check_nodes() {
    local before after report bad nodes="$1"
    shift
    report="$ATTEMPT_LOGS/nodes.txt"
    before="$(date +%s)"
    echo "$SLURM_JOB_ID" >"$ATTEMPT_LOGS/shared"
    srun "$@" --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --output="$report" --open-mode=truncate \
        bash "$KLONG_HOME/slurm/check_node.sh" "$ATTEMPT_LOGS/shared" "$SLURM_JOB_ID" "$KLONG_TMP_GIB" ||
        fail "the nodes could not be checked; see $report"
    after="$(date +%s)"
    bad="$(awk -v first="$((before - KLONG_CLOCK_SECONDS))" -v last="$((after + KLONG_CLOCK_SECONDS))" '
        $1 == "bad" { print }
        $1 == "ok" && ($3 < first || $3 > last) {
            print "bad", $2, "its clock is", ($3 < first ? $3 - first : $3 - last), "seconds off beyond what is allowed"
        }' "$report")"
    if [[ -n "$bad" ]]; then
        echo "$bad" >&2
        fail "nodes that are not fit; submit again with --exclude=$(awk '{ print $2 }' <<<"$bad" | sort -u | paste -sd,)"
    fi
    say "$(grep -c '^ok' "$report") nodes checked"
}

# The exit status of tasks that srun has reported in the file. 143 is how klong ends after SIGTERM, with a
# checkpoint; but srun also sends that to all tasks when one has failed, and reports the highest status.
task_status() {
    local status="$1" report="$2" codes
    cat "$report" >&2
    codes="$(grep -oE 'Exited with exit code [0-9]+' "$report" | awk '$5 != 143 { print $5; exit }')"
    echo "${codes:-$status}"
}

# finish STATUS: what comes after the work.
finish() {
    local status="$1"
    if [[ "$status" == 0 ]]; then
        say "done"
        exit 0
    fi
    if [[ -n "$ENDED_BY_SLURM" ]]; then
        say "ended by Slurm after the work was saved; if it was queued again, it goes on"
        exit "$status"
    fi
    if [[ "$status" == 143 ]]; then
        if ((ATTEMPT < KLONG_REQUEUES)); then
            say "stopped before the time limit, saved; queued again"
            scontrol requeue "$SLURM_JOB_ID"
            # Slurm ends this script now.
            sleep 60
        fi
        fail "stopped before the time limit, saved; not queued again after $KLONG_REQUEUES times (KLONG_REQUEUES)"
    fi
    echo "failed with exit code $status; of the logs in $ATTEMPT_LOGS:" >&2
    grep -hE '^(error:|.*Error: |srun: error|slurmstepd: error)' "$ATTEMPT_LOGS"/*.log | sort | uniq -c | sort -rn | head -20 >&2 ||
        tail -n 20 "$ATTEMPT_LOGS"/*.log >&2
    exit "$status"
}
