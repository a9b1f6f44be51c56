"""`BandIndex`, an index of documents by the bands of their MinHash sketches, in files, so that memory stays small.

A band is a run of MinHash values. Two documents are compared only if one of their bands is the same (Leskovec, Rajaraman
and Ullman, Mining of Massive Datasets, section 3.4). Most documents share no band with any other: these are known before the
first comparison, and take no room in the index.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from trainer.data.selection.document_hashes import mix_bits

DOCUMENTS_PER_WRITE = 4096
"""Documents whose band keys are made at a time."""
BYTES_PER_BAND = 20
"""Bytes in the files of an index for a band of a document that shares one: its key, and three numbers of its group."""


class BandIndex:
    """Finds documents that may be near copies: those that have a band, a part of their MinHash sketches, in common.

    Documents are numbered from 0 to n - 1. Only those that were kept (`add_kept`) are found. Files: 8 bytes a band of a document,
    and 12 more if it shares a band (for 18 bands 144 and 216 bytes). Memory: 40 bytes a document while the index is made, 1 byte
    after.
    """

    def __init__(
        self, digests: Iterable[list[int] | None], num_documents: int, bands: int, directory: Path | None
    ) -> None:
        """Make an index of documents by the bands of their MinHash sketches, in files, and find out which share a band.

        `digests`: the MinHash values of each document in order; None for one without words, which shares no band.
        `bands`: into how many bands the values of a document are divided.
        `directory`: where the files are; they have no name there, and go with the index.
        """
        # A hash key of each band of each document.
        self._bands = bands
        keys = _zeros_in_unnamed_file((bands, num_documents), np.uint64, directory)
        has_keys = np.zeros(num_documents, bool)
        for begin, keys_of_chunk, has_keys_of_chunk in _band_keys_by_chunk(digests, bands):
            chunk = slice(begin, begin + len(has_keys_of_chunk))
            keys[:, chunk] = keys_of_chunk
            has_keys[chunk] = has_keys_of_chunk

        self.shares_band = np.zeros(num_documents, bool)
        """bool [n]: whether a document has a band that another one has, too. The others need not be looked for."""
        for band in range(bands):
            self.shares_band |= _is_repeated(keys[band], has_keys)

        # Sharing numbers: documents numbered among those that share a band; -1 for the others.
        shared = np.flatnonzero(self.shares_band)
        self._sharing_number = np.full(num_documents, -1, np.int32)
        self._sharing_number[shared] = np.arange(len(shared), dtype=np.int32)
        shape = (bands, len(shared))
        self._first_slot = _zeros_in_unnamed_file(shape, np.int32, directory)
        """Where the slots of a document's group begin: a group has the same band, and one slot for each member."""
        self._members_by_slot = _zeros_in_unnamed_file(shape, np.int32, directory)
        """The kept members of each group, in the order in which they were kept."""
        self._num_kept_at_slot = _zeros_in_unnamed_file(shape, np.int32, directory)
        """How many members of a group are kept, at its first slot."""
        for band in range(bands):
            _, group, sizes = np.unique(keys[band, shared], return_inverse=True, return_counts=True)
            first_slot_of_group = np.cumsum(sizes) - sizes
            self._first_slot[band] = first_slot_of_group[group]

    def add_kept(self, document: int) -> None:
        """Let a document, which is kept and no copy, be found as a candidate from now on, if it shares a band with another."""
        number = int(self._sharing_number[document])
        if number < 0:  # it shares no band
            return
        for band in range(self._bands):
            first_slot = self._first_slot[band, number]
            self._members_by_slot[band, first_slot + self._num_kept_at_slot[band, first_slot]] = document
            self._num_kept_at_slot[band, first_slot] += 1

    def find_candidates(self, document: int) -> set[int]:
        """Find the kept documents that may be near copies of a document: those that share a band with it.

        A band is a part of a MinHash sketch; similar documents agree in at least one. `document`: a number from 0.
        """
        number = int(self._sharing_number[document])
        found: set[int] = set()
        if number < 0:  # it shares no band
            return found
        for band in range(self._bands):
            # All documents with the same band have one run of slots, which holds those that are kept.
            first_slot = self._first_slot[band, number]
            num_kept = self._num_kept_at_slot[band, first_slot]
            if num_kept:
                found.update(self._members_by_slot[band, first_slot : first_slot + num_kept].tolist())
        return found


def _zeros_in_unnamed_file(shape: tuple[int, int], dtype: type, directory: Path | None) -> np.ndarray:
    """Make an array of zeros that lies in a file without a name, so that the system may write it out and drop it from memory.

    The file goes with the array. `directory`: on which disk it is; None: that of temporary files. Raises OSError if the disk
    has no room for all of it.
    """
    if 0 in shape:
        return np.zeros(shape, dtype)
    with tempfile.TemporaryFile(dir=directory) as file:
        # Writing to a mapped file for which the disk has no room kills the process with a bus error.
        os.posix_fallocate(file.fileno(), 0, math.prod(shape) * np.dtype(dtype).itemsize)
        return np.memmap(file, dtype, "w+", shape=shape)


def _band_keys_by_chunk(
    digests: Iterable[list[int] | None], bands: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Hash the bands of documents, parts of their MinHash sketches: documents with an equal key are compared later.

    `digests`: the sketch of each document; None if it has no words. Yields for n documents at a time (`DOCUMENTS_PER_WRITE`,
    fewer at the end): (number of the first one, uint64 [bands, n] keys, bool [n] whether a document has a sketch).
    """
    remaining = iter(digests)
    begin = 0
    while chunk := list(islice(remaining, DOCUMENTS_PER_WRITE)):
        has_keys = np.array([digest is not None for digest in chunk], bool)
        keys = np.zeros((bands, len(chunk)), np.uint64)
        values = np.array([digest for digest in chunk if digest is not None], np.uint64)
        if len(values):
            # A key is a hash of the band's values. Two bands with the same hash would cost a comparison, no wrong copy.
            values_by_band = values.reshape(len(values), bands, -1)  # [documents, bands, values of a band]
            keys_by_document = np.zeros((len(values), bands), np.uint64)
            for row in range(values_by_band.shape[2]):
                keys_by_document = mix_bits(keys_by_document + values_by_band[:, :, row] + np.uint64(1))
            keys[:, has_keys] = keys_by_document.T
        yield begin, keys, has_keys
        begin += len(chunk)


def _is_repeated(keys: np.ndarray, has_keys: np.ndarray) -> np.ndarray:
    """Find which documents share one band with another one, bool [n]: two with the same key of the band.

    Keys [7, 5, 7] give [True, False, True]. A band is a part of a MinHash sketch. `keys`: uint64 [n]. `has_keys` (bool [n]):
    which documents have one; the keys of others mean nothing.
    """
    documents = np.flatnonzero(has_keys)
    documents_by_key = documents[np.argsort(keys[documents])]
    sorted_keys = keys[documents_by_key]
    # Equal keys are neighbours: a document's key is repeated if the key before or behind it is the same.
    equals_next = sorted_keys[1:] == sorted_keys[:-1]
    is_repeated_in_order = np.zeros(len(sorted_keys), bool)
    is_repeated_in_order[1:] = equals_next
    is_repeated_in_order[:-1] |= equals_next
    is_repeated = np.zeros(len(keys), bool)
    is_repeated[documents_by_key] = is_repeated_in_order
    return is_repeated
