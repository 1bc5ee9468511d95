"""Linear attention on XLA with the chunks of a block in parallel, for GPUs."""
