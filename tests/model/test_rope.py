"""`model.positions` and `model.rope`: what they write into the model's configuration, and what refuses them."""

import json

import pytest

from strategies.errors import ConfigError
from tests.helpers.models import tiny_model_dir
from trainer.model.config import ModelConfig, RopeConfig, RopeScaling
from trainer.model.loading import load_model_config
from trainer.model.rope import check_adapter_positions, require_rotary_parameters_in_use
from trainer.model.rules import position_problems
from trainer.objectives.distillation import DistillationConfig
from trainer.objectives.frozen_model import teacher_model
from trainer.tuning.base import FullConfig
from trainer.tuning.check import check_positions

YARN, LINEAR = RopeScaling.yarn, RopeScaling.linear


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of tiny models of 512 positions, by architecture and changes of their configuration."""

    def make(architecture, **settings):
        path = tmp_path_factory.mktemp("model")
        tiny_model_dir(path, architecture, **settings)
        return str(path)

    return make


def text_of(path, **settings):
    return load_model_config(ModelConfig(path=path, **settings)).get_text_config()


def test_yarn_takes_its_factor_from_the_positions_and_names_those_of_the_base(models):
    text = text_of(models("llama"), positions=2048, rope=RopeConfig(type=YARN))
    assert text.max_position_embeddings == 2048
    assert text.rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
    }


def test_rope_settings_alone_change_what_they_name(models):
    path = models("llama")
    assert text_of(path, positions=4096).rope_parameters == text_of(path).rope_parameters
    linear = text_of(path, rope=RopeConfig(type=LINEAR, factor=3.0))
    assert linear.max_position_embeddings == 512
    assert linear.rope_parameters == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
    theta = text_of(path, rope=RopeConfig(theta=5e6))
    assert theta.rope_parameters == {"rope_type": "default", "rope_theta": 5e6}


def test_rope_of_layer_types_changes_for_full_attention_alone(models):
    path = models("gemma3_text")
    before = text_of(path).rope_parameters
    after = text_of(path, positions=1024, rope=RopeConfig(type=YARN, theta=2e6)).rope_parameters
    assert after["sliding_attention"] == before["sliding_attention"]
    assert after["full_attention"] == {
        "rope_type": "yarn",
        "rope_theta": 2e6,
        "factor": 2.0,
        "original_max_position_embeddings": 512,
    }


def test_scaled_base_is_stretched_from_the_positions_that_it_was_trained_with(models):
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    text = text_of(models("llama", rope_parameters=llama3), positions=8192, rope=RopeConfig(type=YARN))
    assert text.rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": 500000.0,
        "factor": 128.0,
        "original_max_position_embeddings": 64,
    }
    # A base of type yarn keeps what shapes its ramp, not the attention factor of its old length.
    yarn = llama3 | {"rope_type": "yarn", "beta_fast": 16, "attention_factor": 1.3}
    for key in ("low_freq_factor", "high_freq_factor"):
        del yarn[key]
    text = text_of(models("llama", rope_parameters=yarn), rope=RopeConfig(type=YARN, factor=2.0))
    assert text.rope_parameters["beta_fast"] == 16
    assert "attention_factor" not in text.rope_parameters


@pytest.mark.parametrize(
    ("architecture", "changes", "settings", "reason"),
    [
        ("gpt2", {}, {"positions": 2048}, r"model.positions=2048: the positions of a gpt2 .* not rotary"),
        ("gpt2", {}, {"rope": RopeConfig(theta=5e5)}, r"model.rope.theta=500000.0: .* not rotary"),
        ("falcon", {"alibi": True}, {"positions": 4096}, "not rotary"),
        ("phi3", {}, {"positions": 16384, "rope": RopeConfig(type=YARN)}, "not for a phi3 .*longrope"),
        ("llama", {}, {"positions": 256, "rope": RopeConfig(type=YARN)}, "less than the 512 positions"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}},
            {"positions": 4096, "rope": RopeConfig(type=YARN)},
            r"scaled already \(linear, by 8.0\)",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            {"positions": 4096},
            "rotates by rope type dynamic",
        ),
    ],
)
def test_rope_settings_that_a_model_cannot_take_are_refused(models, architecture, changes, settings, reason):
    path = models(architecture, **changes)
    with pytest.raises(ConfigError, match=reason):
        load_model_config(ModelConfig(path=path, **settings))
    load_model_config(ModelConfig(path=path))


def test_rope_settings_that_do_not_go_together_are_problems():
    def problems(**settings):
        return list(position_problems(ModelConfig(**settings)))

    (problem,) = problems(rope=RopeConfig(factor=4.0))
    assert problem.startswith("model.rope.factor=4: ") and "model.rope.type" in problem
    (problem,) = problems(rope=RopeConfig(type=YARN))
    assert problem.startswith("model.rope.type=yarn: ") and "model.positions" in problem
    assert not problems(positions=4096, rope=RopeConfig(type=YARN)) and not problems()


def test_model_that_rotates_nothing_is_refused_when_it_is_built(models):
    import torch
    import transformers

    config = ModelConfig(path=models("llama"), positions=1024)
    settings = load_model_config(config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(settings)
    require_rotary_parameters_in_use(model, config)
    own_settings = transformers.LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    model.model.rotary_emb.config = own_settings  # as parts of a model that have a configuration of their own
    with pytest.raises(ConfigError, match="rotates nothing"):
        require_rotary_parameters_in_use(model, config)
    model.model.rotary_emb = torch.nn.Identity()
    with pytest.raises(ConfigError, match="rotates nothing"):
        require_rotary_parameters_in_use(model, config)
    require_rotary_parameters_in_use(model, ModelConfig(path=config.path))


def test_teacher_rotates_by_its_own_configuration(models):
    student = ModelConfig(path=models("llama"), positions=2048, rope=RopeConfig(type=YARN))
    objective = DistillationConfig()
    objective.teacher.path = models("llama")
    teacher = teacher_model(student, objective)
    assert text_of(teacher.path).max_position_embeddings == 512
    assert teacher.positions is None and teacher.rope == RopeConfig()


def test_adapter_trained_with_other_positions_needs_the_settings(models, tmp_path):
    base = models("llama")
    trained = ModelConfig(path=base, positions=2048, rope=RopeConfig(type=YARN))
    load_model_config(trained).save_pretrained(tmp_path)
    own = ModelConfig(path=base)
    with pytest.raises(ConfigError, match=r"tuning.from=.*max_position_embeddings=2048, not 512"):
        check_adapter_positions(str(tmp_path), "tuning.from", load_model_config(own), own)
    check_adapter_positions(str(tmp_path), "tuning.from", load_model_config(trained), trained)
    (tmp_path / "config.json").write_text(json.dumps(load_model_config(own).to_dict()))
    check_adapter_positions(str(tmp_path), "tuning.from", load_model_config(own), own)


def test_long_document_error_names_the_settings_that_give_room():
    with pytest.raises(ConfigError, match=r"data.max_length=512.*model.positions=700.*model.rope.type=yarn"):
        check_positions(FullConfig(), 700, 512, has_rotary_positions=True)
    with pytest.raises(ConfigError, match=r"Set data\.max_length=512, or take") as error:
        check_positions(FullConfig(), 700, 512, has_rotary_positions=False)
    assert "model.positions" not in str(error.value)
