"""A run is never silently another: what decides the result is compared when it is gone on with, and refused by name."""

import hashlib
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from strategies.errors import ConfigError, ShardtuneError, StorageError
from strategies.file_fingerprints import BLOCK_BYTES, MAX_BLOCKS, sampled_digest
from strategies.settings import FREE
from tests.helpers.speed import seconds
from tests.helpers.tokenizers import write_chat_data
from trainer.config.resuming import KINDS_OF_CHANGE, flatten_settings, settings_as_dict
from trainer.config.run import RunConfig, RunSettings
from trainer.config.tree import change_kind_of_setting, metadata_by_key
from trainer.session import identity
from trainer.session.identity import (
    _raise_if_ranks_differ,
    compare_and_write_identity,
    identity_differences,
    source_digest,
)


@pytest.fixture(scope="module")
def own(site):
    """A model and data that may be changed, and a run on them that stopped after four of its steps."""
    model, data = site.root / "own-model", site.root / "own.jsonl"
    shutil.copytree(site.model, model)
    write_chat_data(data, 24)
    words = [f"model.path={model}", f"data.path={data}", "budget.steps=4"]
    code, said = site.run_here("whole", *words)
    assert code == 0, said
    return words


def replace_weights(model):
    path = model / "model.safetensors"
    tensors = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def test_identity_of_another_run_is_refused_with_the_differences_or_accepted_and_recorded(runs, own):
    state = f"run.resume={runs.root / 'whole' / 'checkpoints' / 'step-000004'}"
    longer = [word for word in own if not word.startswith("budget")] + ["budget.steps=6", state]
    # Where and how fast it is computed, and how long, may change.
    code, said = runs.run_here("elsewhere", *longer, "strategy=fsdp2", "launcher.processes=2", "batch.micro=1")
    assert code == 0, said
    assert "resumed from step-000004" in said

    changed = [*longer, "run.seed=7", "batch.global=4", "tuning.alpha=3"]
    write_chat_data(runs.root / "own.jsonl", 20, seed=5)
    replace_weights(runs.root / "own-model")
    code, said = runs.run_here("another", *changed)
    assert code == 64, said
    for line in (
        "order: run.seed: 42 there, 7 here",
        "order: batch.global: 8 there, 4 here",
        "tuning: tuning.alpha: ",
        "data: documents: 24 there, 20 here",
        "base: base/model.safetensors: ",
        "run.accept=[data,base,tuning,order]",
    ):
        assert line in said
    assert "Traceback" not in said and "1 problem\n" in said
    code, said = runs.run_here("another", *changed, "run.accept=[data,base,tuning,order]")
    assert code == 0, said
    assert "accepted: order: run.seed: 42 there, 7 here" in said
    accepted = json.loads((runs.root / "another" / "run.json").read_text())["accepted"]
    assert any(line.startswith("base: base/model.safetensors: ") for line in accepted)
    # A later start has it on record too, with nothing left to accept.
    (runs.root / "another" / "status.json").unlink()  # as of a run that was killed before it said that it was done
    later = [word for word in changed if not word.startswith("run.resume")]
    code, said = runs.run("another", *later, "run.resume=auto")
    assert code == 0, said
    assert "resumed from step-000006" in said and "accepted: order: run.seed: 42 there, 7 here" in said
    assert json.loads((runs.root / "another" / "run.json").read_text())["accepted"] == accepted


def test_identity_check_finds_a_flipped_bit_in_prepared_tokens_before_training(runs):
    words = ["budget.steps=2", f"data.cache_dir={runs.root / 'flipped'}"]
    code, said = runs.run_here("before", *words)
    assert code == 0, said
    [tokens] = (runs.root / "flipped").glob("*/tokens.bin")
    content = bytearray(tokens.read_bytes())
    content[len(content) // 2] ^= 1
    tokens.write_bytes(content)
    code, said = runs.run_here("after", *words)
    assert (code, "tokens.bin: does not have the bytes that were prepared" in said) == (65, True), said


def test_identity_of_every_settings_group_says_what_may_change_at_a_resume():
    silent = [key for key, traits in metadata_by_key().items() if "." not in key and traits.resume is None]
    assert silent == [], "say at these fields of RunConfig which kind of change another value is, or FREE: resume=..."
    kinds = {key: change_kind_of_setting(key) for key in flatten_settings(settings_as_dict(RunConfig()))}
    assert set(kinds.values()) - {None} <= set(KINDS_OF_CHANGE)
    assert {traits.resume for traits in metadata_by_key().values()} - {None, FREE} <= set(KINDS_OF_CHANGE)
    assert (
        change_kind_of_setting("data.workers") is None
        and change_kind_of_setting("data.mixing.over") == "order"
        and change_kind_of_setting("data.checks") == "data"
    )
    assert kinds["run.seed"] == "order" and kinds["run.dir"] is None
    with pytest.raises(KeyError):
        change_kind_of_setting("invented.setting")


def test_identity_of_ranks_with_another_version_or_clone_is_named():
    here = {kind: {} for kind in KINDS_OF_CHANGE} | {"versions": {"torch": "2.13"}, "base": {"model": "1"}}
    here["code"] = {"source": "1"}
    other = here | {"versions": {"torch": "2.12"}, "base": {}, "code": {}}  # only one rank a host reads files
    with pytest.raises(ConfigError) as caught:
        _raise_if_ranks_differ([("a", here), ("b", other)], [])
    [problem] = caught.value.problems
    assert problem.startswith("rank 1 on b would train something else than rank 0 on a")
    assert problem.endswith("\n    versions: torch: 2.13 there, 2.12 here")
    _raise_if_ranks_differ([("a", here), ("b", other)], ["versions"])
    with pytest.raises(ConfigError, match="code: source: 1 there, 2 here"):
        _raise_if_ranks_differ([("a", here), ("b", here | {"code": {"source": "2"}})], [])
    assert identity_differences(here, here, accept=[]) == []


def test_identity_of_changed_data_is_refused_in_words_and_with_short_digests(tmp_path, monkeypatch):
    recorded = {kind: {} for kind in KINDS_OF_CHANGE} | {"data": {"fingerprint": f"{'a' * 64}/train", "documents": 3}}
    current = recorded | {"data": {"fingerprint": f"{'b' * 64}/train", "documents": 3}}
    (tmp_path / "identity.json").write_text(json.dumps(recorded))
    monkeypatch.setattr(identity, "_run_dir_of_checkpoint", lambda config, run_dir: run_dir)
    monkeypatch.setattr(identity, "_with_defaults_of_new_settings", lambda recorded, defaults: recorded)
    with pytest.raises(ConfigError) as caught:
        identity._compare_with_earlier_start(RunConfig(), current, tmp_path)
    [problem] = caught.value.problems
    refusal, difference = problem.split("\n    ")
    assert f"run.resume=auto: {tmp_path} was trained differently: the prepared data changed since" in refusal
    assert "(there: as it was trained, here: this start)" in refusal and "run.accept=[data]" in refusal
    assert difference.startswith("data: fingerprint of the data files, of the tokenizer")
    assert difference.endswith(f": {'a' * 12}/train there, {'b' * 12}/train here")
    assert set(identity.NAME_BY_KIND) == set(KINDS_OF_CHANGE)
    accepted = RunConfig(run=RunSettings(accept=["data"]))  # the record keeps every character
    assert identity._compare_with_earlier_start(accepted, current, tmp_path) == [
        f"data: fingerprint: {'a' * 64}/train there, {'b' * 64}/train here"
    ]


class TwoRanks:
    """Collectives between two threads, each of which is a rank and has its number in place of a group."""

    def __init__(self, monkeypatch):
        self.barrier, self.values = threading.Barrier(2), [None, None]
        monkeypatch.setattr(dist, "all_gather_object", self.gather)
        monkeypatch.setattr(dist, "broadcast_object_list", lambda box, src, group: self.gather(box, box[0], group))

    def gather(self, box, value, group):
        self.values[group] = value
        self.barrier.wait(seconds(30))
        box[:] = self.values[: len(box)]
        self.barrier.wait(seconds(30))

    def __call__(self, function):
        """What `function` returns or raises on each rank, given its place in the job."""

        def ask(rank):
            runtime = SimpleNamespace(
                rank=rank, world_size=2, local_rank=rank, is_main=rank == 0, simulated=False, control_group=rank
            )
            try:
                return function(runtime)
            except (ShardtuneError, OSError, threading.BrokenBarrierError) as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(ask, range(2)))


@pytest.mark.parametrize(
    ("broken", "kind", "said"),
    [
        ("base", StorageError, "model.safetensors: cannot be read"),
        ("written", StorageError, "cannot write"),
        ("read", ConfigError, "run.accept="),
    ],
)
def test_identity_error_on_rank_0_fails_alike_on_all_ranks(tmp_path, monkeypatch, broken, kind, said):
    def found(*_, reads_files):
        if reads_files and broken == "base":
            raise FileNotFoundError(2, "No such file or directory", "model.safetensors")
        return {kind: {} for kind in KINDS_OF_CHANGE} | {"base": {"model": "1"}, "code": {"source": "1"}}

    monkeypatch.setattr(identity, "run_identity", found)
    monkeypatch.setattr(identity, "_run_dir_of_checkpoint", lambda *_: tmp_path if broken == "read" else None)
    if broken == "written":
        (tmp_path / "identity.json").mkdir()
    errors = TwoRanks(monkeypatch)(lambda runtime: compare_and_write_identity(RunConfig(), None, tmp_path, runtime))
    assert [type(error) for error in errors] == [kind, kind], errors
    assert all(said in str(error) for error in errors)


def test_source_and_base_are_read_once_a_host(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(identity, "_run_dir_of_checkpoint", lambda *_: None)
    monkeypatch.setattr(
        identity, "base_file_digests", lambda *_: read.append("base") or {"base/model.safetensors": "1"}
    )
    monkeypatch.setattr(identity, "source_digest", lambda: read.append("code") or "1")
    data = SimpleNamespace(train=type("Rows", (list,), {"fingerprint": "f"})())
    records = TwoRanks(monkeypatch)(lambda runtime: compare_and_write_identity(RunConfig(), data, tmp_path, runtime))
    assert sorted(read) == ["base", "code"]
    assert records[0] == records[1] and records[0]["identity"]["code"] == {"source": "1"}


@pytest.mark.parametrize("content", ["null", "[]", '{"data": 3}', '{"accepted": 3}', "{", None])
def test_identity_file_that_is_empty_is_refused_or_accepted_as_unknown(tmp_path, monkeypatch, content):
    monkeypatch.setattr(identity, "_run_dir_of_checkpoint", lambda *_: tmp_path)
    if content is not None:
        (tmp_path / "identity.json").write_text(content)
    mine = {kind: {} for kind in KINDS_OF_CHANGE}
    with pytest.raises(ConfigError, match=r"cannot be read .* run.accept=\[unknown\]"):
        identity._compare_with_earlier_start(RunConfig(), mine, tmp_path)
    config = RunConfig(run=RunSettings(accept=["unknown"]))
    assert identity._compare_with_earlier_start(config, mine, tmp_path) == [
        f"unknown: {tmp_path / 'identity.json'} cannot be read"
    ]


def test_identity_digest_depends_on_the_source(tmp_path, monkeypatch):
    nothing = hashlib.sha256().hexdigest()
    assert not nothing.startswith(source_digest()), "no source was read"  # where the module really lies
    (tmp_path / "trainer").mkdir()
    monkeypatch.setattr(identity, "__file__", str(tmp_path / "trainer" / "session" / "identity.py"))
    digests = []
    for text in ("a = 1\n", "a = 2\n", "a = 1\n"):
        (tmp_path / "trainer" / "x.py").write_text(text)
        digests.append(source_digest())
    assert digests[0] == digests[2] != digests[1]


def test_identity_samples_large_files_and_reads_small_ones_completely(tmp_path):
    path = tmp_path / "file"
    small = bytearray(BLOCK_BYTES * MAX_BLOCKS)
    large = bytearray(3 * BLOCK_BYTES * MAX_BLOCKS)
    for content, places in ((small, [0, 77_777, len(small) - 1]), (large, [0, len(large) - 1])):
        path.write_bytes(content)
        whole = sampled_digest(path)
        for place in places:
            content[place] ^= 1
            path.write_bytes(content)
            assert sampled_digest(path) != whole
            content[place] ^= 1
    path.write_bytes(large + b"\0")
    assert sampled_digest(path) != whole


def test_identity_setting_unknown_to_an_earlier_version_counts_as_its_default(monkeypatch):
    """A run of that version goes on, unless the setting now has another value than the default."""
    monkeypatch.setattr(identity, "base_file_digests", lambda config: {})
    config = RunConfig()
    data = SimpleNamespace(train=FakeDocuments())
    today = identity.run_identity(config, data)
    earlier = {kind: dict(values) for kind, values in today.items()}
    del earlier["data"]["data.max_length"]
    del earlier["optimizer"]["optim.weight_decay"]
    assert (
        identity_differences(
            identity._with_defaults_of_new_settings(earlier, identity.default_settings(config)), today, accept=[]
        )
        == []
    )

    config.optim.weight_decay = 0.5
    today = identity.run_identity(config, data)
    changed = identity_differences(
        identity._with_defaults_of_new_settings(earlier, identity.default_settings(config)), today, accept=[]
    )
    assert [str(difference) for difference in changed] == ["optimizer: optim.weight_decay: 0.0 there, 0.5 here"]


class FakeDocuments:
    fingerprint = "0" * 64

    def __len__(self):
        return 3
