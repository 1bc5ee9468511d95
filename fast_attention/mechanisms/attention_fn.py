"""The base class of attention functions: one signature, one check of arguments, one call.

A mechanism is a frozen dataclass that inherits from :class:`AttentionFn`, declares which arguments
it supports and computes :meth:`AttentionFn.attend`. Flax's layers take it as ``attention_fn``.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, D head width, V value width.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, ClassVar

import jax

from fast_attention.arrays.explicit_axes import runs_on_auto_axes
from fast_attention.arrays.forward_mode import naming_forward_mode
from fast_attention.arrays.types import Array
from fast_attention.mechanisms.binding import bind, dropout_of, refuse, refuse_untaken
from fast_attention.mechanisms.call import Call, check_lengths
from fast_attention.mechanisms.checks import check_flag
from fast_attention.mechanisms.decoding import Decoder
from fast_attention.mechanisms.equality import EqualOptions

if TYPE_CHECKING:
    from fast_attention.feature_maps.tuned import TunedFeatures
    from fast_attention.mechanisms.favor.calibration import Calibration
    from fast_attention.mesh.layout import AxisName


class AttentionFn(EqualOptions, Decoder, abc.ABC):
    """An attention function with the signature of Flax's ``dot_product_attention``.

    Immutable and without state. Functions with equal options are equal and have the same hash, so
    they share compiled programs.

    Attributes:
      mechanism: its name, for messages.
      forward_mode: how to get ``jax.jvp``, for the error message if it is not supported.
      unidirectional: position t sees keys 0..t, whatever the caller's ``is_causal`` is.
      calibration: source of parameters that are fitted to data, or None.
      moment_decay: decay per call of the running averages of query and key moments that layers keep
        in training; None keeps none.
      redraws: a training call draws its random features from ``dropout_rng``.
      check_masks: an unsupported mask under jit also raises an error when the program runs.
    """

    mechanism: ClassVar[str] = "This attention function"
    forward_mode: ClassVar[str] = "use reverse mode (jax.grad, jax.vjp, jax.jacrev)"
    unidirectional: bool = False
    calibration: Calibration | None = None
    moment_decay: float | None = None
    redraws: bool = False
    check_masks: bool = False

    @property
    def tuned_map(self) -> TunedFeatures | None:
        """The feature map whose parameters are fitted to data, or None."""
        return None

    @runs_on_auto_axes
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: jax.lax.PrecisionLike = None,
        module: Any = None,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = True,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        input_positions: Any = None,
        *,
        axis: int | tuple[int, ...] | None = None,
        key_mask: Array | None = None,
        segment_ids: Array | None = None,
        log_decay: Array | None = None,
        query_mask: Array | None = None,
        projection: Any = None,
        positions: Array | None = None,
        buckets: Array | None = None,
        return_weights: bool = False,
        return_buckets: bool = False,
    ) -> Any:
        """Attends. A query that sees no key gives zeros.

        Args:
          query: ``[*B, T, H, D]``, any number of batch axes. Integers are converted to float32.
          key: ``[*B, S, K, D]``; K divides H, query head h reads key head ``h // (H / K)``.
          value: ``[*B, S, K, V]``.
          bias: broadcastable to ``[*B, H, T, S]``, added to the logits. Linear and efficient
            attention support only a bias that is constant over queries (a factor ``exp(bias)`` on
            keys); other biases raise an error.
          mask: bool or 0/1, broadcastable to ``[*B, H, T, S]``, True sees. Linear and efficient
            attention support masks that are constant over queries, or padding x padding, times
            causality if they are causal. Other masks raise an error, also additive ones (0 and
            -1e9). **Under jit**, where mask values are not known, the outputs of such rows of the
            batch are NaN.
          broadcast_dropout: the batch and the heads share the dropout mask.
          dropout_rng: random key of dropout, and of random features that are redrawn.
          dropout_rate: probability of dropping an attention weight; the others are scaled up.
            Linear and efficient attention drop whole keys from the numerator.
          deterministic: no dropout, and no features are redrawn.
          dtype: dtype of the computation, by default the promoted dtype of the inputs. Exponents,
            sums and states are at least float32.
          precision: of the products.
          module: must be None; attention weights are not recorded.
          is_causal: position t sees keys 0..t, as ``unidirectional``. For one query over several
            keys (a step with a cache), only the mask counts.
          force_fp32_for_softmax: has no effect: exponents are always at least float32.
          qk_attn_weights_einsum: must be None.
          attn_weights_value_einsum: must be None.
          input_positions: must be None; rotate queries and keys before the call.
          axis: attend over this axis, or over several axes, flattened in row-major order; other
            axes before the heads are batch axes. None is the last axis before the heads. With
            several axes, T and S in masks are the products of their lengths.
          key_mask: ``[*B, S]`` (the shape of key without heads and width) or ``[*B, S, K]``, bool
            or 0/1, where batch axes may be 1: a key where it is False is not seen, whatever its
            values are.
          segment_ids: ``[*B, T]`` integers, self-attention only: positions see their own run of
            equal ids.
          log_decay: ``[*B, T, K]``, or ``[K]`` for all tokens, at most 0, causal linear attention
            only (also with ``exact_window``): for a token and all later ones, the weights of
            earlier tokens are multiplied by ``exp(log_decay)``. Masked tokens do not decay. See
            :func:`fast_attention.linear_attention`.
          query_mask: ``[*B, T]``, False is padding: its outputs are unspecified, its values (also
            NaN) do not affect gradients, and it is ignored when parameters are fitted to a call.
            None is `key_mask` if parameters are fitted and T = S; otherwise all queries count, and
            NaN in one of them affects the gradients of keys and values.
          projection: random features to use instead of the function's own, see
            :meth:`draw_projection`.
          positions: ``[*B, T]``, for functions that rotate queries and keys themselves.
          buckets: of an earlier call of hashed attention, to be used again.
          return_weights: also return the weights (hashed attention only).
          return_buckets: also return the buckets (hashed attention only).

        Returns:
          ``[*B, T, H, V]`` in ``dtype``; with weights or buckets an
          :class:`~fast_attention.LSHOutput`. An empty batch or sequence gives an empty result.

        Raises:
          ValueError: for unsupported arguments; the message says what to do instead.
          TypeError: in forward mode differentiation (``jax.jvp``, ``jax.jacfwd``), if it is not
            supported: linear, hashed and causal efficient attention have custom gradients, and
            support forward mode with ``implementation="reference"``, which the message names. Under
            ``jax.jit`` the message is that of JAX, because JAX differentiates the compiled program.
            ``jax.hessian`` works.
        """
        check_flag("force_fp32_for_softmax", force_fp32_for_softmax)
        causal = check_flag("is_causal", is_causal) or self.unidirectional
        deterministic = check_flag("deterministic", deterministic)
        refuse(
            self.mechanism,
            module=module,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
            input_positions=input_positions,
        )
        call = bind(
            self.mechanism,
            self.takes,
            query,
            key,
            value,
            dtype=dtype,
            precision=precision,
            axis=axis,
            causal=causal,
            dropout=dropout_of(dropout_rng, dropout_rate, broadcast_dropout, deterministic),
            training_key=None if deterministic else dropout_rng,
            deterministic=deterministic,
            projection=projection,
            buckets=buckets,
            return_weights=check_flag("return_weights", return_weights),
            return_buckets=check_flag("return_buckets", return_buckets),
        )
        call = call.with_ids(segment_ids, positions).with_query_mask(query_mask)
        call = call.with_decay(log_decay)
        refuse_untaken(self.mechanism, self.takes, call, bias)
        check_lengths(call, self.mechanism, self.takes, masked=mask is not None)
        call = call.with_key_mask(key_mask).with_mask(self.takes, mask, bias)
        if call.is_empty and not (call.return_weights or call.return_buckets):
            return call.finish(call.empty_output())
        if self.check_masks and call.fits is not None:
            jax.debug.callback(_raise_unless, call.fits.all())
        with naming_forward_mode(self.mechanism, self.forward_mode):
            found = self.attend(call)
        if call.return_weights or call.return_buckets:
            return found._replace(out=call.finish(found.out))
        return call.finish(found)

    @abc.abstractmethod
    def attend(self, call: Call) -> Any:
        """Computes the output ``[*B, T, H, V]`` of a call that is checked and not empty."""

    def draw_projection(self, key: Array, head_dim: int) -> Any:
        """Draws the arrays that layers keep and pass as ``projection=``; None for no features."""
        del key, head_dim

    def redraw_projection(self, key: Array, projection: Any) -> Any:
        """Draws new rows; parameters fitted to data do not change."""
        raise ValueError(f"{self.mechanism} has no parameters that are fitted to data.")

    def resolve_parameters(self, projection: Any, head_dim: int, rng: Array | None = None) -> Any:
        """Returns the parameters that a call with this ``projection`` uses; None for none."""
        del projection, head_dim, rng

    def along_axis(self, axis: AxisName) -> AttentionFn:
        """Returns the function for sequences sharded along a mesh axis, in ``jax.shard_map``.

        It is called with the positions of one device and attends to the whole sequence, which is
        sharded in order along `axis`, the name of a mesh axis or a tuple of names. Decoding does
        not change: each device decodes its own rows.

        Raises:
          ValueError: for a function that needs all positions on one device.
        """
        raise ValueError(
            f"{self.mechanism} needs all positions on one device and cannot attend along the mesh "
            f"axis {axis!r}: use make_fast_softmax_attention or make_fast_generalized_attention, "
            "whose devices exchange states, or make_local_attention, whose devices exchange the "
            "edges of their shards."
        )

    @property
    def divides(self) -> bool:
        """Whether each device should compute its own rows and heads separately."""
        return False

    def exact(self) -> AttentionFn | None:
        """The function that it approximates; None if that is softmax attention to the same keys."""
        return None


def _raise_unless(fits: Array) -> None:
    if not bool(fits):
        raise ValueError(
            "A mask given under jit is not supported: its values are not 0 and 1, or it is "
            "neither constant over queries nor padding x padding (x causal)."
        )
