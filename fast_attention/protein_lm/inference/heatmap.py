"""The effects of single substitutions as a picture: positions by residues."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fast_attention.protein_lm.data.alphabets import PROTEIN
from fast_attention.protein_lm.data.fasta import FastaRecord
from fast_attention.protein_lm.files.output_files import write_file
from fast_attention.protein_lm.inference.mutations import Variant

_POSITIONS_PER_ROW = 100
_MOST_ROWS = 40
_CELL_INCHES = 0.14
_WIDEST_INCHES = 30.0


def check(work: Sequence[tuple[FastaRecord, Iterable[Variant]]]) -> None:
    """Raises ValueError unless there is a picture to draw: single substitutions of one protein.

    Args:
      work: Wild types and their variants; two are enough to see that there are several. Variants
        that are an iterator are not looked at, since they can be read only once.
    """
    if len(work) != 1:
        raise ValueError(
            "a heat map shows one protein, but there are several: run the command for each"
        )
    ((_, variants),) = work
    if isinstance(variants, Sequence) and not any(_is_single(variant) for variant in variants):
        raise ValueError("a heat map shows single substitutions such as A12G, but there is none")


def effect_matrix(
    wild_type: str,
    variants: Sequence[Variant],
    values: np.ndarray,
    residues: str = PROTEIN.standard_symbols,
) -> np.ndarray:
    """Returns float64 [residues, positions]: the value of each single substitution, NaN elsewhere.

    That of the wild type's own residue is 0. Other variants are left out.

    Args:
      wild_type: The protein.
      variants: Of the protein.
      values: One of each variant.
      residues: The residue of each row.
    """
    rows = {residue: row for row, residue in enumerate(residues)}
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


def merge(matrix: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Two matrices of one protein by `effect_matrix` as one."""
    return np.where(np.isnan(more), matrix, more)


def plot_heatmap(
    path: str | os.PathLike[str],
    protein: FastaRecord,
    matrix: np.ndarray,
    name: str,
    *,
    residues: str = PROTEIN.standard_symbols,
    span: tuple[int, int] | None = None,
) -> None:
    """Draws `effect_matrix`, with a dot at each residue of the wild type; grey is not known.

    A protein of more than 100 residues takes several rows of equal scale.

    Args:
      path: The picture, PNG.
      protein: The wild type.
      matrix: float ``[residues, positions]``, natural logarithms.
      name: What the values are.
      residues: The residue of each row.
      span: The first position that is drawn, from 0, and the first after the last; None draws the
        whole protein.
    """
    first, end = span or (0, len(protein.sequence))
    per_row = max(_POSITIONS_PER_ROW, -(-(end - first) // _MOST_ROWS))
    starts = range(first, end, per_row)
    width = min(end - first, per_row)
    limit = float(np.nanmax(np.abs(matrix))) or 1.0
    inches = min(_CELL_INCHES * max(width, 20), _WIDEST_INCHES)
    figure = Figure(figsize=(2.5 + inches, 0.9 + 3.4 * len(starts)))
    figure.set_layout_engine("constrained")
    grid = figure.subplots(len(starts), 1, squeeze=False)[:, 0]
    image = None
    for axes, start in zip(grid, starts, strict=True):
        stop = min(start + per_row, end)
        part = matrix[:, start:stop]
        image = _draw_row(axes, part, protein.sequence, residues, start, width, limit)
    grid[-1].set_xlabel("position; a dot marks the residue of the wild type")
    shown = protein.id if len(protein.id) <= 60 else f"{protein.id[:57]}..."
    # A dollar sign would begin a formula.
    title = f"{shown}, {len(protein.sequence):,} residues".replace("$", r"\$")
    figure.suptitle(title)
    if image is not None:
        label = f"{name.replace('_', ' ')} (nats)\nred: less probable than the wild type"
        figure.colorbar(image, ax=list(grid), label=label, pad=0.01, aspect=30, shrink=0.9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_file(path, picture.getvalue())


def _draw_row(
    axes: Any,
    part: np.ndarray,
    wild_type: str,
    residues: str,
    start: int,
    width: int,
    limit: float,
) -> Any:
    """Draws the positions from `start` on, in a row with room for `width` of them."""
    left, right = start + 0.5, start + part.shape[1] + 0.5
    axes.axvspan(left, right, color="0.85", zorder=0, linewidth=0)
    image = axes.imshow(
        part,
        cmap="RdBu",
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        interpolation="nearest",
        extent=(left, right, len(part) - 0.5, -0.5),
    )
    # The scale of the last row is that of the others, and its frame ends with the protein.
    axes.set_xlim(left, left + width)
    for side in ("top", "bottom"):
        axes.spines[side].set_bounds(left, right)
    axes.spines["right"].set_position(("data", right))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins="auto", steps=[1, 2, 5, 10]))
    ticks = [tick for tick in axes.get_xticks() if left <= tick <= right]
    axes.set_xticks([start + 1, *(tick for tick in ticks if tick > start + width / 20)])
    places = [
        place for place in range(start, start + part.shape[1]) if wild_type[place] in residues
    ]
    rows = [residues.index(wild_type[place]) for place in places]
    size = 5 * min(1.0, _POSITIONS_PER_ROW / width)
    axes.scatter(np.array(places) + 1, rows, s=size, color="black", linewidths=0)
    axes.set_yticks(range(len(residues)), residues, fontsize=7)
    axes.set_ylabel("residue")
    return image


def _is_single(variant: Variant) -> bool:
    return len(variant.edits) == 1 and variant.substitutes_only
