"""Records are replaced whole, whoever writes them at the same time."""

import errno
from concurrent.futures import ThreadPoolExecutor

import pytest

from strategies.errors import StorageError
from trainer.reporting.status import write_text_atomic


def test_atomic_write_of_one_file_by_several_threads(tmp_path):
    path, texts = tmp_path / "energy" / "host.json", [str(number) * 1000 for number in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(50):
            list(threads.map(lambda text: write_text_atomic(path, text), texts))
            assert path.read_text() in texts
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_free_space_is_suggested_where_there_is_none_and_nowhere_else(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(
        StorageError, match=r"cannot write \(Not a directory\); choose another directory \(run\.dir=, or to=\)$"
    ):
        write_text_atomic(tmp_path / "file" / "status.json", "{}")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("trainer.reporting.status.shared_files.replace_shared_file", full)
    with pytest.raises(StorageError, match=r"free space, or choose another directory \(run\.dir=, or to=\)$"):
        write_text_atomic(tmp_path / "status.json", "{}")
