"""GGUF by a converter in its own environment, and the Modelfile: the template's own text, its ends; verified or said not to be.

The converter here is a stand-in that is called as llama.cpp's is, and writes with the package `gguf` what that one wrote of the
same architecture; the real one is tried where SHARDTUNE_GGUF_CONVERTER names it.
"""

import os
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from strategies.errors import ConfigError, ShardtuneError
from tests.helpers import tokenizers
from trainer.export.gguf import GgufType, find_converter, verify_gguf, write_gguf
from trainer.export.ollama import modelfile_of, turn_texts_of_template
from trainer.export.verify import DriftError

TEMPLATES = {"CHATML": True, "CHATML_DEFAULT_SYSTEM": True, "LLAMA3": True, "GEMMA": True, "MISTRAL": True}
TEMPLATES |= {"NO_END": True, "THINKING": False, "DROPS_REPLY": False}


def templated(name):
    """Llama's, Gemma's and Mistral's tokenizers, too, put a token before every text."""
    return tokenizers.tiny_tokenizer(getattr(tokenizers, name), adds_bos=name in ("LLAMA3", "GEMMA", "MISTRAL"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_gguf_template_is_rebuilt_from_its_turns_or_given_up(name):
    tokenizer = templated(name)
    found = turn_texts_of_template(tokenizer)
    assert (found is not None) == TEMPLATES[name]
    if found is None:
        return
    talk = [{"role": "user", "content": "x y"}, {"role": "assistant", "content": "z"}, {"role": "user", "content": "w"}]
    own = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert found.render(talk) == own.removeprefix("<s>")


def test_a_first_token_that_the_tokenizer_does_not_add_stays_in_the_template():
    """SmolLM2's `bos_token` is `<|im_start|>`, which its template writes and its tokenizer does not."""
    tokenizer = templated("CHATML_DEFAULT_SYSTEM")
    tokenizer.bos_token = "<|im_start|>"
    assert tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id
    found = turn_texts_of_template(tokenizer)
    assert found.system == ("<|im_start|>system\n", "<|im_end|>\n")


def test_a_modelfile_has_template_system_and_stops():
    text, lacking = modelfile_of("m.gguf", templated("CHATML_DEFAULT_SYSTEM"), GenerationConfig(eos_token_id=1))
    assert lacking is None and text.splitlines()[0] == "FROM ./m.gguf"
    assert (
        'TEMPLATE """{{- range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ end }}{{ end }}<|im_start|>assistant\n"""\n'
    ) in text
    assert 'SYSTEM """You are helpful."""' in text and 'PARAMETER stop "<|im_end|>"' in text
    assert 'PARAMETER stop "</s>"' in text and "PARAMETER temperature 0" in text
    text, lacking = modelfile_of(
        "m.gguf", templated("THINKING"), GenerationConfig(do_sample=True, temperature=0.6, top_k=20)
    )
    assert "TEMPLATE" not in text and "no row of turns" in lacking
    assert "PARAMETER temperature 0.6" in text and "PARAMETER top_k 20" in text


STAND_IN = """
import os, sys
directory, _, out, _, kind = sys.argv[1:]
assert os.environ["HF_HUB_OFFLINE"] == "1" and "PYTHONPATH" not in os.environ
if kind == "bf16":
    sys.exit("Model FooForCausalLM is not supported")
open(out, "wb").write(b"GGUF" + kind.encode())
"""


@pytest.fixture(name="export")
def _export(tmp_path):
    from tests.helpers.models import tiny_model_dir

    directory = tiny_model_dir(tmp_path / "tuned", "llama", pad_token_id=2)
    templated("CHATML").save_pretrained(directory)
    (tmp_path / "convert_hf_to_gguf.py").write_text(STAND_IN)
    return Path(directory), find_converter(str(tmp_path / "convert_hf_to_gguf.py"), sys.executable)


def test_gguf_converter_is_called_offline_and_its_file_gets_a_modelfile(export, monkeypatch):
    directory, converter = export
    monkeypatch.setenv("PYTHONPATH", "/ours")
    file, lacking = write_gguf(directory, "mine", GgufType.q8_0, converter)
    assert file == directory / "gguf" / "mine-q8_0.gguf" and file.read_bytes() == b"GGUFq8_0" and lacking is None
    assert "FROM ./mine-q8_0.gguf" in (directory / "gguf" / "Modelfile").read_text()
    assert {path.name for path in file.parent.iterdir()} == {"mine-q8_0.gguf", "Modelfile"}
    assert verify_gguf(file, GgufType.q8_0).startswith("not verified: transformers cannot read it")


def test_gguf_converter_that_fails_is_reported_with_its_last_words(export):
    directory, converter = export
    with pytest.raises(ShardtuneError, match=r"FooForCausalLM is not supported.*is whole.*--outtype bf16"):
        write_gguf(directory, "mine", GgufType.bf16, converter)
    assert not [*(directory / "gguf").iterdir()]


def test_gguf_without_a_converter_fetches_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for named, python, said in (
        (None, None, "no convert-hf-to-gguf is found"),
        ("nowhere.py", None, "no such file"),
        (str(tmp_path), None, "no such file"),
        (None, "nothing", "no such program"),
    ):
        with pytest.raises(ConfigError, match=said):
            find_converter(named, python)


@pytest.mark.skipif("SHARDTUNE_GGUF_CONVERTER" not in os.environ, reason="needs llama.cpp's converter and its Python")
@pytest.mark.parametrize("kind", GgufType)
def test_gguf_file_of_the_real_converter_computes_what_the_export_does(kind, tmp_path):
    """SHARDTUNE_GGUF_CONVERTER=<python>:<convert_hf_to_gguf.py>:<a model directory it knows>."""
    python, script, model = os.environ["SHARDTUNE_GGUF_CONVERTER"].split(":")
    directory = tmp_path / "tuned"
    directory.mkdir()
    for path in Path(model).iterdir():
        (directory / path.name).symlink_to(path)
    converter = find_converter(script, python)
    file, lacking = write_gguf(directory, "m", kind, converter)
    assert lacking is None and verify_gguf(file, kind).startswith("verified: ")
    assert AutoTokenizer.from_pretrained(directory).eos_token in (file.parent / "Modelfile").read_text()
    if kind is GgufType.f32:  # another model's file is found out
        from safetensors.torch import load_file, save_file

        weights = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        name = next(name for name in weights if name.endswith("mlp.down_proj.weight"))
        save_file({**weights, name: weights[name] * 1.5}, directory / "model.safetensors", {"format": "pt"})
        with pytest.raises(DriftError):
            verify_gguf(file, kind)
