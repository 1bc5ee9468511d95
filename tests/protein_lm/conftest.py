import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import gin
import jax
import pytest

from fast_attention.protein_lm import cli
from fast_attention.protein_lm.data.corpus import bundled_corpus

# Linux allows a process 65,530, and compiled programs take most of them.
MOST_MAPS = 20_000

TINY_CONFIG = """
experiment.batch_size_per_device = 4
experiment.max_train_steps = 12
experiment.max_train_length = 64
experiment.train_summary_frequency = 3
experiment.eval_frequency = 6
experiment.num_eval_steps = 1
experiment.checkpoint_frequency = 4
experiment.checkpoints_to_keep = 2
make_protein_domain.length = 64
FlaxModel.emb_dim = 32
FlaxModel.num_heads = 2
FlaxModel.num_layers = 1
FlaxModel.qkv_dim = 32
FlaxModel.mlp_dim = 64
FlaxModel.batch_size = 16
FlaxModel.grad_clip = 1.0
FlaxModel.attention_fn = @make_fast_softmax_attention()
make_fast_softmax_attention.nb_features = 16
make_fast_softmax_attention.implementation = 'quadratic'
FlaxModel.learning_rate = @create_learning_rate_scheduler()
create_learning_rate_scheduler.factors = 'constant * linear_warmup * cosine_decay'
create_learning_rate_scheduler.base_learning_rate = 0.003
create_learning_rate_scheduler.warmup_steps = 4
create_learning_rate_scheduler.steps_per_cycle = 100
"""


@pytest.fixture(autouse=True, scope="module")
def _free_programs():
    """In place of the fixture for all tests: modules share their programs, as long as few are kept.

    Equal models have the same ones, and no test here changes what is traced.
    """
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or len(maps.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def _no_gin_configuration():
    yield
    gin.clear_config()


@pytest.fixture(scope="session")
def tiny_fasta() -> str:
    return str(bundled_corpus("tiny"))


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.gin"
    path.write_text(TINY_CONFIG)
    return path


@pytest.fixture(scope="session")
def train_arguments(tiny_config, tiny_fasta):
    """From a run's folder and more settings to the arguments of ``protein-lm train``."""

    def arguments(folder: Path, *bindings: str) -> list[str]:
        files = [f"--{name}fasta={tiny_fasta}" for name in ("", "valid_")]
        settings = [f"--gin_bindings={binding}" for binding in bindings]
        return ["train", f"--gin_file={tiny_config}", f"--work_dir={folder}", *files, *settings]

    return arguments


def trained_run(tmp_path_factory, name: str, arguments: Callable[..., list[str]], *bindings: str):
    """The folder of a run: a copy of that which the first of all workers has trained."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    trained = shared / f"trained_{name}"
    with open(shared / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not trained.exists():
            assert cli.main(arguments(trained, *bindings)) == 0
    return shutil.copytree(trained, tmp_path_factory.mktemp("runs") / name)


@pytest.fixture(scope="session")
def lm_run(tmp_path_factory, train_arguments) -> Path:
    return trained_run(tmp_path_factory, "lm", train_arguments)


@pytest.fixture(scope="session")
def bert_run(tmp_path_factory, train_arguments) -> Path:
    binding = "experiment.model_cls = @FlaxBERT"
    return trained_run(tmp_path_factory, "bert", train_arguments, binding)
