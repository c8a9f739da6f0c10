"""Progressive reinforcement learning: rollouts, experience, batches, and the trainer's part."""
