"""The end of a real run that has learned four documents by heart: which weights leave it, and what is said of test documents."""

import gc
import json
import random
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from launch.compare.run_files import read_recorded_run
from launch.compare.run_page.verdict import run_verdict
from strategies.errors import StorageError
from tests.helpers.building import model_dir
from tests.helpers.launching import command_here
from tests.helpers.tokenizers import write_jsonl
from trainer.reporting.results import kept_reports

WORDS = ("quick", "brown", "fox", "jumps", "over", "lazy")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(directory, words) of a run that patience ended. Its test documents ask what its evaluation documents ask."""
    root = tmp_path_factory.mktemp("tested")
    model_dir(root)
    draw = random.Random(0)

    def rows(count):
        questions = [f"{number} {draw.choice(WORDS)}\n" for number in range(count)]
        return [{"prompt": question, "completion": " ".join(draw.choices(WORDS, k=6))} for question in questions]

    held_out = rows(12)
    words = [f"model.path={root}/llama", f"data.path={write_jsonl(root / 'train.jsonl', rows(4))}"]
    words += [f"data.eval_path={write_jsonl(root / 'eval.jsonl', held_out)}"]
    words += [f"data.test_path={write_jsonl(root / 'test.jsonl', held_out)}", f"data.cache_dir={root}/cache"]
    words += [
        f"run.dir={root}/run",
        "run.device=cpu",
        "run.threads=1",
        "logging.wandb=disabled",
        "logging.report=false",
    ]
    words += ["optim.lr=1e-2", "schedule=constant", "batch.global=4", "batch.micro=4", "budget.steps=40"]
    words += [
        "evaluation.every_steps=3",
        "evaluation.patience=2",
        "checkpoint.every_steps=3",
        'gates={test/loss: "<9"}',
    ]
    frozen = gc.get_freeze_count()
    assert command_here(["train", *words]) == 0
    assert gc.get_freeze_count() <= frozen  # else a process that trains again keeps the optimizer of this run
    return root / "run", words


def record(run_dir):
    return json.loads((run_dir / "run.json").read_text())


def held_out_losses(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}


def test_best_checkpoint_leaves_a_run_that_got_worse_and_the_last_lines_say_so(run):
    run_dir, _ = run
    losses = held_out_losses(run_dir)
    best_step, last_step = min(losses, key=losses.__getitem__), max(losses)
    assert 0 < best_step < last_step < 40 and record(run_dir)["outcome"]["stopped_early"]
    chosen = record(run_dir)["exported_checkpoint"]
    assert (chosen["step"], chosen["which"]) == (best_step, "best")
    exported = load_file(run_dir / "export" / "model.safetensors")
    trained = load_file(next((run_dir / "checkpoints" / f"step-{best_step:06d}").glob("*.safetensors")))
    weights = [name for name in trained if name.endswith("/weight")]
    assert len(weights) > 5
    for name in weights:
        assert torch.equal(exported[name.removesuffix("/weight")].view(-1), trained[name])

    last_lines = (run_dir / "logs" / "rank-0.log").read_text().rpartition("done: ")[2]
    assert f"{run_dir}/export (step {best_step}, the best: eval/loss was {losses[best_step]:.4f} there" in last_lines
    assert f"overfits?   yes: held-out loss best at step {best_step}" in last_lines
    assert "fewer steps or more data" in last_lines and "next:       shardtune chat" in last_lines
    assert "warning:    early_stopping, since step" in last_lines, "patience that ended the run is a finding"
    card = (run_dir / "export" / "README.md").read_text()
    assert f"the weights of step {best_step}, the best checkpoint" in card
    assert f"| eval/loss | {losses[0]:.4f} | {losses[best_step]:.4f} |" in card


def test_test_metrics_are_those_of_the_exported_weights_and_stand_in_record_card_and_gate(run):
    run_dir, _ = run
    measured = record(run_dir)["test"]
    losses = held_out_losses(run_dir)
    # The same rows, by the pass of another moment, are evaluation documents too: a second opinion on the number.
    assert measured["metrics"]["test/loss"] == pytest.approx(min(losses.values()), rel=1e-6)
    assert (measured["documents"], measured["looks"]) == (12, 1) and losses[measured["step"]] == min(losses.values())
    (gate,) = record(run_dir)["gates"]["gates"]
    assert gate["passed"] and gate["value"] == measured["metrics"]["test/loss"]
    card = (run_dir / "export" / "README.md").read_text()
    assert "12 documents that were neither trained on nor chosen by, looked at once" in card
    assert f"| test/loss | {measured['metrics']['test/loss']:.4f} |" in card
    assert "test/" not in (run_dir / "metrics.jsonl").read_text(), "where somebody could stop or choose by them"


def test_run_that_was_killed_in_its_export_ends_alike_without_another_look_or_step(run, tmp_path):
    run_dir, words = run
    again = shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(again / "export")
    status = json.loads((again / "status.json").read_text())
    (again / "status.json").write_text(json.dumps({**status, "state": "preempted"}))
    steps = (again / "metrics.jsonl").read_text().splitlines()
    assert command_here(["train", *words, f"run.dir={again}"]) == 0
    assert (again / "metrics.jsonl").read_text().splitlines() == steps
    assert (again / "events.jsonl").read_text() == (run_dir / "events.jsonl").read_text(), "patience ended it once"
    assert record(again)["exported_checkpoint"] == record(run_dir)["exported_checkpoint"]
    assert record(again)["test"] == record(run_dir)["test"]
    same_bytes = (again / "export" / "model.safetensors").read_bytes()
    assert same_bytes == (run_dir / "export" / "model.safetensors").read_bytes()


def test_best_checkpoint_that_was_damaged_since_is_not_exported(run, tmp_path, capfd):
    run_dir, words = run
    again = shutil.copytree(run_dir, tmp_path / "run")
    status = json.loads((again / "status.json").read_text())
    (again / "status.json").write_text(json.dumps({**status, "state": "preempted"}))
    best_step = record(run_dir)["exported_checkpoint"]["step"]
    tensors = next((again / "checkpoints" / f"step-{best_step:06d}").glob("*.safetensors"))
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    assert command_here(["train", *words, f"run.dir={again}"]) == StorageError.exit_code
    assert "bring it back, or export the last one with export.checkpoint=last" in capfd.readouterr().err


def test_verbs_take_what_was_exported_and_of_an_earlier_version_the_last(run, tmp_path):
    from launch.export.checkpoint_choice import find_checkpoint
    from trainer.checkpoints.config import CheckpointConfig

    run_dir, _ = run
    losses = held_out_losses(run_dir)
    best_step = min(losses, key=losses.__getitem__)
    assert find_checkpoint(run_dir, "auto", CheckpointConfig()).name == f"step-{best_step:06d}"
    earlier = shutil.copytree(run_dir, tmp_path / "run")
    without = {key: value for key, value in record(earlier).items() if key != "exported_checkpoint"}
    (earlier / "run.json").write_text(json.dumps(without))
    assert find_checkpoint(earlier, "auto", CheckpointConfig()).name == f"step-{max(losses):06d}"


def test_each_look_is_counted_and_the_comparison_shows_them_last(run, tmp_path, capsys):
    run_dir = shutil.copytree(run[0], tmp_path / "run")
    assert command_here(["evaluate", str(run_dir), "split=test", "checkpoint=last", "run.threads=1"]) == 0
    text = capsys.readouterr().out
    assert "12 test documents, looked at twice so far" in text
    assert record(run_dir)["test"] == {**record(run[0])["test"], "looks": 2}, (
        "the result stays that of the exported weights"
    )
    last, first = kept_reports(run_dir, "test")
    assert last.report["metrics"]["test/loss"] > first.report["metrics"]["test/loss"]
    assert f"{last.report['metrics']['test/loss']:.4f}" in text
    assert command_here(["compare", str(run_dir), str(run[0]), f"to={tmp_path}/compared"]) == 0
    last_section = capsys.readouterr().out.rpartition("test documents (no answer")[2]
    assert "looked at twice" in last_section and "looked at once" in last_section and "verdict:" not in last_section


def test_comparison_and_page_say_that_an_earlier_step_than_the_last_is_exported(run, tmp_path, capsys):
    run_dir, _ = run
    losses = held_out_losses(run_dir)
    best_step, last_step = min(losses, key=losses.__getitem__), max(losses)
    exports = f"exports step {best_step}, with eval/loss {losses[best_step]:.4f} "
    exports += f"({losses[last_step]:.4f} at the last step, {last_step})"
    assert command_here(["compare", str(run_dir), f"to={tmp_path}/one"]) == 0
    [verdict] = re.findall(r"verdict:\n(.*?)\n\n", capsys.readouterr().out, re.DOTALL)
    assert exports in " ".join(verdict.split())

    other = shutil.copytree(
        run_dir, tmp_path / "last"
    )  # this one exports its last step, of which there is nothing to say
    changed = record(other)
    changed["exported_checkpoint"] |= {"step": last_step, "which": "last"}
    (other / "run.json").write_text(json.dumps(changed))
    assert command_here(["compare", str(run_dir), str(other), f"to={tmp_path}/two"]) == 0
    answer = " ".join(capsys.readouterr().out.split())
    assert answer.count(" exports step ") == 1 and exports in answer
    assert "The held-out metrics are those of the last step" in answer
    assert f"It {exports}" in run_verdict(read_recorded_run(run_dir)).text
    assert "exports" not in run_verdict(read_recorded_run(other)).text


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["evaluate", "{run}", "split=test", "against=base"], "against=base: split=test measures one model"),
        (["evaluate", "{run}", "split=test", "evaluation.tasks=[loss]"], "runs no task; leave it out"),
        (["evaluate", "{run}", "split=tset"], "did you mean test"),
        (["train", "{words}", "evaluation.watch=test/loss", "run.dir={run}2"], "nothing may be chosen by them"),
        (
            [
                "train",
                "-m",
                "{words}",
                "sweeper=optuna",
                "optim.weight_decay=range(0.01,0.1)",
                "sweeper.metric=test/loss",
            ],
            "chosen",
        ),
    ],
)
def test_nothing_may_choose_by_the_test_documents(run, command, told, capsys):
    run_dir, words = run
    argv = []
    for word in command:
        kept = [each for each in words if not each.startswith("run.dir")]
        argv += kept if word == "{words}" else [word.format(run=run_dir)]
    assert command_here(argv) == 64
    captured = capsys.readouterr()
    assert told in captured.err + captured.out
