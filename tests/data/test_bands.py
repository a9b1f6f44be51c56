"""The index of bands finds what rensa's own index finds, and takes room only for documents that share a band."""

import os

import numpy as np
import pytest

from trainer.data.selection import bands as bands_module
from trainer.data.selection.bands import BandIndex

BANDS, ROWS = 6, 3


def sketches(count):
    """MinHash sketches of sets of words, many of them with words in common."""
    from rensa import RMinHash

    draw = np.random.default_rng(3)
    made = []
    for number in range(count):
        words = draw.integers(0, 60 if number % 3 else 10**9, draw.integers(1, 30))
        sketch = RMinHash(BANDS * ROWS, 1)
        sketch.update([b"%d" % word for word in words])
        made.append(sketch)
    return made


def test_bands_find_what_the_index_of_rensa_finds(tmp_path, monkeypatch):
    from rensa import RMinHashLSH

    monkeypatch.setattr(bands_module, "DOCUMENTS_PER_WRITE", 64)
    made = sketches(300)
    index = BandIndex([sketch.digest() for sketch in made], len(made), BANDS, tmp_path)
    oracle = RMinHashLSH(0.5, BANDS * ROWS, BANDS)
    num_found = 0
    for number, sketch in enumerate(made):
        assert index.find_candidates(number) == set(oracle.query(sketch))
        num_found += len(index.find_candidates(number))
        if number % 4:
            index.add_kept(number)
            oracle.insert(number, sketch)
    assert num_found > 100
    assert 50 < np.count_nonzero(~index.shares_band) < 290


def test_bands_leave_no_file_and_take_nothing_for_documents_apart(tmp_path):
    digests = [[10 * number + place for place in range(BANDS * ROWS)] for number in range(50)]
    index = BandIndex([*digests, None, None], 52, BANDS, tmp_path)
    assert not index.shares_band.any() and index._members_by_slot.size == 0
    index.add_kept(3)
    assert index.find_candidates(3) == index.find_candidates(50) == set()
    assert not list(tmp_path.iterdir())


def test_bands_have_their_room_on_the_disk_before_they_are_written(tmp_path, monkeypatch):
    """A full disk is then an error with a message. Met while a mapped file is written, it would kill the process."""
    descriptors = []
    make_file = bands_module.tempfile.TemporaryFile

    def remembered(**settings):
        file = make_file(**settings)
        descriptors.append(os.dup(file.fileno()))
        return file

    monkeypatch.setattr(bands_module.tempfile, "TemporaryFile", remembered)
    mapped = bands_module._zeros_in_unnamed_file((BANDS, 100_000), np.uint64, tmp_path)
    (descriptor,) = descriptors
    assert os.fstat(descriptor).st_blocks * 512 >= mapped.nbytes
    os.close(descriptor)


@pytest.mark.parametrize("digests", [[], [None]])
def test_bands_of_no_words(tmp_path, digests):
    assert not BandIndex(digests, len(digests), BANDS, tmp_path).shares_band.any()
