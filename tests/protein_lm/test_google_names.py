"""The page of the original's names is whole and true, and its gin parameters are accepted."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from fast_attention.protein_lm import gin_registry

PAGE = Path(__file__).parents[2] / "docs" / "from-google-protein-lm.md"

PUBLIC = {
    "data": "make_protein_domain protein_domain dataset_from_tensors get_train_valid_files "
    "load_dataset batch_ds csv_to_tfrecord",
    "domains": "BOS_TOKEN EOS_TOKEN PAD_TOKEN MASK_TOKEN SEP_TOKEN Vocabulary ProteinVocab Domain "
    "DiscreteDomain FixedLengthDiscreteDomain VariableLengthDiscreteDomain is_discrete "
    "check_if_discrete is_variable_length domain_to_bos",
    "seq_utils": "AA_TOKENS AA_ANOMALOUS_TOKENS AA_ALIGN_TOKENS pad_sequences unpad_sequences "
    "sequences_end_with_value strip_sequences_at_value",
    "models": "Mode parse_config save_model_kwargs load_model train_step eval_step predict_step "
    "sample_step compute_logprob preprocess_causal FlaxModel FlaxLM FlaxBERT preprocess_masked "
    "BertMasker FlaxModel.preprocess FlaxModel.train_step FlaxModel.bos_token "
    "FlaxModel.eos_token FlaxModel.pad_token FlaxModel.mask_token FlaxModel.length "
    "FlaxModel.vocab_size FlaxModel.optimizer FlaxModel.model_kwargs FlaxModel.pmap "
    "FlaxModel.set_weights FlaxModel.get_weights FlaxModel.save_checkpoint "
    "FlaxModel.load_checkpoint FlaxModel.fit FlaxModel.evaluate FlaxModel.fit_batch "
    "FlaxModel.score FlaxModel.evaluate_batch FlaxLM.cache_def FlaxLM.sample_with_prompt "
    "FlaxLM.sample",
    "modules": "shift_right mask_uniform Tag Embed get_positional_encodings sinusoidal_init "
    "AddLearnedPositionalEncodings AddSinusoidalPositionalEncodings MlpBlock Transformer1DBlock "
    "Transformer",
    "embed": "sum_reducer mean_reducer max_reducer masked_reduce_fn get_embed_fn ProteinLMEmbedder",
    "evaluation": "EmpiricalBaseline combine_metrics evaluate",
    "sampling": "multinomial apply_repetition_penalty temperature_sample",
    "fine_tune": "fine_tune",
    "utils": "create_adam_optimizer compute_weighted_cross_entropy compute_weighted_mse "
    "compute_weighted_accuracy compute_metrics get_params param_count param_reduce batch_apply "
    "create_learning_rate_scheduler",
    "train": "run_experiment",
}

PARAMETERS = {
    "experiment": "data_dir xid batch_size_per_device eval_frequency checkpoint_frequency "
    "save_checkpoints restore_checkpoint num_eval_steps epochs max_train_steps max_train_length "
    "train_summary_frequency max_eval_length model_cls",
    "make_protein_domain": "include_anomalous_amino_acids include_bos include_eos include_pad "
    "include_mask length",
    "get_train_valid_files": "num_test_files num_valid_files",
    "batch_ds": "length batch_size shuffle_buffer pack_length",
    "Vocabulary": "tokens include_bos include_eos include_pad include_mask bos_token eos_token "
    "pad_token mask_token",
    "ProteinVocab": "include_anomalous_amino_acids include_align_tokens include_bos include_eos",
    "FixedLengthDiscreteDomain": "vocab_size length vocab",
    "VariableLengthDiscreteDomain": "vocab length min_length",
    "FlaxModel": "domain random_seed batch_size grad_clip learning_rate weight_decay cache pmap "
    "attention_fn with_bos with_mask store_metrics sampling_kwargs",
    "FlaxLM": "domain num_layers",
    "FlaxBERT": "domain mask_rate random_token_proportion mask_token_proportion",
    "create_learning_rate_scheduler": "factors base_learning_rate warmup_steps decay_factor "
    "steps_per_decay steps_per_cycle",
    "masked_reduce_fn": "reducer_fn domain ignore_eos ignore_bos ignore_pad ignore_mask",
    "ProteinLMEmbedder": "model checkpoint_dir domain output_head reduce_fn length batch_size",
}


def rows():
    """From the name of the original to the names here."""
    found = re.findall(r"^\| `([\w.]+)` \| ([^|]+) \| [^|]+ \|$", PAGE.read_text(), re.M)
    return {name: re.findall(r"`([\w.]+)`", cell) for name, cell in found}


def test_every_public_name_of_the_original_is_on_the_page():
    names = {f"{module}.{name}" for module, text in PUBLIC.items() for name in text.split()}
    assert rows().keys() == names
    assert all(rows().values())


@pytest.mark.parametrize("name", sorted({name for names in rows().values() for name in names}))
def test_what_the_page_names_can_be_imported(name):
    package = "fast_attention.protein_lm"
    parts = name.split(".")
    value, path = importlib.import_module(package), parts
    while len(path) > 1 and importlib.util.find_spec(f"{value.__name__}.{path[0]}"):
        value, path = importlib.import_module(f"{value.__name__}.{path[0]}"), path[1:]
    for part in path:
        value = getattr(value, part)


@pytest.mark.parametrize(
    "setting", [f"{name}.{part}" for name, text in PARAMETERS.items() for part in text.split()]
)
def test_every_gin_parameter_of_the_original_is_accepted(setting):
    gin_registry.configure(bindings=[f"{setting} = None"])
