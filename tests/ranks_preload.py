"""What the process imports that all ranks of tests are forks of."""

from megatron_klong.platform import import_megatron

import_megatron()

import megatron_klong.training.initialize  # noqa: E402, F401
