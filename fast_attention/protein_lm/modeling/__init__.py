"""The model, its state and its training step."""
