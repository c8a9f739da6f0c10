"""How much memory and time a layout needs, before there are any GPUs. Imports no torch."""
