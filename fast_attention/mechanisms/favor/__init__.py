"""Linear attention through feature maps: FAVOR+ and generalized kernels."""
