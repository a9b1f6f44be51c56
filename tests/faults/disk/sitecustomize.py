"""Puts a disk that fails in the place of the real one, in every process of a run whose PYTHONPATH has this directory.

FAULTY_DISK says how: `kill <name>` dies by SIGKILL before a directory gets this name; `full <n>` has no room for the first n
files of tensors; `unlisted <name>` cannot list directories of this name on rank 0;
`crowded <n>` has no room for anything after this many rows of metrics;
`slow <seconds>` takes so long for each file of tensors of rank 1;
`amid <name>` dies by SIGKILL when the tensors of this checkpoint are written and not yet synced.
"""

import errno
import os
import signal
from pathlib import Path

from strategies import atomic_io
from trainer.reporting.jsonl import JsonlTracker

KIND, _, VALUE = os.environ.get("FAULTY_DISK", "").partition(" ")


class Faulty(atomic_io.Disk):
    refused, crowded = 0, False

    def write(self, descriptor, data):
        if self.crowded:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(descriptor, data)

    def open(self, path, flags):
        if KIND == "full" and path.suffix == ".safetensors" and flags & os.O_WRONLY and self.refused < int(VALUE):
            self.refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return super().open(path, flags)

    def sync(self, descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if KIND == "amid" and VALUE in path.parent.name and path.suffix == ".safetensors":
            os.kill(os.getpid(), signal.SIGKILL)
        if KIND == "slow" and os.environ.get("RANK") == "1" and path.suffix == ".safetensors":
            super().sleep(float(VALUE))
        super().sync(descriptor)

    def names(self, directory):
        if KIND == "unlisted" and directory.name == VALUE and os.environ.get("RANK") == "0":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(directory))
        return super().names(directory)

    def sleep(self, seconds):
        if KIND != "unlisted":  # which lasts: nothing is gained by waiting
            super().sleep(seconds)

    def rename(self, source, target):
        if KIND == "kill" and target.name == VALUE:
            os.kill(os.getpid(), signal.SIGKILL)
        super().rename(source, target)


def log(self, metrics, *, step):
    if KIND == "crowded" and step > int(VALUE):
        atomic_io.disk.crowded, self._file = True, Path("/dev/full").open("a")  # noqa: SIM115
    _log(self, metrics, step=step)


atomic_io.disk = Faulty()
_log, JsonlTracker.log = JsonlTracker.log, log
