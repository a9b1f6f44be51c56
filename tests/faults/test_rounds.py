"""Runs that write what they learn from, stopped in each part of a round: they end at once, and go on bit for bit."""

import signal

import pytest

from tests.faults.runs import forked_rank_of, wait
from tests.helpers.covering import EVERYTHING, whole
from tests.helpers.tokenizers import write_jsonl

REWARDS = """
import pathlib, time

def even(completion_ids, completions, step, **_):
    held = pathlib.Path({held!r})
    if step == 2 and (held / "hold").exists():
        (held / "scoring").touch()
        while (held / "hold").exists():
            time.sleep(0.02)
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
"""


@pytest.fixture(scope="module")
def words(site):
    """Words of a run of rounds, whose rewards wait at the third step for as long as there is a file `hold`."""
    write_jsonl(site.root / "prompts.jsonl", [{"prompt": f"question {n}", "answer": str(n)} for n in range(24)])
    (site.root / "rewards.py").write_text(REWARDS.format(held=str(site.root)))
    return [
        *("objective=grpo", "objective.group_size=4", f"objective.rewards={site.root / 'rewards.py'}"),
        "objective.reward_workers=1",  # more of them would only take longer to begin
        *("objective.rollout.max_new_tokens=6", "batch.global=8", "batch.micro=3", "tuning=full", "budget.steps=5"),
        f"data.path={site.root / 'prompts.jsonl'}",
    ]


STRATEGIES = ("fsdp2", *(("single", "zero3") if EVERYTHING else ()))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_stop_while_answers_are_scored_loses_no_step_and_changes_no_curve(runs, words, strategy):
    """The signal comes while a reward hangs: the run saves the step before the round, and the round is written again."""
    ranks = [] if strategy == "single" else ["launcher.processes=2"]
    words = [*words, f"strategy={strategy}", *ranks]
    code, said = runs.run_here(f"{strategy}-calm", *words)
    assert code == 0, said
    (runs.root / "hold").touch()
    (runs.root / "scoring").unlink(missing_ok=True)
    stopped = runs.start(f"{strategy}-stopped", *words, paced=False, ranks=True)
    wait(lambda: (runs.root / "scoring").exists(), "scoring", stopped)
    told = stopped if strategy == "single" else forked_rank_of(stopped.pid, 1)
    told.send_signal(signal.SIGUSR2)
    assert runs.end(stopped) == 75
    (runs.root / "hold").unlink()
    status = runs.status(f"{strategy}-stopped")
    assert (status["state"], status["step"]) == ("preempted", 2)
    code, said = runs.run_here(f"{strategy}-stopped", *words)
    assert code == 0, said
    assert runs.curve(f"{strategy}-stopped") == runs.curve(f"{strategy}-calm")


def test_a_stop_between_the_steps_of_a_round_keeps_the_round(runs, words):
    """Rounds of two steps, taken twice: stopped between two of them, and started again."""
    words = [*words, "objective.rollout.steps=2", "objective.rollout.iterations=2", "budget.steps=6"]
    code, said = runs.run_here("rounds-calm", *words)
    assert code == 0, said
    between = 0
    for step in (1, 3) if EVERYTHING else (1,):
        process = runs.start("rounds-stopped", *words, **runs.held_at("rounds-stopped", step))
        runs.wait_for_step("rounds-stopped", step, process)
        process.send_signal(signal.SIGTERM)
        assert runs.end(process) == 75
        stopped_at = runs.status("rounds-stopped")["step"]
        checkpoint = runs.root / "rounds-stopped" / "checkpoints" / f"step-{stopped_at:06d}"
        assert (checkpoint / "round.safetensors").exists() == (stopped_at % 4 != 0)
        between += stopped_at % 4 != 0
    code, said = runs.run_here("rounds-stopped", *words)
    assert code == 0, said
    assert runs.curve("rounds-stopped") == runs.curve("rounds-calm")
    assert between


@whole("rounds are parity-tested under every strategy, and other runs change strategy in test_elastic.py")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("single", 1), ("zero3", 2)),
        (("fsdp2", 2), ("single", 1)),
        (("zero2", 2), ("fsdp2", 3)),
        (("zero3", 2), ("ddp", 2)),
    ],
)
def test_a_round_that_one_strategy_wrote_is_finished_under_another(runs, words, before, after):
    """Rounds of two steps, stopped after the first step of one: its answers come from the checkpoint, on any number of ranks."""

    def layout(strategy, ranks):
        return [f"strategy={strategy}", *([f"launcher.processes={ranks}"] if ranks > 1 else [])]

    words = [*words, "objective.rollout.steps=2", "batch.micro=2"]
    if not (runs.root / "elastic-calm").exists():
        code, said = runs.run_here("elastic-calm", *words)
        assert code == 0, said
    name = f"{before[0]}-{after[0]}"
    process = runs.start(name, *words, *layout(*before), ranks=True, **runs.held_at(name, 3))
    runs.wait_for_step(name, 3, process)
    # What forked the ranks passes no signal on.
    told = process if before[1] == 1 else forked_rank_of(process.pid, 1)
    told.send_signal(signal.SIGUSR2)
    assert runs.end(process) == 75
    stopped_at = runs.status(name)["step"]
    if stopped_at % 2:
        assert (runs.root / name / "checkpoints" / f"step-{stopped_at:06d}" / "round.safetensors").exists()
    code, said = runs.run_here(name, *words, *layout(*after))
    assert code == 0, said
    assert f"resumed from step-{stopped_at:06d}" in said
    for one, other in zip(runs.curve(name), runs.curve("elastic-calm"), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
