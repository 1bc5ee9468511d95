"""The base class of attention functions: one signature, one check of arguments, one call.

A mechanism is a frozen dataclass that inherits from :class:`AttentionFn`, declares what it honours
and computes :meth:`AttentionFn.attend`. Flax's layers take it as ``attention_fn``.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, D head width, V value width.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, ClassVar

import jax

from fast_attention.arrays.explicit_axes import runs_on_auto_axes
from fast_attention.arrays.forward_mode import naming_forward_mode
from fast_attention.arrays.types import Array
from fast_attention.mechanisms.binding import (
    bind,
    dropout_of,
    refuse,
    refuse_untaken,
)
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

    Immutable: nothing is kept between calls. Functions with equal options are equal and have the
    same hash, so that a program compiled for one serves the other.

    Attributes:
      mechanism: its name, for messages.
      forward_mode: which way there is to ``jax.jvp``, for the error where there is none.
      unidirectional: position t sees keys 0..t, whatever a caller says of causality.
      calibration: where parameters that are fitted to data come from, or None.
      moment_decay: layers keep running averages of the moments of queries and keys in training,
        with this decay a call; None keeps none.
      redraws: a training call draws its random features from ``dropout_rng``.
      check_masks: a mask under jit that cannot be honoured also raises when the program runs.
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
          query: ``[*B, T, H, D]``, any number of batch axes. Whole numbers become float32.
          key: ``[*B, S, K, D]``; K divides H, query head h reads key head ``h // (H / K)``.
          value: ``[*B, S, K, V]``.
          bias: broadcastable to ``[*B, H, T, S]``, added to the logits. Functions of keys alone
            (linear and efficient attention) take one that is constant over queries, a factor
            ``exp(bias)`` on keys; another one raises.
          mask: bool or 0/1, broadcastable to ``[*B, H, T, S]``, True sees. Functions of keys alone
            take masks that are constant over queries, or padding x padding, times causality if they
            are causal. Another mask raises, also an additive one (0 and -1e9). **Under jit**, where
            its values are not known, the outputs of those rows of the batch are NaN.
          broadcast_dropout: the batch and the heads share what is dropped.
          dropout_rng: random key of dropout, and of random features that are redrawn.
          dropout_rate: at which attention weights are dropped and the others scaled up; functions
            of keys alone drop whole keys from the numerator.
          deterministic: no dropout, nothing redrawn.
          dtype: to compute in, by default the promoted type of the inputs. Exponents, sums and
            states are in float32 at least.
          precision: of the products.
          module: must be None; attention weights are not recorded.
          is_causal: position t sees keys 0..t, as ``unidirectional``. For one query over several
            keys (a step with a cache) the mask alone decides.
          force_fp32_for_softmax: has no effect: exponents are float32 at least in either case.
          qk_attn_weights_einsum: must be None.
          attn_weights_value_einsum: must be None.
          input_positions: must be None; rotate queries and keys before.
          axis: attend over this axis, or over several at once, flattened in row-major order; other
            axes before the heads are batch. None is the last axis before the heads. With several
            axes, T and S in masks are the products of their lengths.
          key_mask: ``[*B, S]`` (the shape of key without heads and width) or ``[*B, S, K]``, bool
            or 0/1, where batch axes may be 1: a key where it is False is not seen, whatever it is.
          segment_ids: ``[*B, T]`` integers, self-attention only: positions see their own run of
            equal ids.
          log_decay: ``[*B, T, K]``, or ``[K]`` for all tokens, at most 0, causal linear attention
            only: what came before a token counts ``exp(log_decay)`` times as much for it and all
            later ones. Masked tokens do not decay. See :func:`fast_attention.linear_attention`.
          query_mask: ``[*B, T]``, False is padding: its outputs do not matter, what it holds (NaN
            included) reaches no gradient, and it does not count where parameters are fitted to a
            call. None is `key_mask` where parameters are fitted and T = S; else all queries count,
            and NaN in any of them reaches the gradients of keys and values.
          projection: in place of the function's own random features, see :meth:`draw_projection`.
          positions: ``[*B, T]``, for functions that rotate queries and keys themselves.
          buckets: of an earlier call of hashed attention, to attend to the same again.
          return_weights: also the weights (hashed attention only).
          return_buckets: also the buckets (hashed attention only).

        Returns:
          ``[*B, T, H, V]`` in ``dtype``; with weights or buckets an
          :class:`~fast_attention.LSHOutput`. An empty batch or sequence gives an empty result.

        Raises:
          ValueError: for anything that cannot be honoured; the message says what to do instead.
          TypeError: in forward mode differentiation (``jax.jvp``, ``jax.jacfwd``), where there is
            none: linear, hashed and causal efficient attention have their own gradients, and have
            forward mode with ``implementation="reference"``, which the message names. Where the
            call is under ``jax.jit`` the message is JAX's own, as jax differentiates the compiled
            program and no code of this function runs then. ``jax.hessian`` works.
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
        """Attends ``[*B, T, H, V]``, a call that was checked and is not empty."""

    def draw_projection(self, key: Array, head_dim: int) -> Any:
        """Draws what layers keep and pass as ``projection=``: None where nothing is random."""
        del key, head_dim

    def redraw_projection(self, key: Array, projection: Any) -> Any:
        """Draws new rows for parameters that are fitted to data, which stay as they are."""
        raise ValueError(f"{self.mechanism} has no parameters that are fitted to data.")

    def resolve_parameters(self, projection: Any, head_dim: int, rng: Array | None = None) -> Any:
        """Returns the parameters that a call with this ``projection`` uses; None for none."""
        del projection, head_dim, rng

    def along_axis(self, axis: AxisName) -> AttentionFn:
        """Returns the function for sequences that lie along a mesh axis, in ``jax.shard_map``.

        It is called with the positions of one device and attends to the whole sequence: the
        stretches of the devices lie along `axis`, the name of a mesh axis or a tuple of names, in
        their order. Decoding is as before, on each device by itself.

        Raises:
          ValueError: for a function that needs all positions on one device.
        """
        raise ValueError(
            f"{self.mechanism} needs all positions on one device and cannot attend along the mesh "
            f"axis {axis!r}: use make_fast_softmax_attention or make_fast_generalized_attention, "
            "whose devices exchange states, or make_local_attention, whose devices exchange the "
            "edges of their stretches."
        )

    @property
    def divides(self) -> bool:
        """Whether rows and heads that lie on devices are best attended to on each by itself."""
        return False

    def exact(self) -> AttentionFn | None:
        """The function it stands for; None where that is softmax attention to the same keys."""
        return None


def _raise_unless(fits: Array) -> None:
    if not bool(fits):
        raise ValueError(
            "A mask given under jit cannot be honoured: its values are not 0 and 1, or it is "
            "neither constant over queries nor padding x padding (x causal)."
        )
