"""Linear attention in Pallas kernels for GPUs (Mosaic)."""
