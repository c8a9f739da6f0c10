"""Rollouts: a task played in a sandbox, graded, and kept in the journal."""
