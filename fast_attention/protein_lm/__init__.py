"""Protein language models: data, training, evaluation and sampling.

What is imported here needs numpy alone; training and what belongs to it live in the submodules.
"""

from fast_attention.protein_lm.domains import (
    FixedLengthDiscreteDomain as FixedLengthDiscreteDomain,
)
from fast_attention.protein_lm.domains import (
    VariableLengthDiscreteDomain as VariableLengthDiscreteDomain,
)
from fast_attention.protein_lm.domains import domain_to_bos as domain_to_bos
from fast_attention.protein_lm.domains import make_protein_domain as make_protein_domain
from fast_attention.protein_lm.fasta import FastaError as FastaError
from fast_attention.protein_lm.fasta import FastaRecord as FastaRecord
from fast_attention.protein_lm.fasta import read_fasta as read_fasta
from fast_attention.protein_lm.fasta import write_fasta as write_fasta
from fast_attention.protein_lm.fasta_files import read_proteins as read_proteins
from fast_attention.protein_lm.skipped_records import SkippedRecords as SkippedRecords
from fast_attention.protein_lm.vocabulary import ProteinVocab as ProteinVocab
from fast_attention.protein_lm.vocabulary import Vocabulary as Vocabulary
