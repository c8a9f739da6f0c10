"""Checks of a machine and a model that a person starts: parity, steps and syncs with real numbers."""
