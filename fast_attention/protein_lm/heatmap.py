"""The effects of single substitutions as a picture: positions by residues."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from fast_attention.protein_lm.mutations import Variant
from fast_attention.protein_lm.output_files import write_file
from fast_attention.protein_lm.vocabulary import STANDARD_RESIDUES

_POSITIONS_PER_ROW = 100


def check(variants: Sequence[Variant], num_proteins: int) -> None:
    """Raises ValueError unless there is a picture to draw: single substitutions of one protein."""
    if num_proteins != 1:
        raise ValueError(
            f"a heat map shows one protein, but there are {num_proteins}: run the command for each"
        )
    if not any(_is_single(variant) for variant in variants):
        raise ValueError("a heat map shows single substitutions such as A12G, but there is none")


def effect_matrix(wild_type: str, variants: Sequence[Variant], values: np.ndarray) -> np.ndarray:
    """Returns float64 [20, positions]: the value of each single substitution, NaN where none is.

    That of the wild type's own residue is 0. Other variants are left out.
    """
    rows = {residue: row for row, residue in enumerate(STANDARD_RESIDUES)}
    matrix = np.full((len(rows), len(wild_type)), np.nan)
    for variant, value in zip(variants, values, strict=True):
        if _is_single(variant):
            ((place, residue),) = variant.substitutions
            if residue in rows:
                matrix[rows[residue], place] = value
    for place in np.flatnonzero(~np.isnan(matrix).all(axis=0)):
        if wild_type[place] in rows:
            matrix[rows[wild_type[place]], place] = 0.0
    return matrix


def plot_heatmap(
    path: str | os.PathLike[str],
    wild_type: str,
    variants: Sequence[Variant],
    values: np.ndarray,
    name: str,
) -> None:
    """Draws `effect_matrix`, a dot at the residues of the wild type; grey is not known.

    Positions are those from the first to the last that is known; long proteins take several rows.

    Args:
      path: The picture, PNG.
      wild_type: Residues.
      variants: Of it.
      values: [N], the effect of each.
      name: What the values are.
    """
    matrix = effect_matrix(wild_type, variants, values)
    known = np.flatnonzero(~np.isnan(matrix).all(axis=0))
    first, end = int(known[0]), int(known[-1]) + 1
    starts = range(first, end, _POSITIONS_PER_ROW)
    width = min(end - first, _POSITIONS_PER_ROW)
    limit = float(np.nanmax(np.abs(matrix))) or 1.0
    figure = Figure(figsize=(2.5 + 0.14 * max(width, 20), 0.6 + 3.4 * len(starts)))
    figure.set_layout_engine("constrained")
    grid = figure.subplots(len(starts), 1, squeeze=False)[:, 0]
    image = None
    for axes, start in zip(grid, starts, strict=True):
        part = matrix[:, start : min(start + width, end)]
        axes.set_facecolor("0.85")
        image = axes.imshow(
            part,
            cmap="RdBu",
            vmin=-limit,
            vmax=limit,
            aspect="auto",
            interpolation="nearest",
            extent=(start + 0.5, start + part.shape[1] + 0.5, len(part) - 0.5, -0.5),
        )
        # Rows are of equal scale, the last one, too.
        axes.set_xlim(start + 0.5, start + width + 0.5)
        places = [
            place
            for place in range(start, start + part.shape[1])
            if wild_type[place] in STANDARD_RESIDUES
        ]
        rows = [STANDARD_RESIDUES.index(wild_type[place]) for place in places]
        axes.scatter(np.array(places) + 1, rows, s=5, color="black", linewidths=0)
        axes.set_yticks(range(len(STANDARD_RESIDUES)), STANDARD_RESIDUES, fontsize=7)
        axes.set_ylabel("residue")
    grid[-1].set_xlabel("position; a dot marks the wild type")
    if image is not None:
        figure.colorbar(image, ax=list(grid), label=name.replace("_", " "), pad=0.01)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_file(path, picture.getvalue())


def _is_single(variant: Variant) -> bool:
    return len(variant.edits) == 1 and variant.substitutes_only
