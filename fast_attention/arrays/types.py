"""Shape-annotated array types, from jaxtyping where it is installed (the tests check them).

Annotations are never evaluated outside the tests, so the core install does without jaxtyping.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Num
else:
    try:
        from jaxtyping import Array, Bool, Float, Int, Num
    except ImportError:
        from jax import Array

        class _Unchecked:
            """Stands for ``Float`` and its like: ``Float[Array, "B T"]`` is just ``Array``."""

            def __class_getitem__(cls, item):
                return item[0]

        Bool = Float = Int = Num = _Unchecked

__all__ = ["Array", "Bool", "Float", "Int", "Num"]
