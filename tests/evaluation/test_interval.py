"""How often `evaluation.every_steps=auto` evaluates: its promises, for sizes of all kinds."""

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.base import Progress
from tests.helpers.covering import examples
from trainer.evaluation.base import EvaluationConfig
from trainer.evaluation.interval import (
    RunSize,
    auto_interval_reason,
    automatic_evaluation_interval,
    num_intermediate_evaluations,
)
from trainer.session.evaluation_interval import resolve_evaluation_interval

sizes = st.builds(RunSize, st.integers(1, 10**6), st.floats(1, 1e8), st.integers(0, 10**9))


@settings(max_examples=examples(200), deadline=None)
@given(sizes)
def test_automatic_interval_keeps_its_promises(size):
    interval = automatic_evaluation_interval(size)
    count = num_intermediate_evaluations(interval, size.total_steps)
    assert count <= 20
    assert count * size.held_out_tokens <= 0.05 * size.total_steps * size.tokens_per_step * (1 + 1e-9)
    assert interval == 0 or interval >= 10


@pytest.mark.parametrize(
    ("size", "interval", "count"),
    [
        (RunSize(1000, 16_000, 16_000), 50, 19),  # the twentieth is that of the end
        (RunSize(100, 16_000, 1_000), 10, 9),  # not more often than every 10 steps
        (RunSize(85, 9_600, 30_000), 63, 1),  # the example of the page: 10 % held out, three epochs
        (RunSize(774, 64_000, 500_000), 157, 4),
        (RunSize(1000, 16_000, 280_702), 351, 2),  # docs/challenges.md: three epochs, 5 % held out
        (RunSize(10, 16_000, 1_000), 0, 0),
        (RunSize(1000, 16_000, 0), 0, 0),
    ],
)
def test_automatic_interval_of_usual_runs(size, interval, count):
    assert automatic_evaluation_interval(size) == interval
    assert num_intermediate_evaluations(interval, size.total_steps) == count


def test_reason_says_where_patience_cannot_end_the_run():
    assert "3.7% of the run's tokens" in auto_interval_reason(63, RunSize(85, 9_600, 30_000), 0)
    assert "too few for evaluation.patience=3: give" in auto_interval_reason(63, RunSize(85, 9_600, 30_000), 3)
    assert auto_interval_reason(0, RunSize(10, 16_000, 1_000), 0).startswith(
        "only before the first step and at the end"
    )


class OfTwoSources:
    """Ten held-out documents of 100 tokens from each of two sources."""

    lengths = np.full(20, 100)
    sources = np.repeat([0, 1], 10)
    source_names = ("a", "b")
    manifest: ClassVar[dict] = {}

    def __len__(self):
        return 20


def settled_steps(total_steps, progress):
    """Steps between evaluations of a run of 1,000 tokens a step, which may read 600 held-out tokens each time."""
    settled = resolve_evaluation_interval(
        SimpleNamespace(evaluation=EvaluationConfig(max_documents=3), batch={"global": 1}),
        SimpleNamespace(evaluation=OfTwoSources()),
        SimpleNamespace(data_spec=SimpleNamespace(sequences_per_document=1), substitutions={}),
        SimpleNamespace(unit_tokens=np.array([1000.0])),
        total_steps,
        progress,
        SimpleNamespace(dp_rank=0, dp_size=1, sequence_size=1),
    )
    return settled.steps


def test_documents_of_each_source_count_where_their_number_is_bounded():
    """`evaluation.max_documents` is of each source, as in the evaluations themselves."""
    assert settled_steps(100, Progress()) == 12  # 600 tokens are 5 % of twelve steps


def test_extended_run_keeps_its_interval_unless_it_was_too_short_for_one():
    progress = Progress()
    assert [settled_steps(steps, progress) for steps in (12, 100, 1000)] == [0, 12, 12]
