"""Writes ``docs/benchmarks.md`` and its pictures from the results of runs.

``python -m benchmarks.report runs/benchmarks`` (several folders: several machines, one after the
other). Measures nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import tables
from benchmarks.plots import draw, picture_names
from benchmarks.programs import MEASURES
from benchmarks.results import Results
from benchmarks.settings import Setting

RESULTS = "results.json"
BY_HAND = "<!-- What follows is written by hand and kept. -->"

INTRODUCTION = """\
Time and memory of attention, for this package and for baselines: a scan over tokens or two einsums
over the whole sequence (FAVOR+ as first published), exact attention, the identity (the values,
copied), and the matrix products that FAVOR+ needs at least.

`f+b` is the output and the gradients of query, key and value. Programs of one length are compiled
first and then run in turn. Figures are medians; the spread is the interquartile range divided by
the median. On a CPU everything runs on one core, and the time of a call is its processor time until
its buffers are freed; on an accelerator it is the wall-clock time. Memory is that of temporaries
and results, as planned by the compiler. A dash means that a case was not measured.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads folders of results and writes the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="Writes the page on benchmarks."
    )
    parser.add_argument("folders", nargs="+", type=Path, help="where runs left results.json")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"), help="output")
    options = parser.parse_args(arguments)
    runs = [Results.load(folder / RESULTS) for folder in options.folders]
    folders = " ".join(str(folder) for folder in options.folders)
    write_page(runs, options.page, options.page.parent / "images", folders)


def write_page(runs: Sequence[Results], page: Path, images: Path, folders: str) -> None:
    """Writes a page and its pictures.

    Args:
      runs: results, a section each.
      page: the Markdown file; what stands behind `BY_HAND` there is kept.
      images: folder of the pictures, below that of the page.
      folders: where the results are, for the command that the page states.
    """
    prefix = images.relative_to(page.parent)
    page.parent.mkdir(parents=True, exist_ok=True)
    parts = [
        "# Benchmarks\n",
        INTRODUCTION,
        "Measured by `python -m benchmarks`; this page and its pictures are written from the "
        f"results by `python -m benchmarks.report {folders}`.\n",
        *(part for results in runs for part in _section(results, prefix)),
    ]
    _, marker, kept = page.read_text().partition(BY_HAND) if page.exists() else ("", "", "")
    page.write_text("\n".join(part for part in parts if part) + marker + kept)
    for results in runs:
        draw(results, images)


def ratios(results: Results) -> str:
    """Returns the tables of ratios alone, for the console."""
    parts = [_tables(results, shape, tables.ratio_table) for shape in results.shapes()]
    return "\n".join(line for part in parts for line in part)


def _section(results: Results, prefix: Path) -> list[str]:
    machine = results.machine
    name = machine["cpu"] if machine["platform"] == "cpu" else machine["device"]
    parts = [f"## {name}\n", tables.machine_table(results)]
    if machine["platform"] == "cpu":
        parts += ["### Targets\n", tables.targets_table(results)]
    parts += [
        f"![{text}]({(prefix / name).as_posix()})\n"
        for name, text in picture_names(results).items()
    ]
    for shape in results.shapes():
        parts += _shape(results, shape)
    decoding = tables.decode_table(results)
    if decoding:
        parts += ["### Decoding, per step of all B sequences\n", decoding]
    omitted = tables.left_out(results)
    if omitted:
        parts += ["### Left out\n", omitted]
    return parts


def _shape(results: Results, shape: Setting) -> list[str]:
    title = f"B={shape.batch} H={shape.heads} D={shape.head_dim} M={shape.features} {shape.dtype}"
    sections = (
        ("Ratios: time over that of our fastest FAVOR+", tables.ratio_table),
        ("Times in ms, and their spread", tables.time_table),
        ("Memory in MiB", tables.memory_table),
    )
    parts = []
    for heading, make in sections:
        parts += [f"### {heading}, {title}\n", *_tables(results, shape, make)]
    for kind in results.kinds():
        lines = tables.crossovers(results, kind, shape)
        if lines.strip():
            parts += [f"Crossover, {kind}: our fastest FAVOR+ is\n", lines]
    return parts


def _tables(
    results: Results, shape: Setting, make: Callable[[Results, str, str, Setting], str]
) -> list[str]:
    """Returns a table for each kind of attention and measure, each with a line that names it."""
    return [
        part
        for kind in results.kinds()
        for measure in MEASURES
        if results.lengths(measure, shape)
        for part in (f"{kind.capitalize()}, {measure}:\n", make(results, kind, measure, shape))
    ]


if __name__ == "__main__":
    main()
