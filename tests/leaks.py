"""Tracers that outlive their trace."""

import contextlib
import gc

import jax


@contextlib.contextmanager
def checking_leaks():
    """`jax.checking_leaks`, which looks for garbage at every trace, within what is made here alone.

    All that a test process has made before would otherwise be searched each time.
    """
    gc.collect()
    gc.freeze()
    try:
        with jax.checking_leaks():
            yield
    finally:
        gc.unfreeze()
