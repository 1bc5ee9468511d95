"""The error for functions without forward mode differentiation, in place of that of JAX."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def naming_forward_mode(what: str, instead: str) -> Iterator[None]:
    """Names what has forward mode in the error of code that has a gradient of its own.

    Args:
      what: what was called, for the message.
      instead: what to do.

    Raises:
      TypeError: in place of that of ``jax.custom_vjp``.
    """
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            f"{what} has no forward mode differentiation (jax.jvp, jax.jacfwd) in this "
            f"implementation: {instead}."
        ) from error
