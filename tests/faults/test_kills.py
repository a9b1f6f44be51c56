"""Kills with -9 at random moments: a dozen of `make faults`, which does 200 of five kinds of runs."""

import random

import pytest

from tests.faults.export_kills import ExportCampaign
from tests.faults.kills import RANKS, STEPS, Campaign
from tests.helpers.covering import EVERYTHING, SEED, whole
from tests.helpers.warm import Nursery, nursery

KILLS = 20 if EVERYTHING else 12
"""Of each strategy."""


@pytest.fixture(scope="module")
def forks():
    """The process that ranks are forked from; with DeepSpeed imported where it is needed."""
    if not EVERYTHING:
        yield nursery()
        return
    own = Nursery("deepspeed")
    yield own
    own.close()


@pytest.mark.parametrize("strategy", RANKS if EVERYTHING else ["single"])
def test_kills_at_random_moments_tear_and_lose_no_checkpoint_and_change_no_curve(runs, forks, strategy):
    """By what is in the directory before and after each start, and by the bytes of a run that was left alone."""
    campaign = Campaign(runs, strategy, random.Random(f"{SEED} {strategy}"), forks)
    rows, weights = campaign.expected
    assert len(rows) > STEPS and weights
    tally = campaign.kill(KILLS)
    assert tally.wrong == [], "\n".join(tally.wrong)
    assert tally.kills == KILLS and tally.resumed and tally.finished


@whole("files that a killed export leaves are kept or not in tests/export/test_writers.py, without a kill")
def test_export_that_is_killed_amid_its_files_goes_on_to_the_same_bytes(runs, forks):
    tally = ExportCampaign(runs, random.Random(SEED), forks).kill(KILLS)
    assert tally.wrong == [], "\n".join(tally.wrong)
    assert tally.kills == KILLS and tally.kept and tally.finished
