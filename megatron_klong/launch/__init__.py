"""Experiments of several steps by nemo-run: on this machine, in containers, or on Slurm.

Imports ``config`` of ours, and of ``platform`` how signals are handled; works in an environment without torch
(``make launch-env``).
"""

from megatron_klong.launch.experiment import Launched, dry_run, forget, launch

__all__ = ["Launched", "dry_run", "forget", "launch"]
