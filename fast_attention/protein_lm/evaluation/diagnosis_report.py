"""A `Diagnosis` for people: as text, as a table or JSON, and as a picture."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fast_attention.diagnostics.plots import plot_head_errors
from fast_attention.feature_maps import (
    HyperbolicFeatures,
    LearnedFeatures,
    PositiveFeatures,
    TrigonometricFeatures,
    TunedFeatures,
)
from fast_attention.mechanisms.favor.fn import FastAttention
from fast_attention.mechanisms.favor.softmax_maps import LEARNED_ESTIMATORS
from fast_attention.mechanisms.local.fn import LocalAttention
from fast_attention.mechanisms.lsh.fn import LSHAttention
from fast_attention.protein_lm.evaluation.diagnosis import Diagnosis
from fast_attention.protein_lm.files.output_files import write_file, write_json
from fast_attention.protein_lm.files.tables import EXTENSIONS, find_extension, open_table
from fast_attention.protein_lm.wording import counted
from fast_attention.softmax_attention import SoftmaxAttention

if TYPE_CHECKING:
    from fast_attention.protein_lm.flax_model import FlaxModel

COLUMNS: dict[str, type] = {
    "layer": int,
    "head": int,
    "attention": str,
    "error": float,
    "uniform": float,
    "matrix": float,
    "effective_keys": float,
    "visible_keys": float,
    "query_norm": float,
    "key_norm": float,
}
"""Of the table, with ``features`` behind where a target error was asked for."""

FORMATS = (".json", *EXTENSIONS)
"""What the name of a file of figures may end in."""

_NOTES = {
    "other kernel": "other kernel: the model was trained with another kernel, which does not "
    "approximate softmax; the error is its difference from softmax attention",
    "local": "local: compared with attention to all residues, not only to nearby ones",
    "hashed": "hashed: compared with the same attention without hashing",
    "other": "other: compared with softmax attention to all residues",
}
_SOFTMAX = (
    PositiveFeatures,
    HyperbolicFeatures,
    TrigonometricFeatures,
    TunedFeatures,
    LearnedFeatures,
)


def check_name(path: str | os.PathLike[str]) -> None:
    """Raises ValueError unless the extension of a file is known."""
    find_extension(path, FORMATS)


def check_head(model: FlaxModel, layer: int, head: int) -> None:
    """Raises ValueError unless a model has a layer and a head, from 1."""
    layers, heads = model.config.num_layers, model.config.num_heads
    if layer > layers or head > heads:
        raise ValueError(
            f"the model has layers 1 to {layers} and heads 1 to {heads}, but --layer={layer} and "
            f"--head={head} were requested"
        )


def kind(attention_fn: Any) -> str:
    """Names a kind of attention in a word or two."""
    if isinstance(attention_fn, SoftmaxAttention):
        return "exact"
    if isinstance(attention_fn, FastAttention):
        return "features" if isinstance(attention_fn.feature_map, _SOFTMAX) else "other kernel"
    if isinstance(attention_fn, LSHAttention):
        return "hashed"
    return "local" if isinstance(attention_fn, LocalAttention) else "other"


def rows(found: Diagnosis) -> Iterator[dict[str, Any]]:
    """Yields a row of the table for every head."""
    for number, layer in enumerate(found.layers):
        for head in range(len(layer.output)):
            row = {
                "layer": layer.layer,
                "head": layer.first_head + head,
                "attention": kind(layer.attention_fn),
                "error": float(layer.output[head]),
                "uniform": float(layer.uniform[head]),
                "matrix": float(layer.matrix[head]),
                "effective_keys": float(layer.effective_keys[head]),
                "visible_keys": float(layer.visible_keys),
                "query_norm": float(layer.query_norm[head]),
                "key_norm": float(layer.key_norm[head]),
            }
            if found.recommended is not None:
                row["features"] = found.recommended[number].features
            yield row


def summary(found: Diagnosis) -> dict[str, Any]:
    """Root mean squares over all heads, and how many are no better than uniform attention."""
    error = np.concatenate([layer.output for layer in found.layers])
    uniform = np.concatenate([layer.uniform for layer in found.layers])
    return {
        "proteins": found.proteins,
        "calibrated_on": found.calibrated_on,
        "positions": found.layers[0].positions,
        "heads": len(error),
        "error": float(np.sqrt(np.mean(error**2))),
        "uniform": float(np.sqrt(np.mean(uniform**2))),
        "no_better_than_uniform": int((error >= uniform).sum()),
    }


def format_diagnosis(found: Diagnosis, target_error: float | None = None) -> str:
    """Makes the text that the command prints."""
    about, table = summary(found), list(rows(found))
    lines = [_heading(found, about), ""]
    extra = f"{'features':>10}" if found.recommended is not None else ""
    lines.append(
        "  layer  head  attention         error  uniform   matrix   effective keys       |q|  "
        f"     |k|{extra}"
    )
    for row in table:
        keys = f"{row['effective_keys']:.1f} of {row['visible_keys']:.0f}"
        extra = ""
        if found.recommended is not None:
            recommended = found.recommended[_entry(found, row["layer"], row["head"])]
            mark = "~" if recommended.extrapolated else ""
            extra = f"{mark + format(recommended.features, ','):>10}"
        lines.append(
            f"  {row['layer']:5}  {row['head']:4}  {row['attention']:12}  {row['error']:9.3f}"
            f"{row['uniform']:9.3f}{row['matrix']:9.3f}   {keys:>14}{row['query_norm']:10.2f}"
            f"{row['key_norm']:10.2f}{extra}"
        )
    kinds = dict.fromkeys(row["attention"] for row in table)
    lines += ["", _verdict(about)]
    if list(kinds) == ["exact"]:
        lines.append(
            "attention is exact: --nb_features=256 reports the error that random features would "
            "have"
        )
    lines += [_NOTES[name] for name in kinds if name in _NOTES]
    if found.recommended is not None:
        most = max(found.recommended, key=lambda one: one.features)
        text = (
            f"for a matrix error of {target_error:g} a layer needs up to {most.features:,} features"
        )
        if most.extrapolated:
            text += (
                f"; ~ is extrapolated from {most.measured[-1][0]:,} features, and may be too few"
            )
        lines.append(text)
    return "\n".join(lines)


def write(
    path: str | os.PathLike[str],
    found: Diagnosis,
    about: Mapping[str, Any],
    target_error: float | None = None,
) -> None:
    """Writes the figures of all heads.

    Args:
      path: A table of `COLUMNS`, or ``.json``: ``about``, the summary, and the table as ``heads``.
      found: The figures.
      about: Where they come from.
      target_error: As for `diagnose`.

    Raises:
      ValueError: At another extension.
      OutputError: If the file cannot be written.
    """
    check_name(path)
    if find_extension(path, FORMATS) == ".json":
        content = {**about, "target_error": target_error, "summary": summary(found)}
        write_json(path, content | {"heads": list(rows(found))})
        return
    columns = dict(COLUMNS)
    if found.recommended is not None:
        columns["features"] = int
    with open_table(path, columns) as write_row:
        for row in rows(found):
            write_row(list(row.values()))


def plot(
    path: str | os.PathLike[str],
    found: Diagnosis,
    matrices: Mapping[str, np.ndarray],
    layer: int,
    head: int,
    protein: str,
) -> None:
    """Draws the error of every head, and the matrices of one, as PNG.

    Args:
      path: The picture.
      found: The figures.
      matrices: Of a head, from `diagnosis.head_matrices`.
      layer: Which these are of.
      head: The same.
      protein: Id of the protein that the matrices are of.
    """
    table = list(rows(found))
    ratios = np.full((table[-1]["layer"], max(row["head"] for row in table)), np.nan)
    for row in table:
        if row["uniform"]:
            ratios[row["layer"] - 1, row["head"] - 1] = row["error"] / row["uniform"]
    shown = protein if len(protein) <= 30 else f"{protein[:27]}..."
    # A dollar sign would begin a formula.
    shown = shown.replace("$", r"\$")
    named = {
        f"{name}, layer {layer}, head {head}\nof {shown}": matrix
        for name, matrix in matrices.items()
    }
    picture = io.BytesIO()
    title = f"error of each head\n{counted(found.proteins, 'protein')}"
    plot_head_errors(ratios, picture, named, title)
    write_file(path, picture.getvalue())


def _heading(found: Diagnosis, about: Mapping[str, Any]) -> str:
    text = f"{counted(about['positions'], 'position')} of {counted(found.proteins, 'protein')}"
    if found.features is not None:
        own = found.features
        text += f"; instead of the model's attention {own.estimator}, "
        text += counted(own.nb_features, "feature")
        if own.exact_window is not None:
            text += f", exact within {counted(own.exact_window, 'residue')}"
        if own.estimator in LEARNED_ESTIMATORS:
            text += ", as they are before training"
    if found.calibrated_on:
        text += f"; calibrated on {counted(found.calibrated_on, 'other protein')}"
    return text


def _verdict(about: Mapping[str, Any]) -> str:
    return (
        f"all heads: error {about['error']:.3f}, uniform attention {about['uniform']:.3f} (root "
        f"mean squares); {about['no_better_than_uniform']} of {about['heads']} heads are no better "
        "than uniform attention"
    )


def _entry(found: Diagnosis, layer: int, head: int) -> int:
    """The place of the group of heads that has a head."""
    for number, entry in enumerate(found.layers):
        if entry.layer == layer and 0 <= head - entry.first_head < len(entry.output):
            return number
    raise AssertionError(f"no head {head} in layer {layer}")
