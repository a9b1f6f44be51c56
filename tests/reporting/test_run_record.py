"""`run.json` as a typed record: written, read back, and tolerant of files that an earlier version or somebody else wrote."""

import json
import subprocess
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path

import pytest

from trainer.reporting.file_version import FILE_VERSION
from trainer.reporting.results import add_to_run_record
from trainer.reporting.run_record import (
    MAX_RECORD_BYTES,
    OPTIONAL_KEYS,
    MeasuredCost,
    MemoryCheck,
    PredictedCost,
    Receipt,
    RunOutcome,
    RunRecord,
    Sharding,
    TuningStart,
    read_run_record,
    readable_run_record,
)
from trainer.session.run_facts import write_run_record

ARCHIVE = Path(__file__).parents[1] / "golden" / "earlier_version.tar.gz"
RECORD = RunRecord(
    strategy="zero2",
    world_size=2,
    epochs=1.5,
    base_model="org/base",
    tuning_from=TuningStart(path="runs/first/export", sha256="ab"),
    sharding=Sharding(parameters=10, trainable_parameters=4, exchange="gloo", held_per_rank=[5, 5]),
    substitutions={"batch.micro": "auto -> 4 (planned)"},
    must_fit=MemoryCheck(live_gib=1.0, needed_gib=2.0, device_gib=3.0, when="backward"),
    receipt=Receipt(predicted=PredictedCost(memory_gib=1.0), measured=MeasuredCost(step_s=0.5)),
    outcome=RunOutcome(progress={"step": 4}, before={"eval/loss": 2.0}),
)


def content_of(record):
    """A record's fields but for those that say where it came from."""
    return {**asdict(record), "keys": None, "other": None}


def test_run_record_is_read_back_as_written(tmp_path):
    write_run_record(tmp_path, RECORD)
    assert content_of(read_run_record(tmp_path)) == content_of(RECORD)
    assert content_of(readable_run_record(tmp_path)) == content_of(RECORD)
    tree = json.loads((tmp_path / "run.json").read_text())
    assert (
        tree["version"] == FILE_VERSION and tree["label_names"] is None and tree["sharding"]["held_per_rank"] == [5, 5]
    )
    assert "gates" not in tree and "jobs" not in tree  # nothing to say yet
    # Verbs put something under a key of the file; the rest stays as it is.
    add_to_run_record(tmp_path, "exports", [{"to": "there"}])
    assert read_run_record(tmp_path).exports == [{"to": "there"}]
    assert json.loads((tmp_path / "run.json").read_text()) == {**tree, "exports": [{"to": "there"}]}


def test_run_record_of_an_earlier_version_is_read_and_loses_nothing(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    for name in ("finished", "classifier", "stopped"):
        record = read_run_record(tmp_path / "runs" / name)
        tree = json.loads((tmp_path / "runs" / name / "run.json").read_text())
        assert record.total_steps == tree["total_steps"] and record.data_fingerprint == tree["data_fingerprint"]
        assert record.receipt.predicted.memory_gib == tree["receipt"]["predicted"]["memory_gib"]
        again = record.as_json()
        assert again.keys() == tree.keys() and not record.other
        assert record.version == 0  # it was written before files had one
        nested = ("receipt", "outcome", "sharding", "tuning_from")
        assert all(again[key] == tree[key] for key in tree.keys() - {*nested})
        assert again["receipt"]["predicted"].items() >= tree["receipt"]["predicted"].items()
        assert record.base_commit is None and record.not_exported is None  # of which that version knew nothing


def test_run_record_with_wrong_values_is_refused_or_shown_as_far_as_it_is_right(tmp_path):
    tree = RECORD.as_json() | {"world_size": "two", "epochs": True, "versions": ["torch"], "substitutions": {"a": 1}}
    tree |= {"receipt": {"measured": {"step_s": "fast", "memory_gib": 2}}, "label_names": "neg", "sharding": None}
    tree |= {"exports": [3], "outcome": {"after": {"loss": "low"}}}
    foreign = {"of_somebody_else": {"a": [1]}, "other": 1, "keys": ["a"]}
    tree |= foreign
    (tmp_path / "run.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError) as caught:
        read_run_record(tmp_path)
    assert {*str(caught.value).split("; ")} == {
        "world_size is not a whole number",
        "epochs is not a number",
        "versions is not an object of text",
        "substitutions is not an object of text",
        "receipt.measured.step_s is not a number",
        "label_names is not a list of text",
        "exports is not a list of objects",
        "outcome.after is not an object of numbers",
    }
    record = readable_run_record(tmp_path)
    assert (record.strategy, record.world_size, record.epochs, record.versions) == ("zero2", 0, 0.0, {})
    assert record.receipt.measured == MeasuredCost(memory_gib=2)
    assert record.sharding == Sharding() and record.other == foreign
    # Nobody may take the default for what the file says: a classifier would be read as a model without labels.
    assert "label_names" not in record.keys and "sharding" in record.keys


@pytest.mark.parametrize("text", ["", "[]", "7", "{", "[" * 100_000, "\0", "null"])
def test_run_record_that_is_none_is_refused_or_read_as_an_empty_one(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises((ValueError, RecursionError)):
        read_run_record(tmp_path)
    assert readable_run_record(tmp_path) == RunRecord()


def test_no_file_and_a_huge_file_are_no_record(tmp_path):
    with pytest.raises(OSError):
        read_run_record(tmp_path)
    with (tmp_path / "run.json").open("wb") as file:
        file.truncate(MAX_RECORD_BYTES + 1)
    with pytest.raises(OSError, match="more than"):
        read_run_record(tmp_path)
    assert readable_run_record(tmp_path) == RunRecord()


def test_run_record_of_a_later_version_is_refused_or_read_as_far_as_it_is_known(tmp_path):
    (tmp_path / "run.json").write_text(
        json.dumps(RECORD.as_json() | {"version": FILE_VERSION + 1, "strategy": ["new"]})
    )
    with pytest.raises(ValueError, match=f"it has version {FILE_VERSION + 1}, .* up to {FILE_VERSION}: use a later"):
        read_run_record(tmp_path)
    record = readable_run_record(tmp_path)
    assert (record.version, record.world_size, record.strategy) == (FILE_VERSION + 1, 2, "")


def test_run_record_keys_that_come_later_are_fields_without_a_value():
    """Else a record would say a default as if it were known."""
    tree = RunRecord().as_json()
    assert not {*OPTIONAL_KEYS} & tree.keys() and {*OPTIONAL_KEYS} < {*asdict(RunRecord())}


def test_run_record_needs_neither_torch_nor_a_configuration():
    program = (
        "import sys, trainer.reporting.run_record; "
        "loaded = [name for name in sys.modules if name == 'torch' or name.startswith('trainer.config')]; "
        "sys.exit(', '.join(loaded) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
