"""What to run when an accelerator is at hand for a few minutes."""
