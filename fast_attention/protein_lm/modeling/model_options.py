"""Keywords of a model beside those of its Transformer and its training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from fast_attention.mesh.meshes import make_mesh, with_auto_axes
from fast_attention.protein_lm.modeling.train_state import TrainState

_REPLACED = {
    "repetition_penalty_normalize": "logits are penalized as they are",
    "use_lax_while_loop": "the loop is always a compiled one",
    "max_decode_len": "max_length is the most residues",
    "rng": "sample takes the key",
    "masked_tokens": "begin, padding and mask tokens are never drawn",
}
"""Sampling options of Google's protein_lm, and what took their place."""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Keywords of a model in addition to those of its Transformer and its training.

    The last three are for settings written for Google's protein_lm.

    Attributes:
      with_bos: Adds a begin token, with the id ``domain.vocab_size``, if the vocabulary has none.
        None adds it to a causal model, which needs one.
      with_mask: Adds a mask token in the same way.
      sampling_kwargs: Default options of ``sample``.
      pmap: False uses a single device; prefer ``mesh``.
      cache: Must be True: decoding states exist only during ``sample``.
      store_metrics: Must be False: ``fit`` and ``evaluate`` return their metrics.
    """

    with_bos: bool | None = None
    with_mask: bool = False
    sampling_kwargs: Mapping[str, Any] | None = None
    pmap: bool = True
    cache: bool = True
    store_metrics: bool = False

    def __post_init__(self):
        """Raises ValueError at what is not possible here."""
        if not self.cache:
            raise ValueError(
                "cache=False is not needed: decoding states exist only while sample() runs; leave "
                "it out"
            )
        if self.store_metrics:
            raise ValueError(
                "store_metrics=True is not possible: fit(), fit_batch() and evaluate() return "
                "their metrics, and 'protein-lm train' writes them to metrics.jsonl; leave it out"
            )

    def mesh(self, mesh: Mesh | None) -> Mesh:
        """The devices of the model: `mesh`, or those that there are.

        Raises:
          ValueError: If ``pmap`` is False and a mesh is given, or the mesh has other axes than
            `make_mesh` gives it.
        """
        if self.pmap:
            return make_mesh() if mesh is None else with_auto_axes(mesh)
        if mesh is not None:
            raise ValueError("pmap=False uses one device, and mesh several: give one of them")
        return make_mesh(devices=jax.local_devices()[:1])

    def sampling(self, known: Sequence[str]) -> dict[str, Any]:
        """``sampling_kwargs``, compared with the options that a model's ``sample`` has.

        Raises:
          ValueError: At one that it does not have.
        """
        found = dict(self.sampling_kwargs or {})
        for name in found:
            if name not in known:
                hint = _REPLACED.get(name, f"sample has {', '.join(known)}")
                raise ValueError(f"sampling_kwargs has no option {name!r}: {hint}")
        return found


Options = TypeVar("Options")


def take_options(kind: type[Options], kwargs: dict[str, Any]) -> Options:
    """Makes a dataclass of the keywords that are its fields, and removes those from `kwargs`."""
    names = {field.name for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    return kind(**{name: kwargs.pop(name) for name in names & kwargs.keys()})


def check_state(state: TrainState, abstract: TrainState) -> None:
    """Raises ValueError unless the arrays of a state have the names and shapes of a model's."""
    found, expected = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
        for leaves in map(lambda tree: jax.tree_util.tree_leaves_with_path(tree), (state, abstract))
    )
    for name in [*expected, *found]:
        there, wanted = found.get(name, "absent"), expected.get(name, "absent")
        if there != wanted:
            raise ValueError(
                f"these are the weights of another model: {name} is {there}, and this model "
                f"expects {wanted}"
            )
