"""Trajectories: records, readers and renderers."""
