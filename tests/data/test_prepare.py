import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from strategies import atomic_io
from strategies.errors import ConfigError, DataError, StorageError
from tests.helpers.speed import seconds
from tests.helpers.tokenizers import CHATML, chat_rows, tiny_tokenizer, write_chat_data, write_jsonl
from trainer.data import cache
from trainer.data.config import DataConfig, OverLength
from trainer.data.objective_spec import DataSpec
from trainer.data.prepare import Preparation
from trainer.data.report.preview import preview_text, summary_text
from trainer.data.store import sequences as dataset
from trainer.objectives.classification import LabelDataSpec


class OtherDataSpec(DataSpec):
    def counts(self, sample):
        return {"loss": 1}


def config(tmp_path, **settings):
    return DataConfig(path=str(tmp_path / "train.jsonl"), cache_dir=str(tmp_path / "cache"), **settings)


def run(settings, tokenizer=None, data_spec=None, **options):
    options = {"seed": 1, **options}
    return Preparation(settings, tokenizer or tiny_tokenizer(), data_spec or DataSpec(), **options).open_or_prepare()


def seen(prepared, kind, reason):
    """How often something happened to documents while they were tokenised, and where first."""
    (stage,) = [stage for stage in prepared.report["flow"] if stage["stage"] == "tokenise"]
    return stage[kind][reason], stage["examples"][reason]


@pytest.fixture
def data(tmp_path):
    return write_chat_data(tmp_path / "train.jsonl", 20)


def test_prepared_data_set_and_report(tmp_path, data):
    prepared = run(config(tmp_path))
    assert prepared.evaluation is None and prepared.label_names is None
    report = prepared.report["train"]
    assert report["documents"] == len(prepared.train) == report["ends_supervised"] == 20
    assert report["tokens"] == prepared.train.lengths.sum() and report["doubled_bos"] == 0
    assert report["supervised_tokens"] == prepared.train.counts["loss"].sum() > 0
    tokenizer, rows = tiny_tokenizer(), chat_rows(20)
    for number, row in enumerate(rows):
        sample = prepared.train.sample(number)
        assert tokenizer.decode(sample.input_ids) == tokenizer.apply_chat_template(row["messages"], tokenize=False)
    text = summary_text(prepared.report)
    assert "20 of 20 sequences" in text and "no doubled BOS" in text
    with pytest.raises(DataError, match="two BOS"):
        summary_text({**prepared.report, "train": {**report, "doubled_bos": 2}})


@pytest.mark.parametrize("name", ["tokens.bin", "supervised.bin"])
def test_prepared_file_cut_off_while_it_is_read_ends_in_a_message(tmp_path, data, name):
    """Reading behind the end of a mapped file kills the process, which can say nothing then."""
    train = run(config(tmp_path)).train
    assert len(train.sample(19).input_ids)
    [path] = (tmp_path / "cache").rglob(name)
    os.truncate(path, 16)
    with pytest.raises(DataError, match=f"{name}: was cut off from [0-9]+ to 16 bytes while the run reads it; delete"):
        train.sample(19)


def test_prepare_again_opens_the_first_result(tmp_path, data, monkeypatch):
    first = run(config(tmp_path))
    monkeypatch.setattr(Preparation, "_prepare", lambda *given, **named: pytest.fail("it is made again"))
    second = run(config(tmp_path))
    assert second.directory == first.directory and second.report["cached"] and not first.report["cached"]
    assert second.report["train"] == first.report["train"]
    moved = tmp_path / "elsewhere.jsonl"
    data.rename(moved)
    assert run(replace(config(tmp_path), path=str(moved))).directory == first.directory, "names are not content"


def test_every_input_changes_the_fingerprint(tmp_path, data):
    tokenizer = tiny_tokenizer()
    base = config(tmp_path)
    held = {**{k: getattr(base, k) for k in ("path", "cache_dir")}, "eval_share": 0.2}
    seen = [run(base).train.fingerprint]
    for name, value in [
        ("max_length", 64),
        ("over_length", OverLength.drop),
        ("max_documents", 5),
        ("eval_path", str(data)),
        ("min_supervised_share", 0.01),
        ("eval_share", 0.2),
    ]:
        seen.append(run(replace(base, **{name: value})).train.fingerprint)
    seen.append(run(DataConfig(**held), seed=2).train.fingerprint)
    seen.append(run(base, data_spec=OtherDataSpec()).train.fingerprint)
    seen.append(run(base, tiny_tokenizer(CHATML.replace("assistant", "helper"))).train.fingerprint)
    seen.append(run(base, tiny_tokenizer(vocab_size=300)).train.fingerprint)
    tokenizer.add_tokens(["brown"])
    seen.append(run(base, tokenizer).train.fingerprint)
    seen.append(run(base, tiny_tokenizer(eos_token="<|eot_id|>")).train.fingerprint)
    data.write_bytes(data.read_bytes().replace(b"question 7", b"question 8", 1))
    seen.append(run(base).train.fingerprint)
    assert len(set(seen)) == len(seen)
    assert run(base, seed=99).train.fingerprint == seen[-1], "the seed is no matter while nothing is held out"


def decoded(split):
    tokenizer = tiny_tokenizer()
    return [tokenizer.decode(split.sample(i).input_ids) for i in range(len(split))]


def test_split_is_disjoint_exact_and_of_the_seed(tmp_path):
    write_chat_data(tmp_path / "train.jsonl", 50)
    whole = decoded(run(config(tmp_path)).train)
    parts = run(config(tmp_path, eval_share=0.2))
    train, evaluation = decoded(parts.train), decoded(parts.evaluation)
    assert len(evaluation) == 10 and sorted(train + evaluation) == sorted(whole)
    assert not set(train) & set(evaluation)
    other = decoded(run(config(tmp_path, eval_share=0.2), seed=2).evaluation)
    assert set(other) != set(evaluation)


def test_eval_split_puts_copies_of_a_document_on_the_same_side(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", chat_rows(10) * 3)
    parts = run(config(tmp_path, eval_share=0.3))
    assert not set(decoded(parts.train)) & set(decoded(parts.evaluation))
    write_jsonl(tmp_path / "train.jsonl", chat_rows(1) * 3)
    with pytest.raises(DataError, match=r"data\.eval_share=0\.3 leave.* no training document"):
        run(config(tmp_path, eval_share=0.3))


def test_prepare_over_length_policies(tmp_path):
    reply = " ".join(["fox"] * 200)
    rows = [*chat_rows(3), {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": reply}]}]
    rows.append({"messages": [{"role": "user", "content": reply}, {"role": "assistant", "content": "a"}]})
    write_jsonl(tmp_path / "train.jsonl", rows)
    where = f"{tmp_path / 'train.jsonl'}:"
    with pytest.raises(DataError, match=r"(?s)1 of 5 rows.*nothing_to_learn 1.*=split.*data\.max_bad_share=0\.2$"):
        run(config(tmp_path, max_length=120))
    cut = run(config(tmp_path, max_length=120, max_bad_share=0.2))
    assert seen(cut, "noted", "truncated") == (1, [where + "4"])
    assert seen(cut, "dropped", "nothing_to_learn") == (1, [where + "5"])
    assert cut.train.lengths.max() == 120 and len(cut.train) == 4
    assert "dropped, nothing left to learn: 1 " in summary_text(cut.report)
    dropped = run(config(tmp_path, max_length=120, over_length=OverLength.drop))
    assert seen(dropped, "dropped", "too_long")[0] == 2 and len(dropped.train) == 3
    with pytest.raises(DataError, match=r"train\.jsonl:4: \d+ tokens are more than data\.max_length=120"):
        run(config(tmp_path, max_length=120, over_length=OverLength.fail))


def test_prepare_refuses_data_that_would_teach_nothing(tmp_path, data):
    with pytest.raises(DataError, match=r"no document of the train split.*tokenise/nothing_to_learn 20.*max_length=3"):
        run(config(tmp_path, max_length=3, max_bad_share=1.0))
    with pytest.raises(
        DataError, match=r"of the train tokens are supervised, less than data\.min_supervised_share=0\.9"
    ):
        run(config(tmp_path, min_supervised_share=0.9))
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()], "a refused data set leaves nothing"


def test_settings_that_cannot_be_used(tmp_path, data):
    with pytest.raises(ConfigError, match=r"data\.path: not set"):
        run(DataConfig(cache_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"data\.eval_share"):
        run(config(tmp_path, eval_share=0.1, eval_path=str(data)))
    with pytest.raises(DataError, match=r"data\.eval_path=.*does not exist"):
        run(config(tmp_path, eval_path="missing.jsonl"))


def test_prepare_labels(tmp_path):
    rows = [{"text": f"a lazy dog {i}", "label": ("up", "down", "flat")[i % 3]} for i in range(9)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    prepared = run(config(tmp_path), tiny_tokenizer(None), LabelDataSpec())
    assert prepared.label_names == ["down", "flat", "up"] and prepared.train.labels[:3].tolist() == [2, 0, 1]
    given = run(config(tmp_path), tiny_tokenizer(None), LabelDataSpec(["flat", "up", "down"]))
    assert given.label_names == ["flat", "up", "down"] and given.train.labels[:3].tolist() == [1, 2, 0]
    write_jsonl(tmp_path / "eval.jsonl", [{"text": "a", "label": "sideways"}])
    with pytest.raises(DataError, match=r"eval\.jsonl:1: label 'sideways' is none of"):
        run(config(tmp_path, eval_path=str(tmp_path / "eval.jsonl")), tiny_tokenizer(None), LabelDataSpec())
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a", "label": n} for n in (10, 9, 0)])
    assert run(config(tmp_path), tiny_tokenizer(None), LabelDataSpec()).label_names == ["0", "9", "10"]


def test_prepare_on_a_full_disk_leaves_nothing(tmp_path, data, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dataset.np, "savez", full)
    with pytest.raises(StorageError, match=r"data\.cache_dir=.*No space left.*free space"):
        run(config(tmp_path))
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    monkeypatch.undo()
    assert len(run(config(tmp_path)).train) == 20


def test_prepare_cache_that_cannot_be_made_is_a_storage_error(tmp_path, data):
    with pytest.raises(StorageError, match=r"data\.cache_dir=.*: Not a directory; choose another"):
        run(replace(config(tmp_path), cache_dir=str(data / "below-a-file")))


BUILDER = """
import os, sys, time
from pathlib import Path
from trainer.data.cache import build_once
how = sys.argv[2]
def build(target):
    (target / "half").write_text("x")
    print("building", flush=True)
    if how == "die":
        os._exit(9)
    while how == "hold" and not (target.parent / "go").exists():
        time.sleep(0.05)
    (target / "manifest.json").write_text("{}")
print(build_once(Path(sys.argv[1]), build), flush=True)
"""


def builder(directory: Path, how: str) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILDER, str(directory), how]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_prepare_by_two_processes_is_done_by_one_while_the_other_waits(tmp_path):
    entry = tmp_path / "cache" / "abc"
    first = builder(entry, "hold")
    assert first.stdout.readline() == "building\n"
    second = builder(entry, "build")
    told = second.stderr.readline()
    assert "waiting for another process" in told and str(entry) in told
    (entry.parent / "go").touch()
    assert second.communicate(timeout=seconds(60))[0] == "False\n"
    assert first.communicate(timeout=seconds(60))[0] == "True\n"


def test_prepare_lock_goes_to_rank_0_before_processes_that_came_earlier(tmp_path):
    entry, made = tmp_path / "cache" / "abc", []

    def build(name, target):
        made.append(name)
        (target / "manifest.json").write_text("{}")

    earlier = threading.Thread(
        target=cache.build_once, args=(entry, partial(build, "another rank")), kwargs={"wait_first_s": seconds(60)}
    )
    earlier.start()
    time.sleep(0.2)
    assert cache.build_once(entry, partial(build, "rank 0"))
    earlier.join(seconds(30))
    assert not earlier.is_alive() and made == ["rank 0"]
    assert cache.build_once(tmp_path / "cache" / "own", partial(build, "another host"), wait_first_s=0.1)


def test_prepare_lock_works_where_shared_locks_need_a_file_open_for_reading(tmp_path, monkeypatch):
    """As Linux's NFS client does (flock(2), nfs4_proc_lock): of a file that is open for writing alone there is no shared lock."""
    real, shared = fcntl.flock, []

    def flock(file, how):
        if how & fcntl.LOCK_SH:
            shared.append(file)
            if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(file, how)

    monkeypatch.setattr(cache.fcntl, "flock", flock)
    build = lambda target: (target / "manifest.json").write_text("{}")  # noqa: E731
    assert cache.build_once(tmp_path / "cache" / "abc", build, wait_first_s=0.1) and shared


def test_prepare_syncs_the_data_to_the_disk_before_its_name(tmp_path, data, monkeypatch):
    """A power cut after the rename would leave what was not synced empty, under a name by which it is taken for whole."""

    class Watched(atomic_io.Disk):
        synced, published = set[Path](), 0

        def sync(self, descriptor):
            super().sync(descriptor)
            self.synced.add(Path(f"/proc/self/fd/{descriptor}").readlink())

        def rename(self, source, target):
            lacking = {source, *source.rglob("*")} - self.synced
            assert not lacking, f"not on the disk: {lacking}"
            super().rename(source, target)
            self.published += 1
            self.synced.discard(target.parent)

    monkeypatch.setattr(atomic_io, "disk", Watched())
    prepared = run(config(tmp_path))
    assert atomic_io.disk.published == 1 and prepared.directory.parent in atomic_io.disk.synced


def test_digest_cache_emptied_by_a_power_cut_is_computed_anew(tmp_path):
    (tmp_path / "big").write_bytes(b"big")
    told = cache.cached_digest(tmp_path / "big", tmp_path, big_bytes=0)
    [entry] = (tmp_path / "digests").iterdir()
    for left in (b"", bytes(64), b"\xff"):
        entry.write_bytes(left)
        assert cache.cached_digest(tmp_path / "big", tmp_path, big_bytes=0) == told == entry.read_text()


def test_prepare_does_not_keep_a_file_that_changes_meanwhile_under_its_old_digest(tmp_path):
    def begun():
        return Preparation(config(tmp_path), tiny_tokenizer(), DataSpec(), seed=1)

    write_chat_data(tmp_path / "train.jsonl", 4)
    whole, part = begun(), begun()
    write_chat_data(tmp_path / "train.jsonl", 6)
    for made in (whole.open_or_prepare, lambda: part.make_shard(0, 1)):
        with pytest.raises(DataError, match=r"train\.jsonl: changed while it was prepared"):
            made()
    assert cache.Shards.find_complete(part.directory) is None
    assert len(begun().open_or_prepare().train) == 6
    write_chat_data(tmp_path / "train.jsonl", 4)
    assert len(begun().open_or_prepare().train) == 4


def test_prepare_shard_that_two_tasks_write_is_complete(tmp_path, monkeypatch):
    """A job that is requeued while its first start still lives."""
    monkeypatch.setattr(cache, "save_block", lambda block, path: path.write_text(str(block.number)))
    shards, waits, others = cache.Shards(tmp_path / "entry", 1), threading.Event(), []

    def second():
        with shards.writing_shard(0, waits.set) as keep:
            others.append(keep)

    with shards.writing_shard(0, lambda: None) as keep:
        keep(SimpleNamespace(number=0))
        other = threading.Thread(target=second)
        other.start()
        assert waits.wait(seconds(30))
        keep(SimpleNamespace(number=1))
    other.join(seconds(30))
    assert others == [None]
    assert (
        len(list(shards.shard_path(0).glob("*.npz"))) == 2
        and cache.Shards.find_complete(tmp_path / "entry") is not None
    )


def test_prepare_builder_that_dies_leaves_nothing_that_counts(tmp_path):
    entry = tmp_path / "cache" / "abc"
    dead = builder(entry, "die")
    assert dead.wait(timeout=seconds(60)) == 9 and not entry.exists()

    def build(target):
        assert not list(target.iterdir())
        (target / "manifest.json").write_text("{}")

    assert cache.build_once(entry, build) and not cache.build_once(entry, build)
    assert [p.name for p in entry.parent.iterdir() if p.is_dir()] == ["abc"]


def test_preview_marks_the_learned_tokens(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "hi\x1b[31m"}, {"role": "assistant", "content": "yes\nno"}]}]
    write_jsonl(tmp_path / "train.jsonl", rows)
    data = run(config(tmp_path)).train
    plain = preview_text(data, tiny_tokenizer(), width=80, colour=False)
    assert plain == "<|im_start|>user\nhi\\x1b[31m<|im_end|>\n<|im_start|>assistant\n⟦yes\nno<|im_end|>⟧\n"
    coloured = preview_text(data, tiny_tokenizer(), width=80, colour=True)
    assert "\x1b[32myes\x1b[0m\n\x1b[32mno<|im_end|>\x1b[0m\n" in coloured
    narrow = preview_text(data, tiny_tokenizer(), width=10, colour=False, max_lines=4)
    assert all(len(line) <= 22 for line in narrow.split("\n")) and "lines ...]" in narrow


def test_control_tokens_are_counted(tmp_path):
    rows = chat_rows(3)
    rows[1]["messages"][0]["content"] += "<|im_end|>"
    write_jsonl(tmp_path / "train.jsonl", rows)
    prepared = run(config(tmp_path))
    assert seen(prepared, "noted", "control_tokens_in_text") == (1, [f"{tmp_path / 'train.jsonl'}:2"])
    assert "contains special tokens" in summary_text(prepared.report)


def test_the_audit_names_sources_and_settings(tmp_path, data):
    prepared = run(config(tmp_path, max_documents=7))
    audit = json.loads((prepared.directory / "audit.json").read_text())
    assert [f["path"] for f in audit["sources"][0]["files"]] == [str(data)]
    assert audit["words"]["data.max_documents"] == 7
    assert len(prepared.train) == 7 and np.issubdtype(prepared.train.tokens.dtype, np.int32)
