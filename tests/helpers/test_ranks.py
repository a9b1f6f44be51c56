"""A case that fails, dies or hangs fails alone; the next one is computed by new ranks."""

import time

import pytest

from tests.helpers import speed
from tests.helpers.launching import ended
from tests.helpers.ranks import Ranks


@pytest.fixture
def ranks(tmp_path):
    some = Ranks("tests.helpers.echo_job", 2, tmp_path)
    yield some
    some.stop()


def test_ranks_stay_up_between_cases_and_answer_a_case_once(ranks):
    first, again, other = ranks.ask("echo", 1), ranks.ask("echo", 1), ranks.ask("echo", 2)
    assert first == again == [1, first[1]] and other == [2, first[1]]
    assert ranks.starts == 1
    ranks.stop()
    assert ended(first[1])


def test_ranks_are_renewed_after_many_cases(ranks, monkeypatch):
    monkeypatch.setattr("tests.helpers.ranks.RENEWED_AFTER", 2)
    pids = [ranks.ask("echo", number)[1] for number in range(5)]
    assert len(set(pids)) == ranks.starts == 3 and pids[0] == pids[1] != pids[2]


def test_a_test_that_is_broken_off_leaves_no_answer_to_the_next(ranks, monkeypatch):
    _, pid = ranks.ask("echo")

    def broken_off(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tests.helpers.ranks.wait", broken_off)
        with pytest.raises(KeyboardInterrupt):
            ranks.ask("echo", 1)
    assert ended(pid)
    assert ranks.ask("echo", 2)[0] == 2


@pytest.mark.parametrize(
    ("what", "said"),
    [("fail", "rank 1 does not like it"), ("die", "its last words"), ("hang", r"no answer within .* ranks \[1\]")],
)
def test_ranks_case_that_fails_is_one_failure_and_the_next_runs(ranks, monkeypatch, what, said):
    monkeypatch.setattr("tests.helpers.ranks.START_S", 20)
    _, pid = ranks.ask("echo")
    begun = time.monotonic()
    for _ in range(2):  # asked a second time, it is not tried again
        with pytest.raises(pytest.fail.Exception, match=said):
            ranks.ask(what, limit_s=1)
    assert ended(pid) and ranks.starts == 1
    assert time.monotonic() - begun < speed.seconds(30)
    assert ranks.ask("echo", 3)[0] == 3
    assert ranks.starts == 2
