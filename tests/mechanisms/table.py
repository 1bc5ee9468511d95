"""Every attention function, every option of a call, and every way to call: the axes of the table.

A new mechanism is a line of :data:`FUNCTIONS`, a new option a line of :data:`OPTIONS`, a new way
to call a line of ``WAYS`` in ``test_table.py``.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fast_attention as fa
from fast_attention.feature_maps import LearnedFeatures
from fast_attention.mechanisms.favor.calibration import calibrate
from tests.mechanisms import dense

B, T, H, K, D = 2, 7, 4, 2, 4
VISIBLE = np.array([[True] * T, [True, False, True, True, True, True, False]])
NEAR = np.broadcast_to(np.abs(np.arange(T)[:, None] - np.arange(T)) < 3, (B, 1, T, T))
IDS = np.array([[1, 1, 1, 1, 0, 0, 0], [2, 2, 2, 3, 3, 3, 3]])
RUNS = IDS[:, None, :, None] == IDS[:, None, None]

favor = functools.partial(fa.make_fast_softmax_attention, D, nb_features=8, redraw_features=False)

NOT_A_MASK_OF_KEYS = "is not supported"
ONE_FOR_ALL_QUERIES = "bias must be the same for all queries"
OF_KEYS = {"pairs": NOT_A_MASK_OF_KEYS, "pair_bias": ONE_FOR_ALL_QUERIES}
NO_FEATURES = {"projection": "it has no random features"}


@dataclasses.dataclass(frozen=True)
class Function:
    """A mechanism in the table.

    Attributes:
      make: a factory that takes ``unidirectional``.
      define: its weights, see :mod:`tests.mechanisms.dense`.
      refuses: options that it cannot honour, with words of the message.
      directions: those that it has, see :class:`Case`.
      decodes: whether it has ``init_state``, ``prefill`` and ``step``.
      steps: whether one query may attend to a cache.
      along_sequence: whether positions can be divided over a mesh.
      shared: queries are keys.
    """

    make: Callable[..., Any]
    define: Callable[..., Any]
    refuses: dict[str, str] = dataclasses.field(default_factory=dict)
    directions: tuple[str, ...] = ("both ways", "causal", "is_causal")
    decodes: bool = True
    steps: bool = True
    along_sequence: bool = True
    shared: bool = False


def hashed(function, query, key, seen, bias, causal=False, projection=None, by_pairs=False):
    """The definition, for the buckets that the function finds.

    Positions that a key mask hides stand behind all others and attend to none; with a mask of pairs
    they stand where they hash to.
    """
    shown = np.swapaxes(seen.any(axis=-2), -1, -2)
    alike = (shown == shown[..., :1]).all()
    key_mask = shown[..., 0] if alike else shown
    found = function(query, key, key, key_mask=key_mask, projection=projection, return_buckets=True)
    if not alike or by_pairs:
        return dense.hashed(function, query, key, seen, bias, found.buckets)
    # They stand behind all others in each round.
    buckets = np.where(key_mask[:, None, None], found.buckets, found.buckets.max() + 1)
    weights = dense.hashed(function, query, key, seen, bias, buckets)
    return np.where(key_mask[:, None, :, None], weights, 0)


FUNCTIONS = {
    "favor+": Function(favor, dense.favor, OF_KEYS),
    "wderf_s": Function(
        functools.partial(favor, estimator="wderf_s"),
        dense.favor,
        OF_KEYS | {"segment_ids": "Do not pack segments"},
        ("both ways",),
        along_sequence=False,
    ),
    "stored": Function(
        functools.partial(favor, estimator="wderf_s", calibration="stored"), dense.favor, OF_KEYS
    ),
    "hedgehog": Function(functools.partial(favor, estimator="hedgehog"), dense.favor, OF_KEYS),
    "darkformer": Function(functools.partial(favor, estimator="darkformer"), dense.favor, OF_KEYS),
    "near field": Function(
        functools.partial(favor, exact_window=2), dense.favor, OF_KEYS, along_sequence=False
    ),
    "generalized": Function(
        functools.partial(
            fa.make_fast_generalized_attention, D, nb_features=8, features_type="iid"
        ),
        dense.favor,
        OF_KEYS,
    ),
    "exact": Function(fa.make_softmax_attention, dense.exact, NO_FEATURES, along_sequence=False),
    "local": Function(functools.partial(fa.make_local_attention, 2), dense.local, NO_FEATURES),
    "lsh": Function(
        functools.partial(fa.make_lsh_attention, 4, 2, full_attn_thres=0),
        hashed,
        {
            "key_bias": "bias must be None",
            "pair_bias": "bias must be None",
        },
        decodes=False,
        steps=False,
        along_sequence=False,
        shared=True,
    ),
    "efficient": Function(
        fa.make_efficient_attention, dense.efficient, OF_KEYS | NO_FEATURES, along_sequence=False
    ),
    "blindspot": Function(
        functools.partial(fa.make_efficient_attention, blindspot_size=2),
        dense.efficient,
        OF_KEYS | NO_FEATURES | {"segment_ids": "segment_ids"},
        ("causal",),
        steps=False,
        along_sequence=False,
    ),
    "strided": Function(
        lambda **options: fa.make_strided_attention(favor(**options), 2),
        dense.strided(dense.favor),
        OF_KEYS
        | {
            "pair_bias": "bias must be None",
            "key_bias": "bias must be None",
        },
        steps=False,
        along_sequence=False,
    ),
}


@functools.cache
def function_of(name, unidirectional):
    return FUNCTIONS[name].make(unidirectional=unidirectional)


@dataclasses.dataclass(frozen=True)
class Case:
    """A function in one direction, with its arrays.

    Attributes:
      name: in :data:`FUNCTIONS`.
      direction: "both ways", "causal", or "is_causal", which asks it of a function for both ways.
      kv_heads: of keys and values.
    """

    name: str
    direction: str
    kv_heads: int = K

    @property
    def entry(self):
        return FUNCTIONS[self.name]

    @property
    def function(self):
        return function_of(self.name, self.direction == "causal")

    @property
    def causal(self):
        return self.direction != "both ways"

    def past(self, length=T):
        """Whether a query sees a key as far as causality goes, ``[T, T]``."""
        return np.tri(length, dtype=bool) if self.causal else np.ones((length, length), bool)

    @functools.cached_property
    def arrays(self):
        """Queries, keys and values, as wide as each other because Flax's own functions need it."""
        rng = np.random.default_rng(0)
        query, key, value = (
            rng.normal(size=(B, T, heads, D)).astype(np.float32)
            for heads in (H, self.kv_heads, self.kv_heads)
        )
        return query, query if self.entry.shared else key, value

    @functools.cached_property
    def projection(self):
        """Random features other than the function's own, fitted where it is fitted to data."""
        if "projection" in self.entry.refuses:
            return np.ones((8, D), np.float32)
        drawn = self.function.draw_projection(jax.random.key(3), D)
        if isinstance(getattr(self.function, "feature_map", None), LearnedFeatures):
            return learned(drawn, self.kv_heads)
        if self.function.tuned_map is None:
            return drawn
        fit = jax.jit(calibrate, static_argnums=0)
        return fit(self.function, *map(jnp.asarray, self.arrays[:2]), projection=drawn)

    def options(self, *names):
        """Options of the call by the names of their arguments."""
        given = {OPTIONS[name].name: OPTIONS[name].make(self) for name in names}
        return given | ({"is_causal": True} if self.direction == "is_causal" else {})

    def expected(self, *names, arrays=None, seen=True):
        """``[B, T, H, V]`` by the definition, in float64."""
        query, key, value = self.arrays if arrays is None else arrays
        rows, length = query.shape[:2]
        seen = np.broadcast_to(self.past(length) & seen, (rows, H, length, length))
        bias = 0.0
        for name in names:
            told = OPTIONS[name]
            seen = seen & (told.seen(self) if callable(told.seen) else told.seen)
            bias = bias + told.bias
        told = {"projection": self.projection} if "projection" in names else {}
        if self.function.calibration == "call" and "query_mask" in names:
            told["query_mask"] = VISIBLE
        if self.entry.shared and "padding" in names:
            told["by_pairs"] = True
        bias = np.broadcast_to(bias, seen.shape)
        weights = self.entry.define(
            self.function, query, key, seen, bias, causal=self.causal, **told
        )
        return dense.attend(weights, value)


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a call.

    Attributes:
      name: of the argument.
      make: its value for a case.
      seen: whether a query sees a key, broadcastable to ``[B, H, T, S]``; may depend on the case.
      bias: added to logits.
    """

    name: str
    make: Callable[[Case], Any]
    seen: Any = True
    bias: Any = 0.0


def learned(start, heads):
    """Parameters of each key head, away from where they start."""
    rng = np.random.default_rng(7)
    moved = {
        name: x
        if name == "rows"
        else np.asarray(x) + 0.3 * rng.normal(size=(heads, *x.shape)).astype(np.float32)
        for name, x in start._asdict().items()
        if x is not None
    }
    return type(start)(**moved)


def per_key_head(case):
    """Key heads that see different keys; the first key is seen by all."""
    heads = case.arrays[1].shape[-2]
    return np.broadcast_to(np.arange(T)[:, None] % (2 + np.arange(heads)) == 0, (B, T, heads))


def per_query_head(case):
    heads = np.swapaxes(per_key_head(case), -1, -2)
    return np.repeat(heads, H // heads.shape[-2], axis=-2)[..., None, :]


KEY_BIAS = np.sin(np.arange(B * T)).reshape(B, 1, 1, T).astype(np.float32)
PAIR_BIAS = np.cos(np.arange(B * H * T * T)).reshape(B, H, T, T).astype(np.float32)

OPTIONS = {
    "key_mask": Option("key_mask", lambda case: VISIBLE, VISIBLE[:, None, None]),
    "head_mask": Option("key_mask", per_key_head, per_query_head),
    "keys": Option("mask", lambda case: VISIBLE[:, None, None], VISIBLE[:, None, None]),
    "padding": Option(
        "mask",
        lambda case: (VISIBLE[:, None, :, None] & VISIBLE[:, None, None]) & case.past(),
        VISIBLE[:, None, None],
    ),
    "pairs": Option("mask", lambda case: NEAR, NEAR),
    "key_bias": Option("bias", lambda case: KEY_BIAS, bias=KEY_BIAS),
    "pair_bias": Option("bias", lambda case: PAIR_BIAS, bias=PAIR_BIAS),
    "segment_ids": Option("segment_ids", lambda case: IDS, RUNS),
    "query_mask": Option("query_mask", lambda case: VISIBLE),
    "projection": Option("projection", lambda case: case.projection),
}


def honoured(case):
    return [name for name in OPTIONS if name not in case.entry.refuses]


def together(case):
    """The last honoured option of each argument, to be given all at once."""
    return list({OPTIONS[name].name: name for name in honoured(case)}.values())


CASES = {
    f"{name}, {direction}": Case(name, direction)
    for name, entry in FUNCTIONS.items()
    for direction in entry.directions
}
