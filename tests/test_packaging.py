"""What an installation brings, and what an import costs."""

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_core_needs_no_extra():
    """In a fresh interpreter; what an import loads, :mod:`tests.test_imports` looks at."""
    extras = ("beartype", "grain", "jaxtyping", "matplotlib", "tensorboardX", "tqdm")
    program = f"""
import sys
sys.modules.update(dict.fromkeys({extras}))
import fast_attention.layers, fast_attention.models
from fast_attention import make_fast_softmax_attention
make_fast_softmax_attention(qkv_dim=4)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_command_is_where_it_is_said_to_be():
    module, _, function = PROJECT["scripts"]["protein-lm"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_shipped_corpus_is_small():
    folder = ROOT / "fast_attention" / "protein_lm" / "data" / "bundled"
    assert 0 < sum(path.stat().st_size for path in folder.iterdir()) < 10e6


def test_links_of_the_long_description_lead_somewhere():
    """Package indexes show the README without the files around it."""
    readme = (ROOT / PROJECT["readme"]).read_text()
    source = re.escape(PROJECT["urls"]["Source"].removeprefix("https://github.com/"))
    of_files = re.compile(rf"https://(?:raw\.githubusercontent|github)\.com/{source}/(.*)")
    links = re.findall(r"\]\(([^)\s]+)\)", readme)
    assert links
    for link in links:
        assert re.match(r"https://|#", link)
        if found := of_files.fullmatch(link):
            path = re.sub(r"^(?:blob/|tree/)?main/", "", found[1]).partition("#")[0]
            assert (ROOT / path).exists(), link


def test_the_licence_of_the_bundled_data_is_declared():
    terms = re.search(r"CC BY 4\.0; [^:]+", (ROOT / "LICENSE-DATA").read_text())
    assert terms and "CC-BY-4.0" in PROJECT["license"]
    assert set(PROJECT["license-files"]) == {"LICENSE", "LICENSE-DATA"}
    origin = (ROOT / "fast_attention/protein_lm/data/bundled/README.md").read_text()
    assert "UniProtKB (UniProt Consortium), CC BY 4.0" in " ".join(origin.split())
