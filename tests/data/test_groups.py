"""Held-out shares by group: no patient on both sides, the share of documents kept, the column missing, the audit."""

import json
from collections import Counter

import numpy as np
import pytest

from strategies.errors import ConfigError, DataError
from tests.helpers.tokenizers import tiny_tokenizer, write_jsonl
from trainer.data.config import DataConfig, LeakageConfig, LeakagePolicy
from trainer.data.objective_spec import DataSpec
from trainer.data.prepare import Preparation
from trainer.data.report.audit import Audit
from trainer.data.report.preview import summary_text
from trainer.data.selection.splits import choose_whole_groups
from trainer.data.store.documents import DocumentTable


def patients(number: int, seed: int = 0) -> list[dict]:
    """Rows of `number` patients with 1 to 12 rows each, in no order."""
    draw = np.random.default_rng(seed)
    rows = [
        {
            "prompt": f"note {row} of patient {name}?",
            "completion": f"value {draw.integers(9999)}",
            "about": {"id": name},
        }
        for name in range(seed * 1000, seed * 1000 + number)
        for row in range(draw.integers(1, 13))
    ]
    return [rows[place] for place in draw.permutation(len(rows))]


def prepared(tmp_path, *, seed=1, **settings):
    config = DataConfig(
        **{
            "path": str(tmp_path / "train.jsonl"),
            "cache_dir": str(tmp_path / "cache"),
            "group_by": "about.id",
            **settings,
        }
    )
    return Preparation(config, tiny_tokenizer(), DataSpec(), seed=seed).open_or_prepare()


def groups_of(data, split: str) -> Counter:
    """Documents of each patient in a split, by what the texts say."""
    table = DocumentTable(data.directory)
    index, store = np.load(data.directory / split / "index.npy"), np.load(data.directory / "columns.npz")
    prompts = [table.row(int(number))["prompt"] for number in store["document"][index]]
    return Counter(prompt.split("patient ")[1].rstrip("?") for prompt in prompts)


@pytest.mark.parametrize("seed", [1, 2])
def test_eval_split_has_no_group_on_two_sides_and_keeps_the_shares(tmp_path, seed):
    rows = patients(200)
    write_jsonl(tmp_path / "train.jsonl", rows)
    data = prepared(tmp_path, seed=seed, eval_share=0.1, test_share=0.2)
    whole = Counter(str(row["about"]["id"]) for row in rows)
    parts = {split: groups_of(data, split) for split in ("train", "eval", "test")}
    assert sum(parts.values(), Counter()) == whole
    assert all(part[name] == whole[name] for part in parts.values() for name in part), "a group is on one side, whole"
    assert parts["eval"].total() == round(0.1 * len(rows)) and parts["test"].total() == round(0.2 * len(rows))
    audit = Audit.read(data.directory)
    told = {split: (part.groups, part.documents, part.in_training) for split, part in audit.groups.items()}
    assert told == {split: (len(part), part.total(), 0) for split, part in parts.items()}
    page = (data.directory / "audit.html").read_text()
    assert f"{len(parts['eval'])} groups with {parts['eval'].total()} documents in eval" in page
    assert f"groups (data.group_by), eval: {len(parts['eval'])} with" in summary_text(data.report)


def test_eval_split_by_group_depends_on_the_seed_not_on_place_or_workers(tmp_path):
    rows = patients(60)
    write_jsonl(tmp_path / "train.jsonl", rows)
    first = groups_of(prepared(tmp_path, eval_share=0.2), "eval")
    assert first != groups_of(prepared(tmp_path, eval_share=0.2, seed=5), "eval")
    write_jsonl(tmp_path / "train.jsonl", rows[::-1])
    assert first == groups_of(prepared(tmp_path, eval_share=0.2), "eval")


def test_eval_split_does_not_store_the_names_of_groups(tmp_path):
    rows = [{**row, "about": {"id": f"secret-{row['about']['id']}"}} for row in patients(30)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    data = prepared(tmp_path, eval_share=0.2)
    assert not [path for path in data.directory.rglob("*") if path.is_file() and b"secret-" in path.read_bytes()]


@pytest.mark.parametrize(
    ("value", "said"), [(None, "is None"), ("  ", "is '  '"), ([1], r"is \[1\]"), (True, "is True")]
)
def test_eval_split_refuses_a_row_without_a_group(tmp_path, value, said):
    rows = patients(20)
    rows[3]["about"] = {"id": value}
    write_jsonl(tmp_path / "train.jsonl", rows)
    with pytest.raises(DataError, match=rf'train\.jsonl:4: "about\.id" \(data\.group_by\) {said}'):
        prepared(tmp_path, eval_share=0.2)
    data = prepared(tmp_path, eval_share=0.2, max_bad_share=0.5)
    bad = [json.loads(line) for line in (data.directory / "quarantine.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in bad] == ["missing_group"]


def test_eval_split_refuses_missing_group_columns_and_conflicting_settings(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", patients(20))
    with pytest.raises(
        DataError, match=r"no column 'patient' \(data\.group_by\); the row has \['about', 'completion', 'prompt'\]"
    ):
        prepared(tmp_path, eval_share=0.2, group_by="patient")
    with pytest.raises(ConfigError, match=r"data\.ignore_columns names about, which data\.group_by reads"):
        prepared(tmp_path, eval_share=0.2, group_by="about", ignore_columns=["about"])
    one = [{**row, "about": {"id": 7}} for row in patients(20)]
    write_jsonl(tmp_path / "train.jsonl", one)
    with pytest.raises(DataError, match=rf"leaves no training document: {len(one)} documents, 1 groups by"):
        prepared(tmp_path, eval_share=0.2)


@pytest.mark.parametrize("policy", ["report", "drop_train", "fail"])
def test_eval_path_groups_shared_with_training_follow_the_leakage_policy(tmp_path, policy):
    rows, other = patients(30), patients(5, seed=1)
    held_out = [
        {**row, "prompt": row["prompt"].replace("note", "letter")} for row in rows if row["about"]["id"] in (3, 4)
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "eval.jsonl", held_out + other)
    settings = {"eval_path": str(tmp_path / "eval.jsonl"), "leakage": LeakageConfig(policy=LeakagePolicy(policy))}
    shared = len(held_out)
    if policy == "fail":
        with pytest.raises(DataError, match=rf"{shared} of {len(rows)} training documents are of groups"):
            prepared(tmp_path, **settings)
        return
    data = prepared(tmp_path, **settings)
    assert Audit.read(data.directory).groups["eval"].in_training == shared
    assert ({"3", "4"} <= {*groups_of(data, "train")}) is (policy == "report")
    told = f"{shared} training documents were of them, and are kept (data.leakage.policy=drop_train removes them)"
    assert (told in summary_text(data.report)) is (policy == "report")
    dropped = [stage["dropped"] for stage in data.report["flow"] if stage["stage"] == "leakage"]
    assert dropped == ([] if policy == "report" else [{"group_in_eval": shared}])


def test_eval_path_files_need_not_name_groups(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", patients(30))
    write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "a question?", "completion": "an answer"}])
    data = prepared(tmp_path, eval_path=str(tmp_path / "eval.jsonl"))
    assert Audit.read(data.directory).groups["eval"].groups == 0


def test_eval_split_passes_over_groups_too_large_for_the_share():
    draws = np.repeat(np.array([1, 2, 3, 4, 5], np.uint64), [50, 3, 9, 4, 2])
    assert Counter(draws[choose_whole_groups(draws, 7)].tolist()) == {2: 3, 4: 4}
    assert Counter(draws[choose_whole_groups(draws, 1)].tolist()) == {5: 2}, "one at least, the smallest"
