"""Quantised weights of a quantised base, cached on the host. Each is quantised once, by the first rank that needs it.

The other ranks, and later runs on the same weights, read their part of it. A rank holds a lock while it quantises a
weight. If it dies, the lock is released and another rank quantises. Nothing here communicates: files are written under
another name and renamed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from strategies.cache_dir import cache_directory
from trainer.model.quantisation import QuantisationScheme

FORMAT_VERSION = 1
"""Version of the files' content; files of another version are not read, and their weights quantised anew."""
MIN_CACHED_BYTES = 64 * 2**20
"""Quantised weights of fewer bytes in all are not cached: quantising them takes a second."""
SAMPLES_PER_FILE = 16
"""Samples that a fingerprint reads of each file."""
SAMPLE_BYTES = 2**16
TENSOR_KEY = "packed"
"""Name of the only tensor in a file of the cache."""


class HostRank(NamedTuple):
    """A rank among the ranks of its host."""

    rank: int
    """From 0."""
    num_ranks: int


ONLY_RANK = HostRank(rank=0, num_ranks=1)


def weights_fingerprint(directories: list[Path], scheme: QuantisationScheme) -> str:
    """32 hex digits that identify the quantised form of the weights in `directories`: they name its directory in the cache.

    The digest covers the scheme of quantisation, and each file's name, size, time of change and `SAMPLES_PER_FILE` samples of
    its bytes, since reading all would take as long as quantising. It also covers the versions of the libraries that quantise.
    """
    digest = hashlib.sha256(f"{FORMAT_VERSION} {scheme} {version('bitsandbytes')} {version('transformers')}".encode())
    for directory in directories:
        for file in sorted((*directory.glob("*.safetensors"), *directory.glob("*.json"))):
            stat = file.stat()
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
            with file.open("rb") as weights_file:
                # The samples are spread evenly: the first one at the begin of the file, the last one at its end.
                last_offset = max(0, stat.st_size - SAMPLE_BYTES)
                for index in range(SAMPLES_PER_FILE):
                    weights_file.seek(index * last_offset // (SAMPLES_PER_FILE - 1))
                    digest.update(weights_file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def cached_weights(
    source_directories: list[Path],
    scheme: QuantisationScheme,
    shapes: Mapping[str, tuple[int, ...]],
    quantise: Callable[[str], Tensor],
    host_rank: HostRank,
) -> QuantisedWeightsCache:
    """The host's cache of a base's quantised matrices; nothing is quantised yet, but files are sampled for their fingerprint.

    `source_directories`: those of the base and of adapters that are merged into it. `shapes`: of its quantised weights, by base
    name. Stacks of experts (3-d) are not cached: the ranks that hold them quantise them. `quantise(name)` quantises a matrix
    into bytes.
    """
    num_bytes_by_name = {}
    for name, shape in shapes.items():
        if len(shape) == 2:
            num_bytes_by_name[name] = scheme.num_bytes((shape[0], shape[1]))
    directory = cache_directory() / "packed" / weights_fingerprint(source_directories, scheme)
    return QuantisedWeightsCache(directory, num_bytes_by_name, quantise, host_rank=host_rank)


class QuantisedWeightsCache:
    """The quantised weights of one base, kept on this host: each is quantised by the first rank that needs it."""

    def __init__(
        self,
        directory: Path,
        num_bytes_by_name: dict[str, int],
        quantise: Callable[[str], Tensor],
        *,
        host_rank: HostRank = ONLY_RANK,
    ) -> None:
        """`directory`: where the files are. `num_bytes_by_name`: of each quantised weight. Reads and writes nothing yet.

        `quantise(name)` makes the bytes of a weight, uint8 `[num_bytes]`, on the CPU. `host_rank`: this rank among those of its
        host, each of which begins with another weight.
        """
        self.directory = directory
        self.num_bytes_by_name = num_bytes_by_name
        self.quantise = quantise
        self.host_rank = host_rank
        self.num_quantised = 0
        """Weights that this process has quantised."""
        self.reason_not_cached = ""
        """Why nothing is cached; empty if it is."""
        self._has_filled_cache = False

    @property
    def total_bytes(self) -> int:
        """Bytes of all quantised weights."""
        return sum(self.num_bytes_by_name.values())

    def read_slice(self, name: str, start: int, stop: int) -> Tensor:
        """Bytes `[start, stop)` of a quantised weight, from its file in the cache.

        The first call quantises all weights that are missing there. If the cache cannot be used (`reason_not_cached` then says
        why), the weight is quantised in memory instead.
        """
        try:
            if not self._has_filled_cache:
                self._has_filled_cache = True
                self._fill_cache()
            if not self.reason_not_cached:
                packed_bytes = self._read_cached(name, start, stop)
                if packed_bytes is None:  # no file yet, or a broken one
                    self._quantise_into_cache(name, wait=True)
                    packed_bytes = self._read_cached(name, start, stop)
                if packed_bytes is not None:
                    return packed_bytes
                # From here on this process quantises for itself: a slow start is better than none.
                self.reason_not_cached = f"what was written to {self._cache_file(name)} cannot be read"
        except OSError as error:
            self.reason_not_cached = f"{error.strerror or error} ({error.filename or self.directory})"
        self.num_quantised += 1
        return self.quantise(name)[start:stop]

    def _fill_cache(self) -> None:
        """Quantise the weights that no other rank of the host has quantised or is quantising, so that each is done once.

        Without a lock on a weight, which another rank has while it quantises, this one goes on to the next. Sets
        `reason_not_cached` instead if the weights are too small to be worth it, or if the disk has too little space.
        """
        if self.total_bytes < MIN_CACHED_BYTES:
            self.reason_not_cached = f"{self.total_bytes / 2**20:.1f} MiB are packed as fast as they are read"
            return
        missing = [name for name in self.num_bytes_by_name if not self._is_cached(name)]
        if not missing:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        needed_bytes = sum(self.num_bytes_by_name[name] for name in missing)
        free_bytes = shutil.disk_usage(self.directory).free
        if needed_bytes > free_bytes:
            needed = f"{needed_bytes / 2**30:.2f} GiB more are needed"
            self.reason_not_cached = f"{needed} and {free_bytes / 2**30:.2f} GiB free in {self.directory}"
            return
        # Each rank begins at another weight, so that ranks seldom meet at the same one.
        first = len(missing) * self.host_rank.rank // self.host_rank.num_ranks
        for name in missing[first:] + missing[:first]:
            self._quantise_into_cache(name, wait=False)

    def _cache_file(self, name: str) -> Path:
        """The file of a quantised weight in the cache."""
        return self.directory / f"{name}.safetensors"

    def _is_cached(self, name: str) -> bool:
        """Whether the file of a quantised weight is there, and large enough to be complete: it has a header too."""
        file = self._cache_file(name)
        return file.exists() and file.stat().st_size > self.num_bytes_by_name[name]

    def _read_cached(self, name: str, start: int, stop: int) -> Tensor | None:
        """Bytes `[start, stop)` of a quantised weight from its file, uint8; None if there is no file, or it is broken."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self._cache_file(name)), framework="pt") as opened:
                view = opened.get_slice(TENSOR_KEY)
                is_complete = view.get_shape() == [self.num_bytes_by_name[name]]
                return view[start:stop] if is_complete else None
        except (FileNotFoundError, SafetensorError):
            return None

    def _quantise_into_cache(self, name: str, *, wait: bool) -> None:
        """Quantise a weight into its file in the cache, unless the file is there. Raises OSError.

        Another process may be doing that. With `wait` this call waits for it, and quantises the weight again if the file cannot
        be read. Without `wait` it returns at once.
        """
        from safetensors.torch import save

        # Each weight locks a byte of one file, chosen by its name.
        lock_offset = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
        with (self.directory / "lock").open("a+b") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, lock_offset)
            except BlockingIOError:
                return
            if self._is_cached(name) and (not wait or self._read_cached(name, 0, 1) is not None):
                return
            self.num_quantised += 1
            # Written under another name and renamed, so that no process reads half a file.
            temporary = self._cache_file(name).with_suffix(f".{socket.gethostname()}.{os.getpid()}")
            try:
                with temporary.open("wb") as file:
                    file.write(save({TENSOR_KEY: self.quantise(name)}))
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self._cache_file(name))
            except OSError:
                with suppress(OSError):
                    temporary.unlink()
                raise
