"""The ranks that compute the cases of the parity tests: jobs of two, three, four and eight, for all modules."""

import pytest

from tests.helpers.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """{number of ranks: `Ranks`}; started when a test first asks."""
    found = {
        world: Ranks("tests.parity.job", world, tmp_path_factory.mktemp(f"ranks{world}"), also="deepspeed")
        for world in (2, 3, 4, 8)
    }
    yield found
    for some in found.values():
        some.stop()


@pytest.fixture
def ask(ranks):
    """What the two ranks answer to a part, its function and the arguments."""
    return ranks[2].ask
