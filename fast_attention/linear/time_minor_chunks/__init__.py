"""Linear attention in chunks on XLA in the layout of a TPU: positions in lanes."""
