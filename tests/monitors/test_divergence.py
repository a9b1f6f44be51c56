"""A run against its own beginning: scipy's tests of the held-out side, false alarms, and whole runs that diverge or do not."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import scipy
import torch
import wandb

from launch.config.compose import compose_config
from strategies.base import Progress
from tests.helpers.building import model_dir
from tests.helpers.covering import whole
from tests.helpers.tokenizers import WORDS, write_jsonl
from tests.helpers.wandb_files import record as tracked_record
from tests.helpers.wandb_files import summary
from tests.monitors.test_detector_runs import rows, train
from trainer.evaluation.loss import _place_micro_batch_sums
from trainer.monitors.config import ChallengesConfig, DivergenceConfig, Reaction
from trainer.monitors.detectors import ChallengeDetectors
from trainer.monitors.divergence import (
    HeldOutChange,
    TrainingChange,
    Verdict,
    divergence_verdict,
    first_judged_step,
    held_out_change,
    training_change,
)
from trainer.monitors.first_evaluation import HeldOutEvaluation, HeldOutFile
from trainer.reporting.numbers import format_metric
from trainer.session.evaluation_interval import EvaluationInterval
from trainer.session.monitors import build_detectors

SAME = HeldOutChange("eval/loss", 2.0, 2.0, 0.0, -0.1)
WORSE = HeldOutChange("eval/loss", 2.0, 2.4, 0.2, 0.1)
ROSE = TrainingChange(2.0, 2.4, 9.0, 10)
FELL = TrainingChange(2.0, 0.4, -9.0, 10)


@pytest.mark.parametrize(
    ("training", "held_out", "verdict"),
    [
        (ROSE, WORSE, Verdict.diverged),
        (ROSE, SAME, None),  # data that gets harder
        (FELL, WORSE, Verdict.worse),
        (None, WORSE, Verdict.worse),
        (ROSE, None, None),  # without held-out data a fifth is not enough
        (TrainingChange(2.0, 2.6, 9.0, 10), None, Verdict.diverged),
        (TrainingChange(2.0, 2.6, 2.0, 10), None, None),  # batches differ by as much
        (ROSE, HeldOutChange("eval/loss", 2.0, math.nan, math.nan), Verdict.diverged),
        (FELL, HeldOutChange("eval/loss", 2.0, math.inf, math.inf), Verdict.diverged),  # not overfitting
        (ROSE, HeldOutChange("eval/margin", 0.0, -0.5, 0.5), None),  # too few micro-batches to tell
        (ROSE, HeldOutChange("eval/margin", 0.0, -0.5, 0.5, 0.2), Verdict.diverged),
    ],
)
def test_divergence_verdict_is_by_training_and_held_out_losses_together(training, held_out, verdict):
    assert divergence_verdict(training, held_out) is verdict


def test_the_training_side_takes_the_median_of_the_last_steps_and_their_deviation():
    drawn = np.random.default_rng(0)
    noisy = np.exp(drawn.normal(0, 0.5, 40))
    change = training_change(0.1, noisy, 40)
    logs = np.log(noisy)
    around = scipy.stats.median_abs_deviation(logs, scale="normal")
    between = np.median(np.abs(np.diff(logs))) / scipy.stats.norm.ppf(0.75) / math.sqrt(2)
    assert change.now == pytest.approx(np.median(noisy))
    assert change.deviations == pytest.approx((np.median(logs) - math.log(0.1)) / max(around, between), rel=1e-3)
    assert training_change(1.0, noisy[:9], 10) is None and training_change(None, noisy, 10) is None
    falling = [781, 500, 300, 250, 200, 180, 160, 150, 130, 127]  # after an explosion, far above its beginning
    assert training_change(10.9, falling, 10).rose_by(0.25)
    runs = [np.exp(drawn.normal(0, 0.5, 31)) for _ in range(200)]
    alarms = [training_change(run[0], list(run), 10).rose_by(0.25) for run in runs]
    assert sum(alarms) <= 2  # of 200: an easy first batch is no divergence


def test_divergence_of_held_out_losses_is_a_paired_test():
    drawn = np.random.default_rng(1)
    before = drawn.uniform(20, 60, 16)
    now = before * (1.03 + 0.02 * drawn.normal(size=16))
    change = held_out_change("eval/loss", 2.0, 2.06, (before, now), 0.01)
    ratio = now.sum() / before.sum()
    squares = ((now - ratio * before) ** 2).sum()
    error = math.sqrt(squares * 16 / 15) / before.sum()
    assert change.bound == pytest.approx(0.03 - scipy.stats.t.ppf(0.99, 15) * error, rel=1e-3)
    assert change.is_worse
    margins = drawn.normal(0, 1, 12)
    lower = margins - 0.5 + 0.1 * drawn.normal(size=12)
    change = held_out_change("eval/margin", 0.1, -0.4, (margins, lower), 0.05)
    p = scipy.stats.ttest_rel(margins, lower, alternative="greater").pvalue
    assert change.is_worse == (p < 0.05) and change.is_worse
    better = held_out_change("eval/margin", -0.4, 0.1, (lower, margins), 0.05)
    assert not better.is_worse
    few = held_out_change("eval/loss", 2.0, 2.4, (before[:4], now[:4]), 0.05)
    assert few.bound is None and not few.is_worse  # 20 %: too few micro-batches for a test, too little without one


def sums_in_order(own_sums, *, rank, ranks, ranks_per_row=1):
    """What a rank hands over of the sums of its micro-batches."""
    tensors = [torch.tensor(value, dtype=torch.float64) for value in own_sums]
    return _place_micro_batch_sums(tensors, rank, ranks, ranks_per_row)


def test_ranks_take_micro_batches_in_turns():
    parts = [sums_in_order(own, rank=rank, ranks=2) for rank, own in enumerate(([1.0, 3.0], [2.0, 0.0]))]
    assert sum(parts).tolist() == [1.0, 2.0, 3.0, 0.0]  # as one rank has them; the last one has run out


def test_ranks_that_share_rows_add_their_parts_of_a_micro_batch():
    own = ([0.25, 1.0], [0.75, 2.0], [0.5, 0.0], [1.5, 0.0])
    parts = [sums_in_order(sums, rank=rank, ranks=4, ranks_per_row=2) for rank, sums in enumerate(own)]
    assert sum(parts).tolist() == [1.0, 2.0, 3.0, 0.0]


def test_divergence_has_the_same_micro_batches_on_another_number_of_ranks():
    before = HeldOutEvaluation(
        {"eval/loss": 2.0}, {"eval/loss": [1.0, 2.0, 3.0, 0.0]}
    )  # two ranks, the last one had run out
    assert before.paired_batch_sums("eval/loss", {"eval/loss": [1.5, 2.5, 3.5]}) == ([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    wide = {"eval/loss": [1.5, 2.5, 3.5, 0.0, 0.0, 0.0]}
    assert before.paired_batch_sums("eval/loss", wide) == ([1.0, 2.0, 3.0, 0.0], [1.5, 2.5, 3.5, 0.0])
    assert before.paired_batch_sums("eval/loss", {"eval/loss": [0.7, 0.8, 1.0, 1.0, 1.5, 1.5]}) is None  # smaller ones


def test_divergence_of_a_student_that_begins_as_its_own_teacher_is_none():
    sums = [0.0] * 12
    nearly = held_out_change("eval/loss", 0.0, 0.002, (sums, [0.08] * 12), 0.05)
    assert nearly.bound is None and not nearly.is_worse
    assert held_out_change("eval/loss", 1e-6, 3.0, ([1e-5] * 12, [90.0] * 12), 0.05).is_worse
    assert not training_change(0.0, [0.002] * 20, 10).rose_by(0.25) and training_change(0.0, [3.0] * 20, 10).rose_by(
        0.25
    )


def test_divergence_of_held_out_losses_that_only_hover_is_none():
    drawn = np.random.default_rng(2)
    alarms = 0
    for _ in range(200):
        before = drawn.uniform(20, 60, 12)
        looks = []
        for _ in range(10):
            now = before * (1 + 0.1 * drawn.normal(size=12))
            values = (before.sum() / 480, now.sum() / 480)
            looks.append(held_out_change("eval/loss", *values, (before, now), 0.05 / 10).is_worse)
        alarms += any(looks)
    assert alarms <= 20  # of 200 runs: 5 %, and its chance


def looked(losses, held_out, action=Reaction.note, warmup_steps=0):
    """A run of so many steps, evaluated every ten, as the loop tells the detectors of it."""
    said = []
    config = ChallengesConfig(divergence=DivergenceConfig(action=action))
    challenges = ChallengeDetectors(config, len(held_out) or 1, "loss", said.append)
    challenges.first_judged_step = first_judged_step(warmup_steps)
    progress = Progress()
    if held_out:
        challenges.run_detectors(progress, {"eval/loss": held_out[0]})
    for step, loss in enumerate(losses, 1):
        progress.step = step
        challenges.add_step_metrics(progress, [{"step": step, "loss": loss}])
        if held_out and step % 10 == 0:
            challenges.run_detectors(progress, {"eval/loss": held_out[step // 10]})
    challenges.record_findings_of_whole_run(progress)
    return challenges, said


def test_divergence_that_recovers_is_a_note_and_the_end_decides():
    spike = [2.0] * 10 + [30.0] * 15 + [1.5] * 25
    twice, _ = looked(spike + [30.0] * 20, [2.0, 2.0, 30.0, 1.6, 1.5, 1.5, 30.0, 30.0])
    assert twice.findings_by_detector["divergence"]["first_step"] == 60, "since the second time"
    challenges, said = looked(spike, [2.0, 2.0, 30.0, 1.6, 1.5, 1.5])
    record = challenges.findings_by_detector["divergence"]
    assert not record["found"] and record["first_step"] == 20 and record["recovered_at"] == 30
    assert "diverged" in said[0] and "recovered by step 30" in said[1] and len(said) == 2
    again, said = looked([2.0] * 10 + [30.0] * 40, [])
    assert again.findings_by_detector["divergence"]["found"] and len(said) == 1  # told once, without any held-out data
    off, said = looked([2.0] * 10 + [30.0] * 40, [], Reaction.off)
    assert "divergence" not in off.findings_by_detector and not said
    stops, _ = looked([2.0] * 10 + [30.0] * 40, [], Reaction.stop)
    assert stops.stopping_finding is not None and stops.stopping_finding.step == 20


def test_divergence_is_judged_from_the_end_of_warm_up_on():
    """Not before step 20 either. While the rate rises, losses may rise and come back."""
    losses, held_out = [2.0] * 5 + [30.0] * 45, [2.0] + [30.0] * 5
    for warmup, first_step in ((0, 20), (20, 20), (21, 30), (31, 40), (45, 50)):
        challenges, said = looked(losses, held_out, warmup_steps=warmup)
        assert challenges.findings_by_detector["divergence"]["first_step"] == first_step and len(said) == 1, warmup
    risen_and_back = [2.0] * 5 + [30.0] * 20 + [1.5] * 25
    challenges, said = looked(risen_and_back, [2.0, 30.0, 30.0, 1.6, 1.5, 1.5], warmup_steps=30)
    assert challenges.findings_by_detector["divergence"] == {"found": False, "step": 30} and said == []


@pytest.mark.parametrize(
    ("settings", "first_step"),
    [
        (["schedule.warmup_share=0.5"], 40),
        (["schedule.warmup_steps=33", "schedule.warmup_share=0"], 33),
        (["schedule.warmup_share=0.1"], 20),
    ],
)
def test_divergence_is_judged_after_the_warm_up_that_a_run_is_set_to(tmp_path, settings, first_step):
    words = ["model.path=gpt2", "data.path=train.jsonl", "budget.steps=80", "run.device=cpu", *settings]
    config = compose_config(words, check=False).config
    context = SimpleNamespace(
        runtime=SimpleNamespace(is_main=True, world_size=1, simulated=False),
        run_dir=tmp_path,
        console=SimpleNamespace(print_line=print),
        attempt=SimpleNamespace(on_run_dir_renamed=[]),
    )
    built = SimpleNamespace(step_module=SimpleNamespace(objective=SimpleNamespace(comparable_term="loss")))
    interval = EvaluationInterval(steps=10, intermediate_loss_only=False)
    assert build_detectors(config, built, 80, interval, context).first_judged_step == first_step


@pytest.mark.parametrize(
    ("margin_change", "loss_change", "verdict"),
    [(0.5, 1.5, None), (-0.5, 0.5, Verdict.worse)],
    ids=["a loss that rises while answers are ranked better", "a loss that falls while answers are ranked worse"],
)
def test_preferences_are_judged_by_their_margin_and_not_by_their_loss(margin_change, loss_change, verdict):
    """As the loop tells the detectors of it: both metrics in each evaluation, with the sums of twelve micro-batches."""
    drawn = np.random.default_rng(3)
    margins, losses = drawn.normal(1, 0.1, 12), drawn.uniform(20, 30, 12)
    challenges = ChallengeDetectors(ChallengesConfig(), 4, "loss", print)
    progress = Progress()
    for step in range(31):
        progress.step = step
        if step:
            challenges.add_step_metrics(progress, [{"step": step, "loss": 0.7 - step / 100}])
        if step % 10 == 0:
            share = step / 30
            now = {
                "eval/margin": margins + share * margin_change,
                "eval/loss": losses * (1 + share * (loss_change - 1)),
            }
            challenges.add_batch_sums({name: [*sums] for name, sums in now.items()})
            means = {"eval/margin": now["eval/margin"].mean(), "eval/loss": now["eval/loss"].sum() / 480}
            challenges.run_detectors(progress, means)
    record = challenges.findings_by_detector["divergence"]
    assert (record.get("verdict"), record["found"]) == (verdict, verdict is not None)
    if verdict:
        assert "eval/margin from" in record["says"] and "eval/loss" not in record["says"]


def test_divergence_baseline_file_that_is_damaged_counts_as_none(tmp_path):
    class Alone:
        world_size, is_main, simulated = 1, True, False

    kept = HeldOutFile(tmp_path, Alone())
    known = HeldOutEvaluation({"eval/loss": 2.0}, {"eval/loss": [1.0, 3.0]})
    kept.write(known)
    assert kept.read() == known
    for damaged in (
        b"\xff",
        b"[]",
        b'{"values": {"a": null}}',
        b'{"values": 3}',
        b'{"other": {}}',
        b'{"batches": {"a": [[]]}}',
    ):
        kept.path.write_bytes(damaged)
        assert kept.read() == HeldOutEvaluation()


def test_divergence_of_a_run_that_was_killed_in_its_export_is_judged_by_pairs_again(tmp_path):
    """A rise of 5 % is clear by its micro-batches alone: without those before the first step it would be called recovered."""

    class Alone:
        world_size, is_main, simulated = 1, True, False

    def start():
        said = []
        challenges = ChallengeDetectors(ChallengesConfig(), 1, "loss", said.append, tmp_path / "events.jsonl")
        challenges.first_evaluation_file = HeldOutFile(tmp_path, Alone())
        challenges.last_evaluation_file = HeldOutFile(tmp_path, Alone(), "held-out-last.json")
        return challenges, said

    before = [10.0 + number for number in range(12)]
    progress = Progress()
    killed, _ = start()
    killed.add_batch_sums({"eval/loss": before})
    killed.run_detectors(progress, {"eval/loss": 2.0})
    for step in range(1, 41):
        progress.step = step
        killed.add_step_metrics(progress, [{"step": step, "loss": 2.0 - step / 100}])
    killed.add_batch_sums({"eval/loss": [1.05 * batch_sum for batch_sum in before]})
    killed.run_detectors(progress, {"eval/loss": 2.1})
    assert killed.findings_by_detector["divergence"]["found"]

    resumed, said = start()
    resumed.restore_findings(progress)
    resumed.record_findings_of_whole_run(progress)
    assert resumed.findings_by_detector["divergence"] == killed.findings_by_detector["divergence"]
    assert said == []


@pytest.fixture(scope="module", name="site")
def _site(tmp_path_factory):
    root = tmp_path_factory.mktemp("divergence")
    model_dir(root)
    drawn = np.random.default_rng(0)
    words = sorted(set(WORDS.split()))
    for name, count in (("train", 64), ("held-out", 72), ("few", 8), ("general", 4)):
        texts = [{"prompt": f"{n}\n", "completion": " ".join(drawn.choice(words, 6))} for n in range(count)]
        write_jsonl(root / f"{name}.jsonl", texts)
    return root


HIGH = ("optim.lr=3", "schedule.warmup_share=0", "evaluation.every_steps=10", "challenges.forgetting.action=off")
"""A rate at which a run ends far above where it began."""


def test_divergence_of_a_run_is_reported_everywhere(site, capfd, tmp_path, request):
    # A run that this process has under way, as after `wandb.init` in a user's script, which W&B would go on with.
    request.addfinalizer(wandb.init(mode="offline", dir=tmp_path).finish)
    run_dir = site / "high"
    tracked = ("logging.wandb=offline", "logging.alerts=[diverged]", "logging.tags=[first]")
    assert train(site, run_dir, *HIGH, *tracked, "export.at_end=true") == 0
    last_lines = capfd.readouterr().out.split("done: 30 steps")[1]
    record = json.loads((run_dir / "run.json").read_text())["challenges"]["divergence"]
    assert record["found"] and record["verdict"] == "diverged" and record["first_step"] == 20
    assert "warning:    diverged, since step 20: the training loss went from" in last_lines
    assert "best:       no checkpoint has a better eval/loss than before training" in last_lines
    assert last_lines.strip().splitlines()[-1] == "next:       train again in another run.dir, with a lower optim.lr"
    assert not re.search(r"\d{12}", last_lines) and format_metric(1.0162e236) == "1.0e+236"  # of the perplexity
    assert "- **diverged**, since step 20" in (run_dir / "export" / "README.md").read_text()
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("done", "diverged, since step 20")
    (part,) = (run_dir / "wandb").glob("offline-run-*")
    in_wandb = summary(part)
    assert (in_wandb["state"], in_wandb["exit_code"], in_wandb["tags"]) == ("finished", 0, ["first", "diverged"])
    assert in_wandb["summary"]["state"] == "diverged" and "final/eval/loss" in in_wandb["summary"]
    alert = tracked_record(part, "alert")
    assert alert["title"].endswith(": diverged") and "the training loss went from" in alert["text"]
    # Sums of micro-batches are those of the metric: eval/loss is a mean over targets.
    before = json.loads((run_dir / "held-out-before.json").read_text())
    evaluations = [row for row in rows(run_dir) if "eval/loss" in row]
    assert before["values"]["eval/loss"] == evaluations[0]["eval/loss"] and len(before["batches"]["eval/loss"]) == 9
    # Those of the last evaluation are kept too: `shardtune compare` pairs two runs by them.
    last = json.loads((run_dir / "held-out-last.json").read_text())
    growth = sum(last["batches"]["eval/loss"]) / sum(before["batches"]["eval/loss"])
    assert last["step"] == 30 and growth == pytest.approx(evaluations[-1]["eval/loss"] / evaluations[0]["eval/loss"])
    # The same command with stop: a checkpoint, 69, and a way on.
    stopped = site / "stopped"
    assert train(site, stopped, *HIGH, "challenges.divergence.action=stop") == 69
    shown = capfd.readouterr().err
    assert "step 20: divergence: diverged" in shown and "challenges.divergence.action=note continues" in shown
    assert (stopped / "checkpoints" / "step-000020").is_dir()
    assert train(site, stopped, *HIGH) == 0
    capfd.readouterr()
    resumed = json.loads((stopped / "run.json").read_text())["challenges"]["divergence"]
    assert resumed["verdict"] == "diverged" and resumed["bound"] == pytest.approx(
        record["bound"]
    )  # paired after resuming too


def test_divergence_is_worse_for_an_overfitting_run_and_none_for_one_that_learns(site, capfd):
    few = [f"data.path={site}/few.jsonl", "evaluation.every_steps=10", "challenges.forgetting.action=off"]
    assert train(site, site / "few", *few, "budget.steps=80", "optim.lr=3e-2") == 0
    shown = capfd.readouterr().out.split("done: 80 steps")[1]
    record = json.loads((site / "few" / "run.json").read_text())["challenges"]["divergence"]
    assert record["verdict"] == "worse than before training" and "the run overfits" in record["says"]
    assert "warning:    worse than before training, since step" in shown
    good = ["optim.lr=3e-3", "evaluation.every_steps=10", "challenges.forgetting.action=off"]
    assert train(site, site / "good", *good) == 0
    shown = capfd.readouterr().out
    assert json.loads((site / "good" / "run.json").read_text())["challenges"]["divergence"] == {
        "found": False,
        "step": 20,
    }
    assert "warning" not in shown.split("done: 30 steps")[1]
    assert json.loads((site / "good" / "status.json").read_text())["reason"] is None


@whole("the same detectors find it above, in a run without warm-up")
def test_divergence_is_not_hidden_by_warm_up_or_rollbacks(site):
    words = ["optim.lr=3", "schedule.warmup_share=0.5", "budget.steps=40", "guards.loss=rollback"]
    words += ["guards.grad_norm=rollback", "evaluation.every_steps=20", "challenges.forgetting.action=off"]
    assert train(site, site / "half", *words) == 0
    record = json.loads((site / "half" / "run.json").read_text())["challenges"]["divergence"]
    assert record["verdict"] == "diverged"
