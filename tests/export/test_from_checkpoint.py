"""Whole models that are read out of a checkpoint, file by file, have every byte of those that an engine gathers."""

import copy
import hashlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from strategies.base import Precision
from strategies.errors import ConfigError
from strategies.saved_parameters import MeanOfCheckpoints, SavedParameters
from tests.helpers.adapters import plain_adapter
from tests.helpers.exports import model_of, trained
from tests.helpers.gathered_export import write_gathered
from tests.helpers.tokenizers import tiny_tokenizer
from tests.models.tiny import tiny_model
from trainer.export.files import files_of_writer, open_export_staging, write_export_file
from trainer.export.plan import plan_files
from trainer.export.trained_model import ModelValues
from trainer.model import experts
from trainer.model.config import Quantisation
from trainer.optim.config import ScheduleFreeConfig
from trainer.tuning.base import FullConfig, LoraConfig
from trainer.tuning.config import AdaLoraConfig, FreezeConfig

LORA = {"rank": 4}
PROCESSES = (1, 2, 4)
SMALL_FILE = 30_000
"""Bytes of a file: the largest tensors of the tiny models have more."""

CASES = {
    "dense": ("llama", FullConfig(), {}),
    "tied": ("llama_tied", FullConfig(), {}),
    "transposed": ("gpt2", LoraConfig(**LORA), {}),
    "bfloat16": ("llama", FullConfig(), {"dtype": torch.bfloat16}),
    "fused experts": ("gpt_oss", FullConfig(), {}),
    "separate experts": ("qwen3_moe", FullConfig(), {}),
    "quantised base": ("llama", LoraConfig(**LORA), {"quantisation": Quantisation.nf4}),
    "LoRA": ("llama_tied", LoraConfig(**LORA), {}),
    "LoRA in bfloat16": ("llama", LoraConfig(**LORA), {"precision": Precision.bf16}),
    "LoRA of experts": ("qwen3_moe", LoraConfig(**LORA, experts=True, router=True), {}),
    "DoRA": ("llama", LoraConfig(**LORA, dora=True), {}),
    "PiSSA": ("llama", LoraConfig(**LORA, init="pissa"), {}),
    "OLoRA": ("llama", LoraConfig(**LORA, init="olora"), {}),
    "AdaLoRA": ("llama", AdaLoraConfig(), {}),
    "a head in full": ("llama", LoraConfig(**LORA, modules_to_save=["lm_head"]), {}),
    "new tokens": ("llama", LoraConfig(**LORA), {"add_tokens": [f"<word{n}>" for n in range(200)]}),
    "a part": ("llama", FreezeConfig(layers="last-1"), {"add_tokens": [f"<word{n}>" for n in range(200)]}),
    "model.adapters": ("llama", FullConfig(), {"adapters": True}),
    "tuning.from": ("llama", LoraConfig(**LORA), {"continues": True}),
    "EMA": ("llama", FullConfig(), {"ema_decay": 0.9}),
    "schedule-free": ("llama", FullConfig(), {"optim": ScheduleFreeConfig(lr=2e-2)}),
}


def digests(directory):
    """SHA-256 of every file, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir() if path.is_file()}


def written_by(model, directory, processes, *, dtype, max_bytes):
    """The digests of what several processes write, one after the other, each with readers of its own."""
    for number in range(processes):
        values = ModelValues(model)
        plan = plan_files(values, dtype, max_bytes)
        if number == 0:
            open_export_staging(directory, plan, {})
        for file in files_of_writer(plan.files, number, processes):
            write_export_file(plan, file, values, directory)
        values.close()
    index = plan.index_json()
    if index is not None:
        (directory / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return digests(directory)


def compare(parts, base, model, root, dtype=torch.float32):
    """Both ways in a file for all, and in small ones, by 1, 2 and 4 processes."""
    engine, built, _ = parts
    for max_bytes in (2**40, SMALL_FILE):
        gathered = root / f"gathered-{max_bytes}"
        write_gathered(engine, built, base, gathered, dtype=dtype, max_bytes=max_bytes)
        expected = digests(gathered)
        assert (len(expected) > 4) == (max_bytes == SMALL_FILE)
        for processes in PROCESSES:
            found = written_by(model, root / f"{max_bytes}-{processes}", processes, dtype=dtype, max_bytes=max_bytes)
            assert found == expected, (max_bytes, processes)


@pytest.mark.parametrize("case", CASES)
def test_files_read_out_of_a_checkpoint_have_the_bytes_of_those_that_are_gathered(case, bases, runtime, tmp_path):
    architecture, tuning, settings = CASES[case]
    settings = dict(settings)
    dtype = settings.pop("dtype", torch.float32)
    base = bases(architecture, dtype)
    tuning = copy.deepcopy(tuning)
    if settings.pop("adapters", False):
        settings["adapters"] = [str(plain_adapter(base, tmp_path / f"adapter-{seed}", seed=seed)) for seed in (1, 2)]
    if settings.pop("continues", False):
        tuning.from_ = str(plain_adapter(base, tmp_path / "start", r=4, lora_alpha=32))
    parts = trained(base, tuning, runtime, **settings)
    beta = 0.9 if case == "schedule-free" else None
    model = model_of(*parts, base, tmp_path / "checkpoint", schedule_free_beta=beta)
    compare(parts, base, model, tmp_path, dtype)


LARGER = {"llama4": {}, "qwen3_next": {"mtp.fc.weight": torch.ones(4, 4), "mtp.norm.weight": torch.ones(4)}}
"""Models whose files hold more than what trains: the towers of a larger one, and weights that the architecture ignores."""


@pytest.mark.parametrize("model_type", LARGER)
def test_files_keep_what_does_not_train_of_a_larger_model(model_type, runtime, tmp_path):
    base = tmp_path / "base"
    experts.register()
    tiny_model(model_type).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    file = base / "model.safetensors"
    save_file(load_file(file) | LARGER[model_type], file, {"format": "pt"})
    parts = trained(base, FullConfig(), runtime, steps=0)
    with torch.no_grad():
        for _, parameter in parts[0].trainable:
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    compare(parts, base, model_of(*parts, base, tmp_path / "checkpoint"), tmp_path)
    kept = load_file(tmp_path / f"{2**40}-1" / "model.safetensors")
    untouched = [name for name, tensor in load_file(file).items() if torch.equal(tensor, kept[name])]
    assert kept.keys() == load_file(file).keys() and untouched


def test_mean_of_checkpoints_is_that_of_what_each_would_export(bases, runtime, tmp_path):
    """The engine is given the mean that is computed here, so that gathering it is the oracle."""
    base = bases("llama")
    engines = [trained(base, FullConfig(), runtime, steps=steps, ema_decay=0.9) for steps in (1, 2, 3)]
    models = []
    means = {}
    for number, parts in enumerate(engines):
        models.append(model_of(*parts, base, tmp_path / f"checkpoint-{number}"))
        for name, tensor in parts[0].gather_full_parameters(trainable_only=True):
            means[name] = means.get(name, 0) + tensor.double() / 3
    mean = replace(models[-1], trained=MeanOfCheckpoints([model.trained for model in models]))
    engine = engines[-1][0]
    engine.weight_average = None
    with torch.no_grad():
        for name, parameter in engine.trainable:
            parameter.copy_(means[name])
            torch.testing.assert_close(mean.trained[name], parameter.detach(), rtol=2e-7, atol=1e-9)
            parameter.copy_(mean.trained[name])
    compare(engines[-1], base, mean, tmp_path)


def test_merged_weights_do_not_depend_on_the_threads_of_a_process(bases, runtime, tmp_path):
    base = bases("llama")
    parts = trained(base, LoraConfig(rank=4, init="pissa"), runtime, steps=1)
    model = model_of(*parts, base, tmp_path / "checkpoint")
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            written = written_by(model, tmp_path / str(threads), 1, dtype=torch.float32, max_bytes=2**40)
            found.append(written)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_a_checkpoint_of_another_model_is_refused(bases, runtime, tmp_path):
    parts = trained(bases("llama"), FullConfig(), runtime, steps=0)
    model_of(*parts, bases("llama"), tmp_path / "checkpoint")
    shapes = {"model.embed_tokens.weight": torch.Size([3, 3])}
    with pytest.raises(ConfigError, match="has 16384 elements of it"):
        SavedParameters(tmp_path / "checkpoint", shapes)
    with pytest.raises(ConfigError, match="does not hold it"):
        SavedParameters(tmp_path / "checkpoint", {"other.weight": torch.Size([3])})
