"""Arrays that several processes hold together: their parts, sums and agreements.

Every process must call these functions at the same place of the program.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fast_attention.arrays.dtypes import is_random_key
from fast_attention.mesh.meshes import batch_spec

# Steps until the votes of a step are counted: as far as the host runs ahead of the device.
_STEPS_LATE = 2


class Rows(NamedTuple):
    """Which rows of a batch of all processes a batch of this process holds.

    Attributes:
      first: The first of them.
      last: The one after the last.
      total: Rows of the batch of all.
    """

    first: int
    last: int
    total: int


def own_rows(mesh: Mesh, total: int) -> Rows:
    """The rows that the devices of this process need, and those between them.

    Args:
      mesh: From `meshes.make_mesh`.
      total: Rows of the batch of all processes.

    Raises:
      ValueError: If there are none.
    """
    if total < 1:
        raise ValueError(f"batch_size must be at least 1, but got {total}.")
    rows = NamedSharding(mesh, batch_spec(mesh, (total,)))
    held = [
        index[0].indices(total)[:2]
        for index in rows.addressable_devices_indices_map((total,)).values()
        if index is not None
    ]
    return Rows(min(first for first, _ in held), max(last for _, last in held), total)


def put(array: Any, sharding: NamedSharding) -> jax.Array:
    """As `jax.device_put`, also onto devices of other processes, all of which have this array."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return array if array.sharding == sharding else jax.device_put(array, sharding)
    if is_random_key(array):
        data = put(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)


def put_copy(array: Any, sharding: NamedSharding) -> jax.Array:
    """As `put`, but the result never shares memory with the array."""
    if not sharding.is_fully_addressable:
        # Parts of a global array may be views of what is given.
        return jnp.copy(put(array, sharding))
    if not isinstance(array, jax.Array):
        # JAX may keep the memory of NumPy's arrays, whatever `may_alias` says.
        return put(np.array(array), sharding)
    return jax.device_put(array, sharding, may_alias=False)


def place(
    batch: Mapping[str, Any], shardings: Mapping[str, NamedSharding], rows: Rows | None = None
) -> dict[str, jax.Array]:
    """Makes arrays of all processes from what this one has.

    Args:
      batch: Arrays on the host.
      shardings: Of the results, by their names.
      rows: Which rows `batch` holds; None stands for all of them.
    """
    if all(sharding.is_fully_addressable for sharding in shardings.values()):
        return jax.device_put(dict(batch), dict(shardings))

    def put(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
        first, _, total = rows or Rows(0, len(value), len(value))

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # Asked only for the devices of this process.
            begin, end, _ = index[0].indices(total)
            return value[(slice(begin - first, end - first), *index[1:])]

        return jax.make_array_from_callback((total, *value.shape[1:]), sharding, part)

    return {name: put(np.asarray(value), shardings[name]) for name, value in batch.items()}


def fetch(tree: Any) -> Any:
    """Whole arrays on the host of every process, as `jax.device_get` where there is one."""

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def add_up(numbers: np.ndarray) -> np.ndarray:
    """The sums over all processes of integers of at most 32 bits on the host, modulo their type.

    Raises:
      ValueError: If they have more bits, which JAX would drop.
    """
    if numbers.dtype.itemsize > 4:
        raise ValueError(f"expected integers of at most 32 bits, but got {numbers.dtype}")
    if jax.process_count() == 1 or not len(numbers):
        return numbers
    return np.sum(multihost_utils.process_allgather(numbers), axis=0, dtype=numbers.dtype)


def any_process(flag: bool) -> bool:
    """Whether `flag` is so in any process; all wait for each other."""
    return bool(add_up(np.array([flag], np.int32))[0])


def all_alike(text: str) -> bool:
    """Whether every process gives the same text; all wait for each other."""
    if jax.process_count() == 1:
        return True
    found = multihost_utils.process_allgather(np.array([zlib.crc32(text.encode())], np.uint32))
    return bool((found == found[0]).all())


class Votes:
    """Requests of the processes, known to all at the same step; see `cast`."""

    def __init__(self):
        """Begins without votes."""
        self._mesh = Mesh(np.asarray(jax.devices()), ("devices",))
        self._found: deque[jax.Array] = deque()
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(self._mesh, PartitionSpec()))

    def cast(self, wish: int | None) -> int | None:
        """Sends the request of this process, a positive number, or None.

        Every process must call this after every step.

        Returns:
          The largest request that any process sent two steps ago; a single process gets its own at
          once. Nobody waits for what is not computed yet.
        """
        if jax.process_count() == 1:
            return wish
        votes = place(
            {"votes": np.full(self._mesh.size, wish or 0, np.int32)},
            {"votes": NamedSharding(self._mesh, PartitionSpec("devices"))},
        )
        self._found.append(self._largest(votes["votes"]))
        return int(self._found.popleft()) or None if len(self._found) > _STEPS_LATE else None
