"""llm-compressor in its own environment: how it is called, what is made of what it says; the real one where it is named.

SHARDTUNE_LLM_COMPRESSOR=<its environment's Python>, and compressed-tensors in this one, try the real one.
"""

import os
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from launch.export.command import read_export_arguments
from launch.export.gguf import quantised_request
from strategies.errors import ConfigError, ShardtuneError
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer
from trainer.data.store.sequences import Sample
from trainer.export import quantised
from trainer.export.llm_compressor import Compressor, find_llm_compressor_python
from trainer.export.quantised import QuantisedFormat, write_quantised_model
from trainer.export.verify import DriftError, probe_ids

STAND_IN = """#!{python}
import json, os, shutil, sys
if sys.argv[1] == "-c":
    sys.exit(0)
job = json.load(open(sys.argv[2]))
assert os.environ["HF_HUB_OFFLINE"] == "1" and "PYTHONPATH" not in os.environ
if job["scheme"] == "W4A16":
    print("loading")
    sys.exit("size 40 is not divisible by group size 128")
os.mkdir(job["to"])
for name in ("config.json", "model.safetensors"):
    shutil.copy(os.path.join(job["model"], name), job["to"])
shutil.copy("{root}/probe.safetensors", os.path.dirname(sys.argv[2]))
shutil.copy(sys.argv[2], "{root}")
"""
SAMPLES = [Sample(np.arange(3, 3 + size, dtype=np.int32), np.arange(size) > 4) for size in (17, 40)]
ROWS = [[3, 4, 5], [6, 7, 8, 9]]


def made(root, **shape):
    directory = tiny_model_dir(root / "m", pad_token_id=2, **shape)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def test_llm_compressor_is_called_offline_with_training_rows_and_its_files_are_read_back(tmp_path, monkeypatch):
    import json

    directory, python = made(tmp_path), tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable, root=tmp_path))
    python.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", "/ours")
    plain = AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = probe_ids(tiny_tokenizer())
    logits = plain(torch.tensor([ids])).logits[0].detach()
    save_file({"logits": logits}, tmp_path / "probe.safetensors")
    compressor = Compressor(find_llm_compressor_python(str(python)), ROWS)
    folder, cost = write_quantised_model(directory, QuantisedFormat.llmcompressor_w8a8, SAMPLES, "held-out", compressor)
    job = json.loads((tmp_path / "job.json").read_text())
    assert job["scheme"] == "W8A8" and job["rows"] == ROWS and job["probe"] == list(ids)
    assert (
        cost.export_loss == cost.quantised_loss
        and cost.max_logit_difference < 1e-6
        and (folder / "tokenizer.json").is_file()
    )
    assert "By llm-compressor, in `llmcompressor_w8a8/`: loss" in (folder / "README.md").read_text()

    with pytest.raises(ShardtuneError, match=r"llm-compressor cannot store.*failed with 1: .*size 40 is not divisible"):
        write_quantised_model(directory, QuantisedFormat.llmcompressor_w4a16, SAMPLES, "held-out", compressor)
    save_file({"logits": logits * 1.2}, tmp_path / "probe.safetensors")
    with pytest.raises(DriftError, match="its files compute something else"):
        write_quantised_model(directory, QuantisedFormat.llmcompressor_fp8, SAMPLES, "held-out", compressor)
    assert [path.name for path in directory.iterdir() if path.is_dir()] == ["llmcompressor_w8a8"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            {"bits": "llmcompressor_fp8"},
            r"needs an environment of its own; name the Python of its environment with bits\.python",
        ),
        ({"bits": "llmcompressor_fp8", "bits.python": "nowhere"}, "there is no such program"),
        ({"bits": "llmcompressor_fp8", "bits.python": "false"}, "no Python that has llmcompressor"),
        ({"bits": "torchao_int8", "bits.python": "true"}, "goes with bits=llmcompressor_"),
        ({"bits.python": "true"}, "goes with bits=llmcompressor_"),
    ],
)
def test_llm_compressor_refuses_unsuitable_exports_before_anything_is_written(words, said, monkeypatch, tmp_path):
    from trainer.config.run import RunConfig

    monkeypatch.setattr(quantised, "missing_library", lambda kit: None)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    with pytest.raises(ConfigError, match=said):
        typed, _ = read_export_arguments([str(run), *(f"{key}={text}" for key, text in words.items())])
        quantised_request(typed, RunConfig())


@pytest.mark.skipif(
    "SHARDTUNE_LLM_COMPRESSOR" not in os.environ or find_spec("compressed_tensors") is None,
    reason="needs llm-compressor's Python (SHARDTUNE_LLM_COMPRESSOR) and compressed-tensors here",
)
@pytest.mark.parametrize("kind", [kind for kind in QuantisedFormat if kind.needs_other_python])
def test_llm_compressor_stores_the_values_of_its_scheme(tmp_path, kind):
    directory = made(tmp_path, hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)
    rows = [list(range(5, 5 + size)) for size in (30, 200, 90, 9)]
    compressor = Compressor(find_llm_compressor_python(os.environ["SHARDTUNE_LLM_COMPRESSOR"]), rows)
    folder, cost = write_quantised_model(directory, kind, SAMPLES, "held-out", compressor)
    assert 0 < abs(cost.quantised_loss - cost.export_loss) < 0.2
    name = "model.layers.1.mlp.down_proj.weight"
    plain, there = load_file(directory / "model.safetensors")[name].float(), load_file(folder / "model.safetensors")
    scale = there[f"{name}_scale"].float()
    if kind is QuantisedFormat.llmcompressor_w4a16:  # eight values in 32 bits, the first one lowest
        codes = torch.stack([(there[f"{name}_packed"] >> 4 * place) & 15 for place in range(8)], dim=-1).float() - 8
        stored = (codes.reshape(128, 2, 128) * scale[..., None]).reshape(128, 256)
    else:
        stored = there[name].float() * scale
    steps = {
        QuantisedFormat.llmcompressor_w4a16: 15,
        QuantisedFormat.llmcompressor_w8a8: 255,
        QuantisedFormat.llmcompressor_fp8: 448,
    }[kind]
    assert 0 < (stored - plain).abs().mean() < 2 * plain.abs().amax() / steps
