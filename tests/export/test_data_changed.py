"""The training data is replaced, extended or removed after a run: what is made of the run stays the run's."""

import json
import shutil

import pytest

from tests.helpers.launching import command_here
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data, write_jsonl
from trainer.objectives.registry import FAMILIES, data_spec_of
from trainer.session.run_data import _data_set_of_one_document


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier with balanced weights and a language model, both of two steps, with their data."""
    folder = tmp_path_factory.mktemp("data_changed")
    model = tiny_model_dir(folder / "model", "llama", pad_token_id=2)
    tiny_tokenizer().save_pretrained(model)
    labelled = [{"text": f"row {number} of texts", "label": "neg" if number % 3 else "pos"} for number in range(16)]
    write_jsonl(folder / "labelled.jsonl", labelled)
    write_jsonl(folder / "own.jsonl", labelled[:4])
    write_chat_data(folder / "chat.jsonl", 16)
    common = [
        f"model.path={model}",
        f"data.cache_dir={folder / 'cache'}",
        "data.eval_share=0.25",
        "export.at_end=false",
    ]
    common += ["batch.global=4", "batch.micro=4", "budget.steps=2", "run.device=cpu", "logging.wandb=disabled"]
    runs = {
        "classifier": ["objective=classification", "objective.class_weights=balanced", "tuning=full"],
        "talk": ["tuning=lora"],
    }
    for name, words in runs.items():
        data = folder / ("labelled.jsonl" if name == "classifier" else "chat.jsonl")
        assert command_here(["train", *common, *words, f"data.path={data}", f"run.dir={folder / name}"]) == 0
    return folder


@pytest.fixture
def unprepared(folder):
    """Meanwhile nothing is prepared, and a test may change the files of `data.path`."""
    files = [folder / "labelled.jsonl", folder / "chat.jsonl"]
    originals = [file.read_bytes() for file in files]
    (folder / "cache").rename(folder / "kept")
    yield folder
    for file, original in zip(files, originals, strict=True):
        file.write_bytes(original)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    (folder / "kept").rename(folder / "cache")


def write_other_labels(file):
    write_jsonl(file, [{"text": f"mail {number}", "label": ["zzz_spam", "ham"][number % 2]} for number in range(8)])


def test_data_changed_later_leaves_a_classifier_its_labels(unprepared, tmp_path, capsys):
    """Other labels, a label that would come first, no file at all."""
    run_dir, rows = unprepared / "classifier", unprepared / "labelled.jsonl"
    more = rows.read_text(encoding="utf-8") + json.dumps({"text": "one more", "label": "all"}) + "\n"
    changes = {
        "replaced": lambda: write_other_labels(rows),
        "longer": lambda: rows.write_text(more, encoding="utf-8"),
        "gone": rows.unlink,
    }
    for name, change in changes.items():
        change()
        assert command_here(["export", str(run_dir), f"to={tmp_path / name}"]) == 0, name
        settings = json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))
        assert settings["id2label"] == {"0": "neg", "1": "pos"}, name
    words = ["evaluation.tasks.own.kind=classification", f"evaluation.tasks.own.path={unprepared / 'own.jsonl'}"]
    words.append("evaluation.resamples=20")
    assert command_here(["evaluate", str(run_dir), *words, f"to={tmp_path / 'e'}"]) == 0
    report = json.loads((tmp_path / "e" / "evaluation.json").read_text(encoding="utf-8"))
    assert report["tasks"]["own"]["metrics"]["accuracy"]["value"] is not None
    assert not (unprepared / "cache").exists(), "nothing was prepared"


def test_data_changed_later_gives_a_classifier_without_its_record_no_labels(unprepared, tmp_path, capsys):
    run_dir, rows = unprepared / "classifier", unprepared / "labelled.jsonl"
    record = run_dir / "run.json"
    kept = record.read_bytes()
    words = ["evaluation.tasks.own.kind=classification", f"evaluation.tasks.own.path={unprepared / 'own.jsonl'}"]
    words.append("evaluation.resamples=20")
    try:
        record.write_bytes(kept[:40])
        assert command_here(["evaluate", str(run_dir), *words, f"to={tmp_path / 'e'}"]) == 0, "the rows are the same"
        shutil.rmtree(unprepared / "cache")
        write_other_labels(rows)
        assert command_here(["evaluate", str(run_dir), *words, f"to={tmp_path / 'e'}"]) == 65
        assert "the labels' names come from the rows" in capsys.readouterr().err
    finally:
        record.write_bytes(kept)


def test_data_changed_later_is_refused_for_tasks_on_the_runs_documents(unprepared, tmp_path, capsys):
    rows = unprepared / "chat.jsonl"
    evaluate = ["evaluate", str(unprepared / "talk"), f"to={tmp_path / 'e'}", "evaluation.resamples=20"]
    with rows.open("a", encoding="utf-8") as file:
        file.write(rows.read_text(encoding="utf-8").splitlines()[0] + "\n")
    assert command_here(evaluate) == 65
    said = capsys.readouterr().err
    assert "evaluation.tasks.loss" in said and "asks the run's own documents" in said and "accept=[data]" in said
    assert command_here([*evaluate, "accept=[data]"]) == 0
    model = json.loads((tmp_path / "e" / "evaluation.json").read_text(encoding="utf-8"))["model"]
    assert model["accepted"] == ["data: other rows than the run was trained on"] and model["artefact"] is None
    shutil.rmtree(unprepared / "cache")
    rows.unlink()
    bits = ["export", str(unprepared / "talk"), "merge=true", "bits=torchao_int8", f"to={tmp_path / 'x'}"]
    for words in (evaluate, [*evaluate, "accept=[data]"], bits):
        capsys.readouterr()
        assert command_here(words) == 65
        assert "does not exist" in (said := capsys.readouterr().err)
    assert "measures its loss on 32 held-out documents" in said and not (tmp_path / "x").exists()
    shutil.copytree(unprepared / "kept", unprepared / "cache")
    assert command_here(evaluate) == 0, "what was prepared for the training has the documents of then"


@pytest.mark.parametrize("objective", sorted(FAMILIES))
def test_data_of_each_objective_can_be_replaced_by_one_document(tmp_path, objective):
    data_spec = data_spec_of(FAMILIES[objective].settings())
    data = _data_set_of_one_document(tmp_path, data_spec, "print/train")
    assert len(data) == data_spec.sequences_per_document and data.fingerprint == "print/train"
    assert set(data.marks) == set(data_spec.marks)
