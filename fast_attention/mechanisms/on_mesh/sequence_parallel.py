"""Attention functions for sequences that lie across devices, inside ``jax.shard_map``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fast_attention.mechanisms.attention_fn import AttentionFn
from fast_attention.mechanisms.wrapped import as_attention_fn
from fast_attention.mesh.layout import AxisName


def along_mesh_axis(attention_fn: Callable[..., Any], axis: AxisName) -> AttentionFn:
    """Returns the attention function for a sequence of which every device holds a stretch.

    It is to be called inside ``jax.shard_map`` with the positions of the device, in place of the
    function given, and attends to the whole sequence: stretches lie along ``axis`` in the order of
    the devices. Decoding is as before, on each device by itself.

    Args:
      attention_fn: from :func:`~fast_attention.make_fast_softmax_attention`,
        :func:`~fast_attention.make_fast_generalized_attention` or
        :func:`~fast_attention.make_local_attention`.
      axis: the name of a mesh axis, or a tuple of names.

    Raises:
      ValueError: for a function that cannot attend across devices.
    """
    return as_attention_fn(attention_fn).along_axis(axis)
