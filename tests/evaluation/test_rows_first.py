"""Rows are encoded and checked before anything is asked, and what a model has answered is written before the next task."""

import json
import re
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.building import model_dir
from tests.helpers.endpoint import serving
from tests.helpers.launching import command_here
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer
from trainer.data.report import progress
from trainer.evaluation import task_evaluator
from trainer.evaluation.tasks.prepared import PreparedTask

NAMES = ("Emily", "Sarah", "James", "Michael")
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def write_rows(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def named_model(root):
    """A model whose tokenizer, as SmolLM2's, adds no BOS and has names as one token."""
    tokenizer = tiny_tokenizer(vocab_size=600, texts=NAMES)
    assert [len(tokenizer(name)["input_ids"]) for name in NAMES] == [1, 1, 1, 1]
    tiny_model_dir(root / "named", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(root / "named")
    return root / "named"


def test_counterfactual_people_are_names_of_one_token_without_a_bos(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = named_model(tmp_path)
    terms = {"gender": {"female": {"person": ["Emily"]}, "male": {"person": ["James"]}}}
    (tmp_path / "terms.json").write_text(json.dumps(terms))
    template = {"template": "{person} leads the project.", "attribute": "gender"}
    key = "evaluation.tasks.own"
    words = [f"model.path={path}", f"to={tmp_path}/out", "run.threads=1", "evaluation.tasks=[counterfactual]"]
    words += [f"{key}.kind=counterfactual", f"{key}.path={write_rows(tmp_path / 'own.jsonl', [template])}"]
    words += [f"{key}.options.terms={tmp_path}/terms.json", "evaluation.resamples=100"]
    assert command_here(["evaluate", *words]) == 0
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["tasks"]["counterfactual"]["num_rows"] == 32  # every shipped template

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)

    def logprob_after_name(name):
        ids = tokenizer(f"{name} leads the project.")["input_ids"]
        with torch.no_grad():
            likely = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(likely[place - 1, ids[place]]) for place in range(1, len(ids)))

    gap = report["tasks"]["own"]["metrics"]["gap"]["value"]
    assert gap == pytest.approx(abs(logprob_after_name("Emily") - logprob_after_name("James")), rel=1e-4)


BAD = {
    "tool_calls": (
        {
            "messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
            "tools": TOOLS,
        },
        [],
        "bad.jsonl:1: this chat template ignores the column tools",
    ),
    "exact_match": (
        {"prompt": "word " * 2000, "completion": "a"},
        ["write.max_new_tokens=4"],
        r"bad.jsonl:1: \d+ tokens, and 4 for .* are more than the 512 positions of the model",
    ),
}


@pytest.fixture(scope="module", name="judged")
def _judged(tmp_path_factory):
    """A model, a judge, and the words of two tasks, of which the second one asks the judge."""
    root = tmp_path_factory.mktemp("rows")
    model_dir(root)
    asked = write_rows(root / "asked.jsonl", [{"prompt": f"question {n}", "completion": "hello"} for n in range(3)])
    with serving(chat=lambda body: "Grade: 7") as judge:
        words = [f"model.path={root}/llama", "run.threads=1", f"evaluation.judge.url={judge.url}"]
        words += ["evaluation.judge.parallel=1", "evaluation.judge.retries=0", "evaluation.resamples=100"]
        for name, kind in (("first", "exact_match"), ("graded", "judge")):
            key = f"evaluation.tasks.{name}"
            words += [f"{key}.kind={kind}", f"{key}.path={asked}", f"{key}.write.max_new_tokens=4"]
        yield root, judge, words


@pytest.mark.parametrize("kind", BAD)
def test_evaluation_refuses_a_bad_row_of_the_last_task_before_the_model_or_judge_is_asked(judged, kind, capsys):
    root, judge, words = judged
    judge.requests.clear()
    row, more, message = BAD[kind]
    key = "evaluation.tasks.last"
    bad = [f"{key}.kind={kind}", f"{key}.path={write_rows(root / 'bad.jsonl', [row])}"]
    bad += [f"{key}.{word}" for word in more]
    assert command_here(["evaluate", *words, *bad, f"to={root}/{kind}"]) == 65
    screen = capsys.readouterr()
    assert re.search(message, screen.err) and "tuned: first" not in screen.out
    assert judge.requests == []


def test_evaluation_reports_rows_that_take_long_to_check(monkeypatch):
    lines = []
    is_told = threading.Event()

    def hear(line):
        lines.append(line)
        is_told.set()

    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.01)
    monkeypatch.setattr(task_evaluator, "PreparationProgress", partial(progress.PreparationProgress, hear))
    task = SimpleNamespace(
        config_key="evaluation.tasks.big", loads_own_rows=False, score_cases=lambda cases, model: is_told.wait(60)
    )
    task_evaluator.TaskEvaluator([PreparedTask(task, [None] * 1200)], SimpleNamespace()).check_rows()
    assert lines[0].startswith("preparing data: checking 1,200 rows of evaluation.tasks.big, ")


def test_training_refuses_a_bad_row_of_its_tasks_before_the_first_step(judged, tmp_path, capsys):
    root, _, _ = judged
    row, more, message = BAD["exact_match"]
    words = [f"model.path={root}/llama", f"data.path={root}/asked.jsonl", f"data.eval_path={root}/asked.jsonl"]
    words += [f"run.dir={tmp_path}/run", "budget.steps=2", "batch.global=2", "batch.micro=2", "run.threads=1"]
    words += ["logging.wandb=disabled", "evaluation.at_start=false", "evaluation.tasks.last.kind=exact_match"]
    words += [f"evaluation.tasks.last.path={write_rows(tmp_path / 'bad.jsonl', [row])}"]
    words += [f"evaluation.tasks.last.{word}" for word in more]
    assert command_here(["train", *words]) == 65
    screen = capsys.readouterr()
    assert re.search(message, screen.err) and "step 1/2" not in screen.out


def test_evaluation_keeps_finished_tasks_on_the_disk_when_a_later_one_fails(judged, tmp_path, capsys):
    _, judge, words = judged
    words = [*words, f"to={tmp_path}/out", f"evaluation.judge.cache_dir={tmp_path}/judge"]
    out = tmp_path / "out"
    out.mkdir()
    (out / "evaluation.json").write_text("an earlier report")
    judge.failures = [(400, {"error": {"message": "too long"}})] * 5
    assert command_here(["evaluate", *words]) == 64
    judge.failures.clear()
    assert f"finished before that: tuned: first; see {out}/evaluation_unfinished.json" in capsys.readouterr().out
    unfinished = json.loads((out / "evaluation_unfinished.json").read_text())
    rows = [json.loads(line) for line in (out / "evaluation_unfinished_rows.jsonl").read_text().splitlines()]
    assert [(row["task"], row["arm"]) for row in rows] == [("first", "tuned")] * 3
    first = unfinished["finished"]["tuned"]["first"]
    right = [next(iter(row["scores"].values())) for row in rows]  # the score that orders rows
    assert first["num_rows"] == 3 and first["metrics"]["exact_match"] == sum(right) / 3
    assert (out / "evaluation.json").read_text() == "an earlier report"
    judge.failures = [(400, {"error": {"message": "too long"}})] * 5
    graded_alone = [word for word in words if not word.startswith("evaluation.tasks.first.")]
    assert command_here(["evaluate", *graded_alone]) == 64
    assert "too long" in capsys.readouterr().err
    judge.failures.clear()
    kept = json.loads((out / "evaluation_unfinished.json").read_text())
    assert kept == unfinished, "an evaluation that answered nothing leaves what an earlier one has finished"
    assert command_here(["evaluate", *words]) == 0  # the same command, once the judge answers
    report = json.loads((out / "evaluation.json").read_text())
    assert report["tasks"]["first"]["metrics"]["exact_match"]["value"] == first["metrics"]["exact_match"]
    assert not [*out.glob("evaluation_unfinished*")]
