"""Ranks that are forked train, print and fail as those of torchrun do."""

from tests.faults.runs import Runs


def test_a_forked_run_leaves_what_a_run_leaves_and_a_failing_rank_its_reason(tmp_path):
    runs = Runs(tmp_path)
    two = ["launcher.processes=2", "strategy=ddp", "budget.steps=2"]
    code, said = runs.run_here("good", *two)
    assert code == 0 and "ddp, lora, 2 process(es)" in said and "step 2/2" in said, said
    assert [row["step"] for row in runs.rows("good")] == [1, 2] and runs.status("good")["state"] == "done"
    code, said = runs.run_here("bad", *two, "tuning.targets=[nothing]")
    assert code == 64 and "matches no module" in said, said
    assert runs.status("bad")["state"] == "failed"
