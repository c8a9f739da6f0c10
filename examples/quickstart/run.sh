#!/usr/bin/env bash
# Long trajectories, split, trained on by Megatron-Core on 4 ranks (TP2 PP2 EP2), served by vLLM.
# Usage: examples/quickstart/run.sh      BIN is the folder of the `klong` command.
set -euo pipefail
cd "$(dirname "$0")/../.."
klong=${BIN:-.venv/bin}/klong
work=runs/quickstart

# The window of sft.yaml: what is reported here is what is trained on there.
window=(--max-tokens 256 --overlap 48 --reserve-generation 16 --reserve-observation 16
        --prefix reading --max-prefix-fraction 0.4)

echo "== 1. Generate replication tasks; a scripted expert solves them through tools"
"$klong" factory generate --tasks 150 --seed 0 --out $work/domain

echo "== 2. Import the trajectories"
"$klong" data import $work/domain/trajectories.jsonl --out $work/data/trajectories.jsonl

echo "== 3. Render every message once, store the tokens"
"$klong" data tokenize $work/data/trajectories.jsonl --tokenizer $work/domain/tokenizer \
    --out $work/data/replication

echo "== 4. Split into windows of 256 tokens: the paper stays, history drops, overlap is masked"
"$klong" data split $work/data/replication "${window[@]}" --row-tokens 1024

echo "== 5. Train a GLM-4.5-shaped mixture of experts with Megatron-Core on 4 ranks"
"$klong" sft examples/quickstart/sft.yaml "$@"

echo "== 6. Export the trained weights as a Hugging Face folder"
run=$work/sft
for setting in "$@"; do
    if [[ $setting == run.dir=* ]]; then run=${setting#run.dir=}; fi
done
rm -rf $work/exported
"$klong" convert export "$run" $work/exported --tokenizer $work/domain/tokenizer

echo "== 7. Serve them by vLLM: Megatron, transformers and vLLM must agree; then Megatron trains on, and"
echo "      its weights go into the running server"
"$klong" sync-check $work/exported --tensor 2 --pipeline 2 --expert 2 --out $work/sync-check
