"""Attention functions for sequences that lie across devices, inside ``jax.shard_map``."""

from __future__ import annotations

import dataclasses
from typing import Any

from fast_attention.fast_attention_fn import FastAttention
from fast_attention.local_attention_fn import LocalAttention
from fast_attention.mesh_layout import AxisName


def along_mesh_axis(attention_fn: Any, axis: AxisName) -> Any:
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
    if isinstance(attention_fn, FastAttention) and attention_fn.exact_window is not None:
        raise ValueError(
            f"exact_window={attention_fn.exact_window} cannot be used along a mesh axis: leave it "
            "out, or give some heads to make_local_attention."
        )
    if isinstance(attention_fn, FastAttention) and attention_fn.calibration == "call":
        raise ValueError(
            "Parameters from each call would be those of a device's stretch alone: make the "
            'function with calibration="stored", and calibrate it.'
        )
    if not isinstance(attention_fn, FastAttention | LocalAttention):
        name = getattr(attention_fn, "__name__", type(attention_fn).__name__)
        raise ValueError(
            f"{name} needs all positions on one device and cannot attend along the mesh axis "
            f"{axis!r}: use make_fast_softmax_attention or make_fast_generalized_attention, whose "
            "devices exchange states, or make_local_attention, whose devices exchange the edges of "
            "their stretches."
        )
    return dataclasses.replace(attention_fn, sequence_axis=axis)
