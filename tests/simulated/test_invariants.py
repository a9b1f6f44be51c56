"""What holds of every simulated step, whatever the versions; and, with those that wrote the table, its numbers."""

import pytest

from strategies.owned import Kind
from tests.helpers.building import model_dir
from tests.simulated.cases import NATIVE, chosen_cases, simulated
from tests.simulated.goldens import golden, name_of, summary

CASES = chosen_cases()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_dir(tmp_path_factory.mktemp("simulated"))


@pytest.mark.parametrize(("case", "world"), CASES, ids=[name_of(*one) for one in CASES])
def test_step(model, case, world):
    found = simulated(case, model, world)
    if world > 1:
        last = simulated(case, model, world, world - 1)
        assert calls(found) == calls(last), "rank 0 and the last rank call different collectives: such a job hangs"
    if case.strategy in NATIVE:
        assert not found.host_reads, f"the host waits for the device: {dict(found.host_reads)}"
    if not case.offload:
        assert all(each.on_device for each in found.collectives)
        assert found.to_host == 0 and found.host < 4096, "only what counts, such as steps, lies on the host"
    assert found.resting[Kind.parameters] > 0
    assert sum(found.resting.values()) <= found.peak[1].total == max(h.total for h in found.moments.values())
    assert (Kind.optimizer in found.resting) != case.offload
    if (row := golden(case, world)) is not None:
        assert summary(found) == row, "numbers moved: see tests/simulated/goldens.py"


def calls(found):
    """What must be alike on all ranks; groups only by their size, since replicas form several."""
    return [(each.name, len(each.ranks), each.dtype, each.bytes) for each in found.collectives]
