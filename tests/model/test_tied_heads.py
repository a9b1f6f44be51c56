"""A head stored beside embeddings that it is tied to, with values of its own: as transformers loads it, and said."""

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from strategies import runtime as processes
from tests.helpers.building import alone, built_trainer
from tests.models import job, stock
from trainer.data.config import Layout
from trainer.model import tied_heads
from trainer.model.config import ModelConfig
from trainer.objectives import layout_choice


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Runs of the sweep, in this process."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield job.Job(tmp_path, alone(processes.join_job("cpu", timeout_s=60, threads=1)))
    processes.leave_job()


def stored_head(directory, factor, name="gemma"):
    """A model whose config ties head and embeddings; its file has both, the head times `factor`."""
    job.made(name, directory, 0)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor
    save_file(tensors, file, {"format": "pt"})


def loaded(config):
    return AutoConfig.from_pretrained(config.path)


@pytest.mark.parametrize(("factor", "built"), [(1.0, 1), (1.5, 2), (None, 1)])
def test_tied_head_model_is_built_again_only_where_values_differ_and_files_are_closed(
    factor, built, tmp_path, monkeypatch
):
    directory = tmp_path / "tied"
    if factor is None:
        job.made("gemma", directory, 0)
    else:
        stored_head(directory, factor)
    config = ModelConfig(path=str(directory))

    def arrange():
        return layout_choice.build_causal_model(
            config, loaded(config), Layout.auto, needs_padding=False, half_on_gpu=False
        )

    arrange()  # what is proven of it is known now
    calls, opened, real, checkpoint = [], [], layout_choice.build_plain_model, tied_heads.PretrainedWeights

    def build_plain_model(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    def noted(*args):
        opened.append(checkpoint(*args))
        return opened[-1]

    monkeypatch.setattr(layout_choice, "build_plain_model", build_plain_model)
    monkeypatch.setattr(tied_heads, "PretrainedWeights", noted)
    arrange()
    assert len(calls) == built
    assert [one.conversions.files._open for one in opened] == [{}]


def test_tied_head_with_other_values_is_noted_beside_a_note_on_padding(tmp_path, trained):
    stored_head(tmp_path / "youtu", 1.5, "youtu")
    _, built = built_trainer(trained._config(tmp_path / "youtu", "single", "lora"), trained.data, trained.runtime)
    assert "two different matrices" in built.substitutions["model.tied_head"]
    assert "(padding) stays zero" in built.substitutions["model.embeddings"]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_tied_head_with_other_values_trains_and_exports_as_plain_transformers(tuning, tmp_path, trained):
    directory = tmp_path / "apart"
    stored_head(directory, 1.5)
    oracle = stock.compute(directory, trained.samples)
    assert not any("lm_head.weight" in names for names in oracle.shared.values())
    trained._trained(directory, tuning, oracle)
    _, built = built_trainer(trained._config(directory, "single", tuning), trained.data, trained.runtime)
    assert "two different matrices" in built.substitutions["model.tied_head"]
    assert not built.config.tie_word_embeddings


def test_tied_head_with_equal_values_is_one_tensor(tmp_path, trained):
    directory = tmp_path / "alike"
    stored_head(directory, 1.0)
    _, built = built_trainer(trained._config(directory, "single", "full"), trained.data, trained.runtime)
    assert "model.tied_head" not in built.substitutions and built.config.tie_word_embeddings
    assert built.base_on_meta.lm_head.weight is built.base_on_meta.model.embed_tokens.weight
