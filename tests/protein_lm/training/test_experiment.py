import dataclasses

import gin
import pytest

from fast_attention import make_fast_softmax_attention
from fast_attention.protein_lm import FlaxLM, gin_registry, make_protein_domain, ranges, train
from fast_attention.protein_lm.modeling.schedules import create_learning_rate_scheduler
from fast_attention.protein_lm.runs.metrics_log import read_metrics
from fast_attention.protein_lm.training.experiment import Experiment, choose_files, find_files


def tiny_model():
    """The model of TINY_CONFIG."""
    return FlaxLM(
        domain=make_protein_domain(length=64),
        emb_dim=32,
        num_heads=2,
        num_layers=1,
        qkv_dim=32,
        mlp_dim=64,
        batch_size=16,
        grad_clip=1.0,
        attention_fn=make_fast_softmax_attention(nb_features=16, implementation="quadratic"),
        learning_rate=create_learning_rate_scheduler(
            "constant * linear_warmup * cosine_decay",
            base_learning_rate=0.003,
            warmup_steps=4,
            steps_per_cycle=100,
        ),
    )


def test_a_run_from_python_is_that_of_the_command_line(lm_run, tiny_fasta, tmp_path):
    experiment = Experiment(
        model_cls=tiny_model,
        train_files=[tiny_fasta],
        valid_files=[tiny_fasta],
        batch_size_per_device=4,
        max_train_steps=12,
        max_train_length=64,
        train_summary_frequency=3,
        eval_frequency=6,
        num_eval_steps=1,
        checkpoint_frequency=4,
        num_samples=0,
    )
    result = train.run_experiment(str(tmp_path / "run"), experiment)
    assert result["steps"] == 12
    found, expected = (
        [(row["step"], row["split"], row["loss"]) for row in read_metrics(path / "metrics.jsonl")]
        for path in (tmp_path / "run", lm_run)
    )
    assert found == expected


def test_settings_of_gin_are_fields():
    gin_registry.configure(bindings=["experiment.batch_size_per_device = 8", "experiment.crop='x'"])
    experiment = gin.get_configurable("experiment")(new_data=True)
    assert type(experiment) is Experiment
    assert (experiment.batch_size_per_device, experiment.crop) == (8, "x")
    assert experiment == dataclasses.replace(
        Experiment(batch_size_per_device=8, crop="x", new_data=True),
        model_cls=experiment.model_cls,
        split_files=experiment.split_files,
    )


@pytest.mark.parametrize("name", ranges.SETTINGS["experiment"])
def test_a_number_out_of_its_range_is_refused(name):
    with pytest.raises(ValueError, match=f"experiment.{name} must be .*but got -1"):
        Experiment(**{name: -1})


def test_none_is_refused_where_a_number_is_needed():
    with pytest.raises(ValueError, match="experiment.max_train_steps must be .*but got None"):
        Experiment(max_train_steps=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_dir": "folder", "train_files": "a.fasta"}, "are both given: give one"),
        ({"pack_length": 8, "pack_sequences": False}, "its own row"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Experiment(**settings)


def test_files_of_a_folder_are_found_once(tmp_path):
    experiment = Experiment(data_dir=str(tmp_path), split_files=lambda folder: ([folder], []))
    found = find_files(experiment)
    assert (found.train_files, found.valid_files, found.data_dir) == ([str(tmp_path)], None, None)
    assert find_files(found) is found


def test_bundled_files_fill_what_is_not_given():
    chosen = choose_files(Experiment(test_files="mine.fasta"))
    names = [str(files).rpartition("/")[2] for files in chosen.by_split.values()]
    assert names == ["train.fasta.gz", "valid.fasta.gz", "mine.fasta"]
    own = choose_files(Experiment(train_files="a.fasta", valid_files="b.fasta"))
    assert own.test_files == "b.fasta"
    assert choose_files(Experiment(train_files="a.fasta")).holds_out


@pytest.mark.parametrize(
    ("step", "best", "patience", "frequency", "tired"),
    [(8, 4, 2, 2, True), (7, 4, 2, 2, False), (8, None, 2, 2, False), (9, 1, None, 2, False)]
    + [(99, 1, 1, None, False)],
)
def test_early_stopping_counts_validations(step, best, patience, frequency, tired):
    times = Experiment(early_stopping=patience, eval_frequency=frequency)
    assert times.stops_early(step, best) == tired
