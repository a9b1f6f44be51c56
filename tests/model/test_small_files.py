"""Model and adapter directories of others: whatever lies there is refused by a sentence that names the file, and soon."""

import json
import os
import shutil

import pytest

from launch.serve.exported import find_export
from strategies.errors import ConfigError
from strategies.small_files import MAX_BYTES, read_json_object
from tests.helpers.building import model_dir
from trainer.model.config import ModelConfig
from trainer.model.files import SafetensorsFiles
from trainer.model.loading import check_model_files, load_generation_config, load_model_config, load_tokenizer
from trainer.model.rules import read_config
from trainer.tuning.adapter_checkpoint import stored_peft_config
from trainer.tuning.initial_adapter import UnusableAdapter, read_adapter_settings

INDEX_FILE = "model.safetensors.index.json"
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return model_dir(tmp_path_factory.mktemp("good"))


@pytest.fixture
def directory(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def content(text):
    return lambda path: path.write_text(text)


SMALL = {
    "a pipe": (pipe, "is a pipe, a device or a directory"),
    "a device without an end": (device, "is a pipe, a device or a directory"),
    "nested deep": (content(DEEP), "is nested too deep"),
    "torn": (content('{"a": "b'), "is not valid JSON"),
    "a list": (content("[1]"), "holds a JSON list"),
    "no UTF-8": (lambda path: path.write_bytes(b'{"a": "\xff"}'), "is not valid JSON"),
    "too large": (lambda path: path.open("wb").truncate(MAX_BYTES + 1), "bytes, and such a file has at most"),
}


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("fault", SMALL)
def test_model_file_that_is_damaged_is_refused_before_a_library_reads_it(directory, fault, name):
    change, said = SMALL[fault]
    change(directory / name)
    config = ModelConfig(path=str(directory))
    for read in (load_model_config, load_tokenizer, check_model_files):
        with pytest.raises(ConfigError, match=said) as refused:
            read(config)
        assert str(directory / name) in str(refused.value)
    with pytest.raises(ConfigError, match=f"{said}|holds neither config.json"):
        find_export(str(directory))
    assert (read_config(str(directory)) is None) == (name == "config.json")


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", INDEX_FILE, "model.safetensors"])
def test_a_pipe_in_place_of_any_file_is_refused(directory, name):
    pipe(directory / name)
    with pytest.raises(ConfigError, match="is a pipe") as refused:
        check_model_files(ModelConfig(path=str(directory)))
    assert name in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"weight_map": {"a": "mod', "is not valid JSON"),
        ("[1]", "holds a JSON list"),
        ('{"weight_map": null}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 5}}', "names no file for a, but 5"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "outside the model directory"),
        ('{"weight_map": {"a": "x.safetensors"}}', r"names x\.safetensors, which is missing"),
    ],
)
def test_model_weight_index_that_is_damaged_is_named(directory, text, said):
    (directory / INDEX_FILE).write_text(text)
    with pytest.raises(ConfigError, match=said) as refused:
        SafetensorsFiles(directory)
    assert str(directory / INDEX_FILE) in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**7}, "num_hidden_layers=10000000 .at most 10,000."),
        ({"num_hidden_layers": 5000}, "num_hidden_layers=5000, and the weights are 21 tensors"),
        ({"hidden_size": 10**12}, "hidden_size=1000000000000 .at most"),
        ({"vocab_size": 10**13}, "vocab_size=10000000000000 .at most"),
        ({"dtype": "os.system"}, "config.json cannot be read"),
        ({"quantization_config": [1]}, "config.json cannot be read"),
    ],
)
def test_model_config_that_no_model_has_is_refused_before_it_is_built(directory, changes, said):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError, match=said):
        check_model_files(ModelConfig(path=str(directory)))


def test_a_generation_config_with_a_value_that_no_field_takes_names_its_file(directory):
    (directory / "generation_config.json").write_text('{"cache_implementation": "magic", "cache_config": 5}')
    config = ModelConfig(path=str(directory))
    with pytest.raises(ConfigError, match=r"generation_config\.json: cannot be used"):
        load_generation_config(config, load_model_config(config), None)


def test_a_file_that_may_not_be_read_is_a_sentence(directory):
    """In a child process that is nobody: root may read everything."""
    (directory / "model.safetensors").chmod(0)
    (directory / "tokenizer_config.json").chmod(0)
    for path in (directory, *directory.parents):
        if path.owner() == "root" or path.stat().st_uid == os.getuid():
            path.chmod(path.stat().st_mode | 0o555)
        if path.name.startswith("pytest-of"):
            break
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        said = "nothing"
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            said = ""
            for read in (SafetensorsFiles, lambda path: read_json_object(path / "tokenizer_config.json")):
                try:
                    read(directory)
                except ConfigError as error:
                    said += f"{error}\n"
        finally:
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as heard:
        lines = heard.read().splitlines()
    assert len(lines) == 2, lines
    for line, name in zip(lines, ("model.safetensors", "tokenizer_config.json"), strict=True):
        assert line.startswith(f"{directory / name}: cannot be read (Permission denied)")


ADAPTER = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "base",
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_alpha": "many"}, 'lora_alpha="many", which is no number'),
        ({"r": True}, "r=true, which is no number"),
        ({"target_modules": 5}, "target_modules=5, which is no list of names"),
        ({"rank_pattern": "x"}, 'rank_pattern="x", which is no table'),
        ({"peft_type": ["LORA"]}, 'peft_type=."LORA"., which is no text'),
        ({"bias": [1]}, "which is no text"),
        (DEEP, "is nested too deep"),
        ("{", "is not valid JSON"),
    ],
)
def test_adapter_config_that_is_damaged_is_refused_wherever_it_is_read(tmp_path, changes, said):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    text = changes if isinstance(changes, str) else json.dumps(ADAPTER | changes)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UnusableAdapter, match=r"adapter_config\.json"):
        read_adapter_settings(tmp_path)
    for read in (lambda: stored_peft_config(tmp_path, "model.adapters"), lambda: find_export(str(tmp_path))):
        with pytest.raises(ConfigError, match=said):
            read()
