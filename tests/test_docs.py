"""The pages of the site: what they link to exists, and the reference lists public names."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SOURCE = "https://github.com/fast-attention/fast-attention/"
PUBLIC = (
    "fast_attention",
    "fast_attention.diagnostics",
    "fast_attention.feature_maps",
    "fast_attention.layers",
    "fast_attention.linear",
    "fast_attention.models",
    "fast_attention.protein_lm",
)


def name_of(page):
    return str(page.relative_to(DOCS))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path = link.partition("#")[0]
        if path.startswith(SOURCE):
            path = re.sub(r"^(?:blob|tree)/main/", "", path.removeprefix(SOURCE))
            assert (ROOT / path).exists(), link
        elif path and not path.startswith("http"):
            assert (page.parent / path).resolve().is_relative_to(DOCS), link
            assert (page.parent / path).exists(), link


@pytest.mark.parametrize("package", PUBLIC)
def test_the_reference_lists_names_that_exist(package):
    source = Path(importlib.import_module(package).__file__).read_text()
    public = {name for name, same in re.findall(r"\b(\w+) as (\w+)\b", source) if name == same}
    pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    listed = set(re.findall(rf"^::: {re.escape(package)}\.(\w+)$", pages, re.M))
    assert listed and listed <= public
