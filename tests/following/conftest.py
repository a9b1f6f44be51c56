"""Real runs, started as users start them, and directories as runs leave them."""

import pytest

from tests.faults.runs import Runs


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("following"))


@pytest.fixture
def runs(site):
    yield site
    site.close()
    site.started.clear()
