"""A run that runs out of memory goes on by itself with half of `batch.micro`, where asked, on the curve of one that has that."""

import pytest

from launch.cluster.oom_retry import write_smaller_settings
from launch.config.compose import compose_config
from launch.config.frozen import load_frozen_config, rewrite_config_with_own_choices
from launch.runs.freeze import write_run_config
from tests.faults.runs import read
from tests.helpers.nursery import FAULT
from trainer.reporting.status import record_failure

WORDS = ["strategy=ddp", "launcher.processes=2", "batch.global=16", "batch.micro=4", "budget.steps=5"]
SAVED = ["checkpoint.every_steps=2", "checkpoint.keep=9", "checkpoint.background=false"]
ASKED = "launcher.retry={out_of_memory: 2}"


def test_a_rank_out_of_memory_is_healed_by_half_the_micro_batch(runs, little, monkeypatch):
    """Rank 1 alone cannot hold four documents from step 4 on; the last checkpoint is that of step 2."""
    little(1, holds=2, since=4)
    code, said = runs.run_here("healed", *WORDS, *SAVED, ASKED)
    assert code == 0 and "Traceback" not in said, said
    assert "started again (out_of_memory; 1 more times), batch.micro: 4 -> 2" in said
    assert "resumed from step-000002" in said and "batch: 16 = 2 micro x 4 accumulation x 2 ranks" in said
    note = "4 -> 2 (4 ran out of memory at step 4)"
    assert f"resolved: batch.micro: {note}" in said
    assert read(runs.root / "healed" / "run.json")["substitutions"]["batch.micro"] == note
    assert runs.status("healed")["state"] == "done" and not (runs.root / "healed" / "failure.json").exists()
    # The same words are still those of this run, which is finished.
    assert "already finished with this configuration" in runs.run_here("healed", *WORDS, *SAVED)[1]

    monkeypatch.delenv(FAULT)
    state = f"run.resume={runs.root / 'healed' / 'checkpoints' / 'step-000002'}"
    code, said = runs.run_here("asked", *WORDS, *SAVED, "batch.micro=2", state)
    assert code == 0, said
    assert runs.curve("healed")[2:] == runs.curve("asked") != []
    assert [row["step"] for row in runs.rows("healed")] == [1, 2, 3, 4, 5]


def test_out_of_memory_with_nothing_left_to_halve_ends_with_its_message(runs, little):
    little(0, holds=0, since=1)
    words = [
        "launcher.processes=1",
        "batch.global=8",
        "batch.micro=2",
        "budget.steps=3",
        "launcher.retry={out_of_memory: 9}",
    ]
    code, said = runs.run_here("nothing", *words)
    assert code == 69 and "Traceback" not in said, said
    assert said.count("started again (out_of_memory") == 1 and "batch.micro: 2 -> 1" in said  # from its start
    assert said.rstrip().splitlines()[-1].lstrip().startswith("what helps: strategy.activation_checkpointing=full")
    assert read(runs.root / "nothing" / "failure.json")["retry"] is None


@pytest.mark.parametrize(
    ("asked", "lowered", "notes"),
    [
        (
            "9",
            [3, 1, None],
            ["9 -> 3 (9 ran out of memory at step 3)", "9 -> 1 (9 ran out of memory at step 3; 3 ran"],
        ),
        ("auto -> 6", [3, 1, None], ["auto -> 3 (planned 2.00 of 3.00 GiB; 6 ran out of memory at step 3)"]),
    ],
)
def test_out_of_memory_retry_notes_the_asked_and_all_tried_micro_batches(runs, asked, lowered, notes):
    name = asked.replace(" -> ", "-")
    micro = asked.rpartition(" ")[2]
    words = runs.words(name, "batch.global=72", f"batch.micro={asked.partition(' ')[0]}")[4:]
    run_dir = write_run_config(compose_config(words), runs.root / name)
    if "auto" in asked:
        chosen = load_frozen_config(run_dir / "config.yaml")
        chosen.batch["micro"], chosen.substitutions["batch.micro"] = int(micro), f"{asked} (planned 2.00 of 3.00 GiB)"
        rewrite_config_with_own_choices(run_dir, chosen)
    record_failure(run_dir, 0, RuntimeError("memory"), "training", 3)
    for step, size in enumerate(lowered):
        assert (write_smaller_settings(run_dir) is None) == (size is None)
        frozen = load_frozen_config(run_dir / "config.yaml")  # which checks that it is the run which was asked for
        assert frozen.batch["micro"] == (size or 1)
        if step < len(notes):
            assert str(frozen.substitutions["batch.micro"]).startswith(notes[step])
        # A job script that reads its words once more goes on from there, also before the first checkpoint.
        assert (
            load_frozen_config(write_run_config(compose_config(words), run_dir) / "config.yaml").batch["micro"]
            == frozen.batch["micro"]
        )
