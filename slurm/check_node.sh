#!/bin/bash
# One line: whether this node is fit, its name, its time; or what is wrong with it.
#   check_node.sh SHARED_FILE CONTENT TMP_GIB
set -euo pipefail
shared="$1" content="$2" tmp_gib="$3"
node="${SLURMD_NODENAME:-$(hostname)}"

bad() {
    echo "bad $node $*"
    exit 0
}

[[ "$(cat "$shared" 2>/dev/null)" == "$content" ]] ||
    bad "does not see $shared: KLONG_LOGS must be on a file system that all nodes share"
free="$(df --output=avail -BG /tmp | tail -1 | tr -dc 0-9)"
((free >= tmp_gib)) || bad "/tmp has $free GiB free, less than KLONG_TMP_GIB=$tmp_gib"

wanted="${SLURM_GPUS_ON_NODE:-0}"
if ((wanted > 0)); then
    command -v nvidia-smi >/dev/null || bad "no nvidia-smi for its $wanted GPUs"
    query=index,memory.used,ecc.errors.uncorrected.volatile.total,remapped_rows.failure
    gpus="$(nvidia-smi --query-gpu="$query" --format=csv,noheader,nounits)" || bad "nvidia-smi fails: $gpus"
    found="$(grep -c . <<<"$gpus" || true)"
    ((found >= wanted)) || bad "$found of $wanted GPUs answer"
    while IFS=', ' read -r index used errors remapped; do
        ((used < 2000)) || bad "GPU $index has $used MiB in use by somebody else"
        [[ ! "$errors" =~ ^[1-9] ]] || bad "GPU $index has $errors uncorrected memory errors"
        [[ ! "$remapped" =~ ^[1-9] ]] || bad "GPU $index could not remap rows of its memory"
    done <<<"$gpus"
fi
echo "ok $node $(date +%s)"
