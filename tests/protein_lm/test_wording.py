import pytest

from fast_attention.protein_lm.wording import counted, duration, place, source


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 proteins"), (1, "1 protein"), (2, "2 proteins"), (1200, "1,200 proteins")],
)
def test_what_is_counted_agrees_with_its_number(number, text):
    assert counted(number, "protein") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.1 seconds"),
        (1.62, "1.6 seconds"),
        (45, "45 seconds"),
        (210, "3.5 minutes"),
        (7560, "2.1 hours"),
    ],
)
def test_a_time_is_in_a_unit_that_shows_it(seconds, text):
    assert duration(seconds) == text


def test_an_output_has_a_name():
    assert place("-") == "standard output" and place("a/b.tsv") == "a/b.tsv"


def test_an_input_has_a_name():
    assert source("-") == "standard input" and source("a/b.fasta") == "a/b.fasta"
