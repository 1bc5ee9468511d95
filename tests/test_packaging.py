"""What an installation brings, and what an import costs."""

import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = ["flax", "gin", "grain", "matplotlib", "optax", "orbax", "tensorboardX", "tqdm"]


def modules_after(statement: str, *, blocked: tuple[str, ...] = ()) -> list[str]:
    """Top-level modules that a fresh interpreter has loaded after `statement`."""
    program = (
        f"import json, sys; sys.modules.update(dict.fromkeys({blocked}))\n{statement}\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_importing_the_package_stays_light():
    assert not set(modules_after("import fast_attention")) & set(HEAVY)


def test_the_core_needs_no_extra():
    use = "from fast_attention import make_fast_softmax_attention as make; make(qkv_dim=4)"
    extras = ("beartype", "grain", "jaxtyping", "matplotlib", "tensorboardX", "tqdm")
    modules_after(f"import fast_attention.layers, fast_attention.models; {use}", blocked=extras)


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
