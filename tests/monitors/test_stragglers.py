"""A rank that holds the others up is named by what it computes itself; one that waits, or has more to do, is not."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from strategies.runtime import Runtime
from tests.faults.runs import Runs, read
from tests.helpers.covering import EVERYTHING
from tests.helpers.nursery import FAULT
from trainer.monitors.stragglers import INTERVALS_TO_CONFIRM, SlowRank, Stragglers, slowness_factor
from trainer.reporting.block_times import BlockTimer, timed_modules
from trainer.reporting.metrics import RankTime
from trainer.session.announcements import build_slow_rank_reporter

FACTOR = 1.5


def times(*seconds, tokens=(), step_s=1.0):
    counts = tokens or (100,) * len(seconds)
    return [RankTime(seconds=each, tokens=count, step_s=step_s) for each, count in zip(seconds, counts, strict=True)]


@pytest.mark.parametrize(
    ("given", "rank", "factor"),
    [
        (times(0.1, 0.3), 1, 3.0),
        (times(0.1, 0.3), 0, 1.0),
        (times(0.1, 0.1, 0.2, 0.5), 3, 5.0),
        (times(0.1, 0.3, tokens=(100, 300)), 1, 1.0),  # has more to do
        (times(0.1, 0.03, tokens=(100, 10)), 1, 1.0),  # its few tokens bear more of what every pass costs
        (times(0.001, 0.003), 1, 1.0),  # of a step of a second
    ],
)
def test_how_slow_a_rank_is(given, rank, factor):
    assert slowness_factor(rank, given) == pytest.approx(factor)


def watched(rounds):
    told: list[tuple[str, int]] = []
    watch = Stragglers(
        FACTOR, Runtime(0, 1, 0, 1, torch.device("cpu"), None), lambda slow, still, step: told.append((str(slow), step))
    )
    watch._unconfirmed_factors_by_rank = [[], [], []]
    for step, given in enumerate(rounds, 1):
        row: dict = {"step": step}
        watch.add_times_and_find_slow_ranks([row], given)
    return watch, told, row


def test_straggler_is_slow_or_no_longer_slow_after_several_intervals_in_a_row(monkeypatch):
    monkeypatch.setattr("trainer.monitors.stragglers.gather_objects", lambda value, runtime: ["a", "b", "c"])
    odd, even = times(0.1, 0.1, 0.2), times(0.1, 0.1, 0.1)
    assert watched([*[odd] * (INTERVALS_TO_CONFIRM - 1), even] * 5)[1] == []
    assert watched([times(0.2, 0.1, 0.1), odd] * 20)[1] == []  # now this one, now that one
    watch, told, row = watched([even] * 3 + [odd] * INTERVALS_TO_CONFIRM + [even] * INTERVALS_TO_CONFIRM)
    assert [step for _, step in told] == [3 + INTERVALS_TO_CONFIRM, 3 + 2 * INTERVALS_TO_CONFIRM]
    assert told[0][0] == "rank 2 on c computes 2.0 times as long as the other ranks"
    assert row == {"step": 13, "blocks_s": 0.1, "blocks_s/worst": 0.1, "blocks_s/rank": 0}
    assert watch.record() == [
        {
            "rank": 2,
            "host": "c",
            "factor": 2.0,
            "from_step": 3 + INTERVALS_TO_CONFIRM,
            "until_step": 3 + 2 * INTERVALS_TO_CONFIRM,
        }
    ]


def test_straggler_timing_covers_only_blocks_and_only_while_it_is_on(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("trainer.reporting.step_times.time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    blocks = [nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)) for _ in range(2)]
    busy, model = BlockTimer(torch.device("cpu")), nn.Sequential(*blocks)
    busy.watch(blocks, has_collectives_inside=False)
    model(torch.ones(2))
    assert busy.read() == 0
    busy.is_on = True
    model(torch.ones(2))
    assert (busy.read(), busy.read()) == (2.0, 0)
    with_weights = [block[place] for block in blocks for place in (0, 2)]
    assert timed_modules(blocks, has_collectives_inside=False) == blocks
    # Attention that exchanges slices for heads waits for the ranks that share the row.
    assert timed_modules(blocks, has_collectives_inside=True) == with_weights
    # Experts that are distributed wait for tokens of other ranks, and their module is left out.
    blocks[1][0].expert_share = object()
    assert timed_modules(blocks, has_collectives_inside=False) == [blocks[0][0], blocks[0][2], blocks[1][2]]
    del blocks[1][0].expert_share
    for parameter in model.parameters():
        parameter.ds_id = 1  # as under ZeRO-3
    assert timed_modules(blocks, has_collectives_inside=False) == with_weights
    blocks[0].compile()
    assert timed_modules(blocks, has_collectives_inside=False) == []


def test_straggler_is_in_the_status_while_it_is_slow(tmp_path):
    said: list[str] = []
    where = SimpleNamespace(reason_run_dir_was_lost=lambda: None, note=None)
    tell = build_slow_rank_reporter(
        SimpleNamespace(run_dir=tmp_path, attempt=where, console=SimpleNamespace(print_line=said.append))
    )
    slow = SlowRank(rank=3, host="node7", factor=1.84, from_step=120)
    tell(slow, [slow], 120)
    status = read(tmp_path / "status.json")
    why = "rank 3 on node7 computes 1.8 times as long as the other ranks, from step 120 on"
    assert (status["state"], status["step"], status["reason"], status["slow"][0]["rank"]) == ("running", 120, why, 3)
    slow.until_step = 170
    tell(slow, [], 170)
    assert (read(tmp_path / "status.json")["reason"], read(tmp_path / "status.json")["slow"]) == (None, [])
    assert said == [
        "warning: step 120: rank 3 on node7 computes 1.8 times as long as the other ranks",
        "step 170: rank 3 on node7 is as fast as the other ranks again",
    ]
    where.reason_run_dir_was_lost = lambda: "another attempt has it"
    (tmp_path / "status.json").unlink()
    tell(slow, [], 171)
    assert not (tmp_path / "status.json").exists()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("slow"))


def words(strategy: str) -> list[str]:
    return [
        f"strategy={strategy}",
        "launcher.processes=2",
        f"budget.steps={2 * INTERVALS_TO_CONFIRM}",
        "checkpoint.save_final=false",
    ]


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp", "zero2", "zero3"] if EVERYTHING else ["fsdp2"])
def test_straggler_that_is_slowed_is_named_and_a_healthy_run_names_none(site, monkeypatch, strategy):
    monkeypatch.setenv(FAULT, "tests.faults.slow_rank")
    monkeypatch.setenv("SLOW_RANK", "1")
    monkeypatch.setenv("SLOW_S", "0")
    code, said = site.run_here(f"healthy-{strategy}", *words(strategy))
    assert code == 0 and "times as long as the other ranks" not in said, said
    assert read(site.root / f"healthy-{strategy}" / "run.json")["outcome"]["slow_ranks"] == []
    monkeypatch.setenv("SLOW_S", "9")
    code, said = site.run_here(f"slow-{strategy}", *words(strategy))
    assert code == 0, said
    [slow] = read(site.root / f"slow-{strategy}" / "run.json")["outcome"]["slow_ranks"]
    assert slow["rank"] == 1 and slow["factor"] > FACTOR and slow["from_step"] >= INTERVALS_TO_CONFIRM
    assert f"warning: step {slow['from_step']}: {SlowRank(**slow)}" in said and "slow:" in said
    assert {row["blocks_s/rank"] for row in site.rows(f"slow-{strategy}")} == {1}
    assert site.status(f"slow-{strategy}")["state"] == "done"
