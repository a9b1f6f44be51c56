"""`strategy=auto`, as a run chooses it: tried by all ranks, the next where memory runs out, frozen once."""

import pytest

from launch.cluster.oom_retry import write_smaller_settings
from launch.config.compose import compose_config
from launch.config.frozen import load_frozen_config
from launch.plan.command import compose_planned_run as planned
from launch.runs.freeze import write_run_config
from strategies.errors import ConfigError, OutOfMemory
from tests.faults.runs import read
from tests.helpers.nursery import FAULT
from trainer.planner.hardware import find_card
from trainer.reporting.status import record_failure

WORDS = ["launcher.processes=2", "batch.global=8", "batch.micro=4", "budget.steps=2"]


def test_strategy_auto_takes_the_next_where_memory_runs_out_and_trains_as_if_typed(runs, little, monkeypatch):
    """DDP finds no memory on either rank; what was tried before leaves nothing behind."""
    little(-1, holds=0, since=1)
    monkeypatch.setenv("LITTLE_UNDER", "ddp")
    words = [*WORDS, "optim=muon", "tuning=full"]  # which ZeRO does not run
    code, said = runs.run_here("chosen", "strategy=auto", *words)
    assert code == 0 and "Traceback" not in said, said
    assert "strategy=ddp runs out of memory; trying the next" in said
    note = "auto -> hsdp (not planned: not asked; 2 steps of the longest documents held; ddp ran out of memory)"
    assert f"resolved: strategy: {note}" in said
    record = read(runs.root / "chosen" / "run.json")
    assert (record["strategy"], record["substitutions"]["strategy"]) == ("hsdp", note)
    assert load_frozen_config(runs.root / "chosen" / "config.yaml").strategy.name == "hsdp"
    # The same words are still those of this run, which is finished.
    assert "already finished with this configuration" in runs.run_here("chosen", "strategy=auto", *words)[1]
    monkeypatch.delenv(FAULT)
    assert runs.run_here("told", "strategy=hsdp", *words)[0] == 0
    assert runs.curve("chosen") == runs.curve("told") != []


def test_strategy_auto_asks_for_a_new_start_when_one_rank_alone_runs_out(runs):
    """The launcher writes down what was tried; the run stays the one that was asked for."""
    words = runs.words("auto-again", "strategy=auto", *WORDS)[4:]
    run_dir = write_run_config(compose_config(words), runs.root / "auto-again")
    assert write_smaller_settings(run_dir) is None  # nothing has failed
    record_failure(
        run_dir, 0, RuntimeError("strategy=auto: with strategy=ddp rank 1 runs out"), "choosing the strategy"
    )
    assert write_smaller_settings(run_dir) is None  # a message alone decides nothing
    (run_dir / "failure.json").unlink()
    for number, tried in enumerate(("ddp", "zero1"), 1):
        error = OutOfMemory("rank 1 runs out of memory, and the others do not", ran_out_with={"strategy": tried})
        record_failure(run_dir, 0, error, "choosing the strategy")
        assert write_smaller_settings(run_dir) == f"without strategy={tried}"
        (run_dir / "failure.json").unlink()
        frozen = load_frozen_config(write_run_config(compose_config(words), run_dir) / "config.yaml")
        trials = frozen.resolution("strategy").tried
        assert [trial.choice for trial in trials] == ["ddp", "zero1"][:number]
        assert frozen.strategy.name == "auto"


def test_strategy_auto_choice_is_replaced_by_a_strategy_typed_later(runs):
    words = runs.words("typed", "strategy=auto", *WORDS)[4:]
    run_dir = write_run_config(compose_config(words), runs.root / "typed")
    told = compose_config([*(word for word in words if word != "strategy=auto"), "strategy=fsdp2"])
    assert (
        load_frozen_config(write_run_config(told, run_dir, may_change_strategy=True) / "config.yaml").strategy.name
        == "fsdp2"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["strategy.stage=2"], "strategy.stage=2: needs strategy=zero1|zero2|zero3"),
        (["optim=adamw_8bit", "strategy.memory_gib=3"], "no strategy can run this"),
        (["budget.steps=0"], "budget.steps=0: "),
    ],
)
def test_strategy_auto_refuses_what_no_strategy_can_run(runs, words, said):
    with pytest.raises(ConfigError, match=said.replace("|", "[|]")):
        compose_config([*runs.words("bad", "strategy=auto", *WORDS)[4:], *words])


def test_strategy_auto_in_a_plan_looks_at_all_strategies(runs):
    typed = planned([f"model.path={runs.model}", "strategy=auto"], find_card("NVIDIA A10G"))[1]
    assert "strategy" not in typed
