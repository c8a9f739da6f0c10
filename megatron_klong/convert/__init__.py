"""Hugging Face <-> Megatron checkpoints, streamed tensor by tensor through the weight map."""
