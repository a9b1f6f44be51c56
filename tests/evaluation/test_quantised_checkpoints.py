"""A model in 4 or 8 bits is evaluated as it is shipped: its losses and answers are those of transformers on the same files."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from strategies.errors import ConfigError
from tests.helpers.building import model_dir
from tests.helpers.launching import command_here
from trainer.data.store.sequences import Sample
from trainer.export.quantised import QuantisedFormat, write_quantised_model
from trainer.model import quantised_checkpoints

pytestmark = pytest.mark.skipif(not all(map(find_spec, ("bitsandbytes", "torchao"))), reason="needs qlora and torchao")
ROWS = [{"prompt": f"question {n} brown fox\n", "completion": f"hello world {n} dog"} for n in range(5)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A model, and the same in few bits."""
    root = tmp_path_factory.mktemp("few")
    model_dir(root, hidden_size=64, intermediate_size=64, pad_token_id=2)
    (root / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return root


def words(root, path):
    found = [f"model.path={path}", "evaluation.resamples=100", "run.threads=1", f"to={root / 'told'}"]
    for name, kind in (("loss", "loss"), ("said", "exact_match")):
        found += [f"evaluation.tasks.{name}.kind={kind}", f"evaluation.tasks.{name}.path={root}/rows.jsonl"]
    return [*found, "evaluation.tasks.said.write.max_new_tokens=6", "logging.wandb=disabled"]


@pytest.mark.parametrize("sides", [(32, 64), (64, 128), (16, 64), (32, 32), (48, 64), (64, 96)])
def test_quantised_4_bit_shapes_that_are_refused_are_those_bitsandbytes_cannot_pack(sides, monkeypatch):
    """Its packing is Python: it fails on every processor over the sides that it fails over with avx512_bf16."""
    from bitsandbytes import functional

    monkeypatch.setattr(functional, "has_avx512bf16", lambda: True)
    rows, columns = sides
    model = torch.nn.Sequential(torch.nn.Linear(columns, rows))
    odd = quantised_checkpoints.unsupported_4bit_layers(model, torch.device("cpu"))
    packed, state = functional.quantize_4bit(model[0].weight.detach(), quant_type="nf4")
    try:
        functional._convert_weight_packed_for_cpu(packed, state)
        assert odd == []
    except (AssertionError, RuntimeError):
        assert odd == [f"0 {rows}x{columns}"]
        with pytest.raises(ConfigError, match=rf"bits=nf4: .* and not 0 {rows}x{columns}; use a GPU or a processor"):
            quantised_checkpoints.refuse_unsupported_4bit("bits=nf4", model, torch.device("cpu"))
    monkeypatch.setattr(functional, "has_avx512bf16", lambda: False)
    assert quantised_checkpoints.unsupported_4bit_layers(model, torch.device("cpu")) == []


def test_quantised_model_that_cannot_be_multiplied_here_is_refused_before_it_is_loaded(site, monkeypatch, capsys):
    from bitsandbytes import functional

    monkeypatch.chdir(site)
    samples = [Sample(np.arange(3, 20, dtype=np.int32), np.arange(17) > 4)]
    folder, _ = write_quantised_model(site / "llama", QuantisedFormat.nf4, samples, "held-out")
    monkeypatch.setattr(functional, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(
        quantised_checkpoints, "AVX512_COLUMNS_MULTIPLE", 128
    )  # of another version: this model's 64 do not do
    assert command_here(["evaluate", *words(site, folder)]) == 64
    assert "on a processor with avx512_bf16 bitsandbytes multiplies 4-bit matrices" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [QuantisedFormat.nf4, QuantisedFormat.int8, QuantisedFormat.torchao_int8])
def test_quantised_checkpoint_has_the_numbers_of_transformers_on_the_same_files(site, kind, monkeypatch):
    monkeypatch.chdir(site)
    samples = [Sample(np.arange(3, 20, dtype=np.int32), np.arange(17) > 4)]
    folder, _ = write_quantised_model(site / "llama", kind, samples, "held-out")
    assert command_here(["evaluate", *words(site, folder), f"against={site}/llama"]) == 0
    report = json.loads((site / "told" / "evaluation.json").read_text())
    rows = [json.loads(line) for line in (site / "told" / "evaluation_rows.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count, answers = 0.0, 0, []
    for row in ROWS:
        chat = [{"role": "user", "content": row["prompt"]}]
        before = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        texts = before, f"{before}{row['completion']}<|im_end|>"
        asked, told = (torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]]) for text in texts)
        cut = asked.shape[1]
        with torch.no_grad():
            likely = model(told).logits[0, cut - 1 : -1].float().log_softmax(-1)
            written = model.generate(asked, max_new_tokens=6, do_sample=False, pad_token_id=2)
        total, count = total - float(likely.gather(1, told[0, cut:, None]).sum()), count + told.shape[1] - cut
        answers.append(tokenizer.decode(written[0, cut:], skip_special_tokens=True))
    found = report["tasks"]["loss"]["metrics"]["loss"]["value"]
    changed = report["against"]["tasks"]["loss"]["metrics"]["loss"]["difference"]
    assert abs(changed) > 5e-3 and found == pytest.approx(total / count, abs=abs(changed) / 5)
    assert [row["answer"].strip() for row in rows if row["task"] == "said"] == [each.strip() for each in answers]
    assert report["precision"] == ("fp16" if kind is QuantisedFormat.int8 else "bf16")


def test_quantised_checkpoint_refuses_unsuitable_settings_at_once(site, capsys, monkeypatch):
    monkeypatch.chdir(site)
    settings = json.loads((site / "llama" / "config.json").read_text())
    small = site / "small"
    small.mkdir()
    (small / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "torchao"}}))
    monkeypatch.setattr(quantised_checkpoints, "find_spec", lambda name: None)
    code = command_here(["evaluate", *words(site, small), "strategy=fsdp2", "precision=bf16", "adapter=x"])
    said = capsys.readouterr().err
    assert code == 64
    for part in (
        "needs torchao; pip install -e '.[torchao]'",
        "strategy=ddp",
        "leave it out",
        "nothing is merged",
    ):
        assert part in said
