"""A quantised base is packed once a host: by whichever rank comes first, with the bytes that each would have packed itself."""

import json
import os
import select
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.launching import clean_environment
from tests.helpers.models import tiny_model_dir
from tests.helpers.speed import seconds
from tests.helpers.uncompiled import bitsandbytes
from tests.helpers.warm import heard
from trainer.model import packed_cache
from trainer.model.config import Quantisation
from trainer.model.packed_cache import QuantisedWeightsCache, weights_fingerprint
from trainer.model.quantisation import QuantisationScheme

bitsandbytes()
SCHEME = QuantisationScheme(Quantisation.nf4)
SHAPES = {f"layers.{index}.weight": (64, 128) for index in range(6)}
SIZES = {name: SCHEME.num_bytes(shape) for name, shape in SHAPES.items()}


def made(name):
    """The bytes of a weight, as a rank without a cache packs them."""
    generator = torch.Generator().manual_seed(list(SHAPES).index(name))
    return SCHEME.quantise(torch.randn(SHAPES[name], generator=generator))


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(packed_cache, "MIN_CACHED_BYTES", 0)


class Rank:
    """A process of its own that packs; what it says can be read."""

    def __init__(self, directory, index, count, pause):
        command = [sys.executable, "-m", "tests.model.packing_rank", directory, index, count, pause]
        self.process, self.said = heard(command, clean_environment())

    def answer(self):
        """What it says last; it has ended well."""
        *_, last = self.said.read().splitlines()
        assert self.process.wait(seconds(120)) == 0
        return json.loads(last)


def test_packed_cache_of_two_ranks_packs_each_weight_once_and_replaces_a_dead_rank(tmp_path):
    """Real processes, the first of which dies while it packs; what it had locked is packed by another."""
    dead = Rank(tmp_path, 0, 1, 600)
    assert dead.said.readline().startswith("packs")
    two = [Rank(tmp_path, index, 2, 0.2) for index in range(2)]
    # One is enough: on a busy machine the other may begin when only the weight of the dead rank is left, and wait for that.
    heard_ranks, _, _ = select.select([rank.said for rank in two], [], [], seconds(120))
    assert heard_ranks[0].readline().startswith("packs")
    dead.process.kill()
    found = [rank.answer() for rank in two]
    assert all(one["same"] and not one["reason"] for one in found)
    assert sorted(found[0]["packed"] + found[1]["packed"]) == sorted(SIZES)
    later = Rank(tmp_path, 0, 1, 0).answer()
    assert later == {"packed": [], "same": True, "reason": ""}


def weights(directory, quantise=made):
    return QuantisedWeightsCache(directory, SIZES, quantise)


def test_ranks_begin_with_different_weights(tmp_path):
    order = []
    second = QuantisedWeightsCache(
        tmp_path, SIZES, lambda name: (order.append(name), made(name))[1], host_rank=packed_cache.HostRank(1, 2)
    )
    second.read_slice("layers.0.weight", 0, 9)
    assert order == [f"layers.{index}.weight" for index in (3, 4, 5, 0, 1, 2)] and second.num_quantised == 6


def test_packed_cache_file_that_was_cut_off_is_packed_again(tmp_path):
    name = next(iter(SIZES))
    assert weights(tmp_path).read_slice(name, 0, 9).equal(made(name)[:9])
    file = tmp_path / f"{name}.safetensors"
    whole = file.read_bytes()
    for broken in (whole[:40], b"\0" * len(whole)):
        file.write_bytes(broken)
        again = weights(tmp_path)
        assert again.read_slice(name, 5, 90).equal(made(name)[5:90])
        assert (again.num_quantised, again.reason_not_cached) == (1, "") and file.read_bytes() == whole


def test_packed_cache_without_room_or_permission_is_reported_and_every_rank_packs(tmp_path, monkeypatch):
    name = next(iter(SIZES))
    (tmp_path / "file").write_text("")
    hindered = weights(tmp_path / "file" / "below")
    assert hindered.read_slice(name, 0, 9).equal(made(name)[:9]) and "Not a directory" in hindered.reason_not_cached
    monkeypatch.setattr(packed_cache.shutil, "disk_usage", lambda _: type("Disk", (), {"free": 2**10}))
    full = weights(tmp_path / "full")
    assert full.read_slice(name, 0, 9).equal(made(name)[:9]) and "GiB free in" in full.reason_not_cached
    monkeypatch.setattr(packed_cache, "MIN_CACHED_BYTES", 2**30)
    small = weights(tmp_path / "small")
    assert small.read_slice(name, 0, 9).equal(made(name)[:9]) and "as fast as they are read" in small.reason_not_cached
    assert not (tmp_path / "small").exists()


def test_scheme_of_quantisation_in_words():
    assert str(QuantisationScheme(Quantisation.nf4)) == "nf4 with double quantisation"
    assert str(QuantisationScheme(Quantisation.nf4, is_double_quantised=False)) == "nf4"
    assert str(QuantisationScheme(Quantisation.int8)) == "int8"


def test_packed_cache_fingerprint_depends_on_weights_and_settings(tmp_path):
    tiny_model_dir(tmp_path, "llama")
    first = weights_fingerprint([tmp_path], SCHEME)
    assert weights_fingerprint([tmp_path], SCHEME) == first
    assert weights_fingerprint([tmp_path], QuantisationScheme(Quantisation.nf4, is_double_quantised=False)) != first
    file = Path(tmp_path) / "model.safetensors"
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights_fingerprint([tmp_path], SCHEME) != first
