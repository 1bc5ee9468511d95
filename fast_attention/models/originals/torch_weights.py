"""Loads the weights of the original PyTorch packages into the models.

PyTorch is not needed, only names and arrays. A dense layer's weight is ``[out, in]`` in PyTorch and
``[in, out]`` here. Buffers that can be computed (sinusoids, counters) are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from fast_attention.layers.attention.multi_head import MultiHeadAttention
from fast_attention.layers.masked_batch_norm import MaskedBatchNorm
from fast_attention.layers.norms import ScaleNorm
from fast_attention.layers.product_key_memory import ProductKeyMemory
from fast_attention.layers.stack.stack import Stack
from fast_attention.layers.stack.sublayer import Sublayer
from fast_attention.models.encoder_decoder import EncoderDecoder
from fast_attention.models.language_model import LanguageModel

Transform = Callable[[Any], Any]
Place = tuple[nnx.Variable, Transform]

_BLOCK = re.compile(r"(?:layers|blocks|irrev_blocks)\.(\d+)\.([01fg])\.(.*)")
_COMPUTED = re.compile(
    r"(.*\.)?(inv_freq|calls_since_last_redraw|(layer_)?pos_emb\.emb|num_batches_tracked|"
    r"proj_updater\.instance\..*)"
)
_DENSE = {
    "to_q": "query",
    "to_k": "key",
    "to_v": "value",
    "to_out": "out",
    "w1": "up",
    "w2": "down",
}
"""Dense layers of sublayers by the originals' names."""
_PARAMETERS = {"proj_k": "key_projection", "proj_v": "value_projection"}


def load_torch_state_dict(model: nnx.Module, state_dict: Mapping[str, Any]) -> None:
    """Loads a state dict of performer-, reformer- or linear-attention-transformer.

    Args:
      model: Made by the preset of the same name, with the same keywords.
      state_dict: Arrays (or values that numpy converts to arrays) by the names of the original; a
        tensor with several names in the original may be given once or under each name.

    Raises:
      ValueError: If a name is missing or unexpected, a shape differs, or two names of one tensor
        disagree; nothing is loaded then.
    """
    values: dict[int, tuple[str, nnx.Variable, Any]] = {}
    unknown, wrong, unlike = [], [], []
    for name, array in state_dict.items():
        if _COMPUTED.fullmatch(name):
            continue
        place = _place(model, name)
        if place is None:
            unknown.append(name)
            continue
        if place is _UNUSED:
            continue
        variable, transform = place
        value = transform(array if isinstance(array, Tracer) else np.asarray(array))
        if value.shape != variable.shape:
            wrong.append(f"{name} is {value.shape}, the model has {variable.shape}")
        elif id(variable) in values and _differ(value, values[id(variable)][2]):
            unlike.append(f"{values[id(variable)][0]} and {name}")
        values[id(variable)] = (name, variable, value)
    missing = [
        ".".join(map(str, path))
        for path, variable in nnx.iter_graph(model)
        if isinstance(variable, nnx.Variable)
        and jnp.issubdtype(variable.dtype, jnp.floating)
        and id(variable) not in values
    ]
    problems = {
        "left over": unknown,
        "of another shape": wrong,
        "missing": missing,
        "names of one tensor with different values": unlike,
    }
    if any(problems.values()):
        hint = ""
        if any(".norm.fn." in name for name in unknown):
            hint = " pkm_norm='batch' is for memories of product-key-memory before 0.2."
        told = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)
        raise ValueError(
            f"The state dict does not fit the model ({told}). Build the model with the keywords "
            f"of the original; missing names are those of this package.{hint}"
        )
    for _, variable, value in values.values():
        variable[...] = jnp.asarray(value, variable.dtype)


_UNUSED: Any = object()


def _differ(value: Any, other: Any) -> bool:
    """Whether two arrays differ, as far as can be seen while a program is traced."""
    if isinstance(value, Tracer) or isinstance(other, Tracer):
        return False
    return not np.array_equal(value, other, equal_nan=True)


def _place(model: Any, name: str) -> Place | None:
    """Where the array of a name belongs and what makes it fit; None if nowhere."""
    if isinstance(model, EncoderDecoder):
        side, _, rest = name.partition(".")
        part = {"enc": model.encoder, "dec": model.decoder}.get(side)
        return None if part is None else _place(part, re.sub(r"^(net\.)+", "", rest))
    if isinstance(model, LanguageModel):
        return _place_around(model, name) or _place_in_stack(model.stack, name)
    if isinstance(model, Stack):
        return _place_in_stack(model, name)
    if isinstance(model, MultiHeadAttention):
        return _place_in_attention(model, name)
    raise TypeError(
        f"{type(model).__name__} is not one of the presets: build it with a preset of "
        "fast_attention.models."
    )


def _place_around(model: LanguageModel, name: str) -> Place | None:
    """Embeddings, positions, projections, norm and logits."""
    found = re.fullmatch(r"pos_emb\.weights[._](\d+)", name)
    if found:
        tables = getattr(model.positions, "tables", ())
        index = int(found[1])
        return (tables[index], _rows) if index < len(tables) else None
    if name == "pos_emb.emb.weight":
        table = getattr(model.positions, "table", None)
        return None if table is None else (table, _same)
    if name in ("token_emb.weight", "out.1.tensor"):
        return model.embed.embedding, _same
    module, _, leaf = name.rpartition(".")
    layers: dict[str, Any] = {
        "to_model_dim": model.project_in,
        "transformer.project_in": model.project_in,
        "out.0": model.project_out,
        "transformer.project_out": model.project_out,
        "norm": model.norm,
        "to_out": model.head,
        "out.1": model.head,
        "out": model.head,
    }
    return _leaf(layers[module], leaf) if layers.get(module) is not None else None


def _place_in_stack(stack: Stack, name: str) -> Place | None:
    found = _BLOCK.search(name)
    if not found:
        return None
    block, part = int(found[1]), {"f": 0, "g": 1}.get(found[2], found[2])
    if block >= len(stack.blocks) or int(part) >= len(stack.blocks[block]):
        return None
    return _place_in_sublayer(stack.blocks[block][int(part)], found[3])


def _place_in_sublayer(sublayer: Sublayer, given: str) -> Place | None:
    name = re.sub(r"^((net|fn)\.)+", "", given)
    if name in ("g", "norm.g"):
        gain = sublayer.norm if isinstance(sublayer.norm, ScaleNorm) else sublayer.gain
        variable = getattr(gain, "scale", getattr(gain, "gain", None))
        return None if variable is None else (variable, _scalar)
    inner = sublayer.inner
    module, _, leaf = name.rpartition(".")
    if module == "norm" and isinstance(inner, ProductKeyMemory) and "fn.norm." in given:
        return _place_in_memory(inner, name)
    if module == "norm":
        return _leaf(sublayer.norm, leaf)
    name = re.sub(r"^((net|fn)\.)+", "", name)
    if isinstance(inner, MultiHeadAttention):
        return _place_in_attention(inner, name)
    if isinstance(inner, ProductKeyMemory):
        return _place_in_memory(inner, name)
    if name in _PARAMETERS:
        own = getattr(inner, _PARAMETERS[name], None)
        return None if own is None else (own, _same)
    module, _, leaf = name.rpartition(".")
    layer = getattr(inner, _DENSE.get(module, ""), None)
    return None if layer is None else _leaf(layer, leaf)


def _place_in_attention(attention: MultiHeadAttention, name: str) -> Place | None:
    project = attention.project
    if name == "fast_attention.projection_matrix":
        drawn = [x for x in attention.projections if x is not None]
        return (drawn[0], _same) if drawn else _UNUSED  # The original draws it in any case.
    if name == "mem_kv":
        return None if project.memory is None else (project.memory, _rows)
    module, _, leaf = name.rpartition(".")
    layers = {
        "to_q": project.query,
        "toqk": project.query,
        "to_k": project.key,
        "to_v": project.value,
        "tov": project.value,
        "to_out": attention.out,
    }
    return _leaf(layers[module], leaf) if layers.get(module) is not None else None


def _place_in_memory(memory: ProductKeyMemory, name: str) -> Place | None:
    places: dict[str, Any] = {
        "keys": (memory.keys, _same),
        "values.weight": (memory.memory_values, _same),
        "to_queries.weight": (memory.to_queries.kernel, _transposed),
    }
    norm = memory.norm
    if isinstance(norm, MaskedBatchNorm):
        places |= {
            "norm.fn.weight": (norm.scale, _same),
            "norm.fn.bias": (norm.bias, _same),
            "norm.fn.running_mean": (norm.mean, _same),
            "norm.fn.running_var": (norm.var, _same),
        }
    else:
        assert isinstance(norm, nnx.LayerNorm)
        places |= {"norm.weight": (norm.scale, _same), "norm.bias": (norm.bias, _same)}
    return places.get(name)


def _leaf(module: Any, leaf: str) -> Place | None:
    """The weight or bias of a dense layer or norm."""
    if leaf == "bias":
        return None if getattr(module, "bias", None) is None else (module.bias, _same)
    if leaf != "weight":
        return None
    if getattr(module, "kernel", None) is not None:
        return module.kernel, _transposed
    return (module.scale, _same) if getattr(module, "scale", None) is not None else None


def _same(array: Any) -> Any:
    return array


def _transposed(array: Any) -> Any:
    return array.T


def _scalar(array: Any) -> Any:
    return array.reshape(())


def _rows(array: Any) -> Any:
    return array.reshape(-1, array.shape[-1])
