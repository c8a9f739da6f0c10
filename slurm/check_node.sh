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
    smi=(nvidia-smi "--format=csv,noheader,nounits")
    [[ -z "${CUDA_VISIBLE_DEVICES:-}" ]] || smi+=(--id="$CUDA_VISIBLE_DEVICES")
    gpus="$("${smi[@]}" --query-gpu=index,memory.used,ecc.errors.uncorrected.volatile.total)" ||
        bad "nvidia-smi fails: $gpus"
    found="$(grep -c . <<<"$gpus" || true)"
    ((found >= wanted)) || bad "$found of $wanted GPUs answer"
    while IFS=', ' read -r index used errors; do
        [[ ! "$used" =~ ^[0-9]+$ ]] || ((used < 2000)) || bad "GPU $index has $used MiB in use by somebody else"
        [[ ! "$errors" =~ ^[1-9] ]] || bad "GPU $index has $errors uncorrected memory errors"
    done <<<"$gpus"
    # Not every driver knows it.
    rows="$("${smi[@]}" --query-remapped-rows=gpu_bus_id,remapped_rows.failure 2>/dev/null || true)"
    [[ ! "$rows" =~ ,\ *(Yes|[1-9]) ]] || bad "a GPU could not remap rows of its memory: $(paste -sd' ' <<<"$rows")"
fi
echo "ok $node $(date +%s)"
