"""What linear attention does to a model that was trained with exact attention.

``python -m benchmarks.trained_model --model=FOLDER`` loads a published BERT or ESM-2 model, puts
other attention functions in the place of its exact attention, trains nothing, and prints how many
masked residues each predicts and with what perplexity. AntiBERTy (MIT licence, 26 million
parameters) is in a wheel of PyPI::

    pip download --no-deps antiberty==0.1.3
    unzip antiberty-0.1.3-py3-none-any.whl 'antiberty/trained_models/*'
    python -m benchmarks.trained_model --model=antiberty/trained_models/AntiBERTy_md_smooth

The default sequences are germline antibodies (``tests/data/antibodies``).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fast_attention import (
    make_fast_generalized_attention,
    make_fast_softmax_attention,
    make_softmax_attention,
)
from fast_attention.layers import with_attention
from fast_attention.models import load_pretrained

FASTA = Path(__file__).parents[1] / "tests" / "data" / "antibodies" / "heavy.fasta.gz"
BATCH = 16


@dataclasses.dataclass(frozen=True)
class Case:
    """An attention function.

    Attributes:
      name: As printed.
      features: M, or None.
      window: ``exact_window``, or None.
      make: Makes it.
      random: Whether draws differ.
    """

    name: str
    features: int | None
    window: int | None
    make: Callable[[], Any]
    random: bool = True


def cases(features: Sequence[int], windows: Sequence[int]) -> list[Case]:
    """Exact and uniform attention, and every estimator at each number of features."""
    uniform = functools.partial(
        make_fast_generalized_attention,
        kernel_fn=jnp.zeros_like,
        kernel_epsilon=1.0,
        nb_features=8,
        features_type="deterministic",
    )
    found = [
        Case("exact", None, None, make_softmax_attention, False),
        Case("uniform", None, None, uniform, False),
    ]
    for number in features:
        relu = functools.partial(
            make_fast_generalized_attention, nb_features=number, features_type="ortho"
        )
        found.append(Case("ReLU", number, None, relu))
        for window in (None, *windows):
            for estimator in ("favor+", "wderf_s"):
                make = functools.partial(
                    make_fast_softmax_attention,
                    nb_features=number,
                    estimator=estimator,
                    exact_window=window,
                    redraw_features=False,
                )
                found.append(Case(estimator, number, window, make))
    return found


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Ids by token, from ``vocab.txt`` in the folder of the model or the one above."""
    for place in (folder, folder.parent):
        if (place / "vocab.txt").is_file():
            tokens = (place / "vocab.txt").read_text(encoding="utf-8").split()
            return {token: index for index, token in enumerate(tokens)}
    raise SystemExit(f"{folder} has no vocab.txt, nor has the folder above it")


def read_sequences(path: Path, limit: int) -> list[str]:
    """The first sequences of a FASTA file, perhaps compressed."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt") as file:
        records = file.read().split(">")[1:]
    found = ["".join(record.splitlines()[1:]) for record in records[:limit]]
    if not found:
        raise SystemExit(f"{path} has no sequences")
    return found


def masked_batches(
    sequences: Sequence[str], ids: dict[str, int], rate: float, seed: int
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches of masked tokens, true tokens and what was masked; padding is -1 in the second."""
    begin, end = ("[CLS]", "[SEP]") if "[CLS]" in ids else ("<cls>", "<eos>")
    mask = ids["[MASK]" if "[MASK]" in ids else "<mask>"]
    rng = np.random.default_rng(seed)
    length = max(map(len, sequences)) + 2
    rows = np.full((len(sequences), length), -1)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence) + 2] = [ids[begin], *map(ids.__getitem__, sequence), ids[end]]
    residue = (rows >= 0) & (np.arange(length) > 0)
    residue &= np.roll(rows, -1, axis=1) >= 0
    residue[:, -1] = False
    hidden = residue & (rng.random(rows.shape) < rate)
    given = np.where(hidden, mask, np.maximum(rows, 0))
    parts = range(0, len(rows), BATCH)
    return [(given[i : i + BATCH], rows[i : i + BATCH], hidden[i : i + BATCH]) for i in parts]


def measure(model: nnx.Module, batches: Iterable[Any]) -> tuple[float, float]:
    """Share of masked residues predicted, and the perplexity of them."""
    graph, state = nnx.split(model)

    @jax.jit
    def sums(state: Any, given: Any, true: Any, hidden: Any) -> Any:
        logits = nnx.merge(graph, state)(given, key_mask=true >= 0)  # pyright: ignore[reportCallIssue]
        log_probabilities = jax.nn.log_softmax(logits, axis=-1)
        own = jnp.take_along_axis(log_probabilities, jnp.maximum(true, 0)[..., None], -1)[..., 0]
        right = (logits.argmax(-1) == true) & hidden
        return right.sum(), jnp.where(hidden, own, 0).sum(), hidden.sum()

    totals = np.sum([jax.device_get(sums(state, *map(jnp.asarray, x))) for x in batches], axis=0)
    return float(totals[0] / totals[2]), float(np.exp(-totals[1] / totals[2]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, a row a function."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trained_model", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--fasta", type=Path, default=FASTA, help="sequences")
    parser.add_argument("--sequences", type=int, default=64, help="how many")
    parser.add_argument("--features", type=int, nargs="+", default=[16, 32, 64, 256])
    parser.add_argument("--windows", type=int, nargs="*", default=[8])
    parser.add_argument("--draws", type=int, default=3, help="of the random features")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    options = parser.parse_args(arguments)
    try:
        exact = load_pretrained(options.model).model
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    sequences = read_sequences(options.fasta, options.sequences)
    batches = masked_batches(sequences, read_vocabulary(options.model), 0.15, 0)
    print(f"{len(sequences)} sequences, {sum(int(b[2].sum()) for b in batches)} masked residues")
    print("| attention | features | window | accuracy, % | perplexity |\n|---|---|---|---|---|")
    rows = []
    for case in cases(options.features, options.windows):
        draws = range(options.draws if case.random else 1)
        found = [
            measure(with_attention(exact, case.make(), nnx.Rngs(seed)), batches) for seed in draws
        ]
        accuracy, perplexity = np.mean(found, axis=0)
        spread = np.std([x[0] for x in found])
        rows.append(
            {
                "attention": case.name,
                "features": case.features,
                "window": case.window,
                "accuracy": float(accuracy),
                "accuracy_deviation": float(spread),
                "perplexity": float(perplexity),
                "draws": len(found),
            }
        )
        between = f" ± {100 * spread:.1f}" if len(found) > 1 else ""
        print(
            f"| {case.name} | {case.features or '-'} | {case.window or '-'} "
            f"| {100 * accuracy:.1f}{between} | {perplexity:.3f} |",
            flush=True,
        )
        jax.clear_caches()
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
