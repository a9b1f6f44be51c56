"""One model and one data set for all faults; what a test leaves running is ended after it."""

import pytest

from tests.faults.runs import Runs
from tests.helpers.nursery import FAULT


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def runs(site):
    yield site
    site.close()
    site.started.clear()


@pytest.fixture
def little(monkeypatch):
    """Gives a rank that is forked too little memory, as `little_memory.py` has it."""

    def little(rank: int, *, holds: int, since: int) -> None:
        monkeypatch.setenv(FAULT, "tests.faults.little_memory")
        for key, value in {"RANK": rank, "HOLDS": holds, "FROM": since}.items():
            monkeypatch.setenv(f"LITTLE_{key}", str(value))

    return little
