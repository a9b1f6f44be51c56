"""One model and one data set for all faults; what a test leaves running is ended after it."""

import pytest

from tests.faults.runs import Runs


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def runs(site):
    yield site
    site.close()
    site.started.clear()
