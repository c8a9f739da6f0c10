#!/usr/bin/env bash
# The whole system on one machine: long trajectories, split, trained on by Megatron-Core on 4 ranks
# (TP2 PP2 EP2), served by vLLM; then reinforcement learning in sandboxes, in two stages.
# Usage: examples/quickstart/run.sh [KEY=VALUE of sft.yaml]...      BIN is the folder of the `klong` command.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=${BIN:-.venv/bin}
klong=$bin/klong
work=runs/quickstart
mkdir -p $work
: >$work/seconds.tsv

phase() { # NAME COMMAND...: run it, and note how long it took
    local name=$1 start=$SECONDS
    shift
    "$@"
    printf '%s\t%s\n' "$name" $((SECONDS - start)) >>$work/seconds.tsv
}

# The window of sft.yaml and rl.yaml: what is reported here is what is trained on there.
window=(--max-tokens 256 --overlap 48 --reserve-generation 16 --reserve-observation 16
        --prefix reading --max-prefix-fraction 0.4)
size=(--min-experiments 12 --max-experiments 16)

echo "== 1. Generate replication tasks. A scripted expert solves 400 through tools, and hands most of them"
echo "      in too early; 64 others are for reinforcement learning, 32 are held out"
phase generate "$klong" factory generate --tasks 400 --seed 0 "${size[@]}" --hurried 0.8 --out $work/domain
phase generate "$klong" factory generate --tasks 64 --seed 1 "${size[@]}" --out $work/rl-tasks
phase generate "$klong" factory generate --tasks 32 --seed 2 "${size[@]}" --out $work/held-out-tasks

echo "== 2. Import the trajectories"
phase data "$klong" data import $work/domain/trajectories.jsonl --out $work/data/trajectories.jsonl

echo "== 3. Render every message once, store the tokens"
phase data "$klong" data tokenize $work/data/trajectories.jsonl --tokenizer $work/domain/tokenizer \
    --out $work/data/replication

echo "== 4. Split into windows of 256 tokens: the paper stays, history drops, overlap is masked"
phase data "$klong" data split $work/data/replication "${window[@]}" --row-tokens 1024

echo "== 5. Train a GLM-4.5-shaped mixture of experts with Megatron-Core on 4 ranks"
phase sft "$klong" sft examples/quickstart/sft.yaml "$@"

echo "== 6. Export the trained weights as a Hugging Face folder"
run=$work/sft rl=$work/rl
for setting in "$@"; do
    if [[ $setting == run.dir=* ]]; then run=${setting#run.dir=} rl=${setting#run.dir=}-rl; fi
done
rm -rf $work/exported
phase export "$klong" convert export "$run" $work/exported --tokenizer $work/domain/tokenizer

echo "== 7. Serve them by vLLM: Megatron, transformers and vLLM must agree; then Megatron trains on, and"
echo "      its weights go into the running server"
phase sync_check "$klong" sync-check $work/exported --tensor 2 --pipeline 2 --expert 2 --syncs 2 \
    --out $work/sync-check

echo "== 8. Reinforcement learning: agents in sandboxes, executable grades, two stages with growing limits"
phase rl "$klong" rl examples/quickstart/rl.yaml run.dir="$rl"

echo "== 9. What came out"
"$bin/python" examples/quickstart/summary.py $work "$run" "$rl"
