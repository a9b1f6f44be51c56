"""Tasks without a model: what they find in answers, which rows they refuse, and how the bootstrap judges."""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from strategies.errors import DataError
from tests.helpers import tool_templates
from trainer.data.document import Document, RefusedDocument
from trainer.data.fields import RowError
from trainer.data.messages import parse_tools
from trainer.data.tokens.encode import Encoder
from trainer.evaluation.base import TaskConfig
from trainer.evaluation.report.intervals import (
    BETTER,
    NO_DIFFERENCE,
    WORSE,
    Bootstrap,
    paired_difference,
    percentile_interval,
    resample_metrics,
)
from trainer.evaluation.task_evaluator import TaskEvaluator
from trainer.evaluation.tasks.base import TaskCase, TaskRow
from trainer.evaluation.tasks.classification import calibration_error
from trainer.evaluation.tasks.model_interface import ModelInterface
from trainer.evaluation.tasks.registry import TASK_KINDS
from trainer.evaluation.tasks.structured import check_json, final_result, parse_tool_calls
from trainer.evaluation.tasks.written import word_f1


def task(kind, **settings):
    return TASK_KINDS[kind]("mine", TaskConfig(kind=kind, **settings))


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("so 3 and then \\boxed{\\frac{1}{2}}.", Fraction(1, 2)),
        ("it is 1,234.50.", Fraction(2469, 2)),
        ("4 apples\n#### 0.5", Fraction(1, 2)),
        ("about -3/4", Fraction(-3, 4)),
        ("\\boxed{x^{2}+1}", "x^{2}+1"),
        ("it costs $5", 5),
        ("none", None),
    ],
)
def test_the_result_of_a_solution(text, result):
    assert final_result(text) == result


def test_tool_calls_are_found_wherever_an_answer_has_them():
    text = 'Let me see. <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call> {broken '
    text += '[{"name": "g", "parameters": {}}, {"function": {"name": "h", "arguments": "{\\"a\\": 2}"}}] {"no": "call"}'
    names = [("f", {"x": 1}), ("g", {}), ("h", {"a": 2})]
    assert [(call["name"], call["arguments"]) for call in parse_tool_calls(text)] == names


def test_tool_calls_are_scored_by_name_and_arguments_and_by_their_absence():
    kind = task("tool_calls")
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    tools = parse_tools([{"name": "f", "parameters": {}}])
    turns = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    case = TaskCase("a:1", Document("a", 1, messages=turns, tools=tools))
    kind.prepare_case(case)
    scores = [
        kind.score(case, text) for text in ('{"name":"f","arguments":{"x":1}}', '{"name":"f","arguments":{}}', "no")
    ]
    assert [tuple(each.values()) for each in scores] == [(1, 1, 1), (0, 1, 1), (0, 0, 0)]
    plain = TaskCase(
        "a:2", Document("a", 2, messages=[turns[0], {"role": "assistant", "content": "hello"}], tools=tools)
    )
    kind.prepare_case(plain)
    assert kind.score(plain, "hi")["right"] == 1 and kind.score(plain, '{"name":"f","arguments":{}}')["called"] == 0
    with pytest.raises(RowError, match="no tools"):
        kind.prepare_case(TaskCase("a:3", Document("a", 3, messages=turns)))


def evaluator_of(run):
    """Of one task, which asks nothing."""
    ready = SimpleNamespace(
        task=SimpleNamespace(name="mine", config_key="evaluation.tasks.mine", score_cases=run), cases=[]
    )
    runtime = SimpleNamespace(is_main=True, world_size=1)
    return TaskEvaluator(
        [ready],
        SimpleNamespace(cached_losses=set(), answer_generator=SimpleNamespace(throughput=None), runtime=runtime),
    )


def test_task_row_that_the_template_cannot_write_is_reported_with_its_task():
    def run(cases, asking):
        raise RefusedDocument("q.jsonl:1", "tools", "this chat template ignores the column tools")

    with pytest.raises(DataError) as refused:
        list(evaluator_of(run).run_tasks())
    assert str(refused.value).startswith("evaluation.tasks.mine: q.jsonl:1: this chat template ignores")


def test_a_task_that_takes_long_gives_a_sign_of_life_every_half_minute():
    now, said = iter([0, 10, 31, 40, 62, 95]), []

    def run(cases, asking):
        for done in range(1, 7):
            asking.answer_generator.on_batch(done, 6)
        raise DataError("enough")

    evaluator = evaluator_of(run)
    evaluator.report_progress(said.append, clock=lambda: next(now))
    with pytest.raises(DataError, match="enough"):
        list(evaluator.run_tasks())
    assert said == [
        "mine: 3 of 6 batches, 31 s since the first",
        "mine: 5 of 6 batches, 62 s since the first",
    ], "not of the last one, whose result is said"


@pytest.mark.parametrize("family", sorted(tool_templates.FAMILIES))
def test_tool_calls_in_a_template_that_is_not_understood_are_refused_and_never_scored(family):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    tools = parse_tools([{"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}])
    case = TaskCase("a:1", Document("a", 1, messages=turns, tools=tools))
    kind = task("tool_calls")
    kind.prepare_case(case)
    tokenizer = tool_templates.tokenizer(family)

    class AnswerGenerator:
        generation_config = None

        def __init__(self):
            self.tokenizer = tokenizer

        def generate_answers(self, *_):
            raise LookupError("would be asked now")

    asking = ModelInterface(None, None, AnswerGenerator(), Encoder(tokenizer), None, None, None, lambda: False, 1)
    reads = family in READ
    with pytest.raises(LookupError if reads else DataError, match=None if reads else "which is not read here"):
        kind.score_cases([case], asking)


READ = {"qwen2.5", "qwen3", "hermes", "llama3.1", "mistral3"}


def test_answers_after_a_schema():
    needs = {"type": "object", "required": ["b"]}
    assert check_json('```json\n{"b": 1}\n```', needs) == (True, None)
    assert check_json("{}", needs) == (True, "$: 'b' is a required property")
    assert check_json("{", needs)[0] is False
    elsewhere = {"$ref": "http://example.com/x.json"}  # never fetched
    assert check_json("{}", elsewhere) == (True, "the schema refers to http://example.com/x.json, which is not in it")


def test_words_that_texts_share():
    assert word_f1("cat sat", "cat") == pytest.approx(2 / 3)
    assert word_f1("the the cat", "the cat cat") == pytest.approx(2 / 3)  # a word counts as often as both have it
    assert word_f1("", "") == 1 and word_f1("", "cat") == 0
    kind = task("f1")
    assert kind.score(TaskCase("a:1", None, {"references": ["The Cat!", "dog"]}), "a cat") == {"f1": 1, "match": 1}
    strict = task("f1", options={"normalise": []})
    assert strict.score(TaskCase("a:1", None, {"references": ["The Cat!"]}), "a cat") == {"f1": 0, "match": 0}


def test_multiple_choice_answer_in_each_of_its_spellings():
    choices = ["one", "two", "three"]
    arc = {"text": choices, "label": ["1", "2", "3"]}
    for fields in ({"answer": 1}, {"answer": "B"}, {"answer": "two"}, {"answerKey": "2", "choices": arc}):
        case = TaskCase("a:1", None, {"question": "?", "choices": choices, **fields})
        task("multiple_choice", path="x").prepare_case(case)
        assert case.fields["answer"] == 1
    with pytest.raises(RowError, match="a number from 0 to 2, a letter up to C"):
        task("multiple_choice").prepare_case(TaskCase("a:1", None, {"question": "?", "choices": choices, "answer": 3}))


def test_rows_of_a_json_list_on_one_line_are_classified_one_by_one():
    """They all have the same location, `rows.json:1`."""

    class Head:  # of a classifier
        label_names = ("no", "yes")
        encoder = SimpleNamespace(
            set_label_names=lambda names: None, encode=lambda documents: [(one, one.text) for one in documents]
        )

        def logits(self, samples):
            return [[0.0, 1.0] if "good" in text else [1.0, 0.0] for text in samples]

    texts = {"good": "yes", "bad": "no", "good again": "yes"}
    cases = [TaskCase("rows.json:1", fields={"text": text, "label": label}) for text, label in texts.items()]
    found = task("classification", path="rows.json").score_cases(cases, Head())
    assert [(row.prompt, row.answer) for row in found] == list(texts.items())


def test_calibration_error_by_hand():
    right, sure = np.array([1.0, 0.0, 1.0]), np.array([0.9, 0.9, 0.5])
    assert calibration_error(right, sure, np.ones(3)) == pytest.approx((abs(1 - 1.8) + abs(1 - 0.5)) / 3)
    assert calibration_error(right, sure, np.array([1.0, 0.0, 0.0])) == pytest.approx(0.1)


def rows(scores):
    return [TaskRow(f"a:{n}", "", "", "", {"match": float(score)}) for n, score in enumerate(scores)]


def test_bootstrap_is_that_of_scipy_and_resamples_both_models_alike():
    from scipy.stats import bootstrap

    drawn = np.random.default_rng(1)
    one, kind = (drawn.random(200) < 0.6).astype(float), task("exact_match")
    other = np.where(drawn.random(200) < 0.1, 1 - one, one)
    how = Bootstrap(10000, 0)
    mine, theirs = (resample_metrics(kind, rows(each), how)["exact_match"] for each in (one, other))
    wanted = bootstrap((one,), np.mean, n_resamples=10000, method="percentile", rng=2).confidence_interval
    assert percentile_interval(mine) == pytest.approx((wanted.low, wanted.high), abs=0.01)
    apart = bootstrap((one - other,), np.mean, n_resamples=10000, method="percentile", rng=2).confidence_interval
    found = paired_difference(one.mean(), other.mean(), mine, theirs, greater_is_better=True)
    assert (found.low, found.high) == pytest.approx((apart.low, apart.high), abs=0.01)


def test_bootstrap_difference_is_reported_only_beyond_chance_and_rounding():
    how, kind = Bootstrap(2000, 0), task("exact_match")
    good, bad = np.ones(40), np.arange(40) % 2

    def verdict(one, other, greater=True):
        drawn = [resample_metrics(kind, rows(each), how)["exact_match"] for each in (one, other)]
        return paired_difference(np.mean(one), np.mean(other), *drawn, greater_is_better=greater).verdict

    assert (verdict(good, bad), verdict(bad, good), verdict(good, bad, greater=False)) == (BETTER, WORSE, WORSE)
    assert verdict(bad, bad) == verdict(bad, np.roll(bad, 1)) == NO_DIFFERENCE
    assert verdict(good, good * (1 - 1e-7)) == NO_DIFFERENCE


def test_kinds_have_the_names_of_the_metrics_that_they_are_known_for():
    for metric, kind in (("rouge", "summarisation"), ("bleu", "translation")):
        assert TASK_KINDS[metric] is TASK_KINDS[kind]
        assert any(
            metric in each.name for each in TASK_KINDS[metric]("mine", TaskConfig(kind=metric, path="x")).metrics
        )
