# shellcheck shell=bash
# What the batch scripts share. They source it first; it reads the settings in env.sh.

say() { echo "[$(date '+%F %T')] $*"; }

fail() {
    echo "error: $*" >&2
    exit 1
}

# shellcheck source=slurm/env.sh
source "$KLONG_HOME/slurm/env.sh"

# Packages of this machine are none of an image's.
[[ "$KLONG_CONTAINER" == none ]] || unset PYTHONPATH PYTHONHOME VIRTUAL_ENV

ATTEMPT="${SLURM_RESTART_COUNT:-0}"
ATTEMPT_LOGS="$KLONG_LOGS/$SLURM_JOB_NAME-$SLURM_JOB_ID/attempt-$ATTEMPT"

# Slurm ends the job: cancelled, preempted, or requeued by somebody. Steps are told by Slurm as well; without a
# handler bash would die before they have saved.
ENDED_BY_SLURM=""
trap 'ENDED_BY_SLURM=yes' TERM

# The command that a task runs, `klong` as the site has it, in COMMAND; options for srun in SRUN.
# shellcheck disable=SC2034 # the scripts use them
prepare_software() {
    SRUN=(--kill-on-bad-exit=1 --wait=0)
    # What is exported here or at submission must win over the image's own values, which pyxis prefers.
    local names
    names="$(compgen -e | grep -E '^(OMP_|CUDA_DEVICE_|NCCL_|GLOO_|PYTHON(FAULT|UNBUF)|KLONG_|WANDB_|MASTER_)' | paste -sd,)"
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
        # The home would bring packages of its own.
        SRUN+=(--container-image="$KLONG_IMAGE" --container-mounts="$KLONG_MOUNTS" --no-container-mount-home
            --container-writable --container-workdir="$KLONG_HOME"
            --container-env="$names")
        COMMAND=(klong)
        ;;
    apptainer)
        [[ -f "$KLONG_IMAGE" ]] || fail "KLONG_CONTAINER=apptainer: KLONG_IMAGE=$KLONG_IMAGE: no such file"
        command -v apptainer >/dev/null || fail "KLONG_CONTAINER=apptainer: no apptainer on $(hostname)"
        # On a node without GPUs --nv only warns. Caches of compilers need a place to write to.
        COMMAND=(apptainer exec --nv --no-home --writable-tmpfs --bind "$KLONG_MOUNTS" --pwd "$KLONG_HOME"
            "$KLONG_IMAGE" klong)
        ;;
    *) fail "KLONG_CONTAINER=$KLONG_CONTAINER: choose none, pyxis or apptainer" ;;
    esac
}

# step SUFFIX: srun with its options in STEP; the suffix is that of a component's variables, or empty. Slurm from
# 22.05 to 23.02 does not take the CPUs of a task from the job.
step() {
    local cpus="SLURM_CPUS_PER_TASK$1" each="SLURM_NTASKS_PER_NODE$1"
    STEP=(srun "${SRUN[@]}")
    [[ -z "${!cpus:-}" ]] || STEP+=(--cpus-per-task="${!cpus}")
    [[ -z "${!each:-}" ]] || STEP+=(--ntasks-per-node="${!each}")
}

# tasks_of GROUP: how many tasks a component has; what Slurm says of them depends on its version.
tasks_of() {
    local tasks="SLURM_NTASKS_HET_GROUP_$1" nodes="SLURM_JOB_NUM_NODES_HET_GROUP_$1"
    local each="SLURM_NTASKS_PER_NODE_HET_GROUP_$1"
    if [[ -n "${!tasks:-}" ]]; then
        echo "${!tasks}"
    elif [[ -n "${!nodes:-}" && -n "${!each:-}" ]]; then
        echo "$((${!nodes} * ${!each}))"
    else
        fail "component $1: Slurm does not say how many tasks it has; give it --ntasks or --ntasks-per-node"
    fi
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

# check_all_nodes: those of the job, of each of its components.
check_all_nodes() {
    local group nodes
    if [[ "${SLURM_HET_SIZE:-1}" == 1 ]]; then
        check_nodes "$SLURM_JOB_NUM_NODES"
        return
    fi
    for ((group = 0; group < SLURM_HET_SIZE; group++)); do
        nodes="SLURM_JOB_NUM_NODES_HET_GROUP_$group"
        check_nodes "${!nodes}" --het-group="$group"
    done
}

# task_status STATUS REPORT: how the tasks of an srun ended, by what it has said of the first that ended badly. Its
# own status is the highest of all, and when a task fails it ends the others by SIGTERM. 143 is how klong ends after
# SIGTERM, with a checkpoint if it had begun.
task_status() {
    local status="$1" report="$2" first
    cat "$report" >&2
    first="$(grep -E '^srun: error: .*: tasks? [0-9,-]+: ' "$report" | head -n 1)"
    case "$first" in
    "" | *Terminated*) echo "$status" ;;
    *"Exited with exit code "*) grep -oE '[0-9]+$' <<<"$first" ;;
    *"Out Of Memory"* | *Killed*) echo 137 ;;
    *) echo 1 ;;
    esac
}

# finish STATUS: what comes after the work.
finish() {
    local status="$1" errors
    if [[ "$status" == 0 ]]; then
        say "done"
        exit 0
    fi
    if [[ -n "$ENDED_BY_SLURM" ]]; then
        say "ended by Slurm (exit code $status); if it is queued again, it goes on from its last checkpoint"
        exit "$status"
    fi
    if [[ "$status" == 143 ]]; then
        ((ATTEMPT < KLONG_REQUEUES)) ||
            fail "stopped before the time limit; not queued again after $KLONG_REQUEUES times (KLONG_REQUEUES)"
        say "stopped before the time limit; queued again, to go on from its checkpoint"
        scontrol requeue "$SLURM_JOB_ID" || fail "job $SLURM_JOB_ID could not be queued again; submit it again"
        # Slurm ends this script now.
        sleep 60
    fi
    echo "failed with exit code $status; of the logs in $ATTEMPT_LOGS:" >&2
    errors="$(grep -hE '^(error:|.*Error: |slurmstepd.*: error)' "$ATTEMPT_LOGS"/*.log || true)"
    if [[ -n "$errors" ]]; then
        # Every rank says much the same.
        sort <<<"$errors" | uniq -c | sort -rn | awk 'NR <= 20' >&2
    else
        tail -n 20 "$ATTEMPT_LOGS"/*.log >&2 || true
    fi
    exit "$status"
}
