"""The agent: a turn loop over contexts that are the windows of training."""
