import os

import hypothesis
import jax
import matplotlib

if not os.environ.get("JAX_PLATFORMS"):
    jax.config.update("jax_platforms", "cpu")
# Sharding tests need several devices; a CPU can stand for four.
jax.config.update("jax_num_cpu_devices", 4)
# A silent broadcast of [T] against [B, T] is a bug more often than a wish.
jax.config.update("jax_numpy_rank_promotion", "raise")

matplotlib.use("Agg")

# The first example of a property compiles, so that no deadline suits all of them.
hypothesis.settings.register_profile("fast_attention", deadline=None, max_examples=20)
hypothesis.settings.load_profile("fast_attention")
