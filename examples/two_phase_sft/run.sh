#!/usr/bin/env bash
# Supervised training in two phases, general data and then split trajectories, on a made-up little of each.
# Usage: examples/two_phase_sft/run.sh [KEY=VALUE of sft.yaml]...      BIN is the folder of the `klong` command.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=${BIN:-.venv/bin}
klong=$bin/klong
work=runs/two-phase

"$klong" factory generate --tasks 120 --seed 0 --min-experiments 12 --max-experiments 16 --out $work/domain
"$bin/python" examples/two_phase_sft/make_data.py $work/chats
for kind in chat code math search; do
    "$klong" data import $work/chats/$kind.jsonl --out $work/imported/$kind.jsonl
    "$klong" data tokenize $work/imported/$kind.jsonl --tokenizer $work/domain/tokenizer --out $work/data/$kind
done
"$klong" data import $work/domain/trajectories.jsonl --out $work/imported/replication.jsonl
"$klong" data tokenize $work/imported/replication.jsonl --tokenizer $work/domain/tokenizer \
    --out $work/data/replication

echo "== What the run will be"
"$klong" sft examples/two_phase_sft/sft.yaml "$@" --dry-run
echo "== The run"
"$klong" sft examples/two_phase_sft/sft.yaml "$@"
