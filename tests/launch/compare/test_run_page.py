"""`report.html` of one run: what each kind of end says first, and that a long or an old run still has a page."""

import json
import re
import tarfile
import time

import numpy as np
import pytest

from launch.compare.comparison import compare_points
from launch.compare.metric_meaning import greater_is_better_by_name
from launch.compare.run_page import contents, figure_pieces, figures, loss_figure, page
from launch.compare.run_page.answers import answer_pairs
from launch.compare.run_page.held_out import MetricChange, best_step, metric_changes
from launch.compare.run_page.rounds import shown_round_groups
from launch.compare.run_page.verdict import run_callouts, run_verdict
from launch.compare.settings import PointSource
from tests.helpers.launching import ROOT
from trainer.monitors.kept_answers import FILE, GENERATED, MAX_ROWS, KeptAnswer, KeptAnswers
from trainer.reporting.results import keep_report
from trainer.rollout.record import RoundRecord
from trainer.rollout.round import Round
from trainer.rollout.types import Answer, AnswerGroup, GroupScores, Prompt

CONFIG = {"strategy": {"name": "single"}, "optim": {"lr": 3.0}, "evaluation": {"watch": "eval/loss"}}
DIVERGED = {
    "found": True,
    "verdict": "diverged",
    "first_step": 20,
    "says": "diverged: the training loss went from 5.88 at step 1 to 23.2",
    "remedies": ["a lower optim.lr", "schedule.warmup_share=0.1"],
}
OVERFIT = {"found": True, "first_step": 54, "says": "held-out loss rises", "remedies": ["fewer epochs"]}


def run_of(directory, held_out=(3.0, 2.5, 2.0), *, status=None, steps=20, config=CONFIG, **record):
    """A run directory with an evaluation at each of `held_out`, evenly spread over its steps; the first is before them."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(json.dumps(config))
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 3 - step / (2 * steps), "tokens": 100 * step, "step_s": 0.5, "tokens_per_s": 200.0}
        rows.append(row | {"memory_gib": 1.5, "grad_norm": 1.0, "lr": 1e-4})
    for index, loss in enumerate(held_out):
        rows.append({"step": index * steps // max(len(held_out) - 1, 1), "eval/loss": loss})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "status.json").write_text(json.dumps(status or {"state": "done"}))
    (directory / "run.json").write_text(json.dumps({"device": "cpu", "world_size": 1, "total_steps": steps, **record}))
    return directory


def compared(directory):
    return compare_points([PointSource((directory,))])


def read(directory):
    return compared(directory).points[0].first_repeat


def html(directory) -> str:
    """The page without its scripts: what a reader sees, the plots aside."""
    text = page.run_page(compared(directory))
    return re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)


def test_verdicts_differ_by_how_a_run_ended(tmp_path):
    runs = {
        "good": run_of(tmp_path / "good"),
        "diverged": run_of(tmp_path / "diverged", (3.0, 9.0), challenges={"divergence": DIVERGED}),
        "overfit": run_of(tmp_path / "overfit", (3.0, 2.0, 2.5), challenges={"overfitting": OVERFIT}),
        "worse": run_of(tmp_path / "worse", (3.0, 3.2)),
        "unevaluated": run_of(tmp_path / "unevaluated", ()),
        "stopped": run_of(tmp_path / "stopped", status={"state": "preempted", "step": 7, "reason": "SIGTERM"}),
        "failed": run_of(tmp_path / "failed", status={"state": "failed", "step": 7, "reason": "out of memory"}),
        "running": run_of(tmp_path / "running", status={"state": "running", "step": 7, "time": time.time()}),
    }
    verdicts = {name: run_verdict(read(directory)) for name, directory in runs.items()}
    assert {name: (verdict.tone, verdict.heading) for name, verdict in verdicts.items()} == {
        "good": ("good", "Held-out loss got better"),
        "diverged": ("bad", "The run diverged"),
        "overfit": ("warning", "Better, but: overfitting"),
        "worse": ("bad", "Held-out loss got worse"),
        "unevaluated": ("note", "Trained, not evaluated"),
        "stopped": ("warning", "Stopped at step 7 of 20"),
        "failed": ("bad", "Failed at step 7 of 20"),
        "running": ("note", "Running: step 20 of 20"),  # a resumed run's status has the step of its checkpoint
    }
    assert verdicts["good"].text == "Held-out loss went from 3.000 to 2.000 (-33.3%). Trained 20 steps, 2,000 tokens."
    directory = runs["diverged"]
    again = f"shardtune train {directory}/config.yaml run.dir={directory}-lower-rate optim.lr=0.3"
    assert verdicts["diverged"].commands == (again,)
    assert verdicts["overfit"].commands == (f"shardtune export {runs['overfit']} checkpoint=best",)
    for directory in runs.values():
        assert run_verdict(read(directory)).heading in html(directory)


def test_what_a_reader_should_know_comes_worst_first(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    leaks = {"policy": "report", "train": {"exact": 2, "normalized": 1, "near": 0, "prompt": 9}}
    (data / "audit.json").write_text(json.dumps({"leakage": {"eval": leaks}}))
    slow = {"rank": 3, "host": "node7", "factor": 1.8, "from_step": 10, "until_step": None}
    record = {
        "challenges": {"forgetting": {"found": True, "first_step": 3, "says": "maths fell", "remedies": ["replay"]}},
        "resumed_from": "step-000010",
        "data_directory": str(data),
        "not_exported": ["model.safetensors"],
        "outcome": {"slow_ranks": [slow], "stopped_early": True},
    }
    config = CONFIG | {"evaluation": {"watch": "eval/loss", "patience": 3}}
    directory = run_of(tmp_path / "run", (3.0, 2.0, 2.5), config=config, **record)
    (directory / "events.jsonl").write_text(json.dumps({"step": 5, "action": "note", "values": {"loss": 9.5}}) + "\n")
    found = run_callouts(read(directory))
    assert [(callout.tone, callout.heading) for callout in found] == [
        ("bad", "Nothing was exported"),
        ("warning", "The model forgets what it knew"),
        ("warning", "Training documents in the held-out data"),
        ("warning", "A rank held the others up"),
        ("note", "Step 10 was the best"),
        ("note", "The run was resumed"),
        ("note", "The run stopped early"),
        ("note", "1 step stood out"),
    ]
    run_and = f"shardtune train {directory}/config.yaml run.dir={directory}"
    assert [callout.commands for callout in found] == [
        (f"shardtune export {directory}",),
        (f"shardtune export {directory} checkpoint=best",),
        (f"{run_and}-clean data.leakage.policy=drop_train",),
        ("shardtune doctor",),
        (f"shardtune export {directory} checkpoint=best",),
        (f"shardtune status {directory}",),
        (f"{run_and}-longer evaluation.patience=6",),
        (f"{run_and}-guarded guards.loss=skip guards.grad_norm=skip",),
    ]
    text = html(directory)
    assert all(command in text for callout in found for command in callout.commands)
    assert found[2].text.startswith("3 training documents")
    assert found[3].text == "Rank 3 on node7 computes 1.8 times as long as the others, from step 10 on."
    assert run_callouts(read(run_of(tmp_path / "plain"))) == []
    (data / "audit.json").write_text(json.dumps({"leakage": {"eval": leaks | {"policy": "drop_train"}}}))
    assert "Training documents in the held-out data" not in html(directory)


def test_cards_before_and_after(tmp_path):
    cards = contents.run_cards(compared(run_of(tmp_path / "run", (3.0, 2.0, 2.5))).points[0])
    shown = [(card.label, card.value, card.tone, card.arrow) for card in cards]
    assert shown == [
        ("Held-out loss", "2.500", "good", "down"),
        *(("Duration", "10 s", "", ""), ("Speed", "200", "", ""), ("Memory", "1.5 GiB", "", "")),
    ]
    assert cards[0].note == "before training 3.000, better, best 2.000 at step 10"
    unevaluated = contents.run_cards(compared(run_of(tmp_path / "none", ())).points[0])
    assert unevaluated[0].label == "Training loss" and not unevaluated[0].tone
    device = {"device": "cuda", "receipt": {"predicted": {"device_gib": 1.6, "memory_gib": 1.4}}}
    full = contents.run_cards(compared(run_of(tmp_path / "full", **device)).points[0])[-1]
    assert full.tone == "warning" and full.note.startswith("93.8% of a card's 1.60 GiB")


@pytest.mark.parametrize(
    ("name", "before", "after", "larger", "tone"),
    [
        *(("eval/accuracy", 0.5, 0.7, True, "good"), ("eval/accuracy", 0.7, 0.5, True, "bad")),
        *(("eval/margin", -1.0, 2.0, True, "good"), ("eval/x", 1.0, 2.0, None, ""), ("eval/loss", 2.0, 2.0, False, "")),
    ],
)
def test_better_and_worse_go_by_the_direction_of_the_metric(name, before, after, larger, tone):
    assert MetricChange(name, after, before, larger).tone == tone


def test_the_name_of_a_metric_tells_its_direction():
    smaller = ("eval/loss", "eval/loss/a", "eval/loss_by_position/1024", "forgetting/loss", "eval/perplexity")
    assert [greater_is_better_by_name(name) for name in smaller] == [False] * 5
    assert greater_is_better_by_name("eval/qa/accuracy") is True and greater_is_better_by_name("eval/x") is None


def test_best_step_is_held_against_the_model_before_training(tmp_path):
    best = best_step(read(run_of(tmp_path / "worse", (2.0, 3.0, 2.5))))
    assert (best.step, best.is_better_than_before_training, best.is_last_step_as_good) == (20, False, True)
    tied = best_step(read(run_of(tmp_path / "tied", (3.0, 2.0, 2.0))))
    assert (tied.step, tied.is_last_step_as_good) == (10, True) and run_callouts(read(tmp_path / "tied")) == []
    config = CONFIG | {"evaluation": {"watch": "eval/loss", "greater_is_better": True}}
    best = best_step(read(run_of(tmp_path / "larger", (2.0, 3.0, 2.5), config=config)))
    assert (best.step, best.is_better_than_before_training) == (10, True)
    assert metric_changes(read(tmp_path / "larger"))[0].tone == "good"
    recorded = {"outcome": {"watch": "eval/loss", "greater_is_better": True}}
    assert best_step(read(run_of(tmp_path / "recorded", (2.0, 3.0, 2.5), **recorded))).step == 10
    unset = run_of(tmp_path / "reward", (2.0, 3.0, 2.5), config=CONFIG | {"evaluation": {"watch": None}})
    assert best_step(read(unset)).step == 20
    metrics = unset / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("eval/loss", "eval/reward"))
    assert best_step(read(unset)).step == 10 and run_verdict(read(unset)).heading == "Held-out reward got better"


def add_evaluations(directory, rows):
    with (directory / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def test_direction_of_the_watched_metric_is_its_own_where_nobody_typed_it(tmp_path):
    """`evaluation.greater_is_better` is null in config.yaml as a rule: the run's record says it, or the metric's name."""
    for name, watch, record in (
        ("named", "eval/accuracy", {}),
        ("recorded", "eval/qa/x", {"outcome": {"watch": "eval/qa/x", "greater_is_better": True}}),
    ):
        config = CONFIG | {"evaluation": {"watch": watch, "greater_is_better": None}}
        directory = run_of(tmp_path / name, (), config=config, **record)
        add_evaluations(directory, [{"step": step, watch: value} for step, value in ((0, 0.5), (10, 0.9), (20, 0.8))])
        run = read(directory)
        assert run_verdict(run).heading.endswith("got better") and best_step(run).step == 10
    unknown = run_of(tmp_path / "unknown", (), config=CONFIG | {"evaluation": {"watch": "eval/qa/x"}})
    add_evaluations(unknown, [{"step": 0, "eval/qa/x": 0.5}, {"step": 20, "eval/qa/x": 0.8}])
    verdict = run_verdict(read(unknown))
    assert (verdict.tone, verdict.heading) == ("note", "qa/x: 0.5000 to 0.8000") and best_step(read(unknown)) is None


def test_a_watched_metric_that_is_no_number_any_more_is_told(tmp_path):
    directory = run_of(tmp_path / "run", (3.0, 2.0))
    add_evaluations(directory, [{"step": 30, "eval/loss": None, "eval/accuracy": 0.1}])
    verdict = run_verdict(read(directory))
    assert (verdict.tone, verdict.heading) == ("bad", "Held-out loss is not a number at the end")
    assert verdict.commands == (f"shardtune export {directory} checkpoint=best",)


def test_addresses_of_other_pages_are_quoted(tmp_path):
    assert (
        contents.relative_address(tmp_path / "run", tmp_path / "data #1" / "audit.html") == "../data%20%231/audit.html"
    )


def test_links_lead_to_the_other_pages_of_a_run_that_are_there(tmp_path):
    directory = run_of(tmp_path / "run", data_directory=str(tmp_path / "data"))
    own = [("metrics", "metrics.jsonl"), ("run record", "run.json")]
    assert contents.run_links(read(directory)) == own
    kept = {kind: keep_report(directory, kind, {"time": 1.0}) for kind in ("evaluation", "review")}
    for page_file in (
        tmp_path / "data" / "audit.html",
        directory / "evaluation.html",
        directory / "export" / "README.md",
    ):
        page_file.parent.mkdir(exist_ok=True)
        page_file.write_text("page")
    reports = {kind: path.relative_to(directory).as_posix() for kind, path in kept.items()}
    assert contents.run_links(read(directory)) == [
        ("audit of the data", "../data/audit.html"),
        ("evaluation", "evaluation.html"),
        ("newest evaluation report", reports["evaluation"]),
        ("review by people", reports["review"]),
        ("model card", "export/README.md"),
        *own,
    ]
    addresses = re.findall(r'<li><a href="([^"]+)">', html(directory))
    assert len(addresses) == 7 and all((directory / address).is_file() for address in addresses)


def test_best_step_is_marked_in_the_plot_of_the_losses(tmp_path):
    def loss_plot(name, held_out):
        return figures.run_figures(read(run_of(tmp_path / name, held_out)), {}, None)[0][0]

    def marks_of(figure, kind):
        """(data, mark) of the layers of a kind of mark."""
        layers = [(layer["data"]["values"], layer["mark"]) for layer in figure.spec["layer"]]
        return [(values, mark) for values, mark in layers if mark["type"] == kind]

    marked = loss_plot("marked", (3.0, 2.0, 2.5))
    assert "★ marks step 10, the best by eval/loss" in marked.caption
    ((label_at, label),) = marks_of(marked, "text")
    assert label["text"] == "★ best: step 10" and [(row["step"], row["value"]) for row in label_at] == [(10, 2.0)]
    rings = [values for values, mark in marks_of(marked, "point") if mark.get("style") == "best"]
    assert rings == [label_at]
    unmarked = loss_plot("worse", (2.0, 3.0, 2.5))
    assert marks_of(unmarked, "text") == [] and "★" not in unmarked.caption


def test_taken_stands_beside_planned_only_where_both_mean_the_same(tmp_path):
    receipt = {"predicted": {"memory_gib": 3.0, "step_s": 0.25, "checkpoint_bytes": 100.0}}
    receipt["measured"] = {"checkpoint_bytes": 150.0, "checkpoint_s": 2.0}

    def rows(device):
        table = contents.cost_table(compared(run_of(tmp_path / device, device=device, receipt=receipt)).points[0])
        return {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}

    assert rows("cuda")["Memory of a rank"] == ["3.0 GiB", "1.5 GiB", "0.50"]
    assert rows("cpu")["Memory of a rank"] == [contents.UNKNOWN, "1.5 GiB", contents.UNKNOWN]
    assert rows("cuda")["Time of a step"] == ["0.25 s", "0.50 s", "2.00"]
    assert rows("cpu")["Size of a checkpoint"] == ["100 B", "150 B", "1.50"]


def test_answers_of_the_newest_evaluation_beside_the_base(tmp_path):
    directory = run_of(tmp_path / "run")
    rows = [{"where": f"q:{n}", "prompt": f"<b>{n}</b>", "answer": "Paris", "other": "Rome"} for n in range(9)]
    changed = {"won": rows, "lost": rows[:1], "num_won": 9, "num_lost": 1}
    report = {"time": 1.0, "against": {"what": "base", "tasks": {"qa": {"changed": changed}}}}
    keep_report(directory, "evaluation", report)
    keep_report(directory, "evaluation", {"time": 2.0, "tasks": {}})
    pairs = answer_pairs(read(directory))
    assert [pair.change for pair in pairs] == ["right now", "wrong now", *(["right now"] * 4)]
    text = html(directory)
    assert "Answers before and after" in text and "&lt;b&gt;0&lt;/b&gt;" in text and "<b>0</b>" not in text
    assert "Answers before" not in html(run_of(tmp_path / "without"))


def test_answers_that_the_run_itself_wrote(tmp_path):
    """Those of the first evaluation and of the newest, to the same prompts; a resumed run keeps the first."""
    directory = run_of(tmp_path / "run")
    for step, text in ((0, "hm"), (10, "mid"), (20, "Paris")):
        kept = KeptAnswers(directory)
        kept.add(GENERATED, [KeptAnswer(f"q{n}" + "x" * 3000, text, "Paris") for n in range(9)])
        kept.write_pending_answers(step)
        kept.write_pending_answers(step)  # nothing was written since
    pairs = answer_pairs(read(directory))
    assert len(pairs) == MAX_ROWS
    assert (pairs[0].answer_before, pairs[0].answer_after, pairs[0].reference_answer) == ("hm", "Paris", "Paris")
    assert pairs[0].summary.startswith("held-out document: … x") and len((directory / FILE).read_bytes()) < 60_000
    assert "Before training" in html(directory)
    KeptAnswers(None).write_pending_answers(0)
    anew = KeptAnswers(directory)
    anew.add("qa", [KeptAnswer("q", "a", "r")])
    anew.write_pending_answers(0)
    assert answer_pairs(read(directory)) == []
    (directory / FILE).write_text("[")
    assert answer_pairs(read(directory)) == []


def test_a_long_run_is_still_a_page(tmp_path):
    """100,000 steps, an evaluation each hundred, and an outlier each hundred."""
    steps = 100_000
    directory = run_of(tmp_path / "long", tuple(3 - n / 1000 for n in range(1001)), steps=steps)
    events = [
        {"step": step, "action": "note", "values": {"loss": 9.5}, "scores": {"loss": 8.0}}
        for step in range(1, steps, 100)
    ]
    (directory / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    text = page.run_page(compared(directory))
    assert len(text) < 1_500_000
    run = read(directory)
    drawn = figure_pieces.drawn_steps(run)
    assert drawn[-1] == steps and len(drawn) <= 2 * figure_pieces.MAX_DRAWN_STEPS + 1
    assert "950 earlier ones are in events.jsonl" in text


def rounds_of(directory, groups, size=8, answer="a <b>bold</b> answer "):
    """Recorded rounds: by step, the mean reward of each prompt; answers score by their number, and the last is unscored."""
    for step, means in groups.items():
        made = []
        scores = []
        for place, mean in enumerate(means):
            texts = [f"{answer}{number} of {place}" for number in range(size)]
            answers = [Answer(n, [1], np.zeros(1, np.float32), text, has_ended=n != 1) for n, text in enumerate(texts)]
            made.append(AnswerGroup(Prompt(place, [1], f"prompt {place} of step {step}", {}, "rows.jsonl:1"), answers))
            total = mean + np.arange(size) / 10 - (size - 2) / 20
            total[-1] = np.nan
            scores.append(GroupScores(total, {"right": total, "short": np.full(size, 0.5)}))
        shape = (len(means), size)
        made_round = Round(0, len(means), made, scores, np.zeros(shape), np.ones(shape, bool))
        RoundRecord(directory).write(made_round, step - 1)


def with_rewards(directory, steps):
    """Let the rows of a run be those of one that learns from rewards."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        of_answers = {"reward": row["step"] / steps, "rewards/right/mean": 0.5, "entropy": 2.0, "kl": 0.1}
        if "loss" in row:
            row |= {**of_answers, "loss": 0.0, "completions/mean_length": 9.0}
        else:
            row |= {"eval/reward": row["step"] / steps / 2}
            row.pop("eval/loss")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_that_learns_from_rewards_shows_its_reward_and_what_it_wrote(tmp_path):
    config = {"strategy": {"name": "single"}, "evaluation": {"watch": None}}
    directory = run_of(tmp_path / "rewarded", config=config)
    with_rewards(directory, 20)
    rounds_of(directory, {step: [0.2, 0.9, 0.5] for step in range(1, 21)})
    (directory / "rounds" / "round-000030.parquet").write_bytes(b"begun")
    shown, closer = figures.run_figures(read(directory), {}, None)
    assert [figure.name for figure in shown] == ["reward", "held-out"]
    assert [figure.name for figure in closer][:1] == ["loss"]
    values = shown[0].spec["data"]["values"]
    drawn = {}
    for row in values:
        drawn.setdefault((row["metric"], row["series"]), []).append(row["value"])
    assert drawn["reward", "training"] == [step / 20 for step in range(1, 21)]
    assert drawn["reward", "held-out"] == [0, 0.25, 0.5]
    assert shown[0].spec["params"][1]["bind"]["options"][:2] == ["reward", "rewards/right/mean"]

    groups = shown_round_groups(read(directory))
    assert [group.summary for group in groups] == [
        f"step {step}, {which} prompt, mean reward {mean}: prompt {place} of step {step}"
        for step in (1, 11)
        for which, mean, place in (("best", "0.9000", 1), ("worst", "0.2000", 0))
    ], "the newest file is being written"
    best = groups[0]
    assert [answer.reward for answer in best.answers] == [
        "1.200",
        "1.100",
        "0.6000",
        "not scored",
    ] and best.left_out == 4
    assert best.answers[0].by_reward == "right 1.200, short 0.5000"
    text = html(directory)
    assert "Answers while training" in text and "a &lt;b&gt;bold&lt;/b&gt; answer" in text and "<b>bold" not in text
    assert "Answers while training" not in html(run_of(tmp_path / "supervised"))


def test_a_long_run_with_rewards_is_still_a_page(tmp_path):
    steps = 20_000
    directory = run_of(tmp_path / "long", tuple(n / 1000 for n in range(1001)), steps=steps)
    with_rewards(directory, steps)
    rounds_of(directory, {1: [0.1, 0.2], 500: [0.1, 0.2], 20_000: [0.1, 0.2]}, size=64, answer="word " * 20_000)
    text = page.run_page(compared(directory))
    assert "step 20000, worst prompt" in text and len(text) < 1_500_000


def test_curves_are_smoothed_over_all_steps():
    assert loss_figure.smoothed({1: 4.0, 2: 2.0, 3: 2.0}, 0.0) == {1: 4.0, 2: 2.0, 3: 2.0}
    smooth = loss_figure.smoothed({1: 4.0, 2: 2.0}, 0.5)
    assert smooth == {1: 4.0, 2: pytest.approx((0.5 * 4 + 2) / 1.5)}
    assert [loss_figure.smoothing_weight(*steps) for steps in ((0.0, 0), (30, 3))] == [0.0, pytest.approx(29 / 31)]
    # Of a run of a few steps, each choice still shows another curve.
    short = [
        loss_figure.smoothing_weight(6 * share, least) for share, least in loss_figure.SMOOTHING_BY_MENU_ENTRY.values()
    ]
    assert short == [0.0, 0.5, pytest.approx(5 / 7)]
    constant = loss_figure.smoothed(dict.fromkeys(range(50), 3.0), 0.95)
    assert list(constant.values()) == pytest.approx([3.0] * 50)


def test_page_of_a_run_of_before_there_were_records(tmp_path):
    directory = run_of(tmp_path / "old", ())
    (directory / "run.json").unlink()
    text = html(directory)
    assert "Trained, not evaluated" in text and "Settings that were chosen" not in text
    for file in ("metrics.jsonl", "status.json"):
        (directory / file).unlink()
    assert "Not started" in html(directory)


def test_pages_of_runs_that_an_earlier_version_wrote(tmp_path):
    archive = ROOT / "tests" / "golden" / "earlier_version.tar.gz"
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    headings = {
        name: run_verdict(read(tmp_path / "runs" / name)).heading for name in ("finished", "classifier", "stopped")
    }
    assert headings == {
        "finished": "Held-out loss got better",
        "classifier": "Trained, not evaluated",
        "stopped": "Stopped at step 1 of 12",
    }
    settings = contents.run_settings(read(tmp_path / "runs" / "finished"))
    chosen = dict(settings.chosen_settings)
    assert (chosen["budget.steps"], chosen["tuning.rank"], chosen["run.device"]) == ("4", "2", "cpu")
    assert chosen.keys() <= dict(settings.all_settings).keys() and len(chosen) < 25
    unchosen = {"run.seed", "run.dir", "data.cache_dir", "tuning.alpha", "optim.weight_decay", "checkpoint.keep"}
    assert unchosen <= dict(settings.all_settings).keys() - chosen.keys(), (
        "defaults and places are among all settings alone"
    )
    for name in headings:
        text = html(tmp_path / "runs" / name)
        assert headings[name] in text and "Settings that were chosen" in text and "Where it comes from" in text


def test_page_without_the_extra_report_lacks_its_plots_alone(tmp_path, monkeypatch):
    directory = run_of(tmp_path / "run")
    monkeypatch.setattr("trainer.pages.vega.find_spec", lambda name: None)
    text = page.run_page(compared(directory))
    assert "Held-out loss got better" in text and "Plots need the extra" in text
    assert 'class="plot"' not in text and "unsafe-eval" not in text
