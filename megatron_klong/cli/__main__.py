"""``python -m megatron_klong.cli``."""

from megatron_klong.cli import main

main()
