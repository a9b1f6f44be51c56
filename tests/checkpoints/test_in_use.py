"""A checkpoint that an export reads is not pruned by the run, which goes on."""

import errno
import os
import time
from pathlib import Path

from tests.checkpoints.test_manager import Made
from trainer.checkpoints.in_use import (
    MAX_MARK_AGE_S,
    is_read_by_another_process,
    marked_as_in_use,
    remove_stale_reader_marks,
)


def steps(made):
    return sorted(path.name for path in made.directory.iterdir())


def test_checkpoint_that_is_read_is_kept_until_it_was_read(tmp_path):
    made = Made(tmp_path, keep=1)
    made.save(1)
    with marked_as_in_use(made.directory / "step-000001"):
        made.save(2, 3)
        names = steps(made)
        assert [name for name in names if not name.startswith(".")] == ["step-000001", "step-000003"]
        assert len(names) == 3 and names[0].startswith(".step-000001.in-use-")
    made.save(4)
    assert steps(made) == ["step-000004"]


def test_mark_of_a_reader_that_was_killed_keeps_nothing(tmp_path):
    made = Made(tmp_path, keep=1)
    made.save(1)
    mark = made.directory / ".step-000001.in-use-elsewhere-17"
    mark.touch()
    made.save(2)
    assert "step-000001" in steps(made)
    long_ago = time.time() - 2 * MAX_MARK_AGE_S
    os.utime(mark, (long_ago, long_ago))
    made.save(3)
    assert steps(made) == ["step-000003"]


def test_checkpoint_in_a_directory_that_cannot_be_written_is_read_all_the_same(tmp_path):
    with marked_as_in_use(tmp_path / "missing" / "step-000001"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_mark_whose_age_cannot_be_read_is_left_alone(tmp_path, monkeypatch):
    mark = tmp_path / ".step-000001.in-use-elsewhere-17"
    mark.touch()
    read_status = Path.stat

    def fail_for_the_mark(path, **options):
        if path == mark:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read_status(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", fail_for_the_mark)
        remove_stale_reader_marks(tmp_path / "step-000001")
        assert not is_read_by_another_process(tmp_path / "step-000001")
    assert mark.exists()
