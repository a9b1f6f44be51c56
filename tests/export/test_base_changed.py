"""The base lies elsewhere than the run, and may be another one by the time that it is read again."""

import json
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.launching import command_here
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data, write_jsonl
from trainer.model.base_files import digests_of_loaded_files
from trainer.model.config import ModelConfig
from trainer.session.base_files import pin_model_to_commit

CHANGED = "base/model.safetensors: has other content than when the run trained"


def write_base(folder, seed):
    tiny_model_dir(folder, "llama", pad_token_id=2, seed=seed)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def train(folder, name, *words):
    """`shardtune train` for two steps; the run directory."""
    run_dir = folder / name
    settings = [] if any(word.startswith("model.path=") for word in words) else [f"model.path={folder / 'base'}"]
    settings += [f"data.path={folder / 'train.jsonl'}", f"run.dir={run_dir}"]
    settings += [f"data.eval_path={folder / 'eval.jsonl'}", f"data.cache_dir={folder / 'cache'}", "optim.lr=1e-2"]
    settings += ["batch.global=4", "batch.micro=4", "budget.steps=2", "logging.wandb=disabled", "run.device=cpu"]
    assert command_here(["train", *settings, *words]) == 0
    return run_dir


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a base, another base of the same shapes, and a run of LoRA on the first."""
    folder = tmp_path_factory.mktemp("changed")
    write_base(folder / "base", seed=0)
    write_base(folder / "other", seed=5)
    write_chat_data(folder / "train.jsonl", 8)
    write_chat_data(folder / "eval.jsonl", 4, seed=1)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "a b", "completion": "c"}])
    train(folder, "run", "tuning=lora", "export.at_end=false")
    return folder


@pytest.fixture
def replaced(trained):
    """Meanwhile the other weights lie at `model.path`."""
    weights = trained / "base" / "model.safetensors"
    original = weights.read_bytes()
    shutil.copy(trained / "other" / "model.safetensors", weights)
    yield trained
    weights.write_bytes(original)


def test_base_that_was_replaced_is_refused_by_every_verb(replaced, tmp_path, capsys):
    run_dir = replaced / "run"
    verbs = [
        ["export", f"to={tmp_path / 'adapter'}"],
        ["export", "merge=true", f"to={tmp_path / 'merged'}", "--verify"],
        ["evaluate", f"to={tmp_path / 'evaluated'}"],
        ["evaluate", "against=base", f"to={tmp_path / 'against'}"],
        ["review", "make", f"prompts={replaced / 'prompts.jsonl'}", f"to={tmp_path / 'review'}"],
    ]
    for words in verbs:
        assert command_here([*words, str(run_dir)]) == 64, words
        said = capsys.readouterr().err
        assert CHANGED in said and "accept=[base]" in said, words
    assert list(tmp_path.iterdir()) == [] and not (run_dir / "review").exists()


def test_base_that_was_replaced_is_used_when_accepted_and_noted_in_the_card(replaced, tmp_path, capsys):
    run_dir, merged = replaced / "run", tmp_path / "merged"
    assert command_here(["export", str(run_dir), "merge=true", "accept=[base]", f"to={merged}"]) == 0
    other = load_file(replaced / "other" / "model.safetensors")
    assert load_file(merged / "model.safetensors")["model.embed_tokens.weight"].equal(
        other["model.embed_tokens.weight"]
    )
    card = (merged / "README.md").read_text()
    assert f"- accepted: base: {CHANGED}" in card and "| eval/loss |" not in card
    assert command_here(["evaluate", str(run_dir), "accept=[base]", f"to={tmp_path / 'evaluated'}", "--json"]) == 0
    model = json.loads((tmp_path / "evaluated" / "evaluation.json").read_text())["model"]
    assert model["accepted"] == [f"base: {CHANGED}"] and model["artefact"] is None
    assert not list(run_dir.glob("reports/*")), "it is no record of the run"
    capsys.readouterr()
    assert command_here(["export", str(run_dir), "accept=[code]", f"to={tmp_path / 'x'}"]) == 64
    assert "accept=[code]: must be one of base, data" in capsys.readouterr().err


def test_base_that_is_cut_off_or_gone_is_named(trained, tmp_path, capsys):
    weights = trained / "base" / "model.safetensors"
    original = weights.read_bytes()
    try:
        weights.write_bytes(original[:3000])
        assert command_here(["export", str(trained / "run"), f"to={tmp_path / 'x'}"]) == 64
        said = capsys.readouterr().err
        assert f"base/model.safetensors: has 3000 bytes, and had {len(original)}" in said and "space" not in said
        weights.unlink()
        assert command_here(["export", str(trained / "run"), f"to={tmp_path / 'x'}"]) == 64
        assert "base/model.safetensors: is missing" in capsys.readouterr().err
    finally:
        weights.write_bytes(original)
    (trained / "base").rename(trained / "moved")
    try:
        assert command_here(["export", str(trained / "run"), f"to={tmp_path / 'x'}"]) == 64
        said = capsys.readouterr().err
        assert f"model.path={trained / 'base'}: not a model directory" in said and "accept" not in said
    finally:
        (trained / "moved").rename(trained / "base")


def test_base_of_a_run_whose_identity_cannot_be_read_is_unknown(trained, tmp_path, capsys):
    record = trained / "run" / "identity.json"
    original = record.read_bytes()
    try:
        record.write_bytes(original[:40])
        assert command_here(["export", str(trained / "run"), f"to={tmp_path / 'x'}"]) == 64
        assert "which base the run was trained on" in capsys.readouterr().err
        assert command_here(["export", str(trained / "run"), "accept=[base]", f"to={tmp_path / 'x'}"]) == 0
    finally:
        record.write_bytes(original)


def test_base_is_the_same_beside_files_that_no_loader_reads(trained, tmp_path):
    """Another program fetches more of the same model into the cache of the hub, or another machine has less of it."""
    more = trained / "base" / "preprocessor_config.json"
    more.write_text("{}")
    try:
        assert command_here(["export", str(trained / "run"), f"to={tmp_path / 'adapter'}"]) == 0
    finally:
        more.unlink()
    digests = {"config.json": "1:a", "model-1.safetensors": "9:b", "consolidated.safetensors": "9:c"}
    assert digests_of_loaded_files(digests, tmp_path) == digests  # without an index every file of weights is read
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"norm.weight": "model-1.safetensors"}}')
    assert digests_of_loaded_files(digests, tmp_path) == {"config.json": "1:a", "model-1.safetensors": "9:b"}


def test_an_adapter_that_a_run_went_on_from_may_be_written_again(trained, tmp_path, capsys):
    """The checkpoint has all of it. Only what asks the model before training needs the old one."""
    first, second = tmp_path / "first", tmp_path / "second"
    for seed, folder in enumerate((first, second)):
        words = [str(trained / "run"), f"to={folder}"]
        assert command_here(["export", *words]) == 0
        weights = load_file(folder / "adapter_model.safetensors")
        save_file({name: tensor + seed for name, tensor in weights.items()}, folder / "adapter_model.safetensors")
    run_dir = train(trained, "gone_on", "tuning=lora", f"tuning.from={first}")
    exported = load_file(run_dir / "export" / "adapter_model.safetensors")
    shutil.copy(second / "adapter_model.safetensors", first)

    assert command_here(["export", str(run_dir), f"to={tmp_path / 'again'}"]) == 0
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(again[name].equal(tensor) for name, tensor in exported.items())
    capsys.readouterr()
    assert command_here(["evaluate", str(run_dir), "against=base", f"to={tmp_path / 'against'}"]) == 64
    assert "tuning.from/adapter_model.safetensors: has other content" in capsys.readouterr().err


def test_base_at_a_new_hub_commit_replaces_one_that_this_machine_lacks(tmp_path, monkeypatch):
    """Its weights mostly are the same, and the digests say whether."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--base"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("b" * 40)
    for commit in ("a" * 40, "b" * 40):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
    model = ModelConfig(path="owner/base")

    assert pin_model_to_commit(model, "a" * 40).revision == "a" * 40
    assert pin_model_to_commit(model, "c" * 40).revision is None
    shutil.rmtree(repository / "snapshots" / ("a" * 40))
    assert pin_model_to_commit(replace(model, revision="a" * 40), "a" * 40).revision is None
    assert pin_model_to_commit(replace(model, download=True), "a" * 40).revision == "a" * 40
    assert pin_model_to_commit(replace(model, trust_remote_code=True), "a" * 40).revision == "a" * 40


@pytest.mark.parametrize("tuning", [["tuning=lora", "export.merge=true"], ["tuning=lora", "tuning.init=pissa"]])
def test_a_base_that_changes_while_a_run_trains_is_not_exported(trained, tmp_path, capsys, monkeypatch, tuning):
    """The run is done. Its checkpoint becomes the export as soon as the base is back."""
    from trainer.session import result

    shutil.copytree(trained / "base", tmp_path / "base")
    for name in ("train.jsonl", "eval.jsonl"):
        shutil.copy(trained / name, tmp_path / name)
    weights = tmp_path / "base" / "model.safetensors"
    model_facts = result.model_facts

    def after_the_last_step(*arguments):
        shutil.copy(trained / "other" / "model.safetensors", weights)
        return model_facts(*arguments)

    monkeypatch.setattr(result, "model_facts", after_the_last_step)
    run_dir = train(tmp_path, "run", "export.at_end=true", *tuning)
    said = capsys.readouterr().out
    assert "not exported: the base has changed" in said and CHANGED in said
    assert f"shardtune export {run_dir}" in said
    assert not (run_dir / "export").exists()
    assert json.loads((run_dir / "status.json").read_text())["state"] == "done"
    assert json.loads((run_dir / "run.json").read_text())["not_exported"] == [CHANGED]
    shutil.copy(trained / "base" / "model.safetensors", weights)
    assert command_here(["export", str(run_dir), "--verify"]) == 0


def test_base_that_an_adapter_was_trained_on_is_compared(trained, tmp_path, capsys):
    """Whoever gives it another one is told, whether it is served, talked with or evaluated."""
    base, adapter, weights = trained / "base", tmp_path / "adapter", trained / "base" / "model.safetensors"
    original = weights.read_bytes()
    assert command_here(["export", str(trained / "run"), f"to={adapter}"]) == 0
    task = ["evaluation.tasks.loss.kind=loss", f"evaluation.tasks.loss.path={trained / 'eval.jsonl'}"]
    task += ["evaluation.resamples=20", "run.device=cpu", f"to={tmp_path / 'e'}"]
    verbs = [
        ["serve", str(adapter), "--dry-run"],
        ["chat", str(adapter), "a b", "max_tokens=1", "device=cpu"],
        ["evaluate", f"model.path={base}", f"adapter={adapter}", *task],
    ]
    try:
        shutil.copy(trained / "other" / "model.safetensors", weights)
        for words in verbs:
            capsys.readouterr()
            assert command_here(words) == 64, words
            said = capsys.readouterr().err
            assert "was trained on another base" in said and "model.safetensors: has other content" in said, words
            assert command_here([*words, "accept=[base]"]) == 0, words
    finally:
        weights.write_bytes(original)
    for words in verbs:
        assert command_here(words) == 0, words
    (adapter / "base_files.json").unlink()  # as of an export that an earlier version wrote
    shutil.copy(trained / "other" / "model.safetensors", weights)
    try:
        assert command_here(verbs[0]) == 0
    finally:
        weights.write_bytes(original)


def test_base_hub_id_is_read_at_the_commit_that_the_run_resolved(trained, tmp_path, monkeypatch):
    """Meanwhile `main` moved on, and both commits lie in the cache of this machine."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repository = cache / "models--me--tiny"
    first, second = "1" * 40, "2" * 40
    for commit, directory in ((first, "base"), (second, "other")):
        shutil.copytree(trained / directory, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(first, encoding="utf-8")
    run_dir = train(trained, tmp_path / "run", "tuning=lora", "export.at_end=false", "model.path=me/tiny")
    assert json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["base_commit"] == first
    (repository / "refs" / "main").write_text(second, encoding="utf-8")
    assert command_here(["export", str(run_dir), "merge=true", f"to={tmp_path / 'merged'}"]) == 0
    embeddings = load_file(tmp_path / "merged" / "model.safetensors")["model.embed_tokens.weight"]
    assert embeddings.equal(load_file(trained / "base" / "model.safetensors")["model.embed_tokens.weight"])
