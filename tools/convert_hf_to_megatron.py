"""Hugging Face folder -> Megatron checkpoint: the same as `klong convert import`; see its --help."""

import sys

from megatron_klong.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "import"]
    main()
