"""Preparation as a whole: nothing lost, nothing twice, the same bytes however many processes do it."""

import gc
import gzip
import json
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strategies import runtime
from strategies.errors import ConfigError, DataError, Preempted, ShardtuneError
from tests.data.broken_files import CASES
from tests.helpers.covering import examples
from tests.helpers.tokenizers import chat_rows, tiny_tokenizer, write_jsonl
from trainer.data import prepare as module
from trainer.data.batches.mixing import build_order
from trainer.data.config import (
    BalanceBy,
    BalanceConfig,
    BalanceTarget,
    DataConfig,
    DecontaminationConfig,
    DecontaminationPolicy,
    DuplicatePolicy,
    DuplicatesConfig,
    LeakageConfig,
    LeakagePolicy,
    OverLength,
    PrivacyConfig,
    PrivacyMode,
    SourceConfig,
)
from trainer.data.objective_spec import DataSpec
from trainer.data.prepare import Preparation
from trainer.data.report.preview import summary_text
from trainer.data.store.documents import DocumentTable
from trainer.objectives.classification import LabelDataSpec
from trainer.objectives.sft import SftDataSpec


def preparation(config, tokenizer=None, data_spec=None, **options):
    return Preparation(config, tokenizer or tiny_tokenizer(), data_spec or DataSpec(), **{"seed": 1, **options})


def run(config, tokenizer=None, data_spec=None, **options):
    return preparation(config, tokenizer, data_spec, **options).open_or_prepare()


@pytest.fixture
def config(tmp_path):
    return DataConfig(path=str(tmp_path / "train.jsonl"), cache_dir=str(tmp_path / "cache"))


def mixed_rows(num):
    """Conversations with copies, mails, bad rows and long ones among them."""
    rows = chat_rows(num)
    for number in range(0, num, 7):
        rows[number] = rows[(number * 3) % num]
    for number in range(3, num, 11):
        rows[number]["messages"][0]["content"] += f" write to jane{number}@example.org"
    return rows


def content(directory):
    """Every byte that training or a reader would see; what says when it was made is left out."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.suffix in (".bin", ".npy", ".arrow", ".jsonl"):
            found[str(path.relative_to(directory))] = path.read_bytes()
    found["columns"] = {name: column.tolist() for name, column in np.load(directory / "columns.npz").items()}
    audit = json.loads((directory / "audit.json").read_text())
    found["audit"] = {key: value for key, value in audit.items() if key not in ("created", "words")}
    return found


def test_pipeline_makes_the_same_data_set_for_any_workers_and_shards(tmp_path, config, monkeypatch):
    write_jsonl(tmp_path / "train.jsonl", [*mixed_rows(1500), {"messages": []}, {"text": "not a chat"}])
    monkeypatch.setattr(module, "SMALL_INPUT_BYTES", 0)
    config = replace(
        config,
        max_bad_share=0.1,
        eval_share=0.1,
        duplicates=DuplicatesConfig(exact=DuplicatePolicy.drop, near=DuplicatePolicy.report),
        privacy=PrivacyConfig(mode=PrivacyMode.redact),
    )
    alone = run(replace(config, workers=1))
    expected = content(alone.directory)
    assert expected["audit"]["privacy"]["types"]["EMAIL"]
    two = run(replace(config, workers=2, cache_dir=str(tmp_path / "two")))
    assert content(two.directory) == expected
    sharded = replace(config, workers=1, cache_dir=str(tmp_path / "sharded"))
    for number in (2, 0):
        preparation(sharded).make_shard(number, 3)
    with pytest.raises(DataError, match=r"shards 1 of 3 are missing; run them"):
        run(sharded)
    preparation(sharded).make_shard(1, 3)
    monkeypatch.setattr(module, "row_ranges", None)  # nothing is read again
    merged = run(sharded)
    assert content(merged.directory) == expected
    assert not list((tmp_path / "sharded").glob(".*.shards"))


def test_pipeline_takes_the_cores_that_a_cgroup_allows(tmp_path, config, monkeypatch):
    write_jsonl(tmp_path / "train.jsonl", mixed_rows(60))
    monkeypatch.setattr(module, "SMALL_INPUT_BYTES", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(runtime, "_texts_in_own_cgroups", lambda name: ["300000 100000"])  # cpu.max: three cores
    pools = []

    def record(make_block, ranges, *, workers, while_waiting):
        pools.append(workers)
        return map(make_block, ranges)

    monkeypatch.setattr(module, "ordered_map", record)
    run(replace(config, workers=0))
    assert pools == [3]


def test_pipeline_rows_in_are_rows_kept_and_rows_dropped(tmp_path, config):
    rows = [*mixed_rows(60), {"messages": [{"role": "user", "content": "x"}]}]
    write_jsonl(tmp_path / "train.jsonl", rows)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"messages": oops}\n\n')
    near = DuplicatesConfig(exact=DuplicatePolicy.drop)
    prepared = run(replace(config, max_bad_share=0.1, duplicates=near, max_length=60, over_length=OverLength.drop))
    told = prepared.report["conserved"]
    dropped = [json.loads(line) for line in (prepared.directory / "dropped.jsonl").open()]
    assert told["rows_in"] == 62 == told["kept"] + len(dropped) and told["dropped"] == len(dropped)
    assert {d["reason"] for d in dropped} == {"not_json", "no_assistant_turn", "too_long", "exact"}
    quarantined = [json.loads(line) for line in (prepared.directory / "quarantine.jsonl").open()]
    assert [(q["line"], q["reason"]) for q in quarantined] == [(61, "no_assistant_turn"), (62, "not_json")]
    assert quarantined[1]["excerpt"] == '{"messages": oops}'
    assert told["kept"] == len(prepared.train)


def test_pipeline_fails_with_too_many_bad_rows_and_lists_them_all(tmp_path, config):
    write_jsonl(tmp_path / "train.jsonl", [*chat_rows(8), {"messages": 5}, {"messages": 6}])
    with pytest.raises(DataError, match=r"2 of 10 rows.*data\.max_bad_share=0\.1.*\n.*train\.jsonl:9: ") as caught:
        run(replace(config, max_bad_share=0.1))
    listed = next((tmp_path / "cache" / "rejected").iterdir())
    assert str(listed) in str(caught.value)
    assert [json.loads(line)["line"] for line in listed.open()] == [9, 10]
    assert len(run(replace(config, max_bad_share=0.2)).train) == 8


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pipeline_broken_file_is_an_error_or_loses_nothing(tmp_path, config, case):
    path = case.make(tmp_path)
    if case.name == "unreadable" and os.access(path, os.R_OK):
        pytest.skip("this user may read every file")
    try:
        prepared = run(replace(config, path=str(path), max_bad_share=1.0), tiny_tokenizer())
    except ShardtuneError as error:
        assert len(str(error)) < 2000 and not list((tmp_path / "cache").glob("*/manifest.json"))
    else:
        told = prepared.report["conserved"]
        assert told["rows_in"] == told["kept"] + told["dropped"] and told["kept"] > 0


ROWS = st.one_of(
    st.fixed_dictionaries({"prompt": st.text(max_size=30), "completion": st.text(max_size=30)}),
    st.dictionaries(st.sampled_from(["prompt", "completion", "text", "x"]), st.none() | st.integers() | st.text()),
    st.lists(st.integers(), max_size=2),
)


@settings(max_examples=examples(25), deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(ROWS, min_size=1, max_size=12))
def test_pipeline_accounts_for_all_random_rows(tmp_path_factory, rows):
    root = tmp_path_factory.mktemp("random")
    good = {"prompt": "a", "completion": "b"}
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [good, *rows]))
    prepared = run(DataConfig(path=str(root / "train.jsonl"), cache_dir=str(root / "cache"), max_bad_share=1.0))
    told = prepared.report["conserved"]
    assert told["rows_in"] == len(rows) + 1 == told["kept"] + told["dropped"]
    assert len(np.unique(prepared.train.documents)) == told["kept"]


def test_pipeline_sources_are_named_weighted_and_of_different_kinds(tmp_path, config):
    write_jsonl(tmp_path / "chat.jsonl", chat_rows(20))
    with gzip.open(tmp_path / "general.csv.gz", "wt") as file:
        file.write("question,reply\n" + "".join(f"q{i},r{i}\n" for i in range(10)))
    sources = {
        "chat": SourceConfig(path=str(tmp_path / "chat.jsonl"), weight=0.9, licence="MIT"),
        "general": SourceConfig(
            path=str(tmp_path / "general.csv.gz"), weight=0.1, columns={"prompt": "question", "completion": "reply"}
        ),
    }
    prepared = run(replace(config, path=None, sources=sources))
    assert prepared.train.source_names == ["chat", "general"]
    assert np.bincount(prepared.train.sources).tolist() == [20, 10]
    audit = json.loads((prepared.directory / "audit.json").read_text())
    assert audit["mixing"]["general"]["requested"] == pytest.approx(0.1)
    assert audit["mixing"]["general"]["share_documents"] == pytest.approx(0.1, abs=0.03)
    assert "MIT" in (prepared.directory / "datacard.md").read_text()
    write_jsonl(tmp_path / "eval.jsonl", chat_rows(3, seed=9))
    held_out = replace(config, path=None, sources=sources, eval_path=str(tmp_path / "eval.jsonl"))
    prepared = run(held_out)
    packs, order = build_order(held_out, prepared.train, sequences_per_document=1, seed=0)
    assert packs is None and order.num_units == 22, "held-out rows have no weight and need none"
    assert json.loads((prepared.directory / "audit.json").read_text())["mixing"].keys() == {"chat", "general"}
    with pytest.raises(ConfigError, match=r"data\.sources\.chat\.path"):
        run(replace(config, path=None, sources={"chat": SourceConfig()}))


def texts(prepared, split="train"):
    table = DocumentTable(prepared.directory)
    data = prepared.train if split == "train" else prepared.evaluation
    return ["\n".join(table.document(int(number)).texts()) for number in data.documents]


def test_pipeline_drops_copies_leaks_and_evaluation_texts_where_asked(tmp_path, config):
    passage = " ".join(f"word{i}" for i in range(40))
    rows = [*chat_rows(30), *chat_rows(30)[:5]]
    rows.append({"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": passage}]})
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "eval.jsonl", chat_rows(30)[10:14])
    write_jsonl(tmp_path / "benchmark.jsonl", [{"text": f"intro {passage} outro"}])
    reported = run(replace(config, eval_path=str(tmp_path / "eval.jsonl")))
    assert len(reported.train) == 36
    assert reported.report["duplicates"]["exact"]["documents"] == 5
    assert reported.report["leakage"]["eval"]["train"]["exact"] == 4
    cleaned = run(
        replace(
            config,
            eval_path=str(tmp_path / "eval.jsonl"),
            duplicates=DuplicatesConfig(exact=DuplicatePolicy.drop),
            leakage=LeakageConfig(policy=LeakagePolicy.drop_train),
            decontamination=DecontaminationConfig(
                paths=str(tmp_path / "benchmark.jsonl"), policy=DecontaminationPolicy.drop
            ),
        )
    )
    assert len(cleaned.train) == 30 - 4 and len(cleaned.evaluation) == 4
    assert not any("word7" in text for text in texts(cleaned))
    assert not set(texts(cleaned)) & set(texts(cleaned, "eval"))
    with pytest.raises(DataError, match=r"data\.leakage\.policy=drop_train"):
        run(replace(config, eval_path=str(tmp_path / "eval.jsonl"), leakage=LeakageConfig(policy=LeakagePolicy.fail)))


def test_pipeline_decontaminates_training_documents_only_and_reports_leaks(tmp_path, config):
    rows = [{"text": f"the quick brown fox number {i} jumps over a very lazy dog once more today ok"} for i in range(6)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "eval.jsonl", rows[:2])
    against = DecontaminationConfig(paths=str(tmp_path / "eval.jsonl"), policy=DecontaminationPolicy.drop)
    config = replace(config, eval_path=str(tmp_path / "eval.jsonl"))
    assert "leakage: 2 training documents are in the eval split too" in summary_text(run(config).report)
    prepared = run(replace(config, decontamination=against))
    assert (len(prepared.train), len(prepared.evaluation)) == (4, 2)


def test_pipeline_policy_for_normalized_duplicates_covers_exact_ones(tmp_path, config):
    write_jsonl(tmp_path / "train.jsonl", [*chat_rows(5), *chat_rows(5)[:2]])
    prepared = run(replace(config, duplicates=DuplicatesConfig(normalized=DuplicatePolicy.drop)))
    assert prepared.report["duplicates"]["exact"]["policy"] == "drop" and len(prepared.train) == 5
    assert "kept (data.duplicates" not in summary_text(prepared.report)


def test_pipeline_labels_and_objective_must_agree(tmp_path, config):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    with pytest.raises(DataError, match="objective=classification"):
        run(config, tiny_tokenizer(None), SftDataSpec())
    assert run(config, tiny_tokenizer(None), LabelDataSpec()).label_names == ["x", "y"]
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="needs rows with a text and a label"):
        run(config, tiny_tokenizer(None), LabelDataSpec())


def test_pipeline_removes_personal_data_from_everything_written(tmp_path, config, monkeypatch):
    monkeypatch.setenv("SHARDTUNE_PSEUDONYM_KEY", "0123456789abcdef0123")
    rows = chat_rows(4)
    for number in (0, 2):
        rows[number]["messages"][0]["content"] = "I am at jane.doe@clinic-mail.org, call me"
    write_jsonl(tmp_path / "train.jsonl", rows)
    for mode in (PrivacyMode.redact, PrivacyMode.pseudonymise, PrivacyMode.drop):
        prepared = run(replace(config, privacy=PrivacyConfig(mode=mode)))
        for path in prepared.directory.rglob("*"):
            assert path.is_dir() or b"jane.doe" not in path.read_bytes(), path
        decoded = [tiny_tokenizer().decode(prepared.train.sample(i).input_ids) for i in range(len(prepared.train))]
        assert len(decoded) == (2 if mode is PrivacyMode.drop else 4) and not any("jane" in text for text in decoded)
    with pytest.raises(DataError, match=r"pieces of personal data found, and data.privacy.mode=fail allows none"):
        run(replace(config, privacy=PrivacyConfig(mode=PrivacyMode.fail)))


def test_pipeline_balance_repeats_documents_and_reports_it(tmp_path, config):
    rows = [{"text": f"a lazy dog {i}", "label": "many" if i % 5 else "few"} for i in range(50)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    balance = BalanceConfig(by=BalanceBy.label, target=BalanceTarget.uniform, max_repeats=10)
    prepared = run(replace(config, balance=balance), tiny_tokenizer(None), LabelDataSpec())
    assert prepared.label_names == ["few", "many"]
    shares = np.bincount(prepared.train.labels) / len(prepared.train)
    assert shares == pytest.approx([0.5, 0.5], abs=0.03)
    audit = json.loads((prepared.directory / "audit.json").read_text())
    assert audit["labels"]["before"] == {"many": 40, "few": 10}
    assert audit["conserved"]["rows_in"] == audit["conserved"]["kept"] + audit["conserved"]["dropped"]


def test_pipeline_splits_a_long_document_and_counts_it_once(tmp_path, config):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "fox " * 100}, {"text": "dog"}])
    prepared = run(replace(config, max_length=32, over_length=OverLength.split), tiny_tokenizer(None))
    assert prepared.report["train"]["documents"] == 2 < prepared.report["train"]["sequences"]
    assert prepared.train.lengths.max() <= 32
    whole = [token for i in range(len(prepared.train) - 1) for token in prepared.train.sample(i).input_ids]
    assert tiny_tokenizer(None).decode(whole, skip_special_tokens=True) == "fox " * 100


def test_pipeline_keeps_the_test_split_separate(tmp_path, config):
    write_jsonl(tmp_path / "train.jsonl", chat_rows(50))
    prepared = run(replace(config, eval_share=0.1, test_share=0.2))
    sizes = {split: prepared.report[split]["documents"] for split in ("train", "eval", "test")}
    assert sizes == {"train": 35, "eval": 5, "test": 10}


def test_pipeline_stops_between_blocks_on_request(tmp_path, config):
    write_jsonl(tmp_path / "train.jsonl", chat_rows(1200))
    asked = iter([False, True])
    frozen_objects = []

    def stop():
        frozen_objects.append(gc.get_freeze_count())
        return next(asked)

    gc.unfreeze()  # the tests may have frozen what they share
    with pytest.raises(Preempted):
        run(config, stop=stop)
    before, between_blocks = frozen_objects
    assert before == 0 and between_blocks > 10_000, "no search for garbage looks at all modules again"
    assert gc.get_freeze_count() == 0, "what the caller leaves behind is searched again"
    gc.freeze()
    assert not list((tmp_path / "cache").glob("*/manifest.json"))
    assert len(run(config).train) == 1200
