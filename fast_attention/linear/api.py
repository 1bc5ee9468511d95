"""``linear_attention``: queries, keys, values and a feature map in, attention out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import jax

from fast_attention.arrays.explicit_axes import runs_on_auto_axes
from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.feature_maps.base import FeatureMap, Parameters
from fast_attention.linear import reference
from fast_attention.linear.chunked import api as chunked
from fast_attention.linear.pallas_gpu import api as pallas_gpu
from fast_attention.linear.prepare import fill_empty, prepare
from fast_attention.linear.segments import attend_within_segments
from fast_attention.linear.state import LinearAttentionState
from fast_attention.linear.symbolic import is_symbolic, pad_symbolic
from fast_attention.linear.types import Inputs, Plan, SavedStates

Implementation = Callable[[Plan, Inputs], Any]

IMPLEMENTATIONS: dict[str, Implementation] = {
    "chunked": chunked.attend,
    "pallas_gpu": pallas_gpu.attend,
    "pallas_gpu_interpret": pallas_gpu.attend_interpreted,
    "reference": reference.attend,
}
"""Implementations by name. One raises NotImplementedError for calls it cannot serve.

``"pallas_gpu_interpret"`` runs the kernels of ``"pallas_gpu"`` on any platform, slowly, to check
them.
"""

DEFAULT_ORDER = ("chunked",)


@overload
def linear_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    feature_map: FeatureMap,
    parameters: Parameters,
    causal: bool = ...,
    key_mask: Array | None = ...,
    key_bias: Array | None = ...,
    segment_ids: Array | None = ...,
    initial_state: LinearAttentionState | None = ...,
    return_state: Literal[False] = ...,
    normalize: bool = ...,
    epsilon: float = ...,
    chunk_size: int | None = ...,
    unroll: int | None = ...,
    saved_states: SavedStates | None = ...,
    implementation: str | Sequence[str] | None = ...,
    precision: jax.lax.PrecisionLike = ...,
) -> Array: ...


@overload
def linear_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    feature_map: FeatureMap,
    parameters: Parameters,
    causal: bool = ...,
    key_mask: Array | None = ...,
    key_bias: Array | None = ...,
    segment_ids: Array | None = ...,
    initial_state: LinearAttentionState | None = ...,
    return_state: Literal[True],
    normalize: bool = ...,
    epsilon: float = ...,
    chunk_size: int | None = ...,
    unroll: int | None = ...,
    saved_states: SavedStates | None = ...,
    implementation: str | Sequence[str] | None = ...,
    precision: jax.lax.PrecisionLike = ...,
) -> tuple[Array, LinearAttentionState]: ...


@runs_on_auto_axes
def linear_attention(
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B S K D"],
    value: Float[Array, "*B S K V"],
    *,
    feature_map: FeatureMap,
    parameters: Parameters,
    causal: bool = False,
    key_mask: Bool[Array, "*#B S"] | Bool[Array, "*#B S #K"] | None = None,
    key_bias: Float[Array, "*#B S"] | Float[Array, "*#B S #K"] | None = None,
    segment_ids: Int[Array, "*#B T"] | None = None,
    initial_state: LinearAttentionState | None = None,
    return_state: bool = False,
    normalize: bool = True,
    epsilon: float = 0.0,
    chunk_size: int | None = None,
    unroll: int | None = None,
    saved_states: SavedStates | None = None,
    implementation: str | Sequence[str] | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Array | tuple[Array, LinearAttentionState]:
    r"""Attention with weights ``phi(q_t) . phi(k_s)``, in time and memory linear in the length.

    .. math::
        y_t = \frac{\sum_s \phi(q_t) \cdot \phi(k_s) \, v_s}{\sum_s \phi(q_t) \cdot \phi(k_s)}

    with the sums over ``s <= t`` if causal. Exponential maps are evaluated with running maxima that
    never look ahead: nothing overflows, and outputs up to t do not change by a single bit,
    whatever comes after t.

    Shape letters: B batch (any number of axes, none included), T queries, S keys, H heads, K
    key/value heads (a divisor of H: query head h reads key head ``h // (H / K)``), D head width,
    V value width.

    Args:
      query: ``[*B, T, H, D]``.
      key: ``[*B, S, K, D]``; S = T if causal.
      value: ``[*B, S, K, V]``.
      feature_map: phi, see :mod:`fast_attention.feature_maps`.
      parameters: of the feature map, as from ``feature_map.init``; their leading axes, if any,
        broadcast against ``[K]`` or ``[prod(B), K]``.
      causal: position t sees keys 0..t.
      key_mask: ``[*B, S]`` or ``[*B, S, K]``; a key where it is False contributes nothing, neither
        to outputs nor to the state, whatever it holds.
      key_bias: ``[*B, S]`` or ``[*B, S, K]``; multiplies the weights of a key by ``exp(bias)``.
        Biases of -1e4 and less mask the key.
      segment_ids: ``[*B, T]``, self-attention only: positions see their own run of equal ids.
        A new run starts from an empty state.
      initial_state: keys seen before the first one; with segments it belongs to the first run.
      return_state: also return the state after the last key (of the last run). With
        ``initial_state`` it cuts a sequence in two: both are differentiable.
      normalize: divide by the sum of weights; if False return the numerator at its true scale.
      epsilon: denominators up to this size are inverted as ``den / epsilon^2``. Not needed for
        positive maps; for signed ones it bounds outputs where a denominator vanishes.
      chunk_size: positions handled at once (1: token by token); None for what was measured to be
        the fastest, see :mod:`fast_attention.linear.chunked.chunk_table`.
      unroll: chunks unrolled in the compiled loop; None for the same.
      saved_states: what the backward pass of causal attention finds when it starts: "all" states
        between chunks (``T K V M / C`` numbers), or a "few", about the square root of that many
        chunks, from which it computes the others again, group by group; None for "all" of short
        sequences and a "few" of long ones.
      implementation: a name of :data:`IMPLEMENTATIONS`, several to try in order, or None for the
        best of the platform.
      precision: of products of features and values. By default those of bfloat16 inputs round
        their operands to bfloat16 and add in float32; "highest" computes them in float32, as
        exponents always are.

    Returns:
      ``[*B, T, H, V]`` in the promoted type of query, key and value; a row that sees no key is 0,
      and batches and sequences may be empty. With ``return_state`` a pair of that and the
      :class:`LinearAttentionState`.

    Raises:
      ValueError: for shapes or options that do not fit together.
      NotImplementedError: if the one implementation asked for cannot serve the call.

    References:
      arXiv:2009.14794 (FAVOR+); arXiv:2006.16236 (linear attention and its state).
    """
    plan = Plan(
        feature_map=feature_map,
        causal=causal,
        output="mean" if normalize else "sum",
        epsilon=epsilon,
        chunk_size=chunk_size,
        unroll=unroll,
        saved_states=saved_states,
        precision=precision,
        # A state has true units, so that any other call can continue it.
        complete=return_state or initial_state is not None,
    )
    out, state = attend(
        plan,
        query,
        key,
        value,
        parameters=parameters,
        key_mask=key_mask,
        key_bias=key_bias,
        segment_ids=segment_ids,
        initial_state=initial_state,
        implementation=implementation,
    )
    return (out, state) if return_state else out


def attend(
    plan: Plan,
    query: Array,
    key: Array,
    value: Array,
    *,
    parameters: Parameters,
    key_mask: Array | None = None,
    key_bias: Array | None = None,
    segment_ids: Array | None = None,
    initial_state: LinearAttentionState | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Any, LinearAttentionState]:
    """Checks and runs what a plan asks for; see :func:`linear_attention` for the arguments.

    Returns:
      The output ``[*B, T, H, V]``, or its :class:`~.types.Parts` with ``*B`` in front if the plan
      asks for them, and the state after the last key.
    """
    plan, inputs = prepare(
        plan,
        query,
        key,
        value,
        parameters=parameters,
        key_mask=key_mask,
        key_bias=key_bias,
        segment_ids=segment_ids,
        initial_state=initial_state,
    )
    batch_shape = query.shape[:-3]
    batch, length = inputs.query.shape[:2]
    inputs = fill_empty(pad_symbolic(plan, inputs))
    attended = _compiled(plan, vary_alike(inputs), implementation_names(implementation))
    if is_symbolic(length) or length == 0:
        attended = (jax.tree.map(lambda x: x[:, :length], attended[0]), attended[1])
    if batch == 0:
        attended = jax.tree.map(lambda x: x[:0], attended)
    out, state = jax.tree.map(lambda x: x.reshape(*batch_shape, *x.shape[1:]), attended)
    if initial_state is not None:
        state = jax.tree.map(lambda x: x.astype(initial_state.kv.dtype), state)
    return out, state


# Compiled as one: called outside jit, the loops inside would be compiled anew in every call.
@functools.partial(jax.jit, static_argnums=(0, 2))
def _compiled(
    plan: Plan, inputs: Inputs, names: tuple[str, ...]
) -> tuple[Any, LinearAttentionState]:
    return run_implementation(plan, inputs, names)


def run_implementation(
    plan: Plan, inputs: Inputs, names: tuple[str, ...]
) -> tuple[Any, LinearAttentionState]:
    """Runs the first of the implementations that can serve a prepared call."""
    if inputs.segment_ids is not None and not plan.causal:
        return attend_within_segments(
            lambda plan, inputs: run_implementation(plan, inputs, names), plan, inputs
        )
    errors: list[NotImplementedError] = []
    for name in names:
        try:
            return IMPLEMENTATIONS[name](plan, inputs)
        except NotImplementedError as error:
            if len(names) == 1:
                raise
            errors.append(error)
    raise ExceptionGroup(f"No implementation of {names} can serve this call.", errors)


def implementation_names(implementation: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns the names to try in order, for what the caller asks for."""
    if implementation is None:
        return DEFAULT_ORDER
    if isinstance(implementation, str) or not isinstance(implementation, Sequence):
        implementation = (implementation,)
    names = tuple(implementation)
    unknown = [name for name in names if name not in IMPLEMENTATIONS]
    if unknown or not names:
        raise ValueError(
            f"Unknown implementation {unknown}; choose from {sorted(IMPLEMENTATIONS)}."
        )
    return names
