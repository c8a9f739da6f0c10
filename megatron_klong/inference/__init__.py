"""vLLM as a process beside the trainer: started, spoken to in tokens, and given new weights."""
