"""The demo's data and its command; the demo itself is run by hand (minutes)."""

import csv
import json

import pytest

from launch.config.compose import compose_config
from launch.demo import command as demo
from launch.demo.results import held_out_evaluations
from strategies.errors import DataError
from tests.helpers.building import model_dir
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer


def write_notes(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ID", "section_header", "section_text", "dialogue"])
        writer.writerows(rows)
    return path


@pytest.fixture
def notes(tmp_path):
    rows = [[n, "ALLERGY", f"None  known {n}.", f"Doctor: Any allergies? \n Patient: No {n}."] for n in range(12)]
    rows.append([12, "PLAN", "Long.", "Doctor: word " * 300])
    return write_notes(tmp_path / "notes.csv", rows)


def prepare(notes, folder):
    return demo.prepare_demo(notes, tiny_tokenizer(), folder, held_out_tokens=300)


def test_demo_documents_are_split_within_the_budget_and_the_same_every_time(notes, tmp_path):
    data = prepare(notes, tmp_path / "a")
    train, held_out = (path.read_text().splitlines() for path in (data.train_file, data.held_out_file))
    assert len(train) == data.num_train_documents and len(held_out) == data.num_held_out_documents
    assert len(set(train) | set(held_out)) == 12, "the long one is left out, no other, and no document is in both"
    assert 300 <= data.num_held_out_tokens < 300 + demo.MAX_DOCUMENT_TOKENS
    again = prepare(notes, tmp_path / "b")
    assert (
        again.train_file.read_text() == data.train_file.read_text()
        and again.held_out_file.read_text() == data.held_out_file.read_text()
    )
    user, assistant = json.loads(train[0])["messages"]
    assert user["content"].startswith("Write the allergies section") and "\nPatient: No" in user["content"]
    assert assistant["role"] == "assistant" and assistant["content"].startswith("None known ")


def test_data_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(DataError, match="NEW"):
        prepare(write_notes(tmp_path / "n.csv", [[1, "NEW", "x", "y"]]), tmp_path)
    with pytest.raises(DataError, match="too few"):
        prepare(write_notes(tmp_path / "n.csv", [[1, "PLAN", "x", "y"]]), tmp_path)


def test_the_command_is_a_legal_run(notes, tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path))
    model = tiny_model_dir(tmp_path / "model")
    composed = compose_config(demo.training_arguments(model, prepare(notes, tmp_path), tmp_path / "run"))
    assert composed.config.strategy.name == "fsdp2" and composed.config.export.verify
    assert composed.config.batch["global"] % (composed.config.batch["micro"] * composed.config.launcher.processes) == 0
    assert composed.config.budget.tokens == demo.TRAIN_TOKENS


def test_dry_run_of_the_demo_trains_nothing_and_ends_well(notes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model, data = model_dir(tmp_path), prepare(notes, tmp_path / "data")
    monkeypatch.setattr(demo, "fetch_demo_model", lambda: model)
    monkeypatch.setattr(demo, "fetch_demo_file", lambda name: notes)
    monkeypatch.setattr(demo, "prepare_demo", lambda *_: data)
    assert demo.main(["strategy=single", "launcher.processes=1", "--dry-run"]) == 0
    assert "(--dry-run)" in capsys.readouterr().out


def test_evaluations_are_reported_in_order(tmp_path):
    rows = [{"step": 0, "eval/loss": 3.0}, {"step": 1, "loss": 2.5}, {"step": 1, "eval/loss": 2.0, "tokens": 9}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert held_out_evaluations(tmp_path, "eval/loss") == [{"eval/loss": 3.0}, {"eval/loss": 2.0}]


def test_the_first_conversation_of_each_shown_section_is_answered():
    def row(section, note):
        return {"messages": [{"content": f"Write the {section} section of it.\n\nDoctor: hi"}, {"content": note}]}

    rows = [
        row("exam", "None."),
        row("plan", "Rest for two weeks."),
        row("plan", "Rest and ice."),
        row("exam", "No finding at all."),
    ]
    assert [note for _, note in demo.questions_with_notes(rows, ("exam", "plan", "labs"))] == [
        "No finding at all.",
        "Rest for two weeks.",
    ]


def test_the_summary_names_everything_and_the_sync_line(tmp_path):
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    before, after = ({f"eval/{name}": value for name in ("loss", "perplexity", "accuracy")} for value in (3.0, 2.0))
    text = demo.summary_text(tmp_path, before, after, 120.0)
    for part in (
        "2.0 minutes",
        "3.0000    2.0000",
        str(tmp_path / "export"),
        "run.json",
        "metrics.jsonl",
        "wandb sync",
    ):
        assert part in text
