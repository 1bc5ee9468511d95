"""The same model with another attention function.

Shape letters: H heads, K key/value heads, D head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from flax import nnx

from fast_attention.layers.attention.config import AttentionConfig, HeadGroup
from fast_attention.layers.attention.multi_head import MultiHeadAttention
from fast_attention.layers.attention.stored_projections import as_held, no_running_moments

Model = TypeVar("Model", bound=nnx.Module)


def with_attention(
    model: Model,
    attention_fn: Callable[..., Any],
    rngs: nnx.Rngs,
    *,
    where: Callable[[HeadGroup], bool] | None = None,
) -> Model:
    """Returns a model with the same parameters and another attention function.

    No weights are converted, because attention functions have no parameters of their own. So a
    model trained with exact attention can be used as a Performer, and a Performer as an exact
    Transformer. The random projection of the new function is drawn from `rngs`; running moments
    start empty. Features with stored parameters are those of FAVOR+ until `calibrate` is called::

        performer = layers.with_attention(transformer, attention_fn, nnx.Rngs(0))
        layers.calibrate(performer, tokens)

    Section 4.3 of the Performer paper (arXiv:2009.14794) does this with a trained Transformer, and
    recovers its accuracy with a few training steps.

    Args:
      model: Any module with `MultiHeadAttention` layers inside. It is not changed, and the result
        has copies of its parameters: training one does not change the other.
      attention_fn: Called like ``nnx.dot_product_attention``, for example a result of
        `make_fast_softmax_attention`.
      rngs: Source of the random projections; each layer has its own.
      where: Function that selects groups of heads to change; None changes all. Change an encoder
        and a decoder separately.

    Raises:
      ValueError: If there is nothing to change, or if a causal function would replace bidirectional
        attention or attention with shared queries and keys.
    """

    def choose(group: HeadGroup) -> HeadGroup:
        chosen = where is None or where(group)
        return dataclasses.replace(group, attention_fn=attention_fn) if chosen else group

    switched = nnx.clone(model)
    count = 0
    for _, module in nnx.iter_modules(switched):
        if isinstance(module, MultiHeadAttention):
            count += _switch_layer(module, choose, rngs)
            continue
        # What modules around the layers know of them is to agree with them.
        for name in ("config", "shape"):
            if dataclasses.is_dataclass(own := getattr(module, name, None)):
                setattr(module, name, _in_configuration(own, choose))
    if not count:
        raise ValueError(
            f"{type(model).__name__} has no MultiHeadAttention with a group of heads to change"
            + ("." if where is None else ", or where= selected none.")
        )
    return switched


def _switch_layer(
    module: MultiHeadAttention, choose: Callable[[HeadGroup], HeadGroup], rngs: nnx.Rngs
) -> int:
    """Changes one layer in place; returns how many of its groups were changed."""
    before = module.config
    config = _in_configuration(before, choose)
    projections, moments = list(module.projections), list(module.moments)
    changed = [i for i, group in enumerate(config.groups) if group is not before.groups[i]]
    empty = no_running_moments(config)
    for index in changed:
        group = config.groups[index]
        _check(before, before.groups[index], group)
        drawn = group.attention_fn.draw_projection(rngs.params(), config.head_dim)
        projections[index] = as_held(drawn, config.kv_heads_of_groups[index])
        moments[index] = empty[index]
    module.config = config
    module.projections, module.moments = nnx.List(projections), nnx.List(moments)
    return len(changed)


def _check(config: AttentionConfig, before: HeadGroup, now: HeadGroup) -> None:
    causal = config.causal or before.attention_fn.unidirectional
    if now.attention_fn.unidirectional and not causal:
        raise ValueError(
            "The new attention function is causal (unidirectional=True), but the model sees later "
            "positions or attends to a second sequence: make it with unidirectional=False, or "
            "exclude such layers with where=."
        )
    if config.shared_qk:
        raise ValueError(
            "Layers with shared queries and keys need functions that normalise keys themselves; "
            "the new function does not. Exclude these layers with where=."
        )


def _in_configuration(config: Any, choose: Callable[[HeadGroup], HeadGroup]) -> Any:
    """The same configuration with groups of heads replaced, at any depth."""
    if isinstance(config, HeadGroup):
        return choose(config)
    if type(config) is tuple:
        parts = tuple(_in_configuration(part, choose) for part in config)
        same = all(new is old for new, old in zip(parts, config, strict=True))
        return config if same else parts
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    parts = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    changed = {name: _in_configuration(part, choose) for name, part in parts.items()}
    changed = {name: part for name, part in changed.items() if part is not parts[name]}
    return dataclasses.replace(config, **changed) if changed else config
