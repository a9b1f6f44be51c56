"""Whole models in few bits by torchao: each value by plain arithmetic, what that costs, and what is never written."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from strategies.errors import ShardtuneError
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer
from trainer.data.store.sequences import Sample
from trainer.export import quantised
from trainer.export.quantised import QuantisedFormat, write_quantised_model
from trainer.export.verify import DriftError

pytestmark = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed (the extra torchao)")
MATRIX = "model.layers.1.mlp.down_proj.weight"


def made(path, architecture="llama", **overrides):
    directory = tiny_model_dir(path, architecture, pad_token_id=2, **overrides)
    tiny_tokenizer().save_pretrained(directory)
    (directory / "README.md").write_text("# A card\n")
    return directory


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return made(tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def samples():
    drawn = np.random.default_rng(0)
    return [
        Sample(drawn.integers(3, 500, size).astype(np.int32), np.arange(size) > 4 + size // 3) for size in (17, 40, 9)
    ]


def eight_bits(weights):
    """A scale for each row: its largest value is 127."""
    scale = weights.abs().amax(1, keepdim=True) / 127
    return (weights / scale).round() * scale


def nvfp4(weights):
    """E2M1: 0, 0.5, 1, 1.5, 2, 3, 4 and 6, times a scale of 16 values (E4M3), times one of the matrix."""
    whole = weights.abs().max() / (6 * 448)
    blocks = weights.reshape(-1, 16)
    scale = (blocks.abs().amax(1, keepdim=True) / 6 / whole).to(torch.float8_e4m3fn).float() * whole
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nearest = ((blocks / scale).abs()[..., None] - grid).abs().argmin(-1)
    return (grid[nearest] * blocks.sign() * scale).reshape(weights.shape)


@pytest.mark.parametrize(
    ("kind", "by_hand"), [(QuantisedFormat.torchao_int8, eight_bits), (QuantisedFormat.torchao_nvfp4, nvfp4)]
)
def test_quantised_export_has_the_values_of_its_scheme_and_the_cost_of_its_files(export, samples, kind, by_hand):
    folder, cost = write_quantised_model(export, kind, samples, "held-out")
    plain, read = (AutoModelForCausalLM.from_pretrained(each).eval() for each in (export, folder))
    stored, mine = (
        read.get_parameter(MATRIX).dequantize().float(),
        by_hand(plain.get_parameter(MATRIX).bfloat16().float()),
    )
    largest = mine.abs().max()
    far = (stored - mine).abs() > 0.02 * largest  # bfloat16 moves a value that lies between two to the other one
    assert far.float().mean() < 0.01 and (stored - mine).abs().mean() < 0.004 * largest
    assert not torch.equal(stored, plain.get_parameter(MATRIX).bfloat16().float())
    size = [sum(file.stat().st_size for file in each.glob("*.safetensors")) for each in (export, folder)]
    assert size[1] < 0.5 * size[0], "half of this model are its embeddings, which stay bfloat16"
    losses = []
    for model in (plain, read):
        total, count = 0.0, 0
        for sample in samples:
            ids = torch.from_numpy(sample.input_ids.astype(np.int64))[None]
            labels = torch.where(torch.from_numpy(sample.supervised)[None], ids, -100)
            rows = int((labels[:, 1:] != -100).sum())
            total, count = total + float(model(ids, labels=labels).loss.detach()) * rows, count + rows
        losses.append(total / count)
    assert [cost.export_loss, cost.quantised_loss] == pytest.approx(
        losses, abs=2e-4
    ) and cost.export_loss != cost.quantised_loss
    assert f"By torchao, in `{kind}/`: loss {cost.export_loss:.4f} ->" in (folder / "README.md").read_text()
    assert (folder / "tokenizer.json").is_file()


def test_quantised_export_that_computes_something_else_is_not_written(export, samples, monkeypatch):
    load = quantised._load_model

    def damaged(directory, **how):
        model = load(directory, **how)
        if not how:
            model.lm_head.weight.data *= 1.2
        return model

    monkeypatch.setattr(quantised, "_load_model", damaged)
    before = {path.name: path.stat().st_mtime_ns for path in export.rglob("*")}
    with pytest.raises(DriftError, match=r"logits differ by 2\.0e-01 of the largest"):
        write_quantised_model(export, QuantisedFormat.torchao_int8, samples, "held-out")
    assert {path.name: path.stat().st_mtime_ns for path in export.rglob("*") if path.name in before} == before


@pytest.mark.parametrize(
    ("architecture", "shape", "kind", "told"),
    [
        ("llama", {"intermediate_size": 40}, QuantisedFormat.torchao_nvfp4, "divisible by 16"),
        ("gpt2", {}, QuantisedFormat.torchao_int8, "stores none of its matrices in few bits"),
    ],
)
def test_quantised_export_of_an_unsuitable_model_is_refused(tmp_path, samples, architecture, shape, kind, told):
    directory = made(tmp_path / "m", architecture, **shape)
    with pytest.raises(
        ShardtuneError, match=rf"bits={kind}: torchao cannot store this model so \(.*{told}.*another type"
    ):
        write_quantised_model(directory, kind, samples, "training")
    assert not [path for path in directory.iterdir() if path.is_dir()]
