import collections
import gc
import os
import sys
from pathlib import Path

import hypothesis
import jax
import matplotlib
import pytest

from tests.compiling import compile_fast

if not os.environ.get("JAX_PLATFORMS"):
    jax.config.update("jax_platforms", "cpu")
# Where XLA's optimisations matter, `optimized` has them back.
compile_fast()
# A silent broadcast of [T] against [B, T] is a bug more often than a wish.
jax.config.update("jax_numpy_rank_promotion", "raise")

matplotlib.use("Agg")

# The first example of a property compiles, so that no deadline suits all of them.
hypothesis.settings.register_profile("fast_attention", deadline=None, max_examples=20)
hypothesis.settings.load_profile("fast_attention")


def pytest_collection_modifyitems(items):
    """Files that take long come first: at the end, one worker would wait for the other.

    Those of `protein_lm` come last, and so one after the other: they share programs.
    """
    sizes = collections.Counter(item.path for item in items)
    folder = Path(__file__).parent
    items.sort(
        key=lambda item: (
            item.path.parent != folder / "devices",
            item.path.is_relative_to(folder / "protein_lm"),
            -sizes[item.path],
        )
    )


def pytest_collection_finish():
    """Garbage is looked for in what tests make, not among the million objects of the imports.

    Tracing makes many objects and few cycles: with Python's own thresholds, looking for garbage
    takes a tenth of the suite's time.
    """
    gc.set_threshold(20_000, 20, 20)
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _compile_once(pytestconfig, tmp_path_factory):
    """Equal programs are compiled once, by the processes that tests start and by later runs too."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if not folder and pytestconfig.pluginmanager.has_plugin("cacheprovider"):
        folder = pytestconfig.cache.mkdir("compiled")
    folder = folder or tmp_path_factory.mktemp("compiled")
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_disable_most_optimizations": True,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        yield


@pytest.fixture(scope="module")
def optimized():
    """Programs are compiled as users have them, with `tests.compiling.compiled` to the letter."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="module")
def _free_programs():
    """A process that keeps the programs of all modules runs out of memory maps, and crashes.

    What stays in other caches is left out when garbage is looked for in later modules.
    """
    yield
    jax.clear_caches()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _no_gin_configuration():
    """What a module binds is not seen by the fixtures of the next one."""
    yield
    if "gin" in sys.modules:
        sys.modules["gin"].clear_config()
