"""What a comparison concludes, from runs as their files tell of them: parity of strategies, quality of methods, what to take."""

import json
from pathlib import Path

import pytest

from launch.compare.answer import comparison_html, comparison_markdown, comparison_text, text_tables
from launch.compare.answer_records import comparison_as_dict
from launch.compare.comparison import compare_points
from launch.compare.metric_meaning import keys_measured_differently
from launch.compare.names import setting_as_argument
from launch.compare.page_table import points_table
from launch.compare.run_files import RecordedRun
from launch.compare.settings import PointSource
from trainer.reporting.run_record import RunRecord

BATCHES = [10.0, 12.0, 9.0, 14.0, 11.0, 8.0, 13.0, 10.0, 12.0, 9.0]
"""Sums of the held-out loss over ten micro-batches; the metric is their sum by 36 targets."""


def write_run(
    directory: Path,
    *,
    settings: dict[str, object],
    losses: float = 3.0,
    scale: float | None = 1.0,
    speed: float = 100.0,
    memory: float = 2.0,
    state: str = "done",
    metrics: dict[str, float] | None = None,
    record: dict[str, object] | None = None,
    batches: list[float] | None = BATCHES,
) -> Path:
    """Write the files of a run of eight steps.

    `losses`: the loss of step 1. `scale`: factor of all held-out sums; None for a run without held-out data. `batches`: sums
    over micro-batches; None if the run kept none. A `record` with a peak (`reference_tflops`) makes rows with an MFU, but not on
    a CPU.
    """
    directory.mkdir(parents=True)
    groups: dict[str, dict[str, object]] = {"strategy": {"name": "ddp"}, "logging": {"every_steps": 1}}
    for key, value in ({"data.path": "train.jsonl", "data.eval_path": "held.jsonl", "run.seed": 1} | settings).items():
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name] = value
    (directory / "config.yaml").write_text(json.dumps(groups))
    rows: list[dict[str, object]] = []
    for step in range(1, 9):
        row = {"step": step, "loss": losses - step / 10, "tokens": 100 * step, "memory_gib": memory, "step_s": 0.5}
        if record is not None and "reference_tflops" in record and record.get("device") != "cpu":
            row["mfu"] = 0.5
        rows.append({**row, "tokens_per_s": speed + step % 2})
    if scale is not None:
        sums = [scale * each for each in batches or BATCHES]
        rows.append({"step": 8, "eval/loss": sum(sums) / 36, **(metrics or {})})
        if batches is not None:
            kept = {"step": 8, "values": {}, "batches": {"eval/loss": sums}}
            (directory / "held-out-last.json").write_text(json.dumps(kept))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = {"world_size": 2, "device": "cuda", **(record or {})}
    (directory / "run.json").write_text(json.dumps(facts))
    (directory / "status.json").write_text(json.dumps({"state": state, "step": 8, "reason": "out of memory"}))
    return directory


def point(tmp_path: Path, name: str, repeats: int = 1, **run) -> PointSource:
    directories = [write_run(tmp_path / f"{name}-{number}", **run) for number in range(repeats)]
    return PointSource(tuple(directories), name, command_keys=("strategy", "tuning", "optim.lr"))


def test_strategies_are_held_to_parity_and_taken_for_speed_or_memory(tmp_path):
    rows = [point(tmp_path, "ddp", settings={}, speed=100.0, memory=4.0)]
    rows += [
        point(tmp_path, "fsdp2", settings={"strategy.name": "fsdp2"}, losses=3.0 * (1 + 1e-7), memory=1.0, speed=50.0)
    ]
    found = compare_points(rows).conclusion
    assert found.sentences == (
        "fsdp2 has the same loss as ddp, within 1e-7.",
        "ddp is the fastest (100 tokens/s; one run each); fsdp2 takes the least memory (1 GiB).",
    )
    assert (found.tone, found.headline) == ("good", found.sentences[0])
    assert [(choice.goal, choice.point.name, choice.arguments) for choice in found.recommendations] == [
        ("the most tokens/s", "ddp", "strategy=ddp"),
        ("the least memory", "fsdp2", "strategy=fsdp2"),
    ]


def test_a_strategy_with_another_loss_is_told_first_and_never_taken(tmp_path):
    rows = [
        point(tmp_path, "ddp", settings={}, memory=4.0),
        point(tmp_path, "hsdp", settings={"strategy.name": "hsdp"}),
    ]
    rows += [point(tmp_path, "fsdp2", settings={"strategy.name": "fsdp2"}, losses=3.003, memory=1.0, speed=900.0)]
    found = compare_points(rows).conclusion
    assert found.tone == "bad" and found.headline == (
        "1 of 2 points that should only compute elsewhere has another loss: fsdp2 differs from ddp by 0.001 at step 5. "
        "Find out why before you use them."
    )
    assert [choice.point.name for choice in found.recommendations] == ["hsdp"]


def test_speeds_within_the_spread_of_repeats_are_no_difference(tmp_path):
    rows = []
    for name, speeds in {"ddp": (100.0, 130.0), "fsdp2": (120.0, 125.0)}.items():
        directories = []
        for number, speed in enumerate(speeds):
            run = write_run(tmp_path / f"{name}{number}", settings={"strategy.name": name}, speed=speed)
            directories.append(run)
        rows.append(PointSource(tuple(directories), name))
    found = compare_points(rows).conclusion
    assert found.sentences[-1] == "No difference in speed or memory shown." and not found.recommendations
    assert not any(table_best(rows, heading) for heading in ("tokens/s", "measured"))


def test_methods_are_ranked_by_the_held_out_loss_where_the_documents_show_it(tmp_path):
    """Every micro-batch is worse by 10 %: shown. Half of them better, half worse: not shown. One baseline in each verdict."""
    mixed = [value * (1.2 if number % 2 else 0.81) for number, value in enumerate(BATCHES)]
    rows = [point(tmp_path, "full", settings={"tuning.name": "full"}, memory=8.0)]
    rows += [point(tmp_path, "lora", settings={"tuning.name": "lora"}, batches=mixed, memory=2.0, speed=300.0)]
    rows += [point(tmp_path, "ia3", settings={"tuning.name": "ia3"}, scale=1.1, memory=1.0, speed=500.0)]
    comparison = compare_points(rows)
    found = comparison.conclusion
    assert found.ranked is not None and found.ranked.metric.name == "eval/loss"
    assert table_best(rows, "eval/loss") == "smallest"
    shown = {job.points[0].name: job in found.ranked.significantly_worse for job in found.ranked.jobs}
    assert shown == {"full": False, "lora": False, "ia3": True} or shown == {"lora": False, "full": False, "ia3": True}
    best = found.ranked.best.points[0].name
    other = "full" if best == "lora" else "lora"
    assert found.headline.startswith(f"{best} has the lowest eval/loss: ")
    assert f"No difference shown from {other}; the other is worse." in found.headline
    taken = {goal: choice.point.name for choice in found.recommendations for goal in choice.goal.split(" and ")}
    assert taken["the least memory"] == taken["the most tokens/s"] == "lora" and "ia3" not in taken.values()
    assert "Of the points that are not shown to be worse: lora is the fastest" in found.sentences[-1]
    full, _, ia3 = comparison.points
    assert full.verdict == "full: eval/loss 3.0000, 100 tokens/s, 8 GiB; the others are compared with it"
    assert ia3.verdict.startswith(
        "ia3: eval/loss 3.3000, worse than full (3.0000; 95 % interval over held-out documents "
    )
    assert ia3.verdict.endswith("5.0 x its tokens/s, 0.1 x its memory")
    assert (
        "The order by eval/loss rests on held-out documents, with one seed each: another seed may change it."
        in found.sentences
    )
    quality = comparison_as_dict(comparison)["answer"]["quality"]
    assert quality["jobs"][-1]["shown_worse"] and quality["jobs"][-1]["interval"][0] > 0


def test_without_repeats_or_kept_documents_no_difference_is_shown(tmp_path):
    """As of runs from before micro-batches were kept: nothing says by how much such runs differ."""
    rows = [point(tmp_path, "full", settings={"tuning.name": "full"}, batches=None)]
    rows += [point(tmp_path, "lora", settings={"tuning.name": "lora"}, batches=None, scale=2.0)]
    found = compare_points(rows).conclusion
    assert "No difference in eval/loss shown between 2 jobs: 3.0000 to 6.0000 (nothing says how far" in found.headline
    assert "run.seed=1,2,3" in found.to_learn_more and found.tone == "note"
    assert table_best(rows, "eval/loss") == ""


@pytest.mark.parametrize(("count", "is_shown"), [(3, False), (4, True)])
def test_four_micro_batches_of_held_out_documents_show_a_large_difference(tmp_path, count, is_shown):
    """A first data set has some thirty held-out documents: four micro-batches of eight."""
    worse = [1.5 * BATCHES[0], 1.4 * BATCHES[1], 1.6 * BATCHES[2], 1.45 * BATCHES[3]]
    rows = [point(tmp_path, "full", settings={"tuning.name": "full"}, batches=BATCHES[:count])]
    rows += [point(tmp_path, "lora", settings={"tuning.name": "lora"}, batches=worse[:count])]
    found = compare_points(rows).conclusion
    assert found.headline.startswith(
        "full has the lowest eval/loss" if is_shown else "No difference in eval/loss shown"
    )


@pytest.mark.parametrize(("seeds", "is_shown"), [((1.0, 1.2), False), ((1.0, 1.001), True)])
def test_seeds_say_how_far_a_job_differs_from_itself_and_strategies_do_not(tmp_path, seeds, is_shown):
    rows = []
    for seed, scale in enumerate(seeds):
        settings = {"tuning.name": "full", "run.seed": seed}
        rows.append(point(tmp_path, f"full{seed}", settings=settings, scale=scale, batches=None))
    rows += [point(tmp_path, "lora", settings={"tuning.name": "lora", "run.seed": 0}, scale=1.1, batches=None)]
    ranked = compare_points(rows).conclusion.ranked
    assert ranked is not None and len(ranked.jobs) == 2 and bool(ranked.significantly_worse) == is_shown
    alone = [
        rows[0],
        point(
            tmp_path, "fsdp2", settings={"tuning.name": "full", "run.seed": 0, "strategy.name": "fsdp2"}, batches=None
        ),
    ]
    ranked = compare_points([*alone, rows[-1]]).conclusion.ranked
    assert ranked is not None and not ranked.evidence_sources, "two strategies of one seed are no repeats"


def test_repeats_of_one_seed_are_no_evidence_of_quality_and_one_value(tmp_path):
    """On a deterministic machine they agree to the last digits, so that any difference would be beyond their spread."""
    for name, scale in {"full": 1.0, "lora": 1.1}.items():
        for number, speed in enumerate((100.0, 101.0)):
            settings = {"tuning.name": name}
            noise = 1 + 1e-9 * number
            write_run(tmp_path / f"{name}-{number}", settings=settings, batches=None, scale=scale * noise, speed=speed)
    rows = [PointSource(tuple(tmp_path / f"{name}-{n}" for n in range(2)), name) for name in ("full", "lora")]
    comparison = compare_points(rows)
    found = comparison.conclusion
    assert found.ranked is not None and not found.ranked.significantly_worse and not found.ranked.evidence_sources
    assert [job.num_seeds for job in found.ranked.jobs] == [
        1,
        1,
    ] and "No difference in eval/loss shown" in found.headline
    assert "no difference shown from full (3.0000; one seed each: repeats of a seed say" in comparison.points[1].verdict
    assert table_best(rows, "eval/loss") == "" and found.to_learn_more


def test_verdict_and_answer_rest_on_all_seeds_of_a_job(tmp_path):
    """Three seeds each, 95 % interval by hand: 10 % apart with a deviation of 1 % is shown, with one of 10 % it is not."""

    def compared(directory: Path, spread: float):
        rows = []
        for name, scale in {"full": 1.0, "lora": 1.1}.items():
            for seed in (1, 2, 3):
                settings = {"tuning.name": name, "run.seed": seed}
                own_scale = scale + spread * (seed - 2)
                rows.append(point(directory, f"{name}{seed}", settings=settings, batches=None, scale=own_scale))
                identity = {"data": {"fingerprint": "same"}}
                (rows[-1].directories[0] / "identity.json").write_text(json.dumps(identity))
        return compare_points(rows)

    near = compared(tmp_path / "near", 0.01)
    ranked = near.conclusion.ranked
    assert ranked is not None and len(ranked.significantly_worse) == 1 and ranked.differences[1] is not None
    margin = 2.776 * 0.01 * (2 / 3) ** 0.5
    assert ranked.differences[1].seed_interval == pytest.approx((0.1 - margin, 0.1 + margin), abs=1e-4)
    assert "The order by eval/loss rests on seeds." in near.conclusion.sentences
    verdicts = [run.verdict for run in near.points]
    assert verdicts[1].startswith("full2: eval/loss 3.0000, with another seed than full1 (2.9700)")
    assert "lora1: eval/loss 3.2700, worse than full1 (2.9700; 95 % interval over 3 seeds +7." in verdicts[3]
    far = compared(tmp_path / "far", 0.1)
    assert "chance explains that much, judged by seeds" in far.conclusion.headline
    assert all("no difference shown from full1" in run.verdict for run in far.points[3:])


@pytest.mark.parametrize("failed", ["lora", "none"])
def test_parity_is_the_headline_where_quality_cannot_be_compared(tmp_path, failed):
    rows = [point(tmp_path, name, settings={"strategy.name": name}, scale=None) for name in ("ddp", "fsdp2")]
    state = "failed" if failed == "lora" else "done"
    rows.append(point(tmp_path, "lora", settings={"tuning.name": "lora"}, scale=None, state=state))
    found = compare_points(rows).conclusion
    assert (found.tone, found.headline) == ("good", "fsdp2 has the same loss as ddp, to the last digit.")
    why = "Fewer than two jobs are done" if failed == "lora" else "No held-out metric was asked"
    assert any(sentence.startswith(why) for sentence in found.sentences)


def test_points_that_differ_in_their_seed_alone_say_how_far_it_matters(tmp_path):
    rows = [point(tmp_path, f"seed{seed}", settings={"run.seed": seed}, scale=1 + seed / 100) for seed in (1, 2, 3)]
    found = compare_points(rows).conclusion
    assert found.headline == "One job with 3 seeds: eval/loss is 3.0300 to 3.0900." and found.ranked is None
    rows.append(point(tmp_path, "lora", settings={"tuning.name": "lora"}, state="failed"))
    assert compare_points(rows).conclusion.headline == found.headline


def test_test_documents_decide_nothing_and_are_never_marked(tmp_path):
    rows = []
    for name, scale, test_loss in (("full", 1.0, 5.0), ("lora", 1.5, 1.0)):
        settings = {"tuning.name": name, "evaluation.watch": "test/loss"}
        metrics = {"test/loss": test_loss, "eval/accuracy": scale / 2, "eval/perplexity": 2 * scale}
        rows.append(point(tmp_path, name, settings=settings, scale=scale, metrics=metrics))
    comparison = compare_points(rows)
    assert comparison.conclusion.ranked is not None and comparison.conclusion.ranked.metric.name == "eval/loss"
    assert comparison.conclusion.recommendations[0].point.name == "full"
    assert (table_best(rows, "eval/loss"), table_best(rows, "test/loss")) == ("smallest", "")
    assert table_best(rows, "eval/perplexity") == "smallest"
    assert table_best(rows, "eval/accuracy") == "", "nothing says how far an accuracy of one run depends on chance"


def test_other_held_out_documents_are_not_compared(tmp_path):
    rows = [point(tmp_path, "a", settings={"optim.lr": 1e-3}), point(tmp_path, "b", settings={"optim.lr": 1e-2})]
    rows += [point(tmp_path, "c", settings={"optim.lr": 1e-4, "data.eval_path": "other.jsonl"}, scale=0.5)]
    rows += [point(tmp_path, "d", settings={"optim.lr": 1e-5, "objective.beta": 0.5}, scale=0.1)]
    comparison = compare_points(rows)
    assert "its eval/loss cannot be compared with that of a (other objective.beta)" in comparison.points[3].verdict
    assert comparison.conclusion.ranked is not None
    assert {job.points[0].name for job in comparison.conclusion.ranked.jobs} == {"a", "b"}
    assert "its eval/loss cannot be compared with that of a (other data.eval_path)" in comparison.points[2].verdict


def test_failed_and_diverged_points_are_told_and_never_taken(tmp_path):
    diverged = {
        "challenges": {"divergence": {"found": True, "verdict": "diverged", "says": "diverged: up", "first_step": 4}}
    }
    rows = [
        point(tmp_path, "a", settings={"optim.lr": 1e-4}),
        point(tmp_path, "b", settings={"optim.lr": 1e-3}, speed=80.0),
    ]
    rows += [point(tmp_path, "high", settings={"optim.lr": 3.0}, scale=0.1, speed=900.0, record=diverged)]
    rows += [point(tmp_path, "big", settings={"optim.lr": 1e-2}, state="failed", memory=0.1)]
    comparison = compare_points(rows)
    assert comparison.conclusion.sentences[0] == "1 of 4 points diverged: high. 1 of 4 points failed: big."
    assert {choice.point.name for choice in comparison.conclusion.recommendations} <= {"a", "b"}
    assert comparison.conclusion.ranked is not None and "high" not in comparison.conclusion.headline
    assert [job.points[0].name for job in comparison.conclusion.ranked.jobs] == ["a", "b"]
    table = points_table(comparison)
    states = {row[0].text: (row[-1].text, row[-1].tone, row[-1].note) for row in table.rows}
    assert states["high"][:2] == ("diverged", "bad") and states["a"] == ("done", "", "")
    assert states["big"] == ("failed", "bad", "failed at step 8: out of memory")
    speed = [column.heading for column in table.columns].index("tokens/s")
    assert [row[speed].sort_value for row in table.rows][2:] == [None, None]


def test_planned_memory_stands_beside_measured_only_where_both_mean_the_same(tmp_path):
    def planned_columns(name: str, by: str, device: str) -> bool:
        receipt = {"receipt": {"predicted": {"memory_gib": 1.5, "memory_by": by}}, "device": device}
        rows = []
        for number in range(2):
            settings = {"optim.lr": 10.0**-number}
            rows.append(point(tmp_path, f"{name}{number}", settings=settings, record=receipt))
        return "planned" in [column.heading for column in points_table(compare_points(rows)).columns]

    assert planned_columns("gpu", "simulation of the longest micro-batch's step", "cuda")
    assert not planned_columns("cpu", "simulation of the longest micro-batch's step", "cpu")
    assert not planned_columns("rule", "estimate: state by arithmetic", "cuda")


@pytest.mark.parametrize(("peak", "is_shown"), [(100.0, True), (100.5, True), (130.0, False)])
def test_mfu_of_different_peaks_is_left_out_of_every_table(tmp_path, peak, is_shown):
    rows = []
    for name, tflops in (("ddp", 100.0), ("fsdp2", peak)):
        rows.append(point(tmp_path, name, settings={"strategy.name": name}, record={"reference_tflops": tflops}))
    comparison = compare_points(rows)
    headings = [column.heading for column in text_tables(comparison)[0].columns]
    page_headings = [column.heading for column in points_table(comparison).columns]
    assert ("MFU" in headings, "MFU" in page_headings) == (is_shown, is_shown)
    assert ("MFU is of different peaks" in comparison_text(comparison)) is not is_shown


def test_a_run_without_mfu_takes_it_from_no_other(tmp_path):
    """A run on a CPU knows a peak too, but has no MFU."""
    rows = []
    for device, tflops in (("cuda", 100.0), ("cpu", 0.1)):
        record = {"reference_tflops": tflops, "device": device}
        rows.append(point(tmp_path, device, settings={"strategy.name": device}, record=record))
    comparison = compare_points(rows)
    assert "MFU" in [column.heading for column in text_tables(comparison)[0].columns]
    assert "MFU" in [column.heading for column in points_table(comparison).columns]
    assert "different peaks" not in comparison_text(comparison)


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("strategy.name", "ddp", "strategy=ddp"),
        ("optim.lr", 0.0002, "optim.lr=2e-4"),
        ("tuning.dora", True, "tuning.dora=true"),
        ("tuning.targets", ["q_proj", "v_proj"], "tuning.targets=[q_proj,v_proj]"),
        ("data.path", "a,b.jsonl", "data.path='a,b.jsonl'"),
        ("model.tokenizer", None, "model.tokenizer=null"),
    ],
)
def test_words_to_paste(key, value, word):
    assert setting_as_argument(key, value) == word


def test_axes_are_in_the_order_of_the_command_and_none_follows_from_another(tmp_path):
    rows = []
    for tuning, rate in (("full", 1e-4), ("lora", 1e-3)):
        for strategy in ("ddp", "fsdp2"):
            settings = {"tuning.name": tuning, "optim.lr": rate, "strategy.name": strategy}
            rows.append(point(tmp_path, f"{strategy}-{tuning}", settings=settings))
    comparison = compare_points(rows)
    assert [(axis.title, axis.values) for axis in comparison.axes] == [
        ("strategy", ["ddp", "fsdp2"]),
        ("tuning", ["full", "lora"]),
    ]
    [told] = [sentence for sentence in comparison.conclusion.sentences if "learning rates" in sentence]
    assert told.startswith("The points trained at different learning rates (optim.lr): 1e-4 for ddp-full")
    assert "1e-3 for ddp-lora" in told
    # An axis of its own says so itself.
    rows = [point(tmp_path, f"rate{rate}", settings={"optim.lr": rate}) for rate in (1e-4, 1e-3)]
    assert not any("learning rates" in sentence for sentence in compare_points(rows).conclusion.sentences)


def test_the_answer_stands_in_text_markdown_and_page(tmp_path):
    rows = [
        point(tmp_path, name, settings={"strategy.name": name}, speed=speed)
        for name, speed in (("ddp", 90), ("fsdp2", 40))
    ]
    comparison = compare_points(rows)
    text, markdown = comparison_text(comparison), comparison_markdown(comparison)
    assert "answer:\n  fsdp2 has the same loss as ddp, to the last digit.\n" in text
    assert text.index("answer:") < text.index("verdict:")
    assert markdown.splitlines()[2].startswith("fsdp2 has the same loss as ddp")
    assert "| the most tokens/s | `ddp` | 90 tokens/s; one run each | `strategy=ddp` |" in markdown
    page = comparison_html(comparison)
    assert (
        page.index("fsdp2 has the same loss as ddp") < page.index('id="points"') and "<code>strategy=ddp</code>" in page
    )


def test_a_hundred_points_are_still_a_page(tmp_path):
    """100 points of 400 steps with 50 metrics, 12 of them failed."""
    metrics = {f"eval/task{number}/accuracy": number / 50 for number in range(50)}
    template = write_run(tmp_path / "template", settings={}, metrics=metrics)
    lines = []
    for step in range(1, 401):
        row = {
            "step": step,
            "loss": 3 - step / 1e3,
            "tokens": 100 * step,
            "memory_gib": 2.0,
            "step_s": 0.5,
            "tokens_per_s": 91.7,
        }
        lines.append(json.dumps({**row, "grad_norm": 1 / step, "lr": 1e-4 / step}))
    lines.append(json.dumps({"step": 400, "eval/loss": 2.5, **metrics}))
    (template / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    rows = []
    for number in range(100):
        run = tmp_path / f"point{number}"
        run.mkdir()
        for file in template.iterdir():
            (run / file.name).write_bytes(file.read_bytes())
        config = {"strategy": {"name": ["ddp", "fsdp2"][number % 2]}, "optim": {"lr": 1e-5 * (1 + number // 2)}}
        (run / "config.yaml").write_text(json.dumps(config))
        if number >= 88:
            (run / "status.json").write_text(json.dumps({"state": "failed", "step": 400, "reason": "out of memory"}))
        rows.append(PointSource((run,)))
    page = comparison_html(compare_points(rows))
    assert len(page.encode()) <= 1.5e6
    assert page.count('<th scope="row"') >= 200  # the table of points, and that of held-out metrics


def table_best(rows: list[PointSource], heading: str) -> str:
    """How the best cell of a column of the page's table is chosen; empty for a column that has none."""
    (column,) = [column for column in points_table(compare_points(rows)).columns if column.heading == heading]
    return column.best


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({}, None),
        ({"objective.rewards.ended.function": "r.py:ended", "objective.rewards.ended.weight": 0.0}, None),
        ({"objective.rewards.words.timeout_s": 5}, None),
        ({"objective.rewards.words.function": "other.py:words"}, "objective.rewards.words.function"),
        ({"objective.rewards.words.weight": 2.0}, "objective.rewards.words.weight"),
        ({"objective.rollout.max_new_tokens": 5}, "objective.rollout.max_new_tokens"),
        ({"objective.kl.weight": 0.1, "objective.group_size": 4}, None),
    ],
)
def test_rewards_of_other_functions_are_no_ranking(more, reason):
    """A run whose reward is easier to cheat has the higher one; a control beside changes no reward."""
    config = {"objective.rewards.words.function": "r.py:words", "objective.rewards.words.weight": 1.0}
    config |= {"objective.rollout.max_new_tokens": 12, "evaluation.watch": "eval/reward"}
    identity = {"data": {"fingerprint": "one"}}
    runs = [
        RecordedRun(Path("run"), settings, identity, RunRecord(), {}, {}, {}, {})
        for settings in (config, config | more)
    ]
    assert keys_measured_differently(*runs, "eval/reward") == ([reason] if reason else [])
