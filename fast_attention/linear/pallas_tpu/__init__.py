"""Linear attention in TPU kernels written with Pallas (Mosaic)."""
