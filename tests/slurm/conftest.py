"""One SLURM for the session; without the rights for it, its tests are skipped with the reason."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, Unavailable, provide


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        provide()
    except Unavailable as reason:
        pytest.skip(str(reason))
    up = Cluster(tmp_path_factory.mktemp("slurm-cluster"))
    try:
        yield up
    finally:
        up.close()
