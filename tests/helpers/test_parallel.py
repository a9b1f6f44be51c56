"""Which tests stay together when several workers share them, and how many workers there are."""

from pathlib import Path

import pytest

pytest.importorskip("xdist", reason="needs pytest-xdist, as make test does")

from tests.helpers import parallel

ROOT = Path(__file__).parents[2]


def test_parallel_unit_is_a_file_or_a_room_that_shares_one_resource():
    assert parallel.unit_of("tests/losses/test_next_token.py::test_x[a/b::c@d]") == "tests/losses/test_next_token.py"
    assert parallel.unit_of("tests/slurm/test_script.py::test_x") == "tests/slurm"
    assert parallel.unit_of("tests/parity/test_bases.py::TestY::test_x") == "tests/parity"


def test_rooms_that_share_a_session_are_handed_out_first_and_exist():
    names = [
        "tests/test_step.py::a",
        "tests/launch/test_x.py::b",
        "tests/parity/test_x.py::c",
        "tests/slurm/test_x.py::d",
    ]
    assert sorted(names, key=parallel.place_of) == names[::-1]
    assert [room for room in parallel.FIRST if not (ROOT / room).is_dir()] == []


@pytest.mark.parametrize(
    ("cores", "gib", "expected"), [(1, 64, 0), (2, 64, 2), (4, 9, 2), (4, 7, 0), (64, 500, parallel.MOST)]
)
def test_workers_are_as_many_as_cores_and_memory_allow(monkeypatch, cores, gib, expected):
    monkeypatch.setattr(parallel, "num_usable_cores", lambda: cores)
    monkeypatch.setattr(parallel, "memory", lambda: gib << 30)
    assert parallel.num_workers() == expected


def test_parallel_memory_is_what_is_free_and_allowed(monkeypatch):
    monkeypatch.setattr(parallel, "cgroup_memory_limit", lambda: 1 << 20)
    assert parallel.memory() == 1 << 20
    monkeypatch.setattr(parallel, "cgroup_memory_limit", lambda: None)
    assert 1 << 20 < parallel.memory() <= parallel.psutil.virtual_memory().total
