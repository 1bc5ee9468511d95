"""Kinds, sizes and times of the operations of a program."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks import operations


def test_products_have_their_sizes_and_loops_are_not_counted_twice():
    x, y = jnp.ones((96, 64)), jnp.ones((64, 160))

    def products_of(length):
        def body(carry, _):
            return jnp.sin(carry @ y @ y.T), None

        return lambda x, y: jax.lax.scan(body, x, None, length=length)[0].sum()

    shares = operations.measure(products_of(4), (x, y), calls=2)
    flops = 2 * 96 * 64 * 160
    assert shares["large products"].flops == 2 * 4 * flops
    assert shares["large products"].seconds > 0
    table = operations.make_table(shares)
    assert "large products" in table and table.splitlines()[-1].startswith("| all |")


def test_operations_are_classified_by_what_they_compute():
    def function(x, w, v):
        return jnp.exp(x @ w), x @ v, jnp.log1p(x).max(-1), x.T.copy()

    x, w, v = jnp.ones((64, 32)), jnp.ones((32, 48)), jnp.ones(32)
    text = jax.jit(function).lower(x, w, v).compile().as_text()
    assert text is not None
    kinds = [operation.kind for operation in operations.read_operations(text).values()]
    assert {"products", "exponentials"} <= set(kinds) <= {"products", *operations.KINDS}
    sizes = {op.flops for op in operations.read_operations(text).values() if op.flops}
    assert 2 * 64 * 32 * 48 in sizes
