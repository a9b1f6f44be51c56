"""The version in the first row of `metrics.jsonl`: no reader takes it for a metric, and no start writes it a second time."""

import json

import pytest

from strategies.errors import ConfigError
from trainer.reporting.file_version import FILE_VERSION, readable_file_version
from trainer.reporting.jsonl import JsonlTracker
from trainer.reporting.metric_rows import read_rows, readable_rows


@pytest.mark.parametrize(("tree", "version"), [({}, 0), ({"version": 0}, 0), ({"version": FILE_VERSION}, FILE_VERSION)])
def test_metrics_version_of_a_file_without_one_is_0(tree, version):
    assert readable_file_version(tree) == version


@pytest.mark.parametrize("version", [FILE_VERSION + 1, -1, "1", 1.0, True, None])
def test_metrics_version_that_is_later_or_none_is_refused(version):
    with pytest.raises(ValueError, match="version"):
        readable_file_version({"version": version})


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged(path, resume_step, steps):
    tracker = JsonlTracker(path, resume_step)
    for step in steps:
        tracker.log({"loss": 1.0 / (step + 1)}, step=step)
    tracker.close()


def test_metrics_version_is_in_the_first_row_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logged(path, 0, [0, 1, 2, 3])
    assert [row.get("version") for row in lines_of(path)] == [FILE_VERSION, None, None, None]
    logged(path, 2, [3, 4])  # resumed: the rows since the checkpoint are written again
    assert [row["step"] for row in lines_of(path)] == [0, 1, 2, 3, 4]
    assert [row.get("version") for row in lines_of(path)] == [FILE_VERSION, None, None, None, None]
    logged(path, 0, [1])  # from its start: no row is left, and the next is the first
    assert lines_of(path) == [{"step": 1, "loss": 0.5, "version": FILE_VERSION}]
    tracker = JsonlTracker(path, 1)
    tracker.rewind(0)
    tracker.log({"loss": 2.0}, step=1)
    tracker.close()
    assert lines_of(path) == [{"step": 1, "loss": 2.0, "version": FILE_VERSION}]


def test_metrics_version_is_taken_for_a_metric_by_no_reader(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logged(path, 0, [1, 2])
    metrics = read_rows(path)
    assert metrics.version == FILE_VERSION
    assert (
        metrics.rows
        == readable_rows(path.read_bytes().splitlines())
        == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1 / 3}]
    )


def test_metrics_file_that_an_earlier_version_began_stays_without_a_version(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n')
    logged(path, 1, [2])
    assert read_rows(path).version == 0
    assert lines_of(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1 / 3}]


def test_metrics_file_of_a_later_version_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = json.dumps({"step": 1, "loss": 0.5, "version": FILE_VERSION + 1}) + "\n"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"metrics.jsonl: cannot be read: it has version {FILE_VERSION + 1}"):
        read_rows(path)
    with pytest.raises(ConfigError, match="use a later shardtune"):
        JsonlTracker(path, 1)
    assert path.read_text() == text
