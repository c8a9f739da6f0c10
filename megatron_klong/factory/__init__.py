"""Research-Factory: tasks and the trajectories of experts on them."""
