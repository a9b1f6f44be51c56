"""A run goes on by the same command on fewer or more ranks and under another strategy, on the curve of one left alone."""

import pytest

WORDS = ["batch.global=8", "batch.micro=2", "budget.steps=6", "checkpoint.every_steps=1", "checkpoint.background=false"]


def test_elastic_run_resumes_on_other_ranks_and_strategies_without_a_setting(runs, little):
    assert runs.run_here("elastic-alone", *WORDS)[0] == 0
    little(1, holds=0, since=4)  # what ends it does not matter
    code, said = runs.run_here("elastic", *WORDS, "strategy=fsdp2", "launcher.processes=2")
    assert code == 69 and len(runs.rows("elastic")) == 3, said
    logs = {name: (runs.root / f"elastic/logs/rank-{name}.log").read_text() for name in (0, 1)}
    assert "checkpoint step-000003: " in logs[0] and "checkpoint step-" not in logs[1], "rank 1 knows no sizes"
    code, said = runs.run_here("elastic", *WORDS, "batch.micro=3")
    assert code == 64 and "batch.micro" in said and "Traceback" not in said  # with what is legal
    code, said = runs.run_here("elastic", *WORDS, "batch.micro=4")  # single, in this process
    assert code == 0 and "resumed from step-000003" in said, said
    assert "resumes in another way: batch.micro: 2 there, 4 here; strategy." in said
    found, expected = runs.curve("elastic"), runs.curve("elastic-alone")
    assert [step for step, *_ in found] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
