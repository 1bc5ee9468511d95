"""Linear attention in chunks, compiled by XLA."""
