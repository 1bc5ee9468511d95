"""The gin names of the protein language models, and how a configuration is put together."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

import gin
import gin.config

import fast_attention
from fast_attention import gin_bindings as gin_bindings
from fast_attention.mesh.meshes import make_mesh
from fast_attention.protein_lm import embedder, models, ranges
from fast_attention.protein_lm.data import domains, vocabulary
from fast_attention.protein_lm.inference import reducers
from fast_attention.protein_lm.modeling import schedules
from fast_attention.protein_lm.modeling.objectives import OBJECTIVES
from fast_attention.protein_lm.training import dataset, experiment

# What holds unless a configuration says otherwise.
_DEFAULTS = """
experiment.model_cls = @FlaxLM
experiment.split_files = @get_train_valid_files
FlaxModel.domain = @make_protein_domain()
"""


CONFIGS = Path(fast_attention.__file__).parents[1] / "protein_lm_configs"
"""The gin files of this project, which are installed beside the package."""

DEMO = CONFIGS / "demo.gin"
"""Settings of a small model."""


# Only this setting of batch_ds reaches an experiment: it gives the others itself.
_RENAMED = {"batch_ds.pack_length": "experiment.pack_length"}


@functools.cache
def register() -> None:
    """Registers the names, once.

    What is bound to ``FlaxModel`` holds for ``FlaxLM`` and ``FlaxBERT``, unless the same
    parameter is bound to these.
    """
    for target in (
        # gin changes the constructors of classes in place, so that the subclasses inherit what
        # is bound to FlaxModel.
        models.FlaxModel,
        models.FlaxLM,
        models.FlaxBERT,
        *OBJECTIVES.values(),
        vocabulary.Vocabulary,
        vocabulary.ProteinVocab,
        domains.FixedLengthDiscreteDomain,
        domains.VariableLengthDiscreteDomain,
        embedder.ProteinLMEmbedder,
        dataset.batch_ds,
        dataset.get_train_valid_files,
        reducers.sum_reducer,
        reducers.mean_reducer,
        reducers.max_reducer,
        reducers.masked_reduce_fn,
        domains.make_protein_domain,
        schedules.create_learning_rate_scheduler,
        make_mesh,
    ):
        gin.configurable(target, module="protein_lm")
    gin.external_configurable(experiment.Experiment, "experiment", module="protein_lm")


def configure(files: Sequence[str | Path] = (), bindings: Sequence[str] = ()) -> None:
    """Replaces the configuration of this process.

    Args:
      files: gin files, or names of files in `CONFIGS`, see `find_settings`. What they include is
        looked for beside them, and then as gin does.
      bindings: Lines that come after the files and win over them.

    Raises:
      OSError: If a file cannot be read.
      SyntaxError: If a line is not gin.
      ValueError: If a name or a parameter is unknown, a number is out of its range, or a file
        includes itself.
    """
    register()
    gin.clear_config()
    gin.parse_config(_DEFAULTS)
    for file in files:
        _parse_file(find_settings(file), ())
    renamed = [_renamed(line) for line in bindings]
    with _unfinished_text_as_syntax_error(None, "\n".join(renamed)):
        gin.parse_config_files_and_bindings([], renamed)
    _check_numbers()


def find_settings(name: str | Path) -> Path:
    """Finds a gin file by its path, or one of `CONFIGS` by its name.

    Args:
      name: The path of a file; where there is none, the name of a file in `CONFIGS`, with or
        without ``protein_lm_configs/`` before and ``.gin`` behind it.

    Raises:
      FileNotFoundError: If there is neither; the message lists the names.
    """
    path = Path(name)
    if path.exists() and not path.is_dir():
        return path
    known = {file.stem: file for file in sorted(CONFIGS.glob("*.gin"))}
    found = known.get(path.name.removesuffix(".gin"))
    if found is not None and path.parent in (Path(), Path(CONFIGS.name)):
        return found
    reason = "is a folder, not a gin file" if path.is_dir() else "no such gin file"
    raise FileNotFoundError(
        f"{name}: {reason}. Give the path of a file, or the name of one that comes with the "
        f"package: {', '.join(known)}."
    )


def _check_numbers() -> None:
    """Raises ValueError, which names the setting, at a number out of its range."""
    for configurable, settings in ranges.SETTINGS.items():
        bound = gin.get_bindings(configurable, resolve_references=False)
        for name in bound.keys() & settings.keys():
            value = bound[name]
            # What a reference stands for is checked where it is used.
            if value is not None and not isinstance(value, gin.config.ConfigurableReference):
                ranges.check(f"{configurable}.{name}", value, settings[name])


def make_model(files: Sequence[str | Path]) -> models.FlaxModel:
    """Makes the model of gin files, untrained, and leaves the configuration of gin empty.

    Args:
      files: As for `configure`.

    Raises:
      OSError, SyntaxError, ValueError: As `configure`.
    """
    try:
        configure(files)
        return gin.get_bindings("experiment")["model_cls"]()
    finally:
        gin.clear_config()


def _parse_file(path: Path, includers: tuple[Path, ...]) -> None:
    """Parses a file part by part, so that what it includes takes its turn."""
    if path in includers:
        raise ValueError(f"{path} includes itself, by way of {', '.join(map(str, includers))}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    except UnicodeError:
        raise ValueError(f"{path} is no gin file: save it as plain text, UTF-8") from None
    begin = 0
    for number, line in enumerate(lines):
        included = re.match(r"""include\s+(['"])(.+?)\1""", line)
        if included and (beside := path.parent / included[2]).is_file():
            _parse_part(path, lines, begin, number)
            _parse_file(beside, (*includers, path))
            begin = number + 1
    _parse_part(path, lines, begin, len(lines))


def _parse_part(path: Path, lines: list[str], begin: int, end: int) -> None:
    # gin names the file and the line of an error: empty lines keep the count right.
    text = "\n" * begin + _renamed("".join(lines[begin:end]))
    part = io.StringIO(text)
    part.name = str(path)  # pyright: ignore[reportAttributeAccessIssue]
    with _unfinished_text_as_syntax_error(str(path), text):
        gin.parse_config(part)


@contextlib.contextmanager
def _unfinished_text_as_syntax_error(name: str | None, text: str) -> Iterator[None]:
    """Raises SyntaxError, which names the line, where Python's tokenizer raises TokenError.

    gin lets that through for an open bracket and, from Python 3.12 on, for an open quote.

    Args:
      name: of the file, or None.
      text: what is parsed.
    """
    try:
        yield
    except tokenize.TokenError as error:
        message, (line, column) = error.args
        lines = text.splitlines()
        line = min(line, len(lines))
        raise SyntaxError(
            f"Unable to parse value: {message}. Close quotes and brackets.",
            (name, line, column, lines[line - 1]),
        ) from None


def _renamed(text: str) -> str:
    """Settings of Google's protein_lm that have another name here, under that name."""
    for old, new in _RENAMED.items():
        text = re.sub(rf"^([\w/]*/)?([\w.]+\.)?{re.escape(old)}\b", rf"\1{new}", text, flags=re.M)
    return text
