#!/usr/bin/env bash
# First light: long trajectories, split, trained on by Megatron-Core on 4 ranks (TP2 PP2 EP2).
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
