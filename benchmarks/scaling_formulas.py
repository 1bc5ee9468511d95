"""What a training step needs of each device of a mesh, in memory and communication, on paper.

A causal or bidirectional Performer with plain softmax features, as `models.Transformer` builds it:
rotary positions, no dropout, AdamW, parameters in float32 and ``remat``. Streams, features and what
crosses the mesh are counted in `itemsize` bytes, states of attention in float32.

Letters: P parameters, N layers, d width of the stream, H heads, D head width, f width of
feed-forward layers, M features, A letters of the vocabulary, B rows of a batch, L their length, t
tokens on one device.
"""

from __future__ import annotations

import dataclasses
import math

WORKING_SET = 21.0
"""Numbers a token, over d: the largest part between two saved streams, with its gradients.

Measured, not derived: what XLA on CPU plans for a model with f = 4 d and M = 4 D, in float32.
"""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and a batch.

    Attributes:
      layers: N.
      width: d.
      heads: H, with D = d / H.
      mlp: f.
      features: M.
      letters: A.
      rows: B, over all devices.
      length: L.
      itemsize: bytes of a number in the streams.
    """

    layers: int
    width: int
    heads: int
    mlp: int
    features: int
    letters: int
    rows: int
    length: int
    itemsize: int = 4

    @property
    def matrices(self) -> int:
        """Parameters that are divided: ``N (4 d^2 + 2 d f) + 2 A d``."""
        d = self.width
        return self.layers * (4 * d * d + 2 * d * self.mlp) + 2 * self.letters * d

    @property
    def vectors(self) -> int:
        """Parameters that every device has: norms and biases, ``N (f + 5 d) + 2 d + A``."""
        return self.layers * (self.mlp + 5 * self.width) + 2 * self.width + self.letters

    @property
    def parameters(self) -> int:
        """P."""
        return self.matrices + self.vectors

    @property
    def flops(self) -> float:
        """Floating point operations of a step over all devices, recomputation included.

        8 for each parameter of a matrix and token (2 forward, 2 recomputed, 4 backward), and as
        often 2 for each of the ``H (2 M D)`` products with the features and the ``2 H M D`` with
        the state.
        """
        attention = 4 * self.layers * self.width * self.features
        return 8.0 * (self.matrices + attention) * self.rows * self.length


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the axes of a mesh, see `fast_attention.mesh.meshes.make_mesh`."""

    data: int = 1
    fsdp: int = 1
    sequence: int = 1
    model: int = 1

    @property
    def devices(self) -> int:
        """How many there are."""
        return self.data * self.fsdp * self.sequence * self.model

    def __str__(self) -> str:
        """Names the axes of more than one device."""
        sizes = dataclasses.asdict(self).items()
        return " x ".join(f"{name} {size}" for name, size in sizes if size > 1) or "1 device"


def tokens(shape: Shape, layout: Layout) -> float:
    """t, of the rows and stretches of one device."""
    return shape.rows * shape.length / (layout.data * layout.fsdp * layout.sequence)


def state_bytes(shape: Shape, layout: Layout) -> float:
    """Parameters and two moments, and the projections, which every device has."""
    divided = shape.matrices / (layout.fsdp * layout.model) + shape.vectors
    projections = shape.layers * shape.features * shape.width / shape.heads
    return 4 * (3 * divided + projections)


def working_bytes(shape: Shape, layout: Layout) -> float:
    """Gradients, the stream before each of the 2 N parts, and what the largest part needs.

    Gradients count twice where they are summed over devices: what goes in and what comes out.
    Of the last, what lies along heads and feed-forward widths is divided along ``model``, and the
    streams are not: a fifth is taken to be streams.
    """
    gradients = 4 * (shape.matrices / (layout.fsdp * layout.model) + shape.vectors)
    if layout.devices > layout.model:
        gradients *= 2
    part = WORKING_SET * (0.2 + 0.8 / layout.model)
    streams = shape.itemsize * tokens(shape, layout) * shape.width * (2 * shape.layers + part)
    return gradients + streams


def state_exchange(shape: Shape, layout: Layout) -> float:
    """Bytes of attention states that a device receives; independent of the length.

    A state has ``M (D + 2)`` float32 numbers a row and head (values, their weights' sum, a scale);
    its gradient has no scale. An exclusive prefix takes ``1 + ceil(log2 n)`` rounds, forward,
    recomputed and backward.
    """
    if layout.sequence == 1:
        return 0.0
    rounds = 1 + math.ceil(math.log2(layout.sequence))
    rows = shape.rows / (layout.data * layout.fsdp)
    heads = shape.heads / layout.model
    own = shape.features * (shape.width // shape.heads + 2)
    numbers = 2 * own + (own - shape.features)
    return 4.0 * shape.layers * rows * heads * rounds * numbers


def parameter_gathering(shape: Shape, layout: Layout) -> float:
    """Bytes of parameters put together along ``fsdp``: forward and once more to recompute.

    The embedding and the logits are not recomputed.
    """
    if layout.fsdp == 1:
        return 0.0
    outside = 2 * shape.letters * shape.width
    return 4.0 * (2 * (shape.matrices - outside) + outside) / layout.model


def gradient_reduction(shape: Shape, layout: Layout) -> float:
    """Bytes of gradients added up over rows and stretches: all of them, as XLA on CPU does it.

    On accelerators XLA scatters what it adds up along ``fsdp``: then it is this over ``fsdp``.
    """
    if layout.data * layout.fsdp * layout.sequence == 1:
        return 0.0
    return 4.0 * (shape.matrices / layout.model + shape.vectors)


def activation_reduction(shape: Shape, layout: Layout) -> float:
    """Bytes of streams added up along ``model``: 2 a layer forward and 4 backward.

    Backward, queries, keys and values each add up theirs; a compiler that adds them first, as on
    accelerators, needs 2.
    """
    if layout.model == 1:
        return 0.0
    return 6.0 * shape.layers * tokens(shape, layout) * shape.width * shape.itemsize
