"""Files that outlive a power cut, on disks and network file systems that fail as real ones do."""

import errno
import os

import pytest

from strategies import atomic_io
from strategies.atomic_io import (
    NewFile,
    RetryingReader,
    WrittenFile,
    disk_space_problem,
    error_summary,
    file_difference,
    make_directories,
    publish_directory,
    read_bytes,
    size_text,
    write_new_file,
)


class Faulty(atomic_io.Disk):
    """Fails the first `times` calls of `call` with `code`; takes `most` bytes at a time; notes what was done, in order."""

    def __init__(self, call="", code=errno.EIO, times=1, most=None):
        self.call, self.code, self.left, self.most = call, code, times, most
        self.done, self.slept, self.names = [], 0.0, {}

    def _maybe(self, call, path=""):
        if call == self.call and self.left:
            self.left -= 1
            raise OSError(self.code, os.strerror(self.code), str(path))

    def open(self, path, flags):
        self._maybe("open", path)
        descriptor = super().open(path, flags)
        self.names[descriptor] = path.name
        return descriptor

    def write(self, descriptor, data):
        self._maybe("write")
        return super().write(descriptor, data[: self.most])

    def read(self, descriptor, into, offset):
        self._maybe("read")
        return super().read(descriptor, into[: self.most], offset)

    def sync(self, descriptor):
        self._maybe("sync")
        self.done.append(("sync", self.names[descriptor]))
        super().sync(descriptor)

    def rename(self, source, target):
        self._maybe("rename", source)
        self.done.append(("rename", target.name))
        super().rename(source, target)

    def remove_tree(self, path):
        self.done.append(("remove", path.name))
        super().remove_tree(path)

    def sleep(self, seconds):
        self.slept += seconds


@pytest.fixture
def on(monkeypatch):
    def put(**how):
        disk = Faulty(**how)
        monkeypatch.setattr(atomic_io, "disk", disk)
        return disk

    return put


DATA = bytes(range(256)) * 9


def test_atomic_io_short_writes_and_reads_lose_nothing(tmp_path, on):
    on(most=7)
    written = write_new_file(tmp_path / "a", DATA)
    assert (tmp_path / "a").read_bytes() == DATA == read_bytes(tmp_path / "a", max_bytes=10**6)
    assert written.size == len(DATA) and file_difference(tmp_path, written) is None


@pytest.mark.parametrize("call", ["write", "sync"])
def test_atomic_io_write_to_a_failing_disk_raises(tmp_path, on, call):
    on(call=call)
    with pytest.raises(OSError, match="Input/output error"):
        write_new_file(tmp_path / "a", DATA)


def test_atomic_io_write_to_a_disk_that_takes_nothing_ends(tmp_path, on):
    on(most=0)
    with pytest.raises(OSError, match="no more bytes"):
        write_new_file(tmp_path / "a", DATA)


def test_atomic_io_lasting_read_error_is_damage_and_named(tmp_path, on):
    written = write_new_file(tmp_path / "a", DATA)
    on(call="read", times=10**6)
    assert file_difference(tmp_path, written) == "a cannot be read (Input/output error)"
    assert file_difference(tmp_path, WrittenFile("a", 5, written.sha256)) == "a has 2304 bytes instead of 5"


@pytest.mark.parametrize("code", [errno.EIO, errno.ETIMEDOUT])
@pytest.mark.parametrize("call", ["open", "read"])
def test_atomic_io_retries_a_passing_error_three_times_over_30_seconds(tmp_path, on, call, code):
    """Of all files of a checkpoint together: a disk that failed for so long is not waited for again at the next one."""
    said = []
    written = write_new_file(tmp_path / "a", DATA)
    disk = on(call=call, code=code, times=2)
    assert file_difference(tmp_path, written, RetryingReader(said.append)) is None and disk.slept == 30
    assert [line.split("; ")[1] for line in said] == ["looking again in 10 s", "looking again in 20 s"]
    disk = on(call=call, code=code, times=10**6)
    looks = RetryingReader()
    for _ in range(3):
        assert f"a cannot be read ({os.strerror(code)}" in (file_difference(tmp_path, written, looks) or "")
    assert disk.slept == 30


def test_a_file_that_ends_too_early_is_not_waited_for(tmp_path, on):
    disk = on()
    (tmp_path / "a").write_bytes(DATA)

    def look():
        with atomic_io.open_regular_file(tmp_path / "a") as (descriptor, size):
            atomic_io.read_exactly(descriptor, memoryview(bytearray(size + 1)), 0)

    with pytest.raises(atomic_io.FileTooShort):
        RetryingReader().read_with_retries(tmp_path / "a", look)
    assert disk.slept == 0


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ESTALE])
def test_atomic_io_waits_for_a_file_that_another_host_has_just_written(tmp_path, on, code):
    written = write_new_file(tmp_path / "a", DATA)
    disk = on(call="open", code=code, times=6)
    assert file_difference(tmp_path, written) is None and 1 < disk.slept < atomic_io.VISIBILITY_TIMEOUT_S
    disk = on(call="open", code=code, times=10**6)
    assert "a is missing" in (text := file_difference(tmp_path, written) or "") or "cannot be read" in text
    assert atomic_io.VISIBILITY_TIMEOUT_S <= disk.slept < 2 * atomic_io.VISIBILITY_TIMEOUT_S
    on(call="open", code=code, times=3)
    assert write_new_file(tmp_path / "b", DATA).size == len(DATA)


def test_atomic_io_does_not_wait_for_a_broken_disk(tmp_path, on):
    disk = on(call="open", code=errno.EIO)
    with pytest.raises(OSError, match="Input/output"), NewFile(tmp_path / "a"):
        pass
    assert disk.slept == 0


def test_atomic_io_publishes_a_directory_after_its_content_is_on_the_disk(tmp_path, on):
    disk = on()
    make_directories(tmp_path / "checkpoints" / ".aside")
    write_new_file(tmp_path / "checkpoints" / ".aside" / "file", DATA)
    publish_directory(tmp_path / "checkpoints" / ".aside", tmp_path / "checkpoints" / "final")
    assert disk.done == [
        ("sync", tmp_path.name),
        ("sync", "checkpoints"),
        ("sync", "file"),
        ("sync", ".aside"),
        ("rename", "final"),
        ("sync", "checkpoints"),
    ]


def test_atomic_io_names_missing_space_in_numbers(tmp_path, on):
    free = atomic_io.disk.free(tmp_path)
    assert disk_space_problem(tmp_path, 1) is None and free > 0
    assert disk_space_problem(tmp_path, 2**60).startswith(
        f"No space left on {tmp_path}: 1073741824.0 GiB are needed and "
    )
    assert disk_space_problem(tmp_path / "nowhere", 2**60) is None
    assert [size_text(n) for n in (5, 2048, 3 * 2**20, 2**40)] == ["5 bytes", "2 KiB", "3 MiB", "1024.0 GiB"]


def test_atomic_io_error_shows_the_cause_first():
    assert error_summary(OSError(28, "No space left on device", "/a")) == "No space left on device: /a"
    assert (
        error_summary(RuntimeError("first line\nsecond")) == "RuntimeError: first line"
        and error_summary(KeyError()) == "KeyError"
    )


@pytest.mark.parametrize("kind", ["link", "pipe", "directory", "large"])
def test_only_regular_files_of_a_sane_size_are_read(tmp_path, kind):
    path = tmp_path / "a"
    if kind == "link":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.write_bytes(bytes(11))
    with pytest.raises(OSError, match=str(path) if kind != "large" else "more than 10"):
        read_bytes(path, max_bytes=10)
