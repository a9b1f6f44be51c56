"""Ordinary faults of a model directory are told in a sentence, with what to do."""

import json

import pytest

from strategies.errors import ConfigError
from tests.helpers.building import model_dir
from trainer.model.config import ModelConfig
from trainer.model.loading import load_model_config, load_tokenizer


def test_an_adapter_in_the_place_of_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    for load in (load_model_config, load_tokenizer):
        with pytest.raises(
            ConfigError,
            match=r"is an adapter; give its base as model.path.*tuning.from.*adapter=.* to evaluate it.*model.adapters",
        ):
            load(ModelConfig(path=str(tmp_path)))


def test_an_adapter_with_positions_of_its_own_in_the_place_of_a_model(tmp_path):
    """Its directory has the base's config.json with these positions, which made it look like a model."""
    path = model_dir(tmp_path)
    (path / "adapter_config.json").write_text("{}")
    load_model_config(ModelConfig(path=str(path)))  # a model beside which somebody left an adapter's settings
    for file in path.glob("*.safetensors"):
        file.rename(path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"is an adapter; give its base as model.path"):
        load_model_config(ModelConfig(path=str(path)))


def test_a_model_without_a_tokenizer(tmp_path):
    path = model_dir(tmp_path)
    for file in path.glob("*token*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"holds no tokenizer.*model.tokenizer=<directory or hub id>"):
        load_tokenizer(ModelConfig(path=str(path)))


def test_a_model_type_that_transformers_does_not_know(tmp_path):
    path = model_dir(tmp_path)
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"model_type": "llama9"}))
    with pytest.raises(ConfigError, match=r"does not know the model_type 'llama9'; install a newer transformers"):
        load_model_config(ModelConfig(path=str(path)))


def test_a_model_of_the_hub_whose_type_transformers_does_not_know(monkeypatch):
    """Its config.json is not at hand: the message once read "the model_type 'its'"."""

    def unknown(*_args, **_kwargs):
        raise ValueError("Transformers does not recognize this architecture")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unknown)
    with pytest.raises(ConfigError, match=r"org/llama9: transformers [\d.]+\w* does not know its model_type; install"):
        load_model_config(ModelConfig(path="org/llama9"))
