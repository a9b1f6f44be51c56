"""Law 1: the same job under any strategy takes the same steps (fp32, dropout off, lr 1e-3, clipping on)."""

import itertools

import pytest

from tests.helpers.launching import run_job
from tests.parity.job import names_for

TOLERANCE = 1e-5
CASES = [
    (world, strategy, tuning, masks, accumulation)
    for world in (2, 4)
    for strategy, tuning, masks, accumulation in itertools.product(
        names_for(world), ("full", "lora"), ("even", "uneven"), (1, 4)
    )
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return {world: run_job("tests.parity.job", world, tmp_path_factory.mktemp(f"world{world}")) for world in (2, 4)}


@pytest.mark.parametrize(("world", "strategy", "tuning", "masks", "accumulation"), CASES)
def test_strategy_equals_single(reports, world, strategy, tuning, masks, accumulation):
    expected = reports[world][f"single-{tuning}-{masks}"]
    found = reports[world][f"{strategy}-{tuning}-{masks}-{accumulation}"]
    assert len(found) == len(expected) == 5
    for (loss, norm), (right_loss, right_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(right_loss, rel=TOLERANCE)
        assert norm == pytest.approx(right_norm, rel=TOLERANCE)


@pytest.mark.parametrize(("world", "strategy"), [(world, name) for world in (2, 4) for name in names_for(world)])
def test_through_sockets_too(reports, world, strategy):
    for found, expected in zip(
        reports[world][f"{strategy}-sockets"], reports[world]["single-full-uneven"], strict=True
    ):
        assert found == pytest.approx(expected, rel=TOLERANCE)


def test_the_oracle_learns_and_is_clipped(reports):
    """A matrix of runs that stand still, or that clipping never touches, would prove little."""
    for tuning, masks in itertools.product(("full", "lora"), ("even", "uneven")):
        steps = reports[2][f"single-{tuning}-{masks}"]
        assert len({round(loss, 3) for loss, _ in steps}) > 1
        assert any(norm > 0.5 for _, norm in steps)


def test_a_quantised_base_trains_alike_under_hsdp(reports):
    pytest.importorskip("bitsandbytes")
    found, expected = reports[4]["hsdp-nf4"], reports[4]["single-nf4"]
    assert len(found) == len(expected) == 5
    for (loss, norm), (right_loss, right_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(right_loss, rel=1e-5)
        assert norm == pytest.approx(right_norm, rel=1e-5)
    assert expected != reports[4]["single-lora-uneven"]
