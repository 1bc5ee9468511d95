"""What there is to know about a predictor, the result of ``protein-lm fine-tune --table``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.json_files import read_json
from fast_attention.protein_lm.files.output_files import printable
from fast_attention.protein_lm.finetune.finetuned import read_about
from fast_attention.protein_lm.finetune.tuning_run import RESULT, format_metrics
from fast_attention.protein_lm.runs.run_folder import inside


def describe_predictor(folder: Path) -> dict[str, Any]:
    """Gathers what is known, in the form of JSON.

    Returns:
      ``folder``, ``kind`` (``"predictor"``), ``method``, ``classes`` (None of a regression),
      ``max_length``, ``whole`` (whether the folder holds the whole model), ``run_dir`` (of the
      model that was fine-tuned, seen from the folder) and ``metrics`` by part; None where the
      folder has no ``result.json``.

    Raises:
      RunError: If a file of the folder is damaged.
    """
    about = read_about(folder)
    names = ("method", "classes", "max_length", "whole", "run_dir")
    found = {"folder": str(folder), "kind": "predictor", **{name: about[name] for name in names}}
    path = inside(folder, RESULT)
    result = read_json(path) if path.is_file() else {}
    if not isinstance(result, dict):
        raise RunError(f"{path} is damaged: remove it, or fetch it again")
    return found | {"metrics": result.get("metrics")}


def format_predictor(about: dict[str, Any]) -> str:
    """The text that ``protein-lm info`` prints."""
    classes, crop = about["classes"], about["max_length"]
    lines = [
        ("folder", f"{about['folder']} (predictor)"),
        ("predicts", "a number" if classes is None else f"a class: {', '.join(classes)}"),
        ("method", about["method"]),
        ("proteins", "read whole" if crop is None else f"the first {crop:,} residues"),
        ("model", "in the folder" if about["whole"] else f"of the run {about['run_dir']}"),
        ("use", f"protein-lm predict --model={about['folder']}"),
    ]
    # Names of classes and of the run are data, which must not look like other lines.
    text = "\n".join(f"{name:<16}{printable(value)}" for name, value in lines)
    if about["metrics"] is None:
        return text
    try:
        return f"{text}\n\n{format_metrics(classes, about['metrics'])}"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        path = Path(about["folder"], RESULT)
        raise RunError(f"{path} is damaged: remove it, or fetch it again") from error
