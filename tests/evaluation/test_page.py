"""The page of an evaluation, made of rows written by hand: verdict, numbers, rows that are shown, and its size."""

import re

import pytest

from trainer.data.document import Document
from trainer.evaluation.base import TaskConfig
from trainer.evaluation.report.change_scale import Change, ChangeScale
from trainer.evaluation.report.comparison import changed_rows, compare_task
from trainer.evaluation.report.intervals import Bootstrap, confidence_intervals, resample_metrics
from trainer.evaluation.report.page import render_page
from trainer.evaluation.report.page_rows import shown_rows
from trainer.evaluation.report.record import BASE, TUNED, EvaluatedModel, build_task_record
from trainer.evaluation.report.tables import worst_rows_table
from trainer.evaluation.tasks.base import TaskRow, last_user_turn
from trainer.evaluation.tasks.registry import build_tasks

SYSTEM = "You are a helpful AI assistant."


def answered(task: str, kind: str, right: list[int], text: str = "", questions: bool = True) -> list[TaskRow]:
    """A row for each number of `right`: 1 for a right answer, or the loss of a row."""
    rows = []
    for number, value in enumerate(right):
        question = f"{task} question {number} {text}"
        prompt = f"system\n{SYSTEM}\nuser\n{question}\nassistant\n"
        scores = {"match": float(value)} if kind == "exact_match" else {"nats": float(value), "targets": 1.0}
        row = TaskRow(f"{task}.jsonl:{number + 1}", prompt, f"answer {value} {text}", f"reference {text}", scores)
        row.question = question if questions else ""
        rows.append(row)
    return rows


def evaluation(given: dict[str, tuple[str, list[int], list[int]]], text: str = "", *, base: bool = True, **more):
    """What `render_page` takes, for tasks given as name: (kind, values of the tuned model, values of the base)."""
    tasks = build_tasks({name: TaskConfig(kind=kind, path=f"{name}.jsonl") for name, (kind, *_) in given.items()})
    models = {TUNED: EvaluatedModel(), BASE: EvaluatedModel()}
    bootstrap = Bootstrap(100, 0)
    records, compared = {}, {}
    for task in tasks:
        kind, *values = given[task.name]
        for arm, found in zip((TUNED, BASE), values, strict=True):
            models[arm].rows[task.name] = answered(task.name, kind, found, text)
            models[arm].metrics[task.name] = task.compute_metrics(models[arm].rows[task.name])
            models[arm].seconds[task.name] = 1.0
        rows, others = models[TUNED].rows[task.name], models[BASE].rows[task.name]
        resampled = resample_metrics(task, rows, bootstrap)
        records[task.name] = build_task_record(task, models[TUNED], confidence_intervals(task, rows, resampled))
        metrics = models[BASE].metrics[task.name]
        compared[task.name] = compare_task(task, models[TUNED], resampled, others, metrics, bootstrap)
    about = {"path": "models/tiny", "run": "runs/first", "checkpoint": "step-9", "adapters": [], "accepted": []}
    report = {"model": about, "strategy": "ddp", "processes": 1, "device": "cpu", "precision": "fp32", "tasks": records}
    report |= {"method": "paired bootstrap", "versions": {"torch": "2.13"}, "server": None, **more}
    if base:
        report["against"] = {"what": "base", "tasks": compared, "not_there": []}
    return report, tasks, models, models[BASE].rows if base else None


TASKS = {
    "facts": ("exact_match", [1] * 30 + [0] * 10, [0] * 36 + [1] * 4),
    "sums": ("exact_match", [0, 1, 0, 1], [1, 0, 0, 1]),
    "held": ("loss", [12] * 10, [10, 11, 10, 11, 10] * 2),
}


def test_rows_of_a_json_list_on_one_line_are_shown_one_by_one():
    """They all have the same location, `facts.json:1`."""
    _, tasks, models, others = evaluation({"facts": ("exact_match", [1] * 100 + [0, 1], [1] * 100 + [1, 0])})
    rows, other_rows = models[TUNED].rows["facts"], others["facts"]
    for number, (row, other) in enumerate(zip(rows, other_rows, strict=True)):
        row.where = other.where = "facts.json:1"
        row.answer, other.answer = f"new {number}", f"old {number}"
    compared = {"facts": {"changed": changed_rows(rows, other_rows, "match")}}
    shown = {row.texts["answer"]: row for row in shown_rows(tasks, {"facts": rows}, others, compared)["facts"].rows}
    assert len(shown) == 21  # the 20 worst, and the one that was won
    assert shown["new 100"].filter_names == ("lost", "wrong") and shown["new 101"].filter_names == ("won",)
    assert all(row.texts["other"] == answer.replace("new", "old") for answer, row in shown.items())
    table = worst_rows_table(tasks[0], rows, other_rows)
    assert all(row[4] == row[3].replace("new", "old") for row in table.rows)


def test_the_verdict_and_all_tasks_come_first():
    page = render_page(*evaluation(TASKS))
    assert "Against base: better in 1, worse in 1, no difference shown in 1 of 3 tasks" in page
    overview = page.split('id="all-tasks"')[1].split("</table>")[0]
    cells = re.findall(r'<tr><th scope="row".*?</tr>', overview, re.DOTALL)
    shown = [" ".join(re.sub("<[^>]*>", " ", cell).split()) for cell in cells]
    # The verdict stands beside the name.
    assert shown[0].startswith("facts ✓ better exact_match 0.1000 0.7500 +0.6500") and shown[0].endswith("higher 40")
    assert shown[1].startswith("sums no difference shown exact_match") and shown[2].startswith("held ✕ worse ")
    assert page.index('id="all-tasks"') < page.index('id="task-0"') and " open>" not in page, "tasks are folded"
    assert "162,755" in page, "a perplexity as people write it"


def test_bars_of_a_table_share_a_scale_that_it_shows():
    """Metrics have different units: what is shared is the change in percent of the larger value, right of the middle better."""
    page = render_page(*evaluation(TASKS))
    overview = page.split('id="all-tasks"')[1].split("</table>")[0]
    scale = re.findall(r'<span class="scale">(.*?)</span></th>', overview)
    assert [re.findall(r"<span>(.*?)</span>", one) for one in scale] == [["-100%", "0", "+100%"]]
    dots = [float(left) for left in re.findall(r'class="dot" style="left:(.*?)%"', overview)]
    # Of facts 0.75 is the larger, and 0.65 of it was gained; sums stay; a loss of 12 was 10.4.
    assert dots == pytest.approx([50 + 50 * 0.65 / 0.75, 50, 50 - 50 * 1.6 / 12], abs=0.01)
    assert 'aria-label="86.7% better, between +' in overview and 'aria-label="13.3% worse, between -' in overview


def test_a_scale_has_round_ends_and_bars_beyond_it_end_at_its_edge():
    up, none = {"value": 0.3, "greater_is_better": True}, {"value": 0.0, "difference": 0.3, "low": 0.2, "high": 0.4}
    change = Change.of_metric(up, none)
    assert (change.low, change.value, change.high) == pytest.approx((2 / 3, 1, 4 / 3)), "of a base of 0, too"
    assert (
        ChangeScale.over([change]).reach == 1 and ChangeScale.over([change]).bar(change, "good").position(4 / 3) == 100
    )
    assert ChangeScale.over([Change(-0.013, 0.004, 0.018), None]).labels == ("-2%", "0", "+2%")
    assert (
        Change.of_metric({"value": 0.0, "greater_is_better": True}, {"value": 0, "difference": 0, "low": 0, "high": 0})
        is None
    )
    assert Change.of_metric(up, None) is None and ChangeScale.over([]).reach == 0.01


@pytest.mark.parametrize(
    ("more", "tone", "said"),
    [
        ({"base": False}, "note", "3 tasks measured, and compared with nothing"),
        ({"base": False}, "note", "shardtune evaluate runs/first against=base"),
        ({"regressions": ["facts: exact_match 0.1, was 0.9: worse by 0.8"]}, "bad", "Worse than base"),
        ({"regressions": ["facts: exact_match 0.1, was 0.9: worse by 0.8"]}, "bad", "was 0.9: worse by 0.8"),
    ],
)
def test_what_the_page_says_of_nothing_compared_and_of_a_broken_limit(more, tone, said):
    page = render_page(*evaluation(TASKS, **more))
    assert said in page and f'class="action {tone}"' in page


def test_a_perplexity_beyond_all_bounds_has_no_240_digits():
    page = render_page(*evaluation({"held": ("loss", [544, 544], [10, 11])}))
    shown = re.sub("<[^>]*>", " ", page.split("<main>")[1].split("<script>")[0])
    assert "1.8e+236" in shown and not re.search(r"\d{12}", shown)


def test_rows_show_the_question_of_the_user_and_all_the_rest_on_demand():
    page = render_page(*evaluation(TASKS))
    rows = re.findall(r'<details class="row (.*?)"><summary>(.*?)</summary>(.*?)</details>', page, re.DOTALL)
    lost = [(summary, inside) for sides, summary, inside in rows if "lost" in sides]
    # Of facts the last four were right before; of sums the first one.
    assert len(lost) == 5 and all("wrong, lost" in summary for summary, _ in lost)
    summary, inside = lost[0]
    assert "facts question 36" in summary and SYSTEM not in summary and SYSTEM in inside
    assert "facts.jsonl:37" in inside and "answer 0" in inside and "answer 1" in inside
    assert "<b>won</b>: 30 wrong before, right now (20 shown)" in page
    assert "<b>wrong</b>: 10 wrong<" in page.replace("</span>", "<")


def test_a_page_of_an_earlier_evaluation_shows_the_end_of_prompts():
    """Rows of earlier reports do not say what the user asked."""
    report, tasks, models, others = evaluation({"facts": TASKS["facts"]})
    models[TUNED].rows["facts"] = answered("facts", "exact_match", TASKS["facts"][1], questions=False)
    assert f"{SYSTEM} user facts question 30 assistant" in render_page(report, tasks, models, others)


@pytest.mark.parametrize("letter", ["x", "\N{CJK UNIFIED IDEOGRAPH-6F22}"])
def test_fifty_tasks_with_long_rows_are_still_a_page(letter):
    given = {f"task-{number}": ("exact_match", [0, 1] * 30, [1, 0] * 30) for number in range(50)}
    page = render_page(*evaluation(given, text=letter * 9000))
    assert len(page.encode()) < 1_500_000 and page.count('<details class="row') >= 50 * 4


def test_the_question_of_a_document_is_its_last_user_turn_before_the_answer():
    turns = [("system", SYSTEM), ("user", "first"), ("assistant", "one"), ("user", "second"), ("assistant", "two")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert last_user_turn(Document("a", 1, messages=messages)) == "second"
    assert last_user_turn(Document("a", 1, messages=messages[:-2])) == "first"
    assert last_user_turn(Document("a", 1, prompt="asked", completion="answered")) == "asked"
    assert last_user_turn(Document("a", 1, text="a text")) == last_user_turn(None) == ""
