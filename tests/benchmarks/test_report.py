"""Tables, targets, crossovers and pictures of given results; the commands."""

from __future__ import annotations

import importlib
import re

import pytest

from benchmarks import environment, report, tables
from benchmarks.__main__ import main
from benchmarks.crossover import crossover
from benchmarks.plots import draw
from benchmarks.results import Results
from benchmarks.settings import Setting
from benchmarks.targets import LONG_PAST, TARGETS, Figure, Target
from tests.benchmarks.runs import made_up


def cells(markdown: str) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in markdown.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_results_are_read_back_as_written(tmp_path):
    results = made_up()
    results.save(tmp_path / "a" / "results.json")
    assert Results.load(tmp_path / "a" / "results.json") == results


def test_ratios_are_to_our_fastest():
    ratios = cells(tables.ratio_table(made_up(), "causal", "f+b", Setting()))
    assert ratios["tokens"] == ["512", "2,048", "4,096"]
    assert ratios["**FAVOR+ (chunked)**"] == ["1"] * 3
    assert ratios["FAVOR+ (scan over tokens)"] == ["5"] * 3
    assert ratios["exact (jax.nn)"] == ["0.512", "2.05", "-"]
    assert ratios["identity (v x 1)"] == ["0.01"] * 3


def test_times_come_with_their_spread():
    times = cells(tables.time_table(made_up(), "causal", "forward", Setting()))
    assert times["FAVOR+ (scan over tokens)"][0] == "2.56 (20%)"
    assert times["exact (jax.nn)"][2] == "-"


def test_memory_and_decoding_have_tables():
    memory = cells(tables.memory_table(made_up(), "causal", "f+b", Setting()))
    assert memory["identity (v x 1)"] == ["2", "8", "16"]
    decoding = cells(tables.decode_table(made_up()))
    assert decoding["state, within a scan, B=1, D=64"] == ["25 us", "25 us"]


def test_what_was_left_out_is_said_once_with_the_reason():
    lines = tables.left_out(made_up()).splitlines()
    reason = "3 calls take longer than 5 s"
    assert lines == [
        f"- causal exact (jax.nn), {m}, from 4096 tokens: {reason}" for m in ("forward", "f+b")
    ]


def test_targets_are_met_or_missed_by_so_much():
    found = cells(tables.targets_table(made_up()))
    assert found["scan over tokens / causal, f+b, 4096 tokens"] == [">= 4.5 x", "5 x", "met"]
    assert found["decoding, a step within a scan"] == ["<= 20 us", "25 us", "missed by 25%"]
    step = f"decoding, a step after {LONG_PAST} tokens / after none"
    assert found[step] == ["<= 1.15 x", "1 x", "met"]
    assert found["exact / causal (crossover), f+b, 512 tokens"][2] == "missed by 49%"
    assert found["torch SDPA / causal, f+b, 4096 tokens"][1:] == ["-", "not measured"]


def test_memory_can_be_a_target():
    figure = Figure("causal/per-token", "f+b", 4096, memory=True)
    target = Target("memory", figure, at_most=1.0)
    assert target.value(made_up()) == 2.0
    assert target.missed_by(2.0) == 1.0


def test_targets_name_cases_that_exist():
    from benchmarks.cases import attention_cases
    from benchmarks.decode import DECODE_CASES

    names = {case.info.name for case in attention_cases("cpu")} | {c.name for c in DECODE_CASES}
    used = {f.case for t in TARGETS for f in (t.figure, t.over) if f is not None}
    assert used <= names | {"causal/torch-sdpa"}


@pytest.mark.parametrize(
    "ours, exact, expected",
    [
        ({1: 2.0, 4: 2.0}, {1: 1.0, 4: 4.0}, ("at", 2.0)),
        ({1: 1.0, 4: 2.0}, {1: 2.0, 4: 4.0}, ("below", 1)),
        ({1: 5.0, 4: 5.0, 8: 5.0}, {1: 1.0, 4: 2.0}, ("above", 4)),
        ({1: 1.0}, {2: 1.0}, ("unknown", None)),
    ],
)
def test_crossover(ours, exact, expected):
    known, length = crossover(ours, exact)
    assert known == expected[0]
    assert length == (None if expected[1] is None else pytest.approx(expected[1]))


def test_crossovers_are_told():
    said = tables.crossovers(made_up(), "causal", Setting())
    assert "exact (jax.nn), forward: from about 1,000 tokens on" in said


def test_a_page_is_written_from_the_files_of_runs(tmp_path):
    made_up().save(tmp_path / "cpu" / "results.json")
    made_up((64, 128), "gpu").save(tmp_path / "gpu" / "results.json")
    page = tmp_path / "docs" / "benchmarks.md"
    report.main([str(tmp_path / "cpu"), str(tmp_path / "gpu"), f"--page={page}"])
    text = page.read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) == len(set(pictures)) == 6
    for picture in pictures:
        assert (page.parent / picture).read_bytes().startswith(b"\x89PNG")
    assert f"python -m benchmarks.report {tmp_path / 'cpu'} {tmp_path / 'gpu'}" in text
    assert text.count("### Targets") == 1
    assert "D=128" in text


def test_pictures_without_matplotlib_name_the_extra(tmp_path, monkeypatch):
    def refuse(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(SystemExit, match=r"\.\[benchmarks\]"):
        draw(made_up(), tmp_path)


def test_the_command_writes_results_tables_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(environment, "detect_platform", lambda: "cpu")
    monkeypatch.setattr(environment, "prepare", lambda *_, **__: None)
    options = ["--quick", "--lengths=8", "--heads=2", "--head_dim=4", "--features=8"]
    main(
        [
            *options,
            "--measures=forward",
            "--only=causal/favor-chunked,identity",
            f"--output={tmp_path}",
        ]
    )
    results = Results.load(tmp_path / "results.json")
    assert {row.case for row in results.rows} == {"causal/favor-chunked", "identity"}
    assert {(row.measure, row.setting.length) for row in results.rows} == {("forward", 8)}
    assert all(len(row.samples) == 3 for row in results.rows)
    assert "--only=causal/favor-chunked,identity" in str(results.machine["command"])
    assert "cpu-d4-time-causal.png" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "cpu-d4-time-causal.png").exists()
    assert "| **FAVOR+ (chunked)** | 1 |" in capsys.readouterr().out


def test_pinning_comes_before_jax():
    with pytest.raises(RuntimeError, match="before the process was pinned"):
        environment.use_one_core()
