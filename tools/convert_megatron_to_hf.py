"""Megatron checkpoint -> Hugging Face folder: the same as `klong convert export`; see its --help."""

import sys

from megatron_klong.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "export"]
    main()
