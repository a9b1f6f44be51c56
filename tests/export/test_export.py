"""Round trips: what training left in an engine, exported, loaded by plain transformers and peft, computes the same."""

import errno
import json
import os

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from strategies.base import Precision
from strategies.errors import ConfigError, StorageError
from tests.helpers.exports import LABELS, export, logits_of, trained
from trainer.export import write as export_write
from trainer.export.config import ExportType
from trainer.export.load import load_export
from trainer.export.tensors import hub_id_and_commit
from trainer.export.verify import DriftError, probe_ids, reference_logits, verify_export
from trainer.model.config import RopeConfig, RopeScaling
from trainer.objectives.classification import ClassificationConfig
from trainer.tuning.base import FullConfig, LoraConfig


def stored_names(directory):
    names = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(str(file), framework="pt") as handle:
            names |= set(handle.keys())
    return names


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gpt2", "gemma2", "falcon"])
def test_a_fully_tuned_model_loads_with_plain_transformers(architecture, bases, runtime, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = bases(architecture)
    parts = trained(base, FullConfig(), runtime)
    directory = export(parts, base, tmp_path / "export", runtime)
    ids = probe_ids(parts[2])
    reference = reference_logits(parts[0], parts[1], ids, runtime)

    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(
        logits_of(model.eval(), ids), reference, rtol=0, atol=1e-4 * float(reference.abs().max())
    )
    original = logits_of(AutoModelForCausalLM.from_pretrained(base).eval(), ids)
    assert (original - reference).abs().max() > 1e-2 * reference.abs().max(), (
        "training changed nothing: the test is blind"
    )

    assert len({file.stat().st_mode for file in directory.iterdir()}) == 1
    names = stored_names(directory)
    assert any("lm_head" in n for n in names) == (not model.config.tie_word_embeddings)
    assert model.config.architectures == [type(model).__name__]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.chat_template == parts[2].chat_template
    assert tokenizer("What is it?")["input_ids"] == parts[2]("What is it?")["input_ids"]


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {}),
        ("llama_tied", {"rslora": True}),
        ("gpt2", {}),
        ("llama_tied", {"dora": True}),
        ("gpt2", {"dora": True}),
    ],
)
def test_an_adapter_loads_with_plain_peft_and_equals_its_merge(architecture, settings, bases, runtime, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = bases(architecture)
    parts = trained(base, LoraConfig(rank=4, **settings), runtime)
    adapter = export(parts, base, tmp_path / "adapter", runtime)
    merged = export(parts, base, tmp_path / "merged", runtime, merge=True)
    ids = probe_ids(parts[2])
    reference = reference_logits(parts[0], parts[1], ids, runtime)
    atol = 1e-4 * float(reference.abs().max())

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    torch.testing.assert_close(logits_of(model.eval(), ids), reference, rtol=0, atol=atol)
    whole, info = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits_of(whole.eval(), ids), reference, rtol=0, atol=atol)
    plain = logits_of(AutoModelForCausalLM.from_pretrained(base).eval(), ids)
    assert (plain - reference).abs().max() > 1e-2 * reference.abs().max()

    settings_file = json.loads((adapter / "adapter_config.json").read_text())
    assert settings_file["base_model_name_or_path"] == str(base)
    assert not any("default" in name for name in stored_names(adapter))
    assert not (adapter / "config.json").exists()


@pytest.mark.parametrize("kind", ["full", "adapter", "merged"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_export_rotates_positions_as_training_did(architecture, kind, bases, runtime, tmp_path):
    """By the config.json of the export, for plain transformers, and beside an adapter for the base of plain peft."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    base = bases(architecture)
    rope = RopeConfig(type=RopeScaling.yarn, theta=20000.0)
    tuning = FullConfig() if kind == "full" else LoraConfig(rank=4)
    parts = trained(base, tuning, runtime, positions=2048, rope=rope)
    directory = export(parts, base, tmp_path / "export", runtime, merge=kind == "merged")
    ids = probe_ids(parts[2])
    reference = reference_logits(parts[0], parts[1], ids, runtime)
    tolerance = 1e-4 * float(reference.abs().max())

    config = AutoConfig.from_pretrained(directory)
    assert config.max_position_embeddings == 2048
    source = base if kind == "adapter" else directory

    def exported_logits(config):
        model = AutoModelForCausalLM.from_pretrained(source, config=config)
        if kind == "adapter":
            model = PeftModel.from_pretrained(model, str(directory))
        return logits_of(model.eval(), ids)

    torch.testing.assert_close(exported_logits(config), reference, rtol=0, atol=tolerance)
    torch.testing.assert_close(logits_of(load_export(directory), ids), reference, rtol=0, atol=tolerance)
    own = exported_logits(AutoConfig.from_pretrained(base))
    assert (own - reference).abs().max() > 10 * tolerance, "the rotation makes no difference: the test is blind"
    card = (directory / "README.md").read_text()
    assert ("config=config" in card) == (kind == "adapter")


@pytest.mark.parametrize("architecture", ["llama", "llama_tied"])
def test_export_adapter_has_the_new_vocabulary_and_the_card_says_how_to_load_it(architecture, bases, runtime, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = bases(architecture)
    words = [f"<word{n}>" for n in range(200)]  # more than the spare rows of the base
    parts = trained(base, LoraConfig(rank=4), runtime, add_tokens=words)
    adapter = export(parts, base, tmp_path / "adapter", runtime)
    ids = probe_ids(parts[2])
    reference = reference_logits(parts[0], parts[1], ids, runtime)

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    assert tokenizer.convert_tokens_to_ids("<word199>") == len(tokenizer) - 1 == ids[-1] > 511
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    model = PeftModel.from_pretrained(model, str(adapter))
    atol = 1e-4 * float(reference.abs().max())
    torch.testing.assert_close(logits_of(model.eval(), ids), reference, rtol=0, atol=atol)
    assert f"resize_token_embeddings({len(tokenizer)})" in (adapter / "README.md").read_text()
    verify_export(adapter, token_ids=ids, reference=reference)

    merged = export(parts, base, tmp_path / "merged", runtime, merge=True)
    torch.testing.assert_close(logits_of(load_export(merged), ids), reference, rtol=0, atol=atol)


def test_new_tokens_in_spare_rows_need_no_resize(bases, runtime, tmp_path):
    base = bases("llama")
    parts = trained(base, LoraConfig(rank=4), runtime, add_tokens=["<word>"])
    adapter = export(parts, base, tmp_path / "adapter", runtime, verify=True)
    assert "resize" not in (adapter / "README.md").read_text()


@pytest.mark.parametrize(
    ("architecture", "tuning"),
    [("llama", FullConfig()), ("llama", LoraConfig(rank=4)), ("distilbert", FullConfig())],
)
def test_export_of_a_classifier_keeps_its_labels(architecture, tuning, bases, runtime, tmp_path):
    base = bases(architecture)
    parts = trained(base, tuning, runtime, objective=ClassificationConfig(), steps=3)
    facts = {"label_names": LABELS, "objective": "classification"}
    whole = export(parts, base, tmp_path / "whole", runtime, facts=facts, merge=True, verify=True)
    model = load_export(whole)
    assert type(model).__name__.endswith("ForSequenceClassification")
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.label2id == {label: n for n, label in enumerate(LABELS)}
    if parts[1].tuning.adapter:
        export(parts, base, tmp_path / "adapter", runtime, facts=facts, verify=True)


def test_a_changed_tensor_is_noticed(bases, runtime, tmp_path):
    base = bases("llama")
    for tuning, file in ((FullConfig(), "model.safetensors"), (LoraConfig(rank=4), "adapter_model.safetensors")):
        parts = trained(base, tuning, runtime)
        directory = export(parts, base, tmp_path / tuning.name, runtime)
        ids = probe_ids(parts[2])
        reference = reference_logits(parts[0], parts[1], ids, runtime)
        found = verify_export(directory, base_path=str(base), token_ids=ids, reference=reference)
        assert found.argmax_agreement == 1.0 and found.max_abs_difference < 1e-4 * found.largest_logit
        tensors = load_file(directory / file)
        name = next(n for n in tensors if "down_proj" in n)
        tensors[name] = tensors[name] * 1.02
        save_file(tensors, directory / file, {"format": "pt"})
        with pytest.raises(DriftError, match="does not compute what was trained") as caught:
            verify_export(directory, base_path=str(base), token_ids=ids, reference=reference)
        assert caught.value.exit_code == 70
        tensors[name] = tensors[name] * float("nan")
        save_file(tensors, directory / file, {"format": "pt"})
        with pytest.raises(DriftError):
            verify_export(directory, base_path=str(base), token_ids=ids, reference=reference)


def test_types_auto_is_that_of_the_base_and_untouched_values_are_exact(bases, runtime, tmp_path):
    base = bases("llama")
    parts = trained(base, LoraConfig(rank=4, targets=["q_proj"]), runtime, precision=Precision.bf16)
    merged = export(parts, base, tmp_path / "merged", runtime, merge=True, verify=True)
    ours, theirs = load_file(merged / "model.safetensors"), load_file(base / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():  # the run held them in bf16
        assert torch.equal(ours[name], tensor) == ("q_proj" not in name), name
    half = bases("llama", torch.bfloat16)
    parts = trained(half, FullConfig(), runtime)
    stored = load_file(export(parts, half, tmp_path / "half", runtime, verify=True) / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    wide = export(parts, half, tmp_path / "wide", runtime, dtype=ExportType.float32, verify=True)
    assert {t.dtype for t in load_file(wide / "model.safetensors").values()} == {torch.float32}


def test_large_models_are_split_and_indexed(bases, runtime, tmp_path, monkeypatch):
    base = bases("llama")
    parts = trained(base, FullConfig(), runtime)
    group, waits, publish = dist.group.WORLD._get_backend(torch.device("cpu")), [], export_write._publish_export
    monkeypatch.setattr(export_write, "SLOWEST_DISK_BYTES_PER_S", 1)
    monkeypatch.setattr(
        export_write,
        "_publish_export",
        lambda *given: (waits.append(group.options._timeout.total_seconds()), publish(*given)),
    )
    directory = export(parts, base, tmp_path / "export", runtime, max_shard_gib=3e-5, verify=True)
    files = sorted(directory.glob("model-*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == stored_names(directory)
    assert not list(directory.glob("part-*"))
    # The other ranks wait as long as a slow disk may take for all of it, and then no longer than ever.
    size = sum(4 * tensor.numel() for file in files for tensor in load_file(file).values())
    size += export_write.SMALL_FILES_BYTES
    assert [*waits, group.options._timeout.total_seconds()] == [runtime.timeout_s + size, runtime.timeout_s]


def test_a_link_in_place_of_an_unfinished_export_is_not_followed(bases, runtime, tmp_path):
    """A downloaded run can hold one: files of its reader's would be written over, and their modes changed."""
    base, others = bases("llama"), tmp_path / "others"
    others.mkdir()
    (others / "key").touch(mode=0o600)
    (tmp_path / ".export.writing").symlink_to(others)
    directory = export(trained(base, FullConfig(), runtime), base, tmp_path / "export", runtime)
    assert (directory / "config.json").is_file() and not directory.is_symlink()
    [key] = others.iterdir()
    assert key.stat().st_mode & 0o777 == 0o600


def test_export_write_that_fails_leaves_the_earlier_export_and_nothing_else(bases, runtime, tmp_path, monkeypatch):
    base = bases("llama")
    parts = trained(base, FullConfig(), runtime)
    directory = export(parts, base, tmp_path / "export", runtime)
    before = (directory / "model.safetensors").read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        export(parts, base, directory, runtime)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export"]
    assert (directory / "model.safetensors").read_bytes() == before
    monkeypatch.undo()
    export(parts, base, directory, runtime)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export"]


def test_an_export_that_drifts_is_not_published(bases, runtime, tmp_path, monkeypatch):
    from trainer.export import files as module

    base = bases("llama")
    parts = trained(base, FullConfig(), runtime)
    stored_tensors_of_group = module.stored_tensors_of_group

    def tampering(*given):
        return {n: t * 1.1 if "down_proj" in n else t for n, t in stored_tensors_of_group(*given).items()}

    monkeypatch.setattr(module, "stored_tensors_of_group", tampering)
    with pytest.raises(DriftError):
        export(parts, base, tmp_path / "export", runtime, verify=True)
    assert not list(tmp_path.iterdir())


def test_folding_into_a_tied_head_is_refused(bases, runtime, tmp_path):
    base = bases("llama_tied")
    parts = trained(base, LoraConfig(rank=4, targets=["q_proj", "lm_head"]), runtime, steps=1)
    with pytest.raises(ConfigError, match=r"export\.merge=true"):
        export(parts, base, tmp_path / "export", runtime, merge=True)
    assert not list(tmp_path.iterdir())


def test_export_names_a_hub_snapshot_as_the_hub_does():
    assert hub_id_and_commit("/c/models--org--name/snapshots/abc") == ("org/name", "abc")
    assert hub_id_and_commit("/models/mine") == ("/models/mine", None)


@pytest.mark.parametrize(
    ("code", "said"), [(errno.EROFS, "choose another directory (to=) and run"), (errno.ENOSPC, "free space and run")]
)
def test_export_error_suggests_free_space_only_where_it_would_help(runtime, tmp_path, code, said):
    with pytest.raises(StorageError) as refused:
        export_write.raise_if_any_rank_failed(
            OSError(code, os.strerror(code)), tmp_path / "aside", tmp_path / "to", runtime
        )
    assert said in str(refused.value)
    # First what the user knows: where the export goes.
    assert str(refused.value).startswith(f"writing the export {tmp_path / 'to'} failed ({os.strerror(code)}")
