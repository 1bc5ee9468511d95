"""Device meshes and the layouts of arrays on them."""
