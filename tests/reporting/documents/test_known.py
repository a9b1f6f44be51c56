"""Licences and their conflicts, compute, questions: by arithmetic and examples."""

from pathlib import Path

import pytest

from strategies.errors import ConfigError
from trainer.reporting.documents.compute import training_compute
from trainer.reporting.documents.facts import ModelFacts
from trainer.reporting.documents.licences import licence_conflicts
from trainer.reporting.documents.questions import QUESTIONS, Paper, paper_problems, read_answers
from trainer.reporting.documents.write import render_document
from trainer.reporting.results import EVALUATION_REPORT, KeptReport
from trainer.reporting.run_record import RunOutcome, RunRecord, parse_run_record

RUN = RunRecord(
    flops_per_token=6e9,
    world_size=4,
    base_parameters=1_000_000_000,
    outcome=RunOutcome(speed={"tokens_per_s": 1000.0}),
)


@pytest.mark.parametrize(
    ("base", "data", "own", "said"),
    [
        (
            "cc-by-nc-4.0",
            "mit",
            "apache-2.0",
            ["the base model is under cc-by-nc-4.0, which allows no commercial use, and apache-2.0"],
        ),
        (
            "apache-2.0",
            "cc-by-sa-4.0",
            "mit",
            ["must be given on under the same terms, and the tuned model is to be given under mit"],
        ),
        ("apache-2.0", "cc-by-nd-4.0", None, ["allows no derivatives"]),
        ("llama3.1", "mit", None, ["a licence of its own terms"]),
        ("mit", None, "mit", ["the data of notes states no licence"]),
        (None, "mit", "mit", ["the base model states no licence"]),
        ("apache-2.0", "cc-by-4.0", "apache-2.0", []),
        ("gpl-3.0", "mit", "gpl-3.0", ["same terms"]),
    ],
)
def test_licence_conflicts_are_those_of_the_stated_licences(base, data, own, said):
    lines = licence_conflicts(base, [{"name": "notes", "licence": data}], own)
    assert len(lines) == len(said) and all(part in line for part, line in zip(said, lines, strict=True))


def test_compute_figures_by_arithmetic():
    took = training_compute(RUN, {"base_flop": "1e19", "device_watts": 500}, 1_000_000)
    assert took.flop == 6e15 and took.device_hours == pytest.approx(1000 / 3600 * 4)
    assert (
        took.kwh == pytest.approx(1000 / 3600 * 4 / 2)
        and took.share_of_base == pytest.approx(6e-4)
        and took.exceeds_third_of_base is False
    )
    assert took.base_tokens_at_third == pytest.approx(3e6)
    assert training_compute(RUN, {"base_flop": 1.7e16}, 1_000_000).exceeds_third_of_base is True


def test_compute_figures_of_unknown_parts_are_left_open():
    took = training_compute(RunRecord(), {}, None)
    assert (took.flop, took.device_hours, took.kwh, took.share_of_base, took.exceeds_third_of_base) == (None,) * 5
    assert training_compute(RUN, {}, 10).kwh is None


def test_papers_answers_to_no_question_and_unknown_papers_are_refused(tmp_path):
    file = tmp_path / "answers.yaml"
    file.write_text("provider: Clinic\nprovidr: x\nbase_flop: much\ncontact:\n")
    answers, problems = read_answers(str(file))
    assert answers["provider"] == "Clinic" and "contact" not in answers
    assert (
        "providr: there is no such question; did you mean provider?" in problems[0]
        and "must be a number" in problems[1]
    )
    assert "cannot be read" in read_answers(str(tmp_path / "none.yaml"))[1][0]
    (line,) = paper_problems(["annex_xi", "annex_x"])
    assert "annex_x]: there is no such paper; did you mean annex_xi?" in line


def test_papers_problems_are_reported_when_a_run_is_composed(tmp_path, monkeypatch):
    from launch.config.compose import compose_config

    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="there is no such paper"):
        compose_config(["model.path=m", "data.path=train.jsonl", "budget.steps=1", "export.papers=[annex_x]"])
    assert {"provider", "licence", "base_flop"} <= QUESTIONS.keys()


@pytest.mark.parametrize("name", ["measured", *Paper])
def test_paper_of_a_run_that_recorded_nothing_says_so(name):
    text = render_document(name, ModelFacts(run=parse_run_record({"config_sha256": "c"}, [])))
    assert ("not recorded" in text or name == "training_summary") and "None" not in text and "*Open:*" in text


def report(time, loss, base=None, rows="a"):
    metrics = {"loss": {"value": loss}}
    against = {"what": "base", "tasks": {"loss": {"metrics": {"loss": {"value": base, "verdict": "better"}}}}}
    tasks = {"loss": {"kind": "loss", "num_rows": 8, "rows_sha256": rows, "metrics": metrics}}
    content = {"time": time, "model": {"artefact": "weights"}, "tasks": tasks}
    return KeptReport(EVALUATION_REPORT, Path("x"), content if base is None else {**content, "against": against})


def test_card_keeps_the_base_of_an_older_report_beside_a_newer_one_without_it():
    facts = ModelFacts(artefact="weights", reports=[report(2, 10.21), report(1, 10.20, base=10.83)])
    (row,) = facts.measured_metrics
    assert (row["value"], row["base"], row["change"]["verdict"]) == (10.21, 10.83, "better")
    other_rows = [report(2, 10.21, rows="b"), report(1, 10.20, base=10.83)]
    (row,) = ModelFacts(artefact="weights", reports=other_rows).measured_metrics
    assert (row["value"], row["base"]) == (10.21, None)


def test_training_summary_has_the_size_of_the_data_and_not_of_what_was_seen():
    run = RunRecord(data_report={"train": {"documents": 8, "tokens": 1052}})
    text = render_document("training_summary", ModelFacts(run=run, tokens=126_240))
    assert "training data: 1,052 tokens in 8 documents; 126,240 tokens seen in training, each 120 times" in text
