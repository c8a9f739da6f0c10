"""Grading: rubric trees, and checks that are carried out in a sandbox."""
