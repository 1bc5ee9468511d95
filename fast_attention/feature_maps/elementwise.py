"""Generalised kernel features: ``f(W x) + epsilon`` or ``f(x) + epsilon``, f elementwise.

References: Choromanski et al., arXiv:2009.14794, section 2.2 (generalised attention);
Katharopoulos et al., "Transformers are RNNs", arXiv:2006.16236 (elu + 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array, Float
from fast_attention.feature_maps.base import FeatureMap, Features, LogKind, Parameters, project
from fast_attention.feature_maps.pickling import from_places, to_places
from fast_attention.feature_maps.projections import draw_projection

Kernel = Callable[[Array], Array]


def relu(x: Array) -> Array:
    """``max(x, 0)``."""
    return jnp.maximum(x, 0)


def squared_relu(x: Array) -> Array:
    """``max(x, 0)^2``."""
    return jnp.square(jnp.maximum(x, 0))


def shifted_elu(x: Array) -> Array:
    """``elu(x) + 1``: ``exp(x)`` for x <= 0 and ``x + 1`` above; always positive."""
    # The inner minimum keeps the unused branch finite, so that its gradient is zero and not nan.
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def exact_gelu(x: Array) -> Array:
    """``x Phi(x)`` with the exact Gaussian distribution function (not the tanh fit)."""
    return jax.nn.gelu(x, approximate=False)


def identity(x: Array) -> Array:
    """``x``."""
    return x


def absolute(x: Array) -> Array:
    """``|x|``."""
    return jnp.abs(x)


KERNELS: dict[str, Kernel] = {
    "relu": relu,
    "squared_relu": squared_relu,
    "elu+1": shifted_elu,
    "exp": jnp.exp,
    "gelu": exact_gelu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "cos": jnp.cos,
    "sin": jnp.sin,
    "abs": absolute,
    "identity": identity,
}
"""Elementwise kernels by name."""

_NONNEGATIVE = frozenset(
    {relu, squared_relu, shifted_elu, jnp.exp, jax.nn.sigmoid, absolute, jax.nn.relu}
    | {jax.nn.relu6, jax.nn.softplus, jax.nn.hard_sigmoid, jnp.square, jnp.abs}
)
_EXPONENTIAL = frozenset({jnp.exp})


def resolve_kernel(kernel: str | Kernel) -> Kernel:
    """Returns the elementwise function called ``kernel``, or ``kernel`` itself if callable.

    Raises:
      ValueError: for an unknown name.
      TypeError: for anything else.
    """
    if callable(kernel):
        return _unwrapped(kernel)
    if not isinstance(kernel, str):
        raise TypeError(
            f"A kernel is an elementwise function or one of the names {sorted(KERNELS)}, got "
            f"{kernel!r}."
        )
    if kernel not in KERNELS:
        raise ValueError(f"Unknown kernel {kernel!r}; choose one of {sorted(KERNELS)}.")
    return KERNELS[kernel]


def _unwrapped(kernel: Kernel) -> Kernel:
    """Returns the known kernel inside a wrapper (gin wraps every configurable)."""
    known = {*KERNELS.values(), *_NONNEGATIVE}
    inner: Kernel | None = kernel
    while inner is not None and inner not in known:
        inner = getattr(inner, "__wrapped__", None)
    return kernel if inner is None else inner


def kernel_name(kernel: Kernel) -> str | None:
    """Returns the name of a kernel in :data:`KERNELS`, None for another function."""
    function = _unwrapped(kernel)
    return next((name for name, known in KERNELS.items() if known is function), None)


def is_signed(kernel: Kernel) -> bool:
    """Returns whether a kernel may take both signs, so that denominators can vanish.

    An unknown function is treated as signed.
    """
    return kernel not in _NONNEGATIVE


def is_known(kernel: Kernel) -> bool:
    """Returns whether the sign of a kernel is known here."""
    return kernel in {*KERNELS.values(), *_NONNEGATIVE, jax.nn.gelu, jax.nn.silu, jax.nn.elu}


def is_exponential(kernel: Kernel) -> bool:
    """Returns whether a kernel is the exponential, which can be kept as a logarithm."""
    return kernel in _EXPONENTIAL


@dataclasses.dataclass(frozen=True)
class ElementwiseFeatures(FeatureMap):
    """Features ``f(c W x) + epsilon``, or ``f(c x) + epsilon`` without a projection.

    Attributes:
      kernel: the elementwise function f.
      epsilon: added to every feature; prevents rows of a relu-like kernel from being all zero.
      num_rows: rows of W, or None for no projection (M = D).
      projection: name of the projection's distribution.
      normalize_data: scale inputs by ``c = D^(-1/4)``, as for softmax features; otherwise c = 1.
    """

    kernel: Kernel = relu
    epsilon: float = 1e-3
    num_rows: int | None = None
    projection: str = "orthogonal"
    normalize_data: bool = False

    log_kind: ClassVar[LogKind] = "none"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the kernel by its name, see :mod:`.pickling`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return _from_fields, (type(self), to_places(fields))

    def init(self, key: Array, head_dim: int) -> Float[Array, "M D"] | None:
        """Draws the projection ``[num_rows, head_dim]``; None without one."""
        if self.num_rows is None:
            return None
        return draw_projection(self.projection, key, self.num_rows, head_dim)

    def num_features(self, parameters: Parameters, head_dim: int) -> int:
        """Returns M: rows of W, or D without a projection."""
        return head_dim if parameters is None else parameters.shape[-2]

    def apply(
        self,
        x: Float[Array, "*B T D"],
        parameters: Array | None,
        *,
        is_query: bool,
        exact_scale: bool,
    ) -> Features:
        """Returns M features per position; see the class."""
        del is_query, exact_scale
        return Features(self.kernel(self._preimage(x, parameters)) + self.epsilon, None)

    def _preimage(self, x: Array, parameters: Array | None) -> Array:
        if self.normalize_data:
            x = x * x.shape[-1] ** -0.25
        return x if parameters is None else project(x, parameters)


def _from_fields(kind: type[ElementwiseFeatures], fields: dict[str, Any]) -> ElementwiseFeatures:
    return kind(**from_places(fields))


@dataclasses.dataclass(frozen=True)
class SignedElementwiseFeatures(ElementwiseFeatures):
    """Elementwise features that may take both signs (gelu, tanh, cos, sin, identity, unknown ones).

    Denominators can vanish, so outputs can be far larger than any value.
    """

    signed: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class ExponentialFeatures(ElementwiseFeatures):
    """``exp(c W x) + epsilon`` kept as a logarithm, so that no input overflows."""

    kernel: Kernel = jnp.exp

    log_kind: ClassVar[LogKind] = "feature"

    def apply(
        self,
        x: Float[Array, "*B T D"],
        parameters: Array | None,
        *,
        is_query: bool,
        exact_scale: bool,
    ) -> Features:
        """Returns M log-features per position; see the class."""
        del is_query, exact_scale
        log = self._preimage(x, parameters)
        if self.epsilon:
            log = jnp.logaddexp(log, jnp.log(jnp.asarray(self.epsilon, log.dtype)))
        return Features(None, log)


def elementwise_map(
    kernel: str | Kernel,
    *,
    epsilon: float = 1e-3,
    num_rows: int | None = None,
    projection: str = "orthogonal",
    normalize_data: bool = False,
    signed: bool | None = None,
) -> ElementwiseFeatures:
    """Returns the feature map of an elementwise kernel, of the class that it needs.

    Args:
      kernel: a name in :data:`KERNELS` or an elementwise function; an unknown function is treated
        as signed.
      epsilon: added to every feature, at least 0.
      num_rows: rows of the random projection, None for the kernel on the raw vectors.
      projection: distribution of the projection.
      normalize_data: scale inputs by ``D^(-1/4)``.
      signed: whether the kernel takes both signs; None uses what is known of it.

    Raises:
      ValueError: for an unknown kernel name or a negative epsilon.
    """
    if epsilon < 0:
        raise ValueError(f"kernel_epsilon must be at least 0, got {epsilon}.")
    function = resolve_kernel(kernel)
    kind = ElementwiseFeatures
    if is_exponential(function):
        kind = ExponentialFeatures
    elif is_signed(function) if signed is None else signed:
        kind = SignedElementwiseFeatures
    return kind(
        kernel=function,
        epsilon=epsilon,
        num_rows=num_rows,
        projection=projection,
        normalize_data=normalize_data,
    )


@dataclasses.dataclass(frozen=True)
class IdentityFeatures(FeatureMap):
    """Queries and keys are already features; the caller guarantees that they are nonnegative."""

    log_kind: ClassVar[LogKind] = "none"

    def init(self, key: Array, head_dim: int) -> None:
        """Returns None: there are no parameters."""
        del key, head_dim

    def num_features(self, parameters: Parameters, head_dim: int) -> int:
        """Returns D, because the inputs are the features."""
        del parameters
        return head_dim

    def apply(
        self, x: Float[Array, "*B T M"], parameters: None, *, is_query: bool, exact_scale: bool
    ) -> Features:
        """Returns ``x``."""
        del parameters, is_query, exact_scale
        return Features(x, None)


@dataclasses.dataclass(frozen=True)
class LogFeatures(IdentityFeatures):
    """Queries and keys are already logarithms of features."""

    log_kind: ClassVar[LogKind] = "feature"

    def apply(
        self, x: Float[Array, "*B T M"], parameters: None, *, is_query: bool, exact_scale: bool
    ) -> Features:
        """Returns ``exp(x)``, kept as ``x``."""
        del parameters, is_query, exact_scale
        return Features(None, x)
