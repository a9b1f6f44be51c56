"""A head stored beside embeddings that it is tied to, with values of its own: as transformers loads it, and said."""

import pytest
from safetensors.torch import load_file, save_file

from strategies import runtime as processes
from tests.helpers.building import alone, built_trainer
from tests.models import job, stock


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Runs of the sweep, in this process."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield job.Job(tmp_path, alone(processes.start("cpu", timeout_s=60, threads=1)))
    processes.stop()


def stored_head(directory, factor):
    """A model whose config ties head and embeddings; its file has both, the head times `factor`."""
    job.made("gemma", directory, 0)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_loss_gradients_and_export_are_those_of_plain_transformers(tuning, tmp_path, trained):
    directory = tmp_path / "apart"
    stored_head(directory, 1.5)
    oracle = stock.compute(directory, trained.samples)
    assert not any("lm_head.weight" in names for names in oracle.shared.values())
    trained._trained(directory, tuning, oracle)
    _, built = built_trainer(trained._config(directory, "single", tuning), trained.data, trained.runtime)
    assert "two different matrices" in built.substitutions["model.path"]
    assert not built.config.tie_word_embeddings


def test_two_that_are_equal_are_one(tmp_path, trained):
    directory = tmp_path / "alike"
    stored_head(directory, 1.0)
    _, built = built_trainer(trained._config(directory, "single", "full"), trained.data, trained.runtime)
    assert "model.path" not in built.substitutions and built.config.tie_word_embeddings
    assert built.plain.lm_head.weight is built.plain.model.embed_tokens.weight
