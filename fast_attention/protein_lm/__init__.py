"""Protein language models: data, training, evaluation, scores, embeddings, new proteins.

What is imported here needs numpy alone. The models and what comes with them need JAX, and are
loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fast_attention.protein_lm.data.domains import (
    FixedLengthDiscreteDomain as FixedLengthDiscreteDomain,
)
from fast_attention.protein_lm.data.domains import (
    VariableLengthDiscreteDomain as VariableLengthDiscreteDomain,
)
from fast_attention.protein_lm.data.domains import domain_to_bos as domain_to_bos
from fast_attention.protein_lm.data.domains import make_protein_domain as make_protein_domain
from fast_attention.protein_lm.data.fasta import FastaError as FastaError
from fast_attention.protein_lm.data.fasta import FastaRecord as FastaRecord
from fast_attention.protein_lm.data.fasta import read_fasta as read_fasta
from fast_attention.protein_lm.data.fasta import read_proteins as read_proteins
from fast_attention.protein_lm.data.fasta import write_fasta as write_fasta
from fast_attention.protein_lm.data.skipped_records import SkippedRecords as SkippedRecords
from fast_attention.protein_lm.data.vocabulary import ProteinVocab as ProteinVocab
from fast_attention.protein_lm.data.vocabulary import Vocabulary as Vocabulary

if TYPE_CHECKING:
    from fast_attention.protein_lm.embedder import ProteinLMEmbedder as ProteinLMEmbedder
    from fast_attention.protein_lm.embedder import get_embed_fn as get_embed_fn
    from fast_attention.protein_lm.evaluation.empirical_baseline import (
        EmpiricalBaseline as EmpiricalBaseline,
    )
    from fast_attention.protein_lm.inference.reducers import masked_reduce_fn as masked_reduce_fn
    from fast_attention.protein_lm.inference.reducers import max_reducer as max_reducer
    from fast_attention.protein_lm.inference.reducers import mean_reducer as mean_reducer
    from fast_attention.protein_lm.inference.reducers import sum_reducer as sum_reducer
    from fast_attention.protein_lm.modeling.metrics import combine_metrics as combine_metrics
    from fast_attention.protein_lm.models import FlaxBERT as FlaxBERT
    from fast_attention.protein_lm.models import FlaxLM as FlaxLM
    from fast_attention.protein_lm.training.dataset import batch_ds as batch_ds
    from fast_attention.protein_lm.training.dataset import (
        get_train_valid_files as get_train_valid_files,
    )

_LAZY = {
    "batch_ds": "training.dataset",
    "get_train_valid_files": "training.dataset",
    "ProteinLMEmbedder": "embedder",
    "get_embed_fn": "embedder",
    "EmpiricalBaseline": "evaluation.empirical_baseline",
    "combine_metrics": "modeling.metrics",
    "FlaxBERT": "models",
    "FlaxLM": "models",
    "masked_reduce_fn": "inference.reducers",
    "max_reducer": "inference.reducers",
    "mean_reducer": "inference.reducers",
    "sum_reducer": "inference.reducers",
}

# The modules of which programs use several functions, under their own names.
_MODULES = {
    "baselines": "evaluation",
    "batches": "modeling",
    "domains": "data",
    "ngrams": "evaluation",
    "sampling": "inference",
    "scoring": "inference",
    "train": "training",
    "vocabulary": "data",
}


def __getattr__(name: str) -> Any:
    """Loads what needs JAX when it is first used."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{_MODULES[name]}.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
