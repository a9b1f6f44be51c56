"""Published shapes: they have the parameters that are published, and stand for files that are not here, never for weights."""

import json
import re

import pytest
import torch
import transformers

from launch import main as command
from launch.config.axes import read_axes
from launch.config.choices import USER_CONFIG_DIRS, choices_by_group, is_published_shape_choice
from launch.config.compose import compose_config
from launch.config.user_files import take_config_dirs
from launch.plan.cards import SHIPPED_CARD_NAMES
from launch.plan.dry_run import describe_run
from strategies.errors import ConfigError
from tests.helpers.covering import EVERYTHING
from trainer.model.config import ModelConfig
from trainer.model.known_shapes import config_of_shape, read_shape, shape_instead_of_files, shape_names
from trainer.model.loading import check_model_files, find_weights_directory, load_model_config, load_tokenizer

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
SMALL = "smollm2_135m"
ONE_A_FAMILY = sorted({read_shape(name).family: name for name in shape_names()}.values())
"""`make test-all` builds all shapes, `make test` one of each family."""
WHOLE_CLASSES = {
    "t5": "AutoModelForSeq2SeqLM",
    "gemma3": "AutoModelForImageTextToText",
    "llama4": "AutoModelForImageTextToText",
}
"""The classes of transformers that have all parameters of a model; of an encoder it is the plain model, else a causal one."""


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    """A machine without a model, in a directory with rows."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "response": "b"}\n')


def parameters(name):
    """The parameters of a shape as transformers builds it, counted on meta."""
    shape = read_shape(name)
    settings = config_of_shape(shape)
    causal = "AutoModel" if shape.family == "Encoders" else "AutoModelForCausalLM"
    with torch.device("meta"):
        model = getattr(transformers, WHOLE_CLASSES.get(settings.model_type, causal)).from_config(settings)
    return sum(parameter.numel() for parameter in model.parameters())


def agrees(count, published):
    """Whether a count is the published one; of a rounded one, within a unit of its last digit that is no zero."""
    if isinstance(published, int):
        return count == published
    number, unit = re.fullmatch(r"([\d.]+)([BM])", published).groups()
    scale = {"B": 10**9, "M": 10**6}[unit]
    if "." in number:
        step = 10.0 ** -len(number.partition(".")[2])
    else:
        step = 10 ** (len(number) - len(number.rstrip("0")))
    return abs(count / scale - float(number)) <= step


@pytest.mark.parametrize("name", shape_names() if EVERYTHING else ONE_A_FAMILY)
def test_a_shape_has_the_published_parameters(name):
    assert agrees(parameters(name), read_shape(name).parameters)


def test_a_count_beside_a_published_one():
    assert agrees(1_235_814_400, "1.23B") and agrees(361_821_120, "360M") and agrees(5, 5)
    assert not agrees(1_498_482_688, "1.23B") and not agrees(34_700_000_000, "32B") and not agrees(6, 5)


def test_every_shape_says_where_its_numbers_are_from():
    ids = [hub_id for name in shape_names() for hub_id in read_shape(name).hub]
    assert len(ids) == len(set(ids)) > 100
    for name in shape_names():
        shape = read_shape(name)
        assert shape.source.startswith("https://") and shape.parameters_from.startswith("https://"), name
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", shape.date), name
        published = json.dumps(shape.config)
        assert config_of_shape(shape).model_type == shape.config["model_type"]
        assert json.dumps(shape.config) == published, "building a configuration leaves the shape as it is"


def test_a_model_is_named_by_its_shape():
    words = ["data.path=train.jsonl", "budget.steps=1"]
    assert compose_config(["model=llama3_8b", *words]).config.model.path == LLAMA
    # Like any word: the last one counts, also over an experiment's.
    experiment = ["experiment=llama3_8b_qlora_single", f"model={SMALL}", *words]
    assert compose_config(experiment).config.model.path == read_shape(SMALL).hub[0]
    with pytest.raises(ConfigError, match=r"model=lama3_8b: no such choice; did you mean model=llama3_8b\?") as caught:
        compose_config(["model=lama3_8b", *words])
    [problem] = caught.value.problems
    assert len(problem) < 200, "the suggestion comes first, and few of all models are listed"
    assert f"lists all {len(choices_by_group()['model'])}" in problem


def test_two_names_of_the_model_are_refused(tmp_path):
    words = ["data.path=train.jsonl", "budget.steps=1"]
    for names in (["model=llama3_8b", "model.path=mine"], ["model.path=mine", "model=llama3_8b"]):
        with pytest.raises(
            ConfigError, match=r"model=llama3_8b: model\.path=mine names another model; leave model=llama3_8b out"
        ):
            compose_config([*names, *words])
    file = tmp_path / "my.yaml"
    file.write_text("defaults: [{model: llama3_8b}]\nmodel: {path: mine}\n")
    with pytest.raises(
        ConfigError, match=r"my\.yaml: model: llama3_8b: .*my\.yaml: model\.path: mine names another model"
    ):
        compose_config([str(file), *words])
    # What is typed stands above a file: that is no contradiction.
    file.write_text("model: {path: mine}\n")
    assert compose_config([str(file), "model=llama3_8b", *words]).config.model.path == LLAMA


def test_a_file_of_the_user_counts_before_a_shape_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "llama3_8b.yaml").write_text("path: mine\nattention: eager\n")
    try:
        assert take_config_dirs(["--config-dir", str(tmp_path)]) == []
        model = compose_config(["model=llama3_8b"], check=False).config.model
        assert (model.path, str(model.attention)) == ("mine", "eager")
        assert compose_config(["model=llama3_70b"], check=False).config.model.path == read_shape("llama3_70b").hub[0]
    finally:
        USER_CONFIG_DIRS.clear()
        choices_by_group.cache_clear()
    assert is_published_shape_choice("model", "llama3_8b")
    monkeypatch.setattr("launch.config.choices.CONF_DIR", tmp_path)  # as if the file lay in conf/model
    assert not is_published_shape_choice("model", "llama3_8b")


def test_a_sweep_does_not_mean_every_published_model():
    with pytest.raises(
        ConfigError, match=rf"model=glob\(\*\): would be a run of each of {len(shape_names())} published models"
    ):
        read_axes(["model=glob(*)"])
    assert ["model=qwen3_8b"] in read_axes(["model=glob(qwen3_*)"]).points()


def test_a_shape_stands_for_files_that_are_not_here(tmp_path):
    config = ModelConfig(path=LLAMA)
    assert shape_instead_of_files(config).name == "llama3_8b"
    assert load_model_config(config).num_hidden_layers == 32
    # A revision may have another shape, a fine-tuned copy another vocabulary.
    assert shape_instead_of_files(ModelConfig(path=LLAMA, revision="main")) is None
    assert shape_instead_of_files(ModelConfig(path="somebody/Llama-3.1-8B-Instruct")) is None
    assert shape_instead_of_files(ModelConfig(path=LLAMA, download=True)) is None, (
        "a hub that is down changes no training"
    )
    with pytest.raises(ConfigError, match="not a model directory"):
        load_model_config(ModelConfig(path=LLAMA, revision="main"))
    # Files that are here count, whatever the shape says.
    snapshot = tmp_path / "hub" / f"models--{LLAMA.replace('/', '--')}"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("c0")
    (snapshot / "snapshots" / "c0").mkdir(parents=True)
    (snapshot / "snapshots" / "c0" / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 3}')
    assert shape_instead_of_files(config) is None


def test_weights_without_a_config_are_not_trained_with_a_shape(tmp_path):
    snapshot = tmp_path / "hub" / f"models--{LLAMA.replace('/', '--')}"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("c0")
    (snapshot / "snapshots" / "c0").mkdir(parents=True)
    (snapshot / "snapshots" / "c0" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"not loadable from the local hub cache \(no config\.json\)"):
        find_weights_directory(ModelConfig(path=LLAMA))


@pytest.mark.parametrize("needs", [check_model_files, load_tokenizer])
def test_training_says_that_a_shape_is_not_enough(needs):
    with pytest.raises(ConfigError) as refused:
        needs(ModelConfig(path=LLAMA))
    said = str(refused.value)
    assert "published shape is enough for plan, submit --print and --dry-run" in said
    assert "shardtune download" in said


def test_plan_and_dry_run_need_no_files(capsys):
    assert "l4" in SHIPPED_CARD_NAMES
    way = ["strategy=ddp", "strategy.activation_checkpointing=none", "batch.micro=1", "batch.global=2"]
    sizes = [f"model={SMALL}", "data.max_length=64", "tuning=lora", *way]
    assert command.main(["plan", *sizes, "hardware=l4", "plan.workers=1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "0.14 billion parameters" in said
    assert f"is not on this machine; its published shape {SMALL} stands for it" in said

    run = ["data.path=train.jsonl", "launcher.processes=1", "budget.epochs=1"]
    dry_run = describe_run(compose_config([*sizes, *run]).config)
    assert "batch: 2 = 1 micro x 2 accumulation x 1 rank" in dry_run.text
    assert "tokens per step: at most 128" in dry_run.text and "steps: not known without a tokenizer" in dry_run.text
    assert "memory per rank" in dry_run.text and "total" in dry_run.text
    assert dry_run.facts["shape"]["name"] == SMALL and dry_run.exit_code == 0
    assert dry_run.facts["parameters"] - dry_run.facts["trainable_parameters"] == parameters(SMALL)

    assert command.main(["submit", *sizes, "data.path=train.jsonl", "budget.steps=1", "--print"]) == 0
    assert "#SBATCH" in capsys.readouterr().out


def test_a_dry_run_cannot_choose_by_documents_that_it_cannot_read():
    words = [f"model={SMALL}", "data.path=train.jsonl", "budget.steps=1", "batch.micro=auto", "launcher.processes=1"]
    with pytest.raises(ConfigError, match=r"batch\.micro=auto: is chosen by the lengths of the documents"):
        describe_run(compose_config(words).config)


@pytest.mark.parametrize("place", [LLAMA, "models/llama"])
def test_a_path_that_is_typed_as_a_name_is_told_its_setting(place):
    with pytest.raises(ConfigError, match=f"a directory or a hub id is model.path={place}$"):
        compose_config([f"model={place}", "data.path=train.jsonl", "budget.steps=1"])
