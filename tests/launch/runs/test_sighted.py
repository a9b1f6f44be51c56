"""Which runs saw a document: held against what the loaders of real runs handed out."""

import json
import shutil
from collections import Counter

import pytest

from launch.main import main
from tests.helpers.covering import EVERYTHING
from tests.helpers.launching import command_here
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import chat_rows, tiny_tokenizer, write_jsonl
from trainer.data.batches.loader import StepLoader

OWN = "run.device=cpu run.threads=1 launcher.processes=1 strategy=single logging.wandb=disabled batch.global=4 batch.micro=2"
SECRET = "my number is 555-0199"


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    """A directory of runs, and by run how often each sequence was handed out to be learned, by its tokens."""
    root, taken = tmp_path_factory.mktemp("sighted"), {}
    rows = chat_rows(12)
    rows[4]["messages"][0]["content"] += f" {SECRET}."
    data, others = write_jsonl(root / "rows.jsonl", rows), write_jsonl(root / "others.jsonl", chat_rows(8, seed=5))
    model = tiny_model_dir(root / "model", "llama")
    tiny_tokenizer().save_pretrained(model)

    def train(name, *words):
        counts = taken[name] = Counter()
        collated = StepLoader._collate

        def counted(self, samples, numbers=None):
            counts.update(sample.input_ids.tobytes() for sample in samples)
            return collated(self, samples, numbers)

        own = [
            *OWN.split(),
            f"run.dir={root / 'runs' / name}",
            f"data.cache_dir={root / 'cache'}",
            f"model.path={model}",
        ]
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(StepLoader, "_collate", counted)
            given = {word.partition("=")[0]: word for word in [*own, f"data.path={data}", *words]}
            assert command_here(["train", *given.values()]) == 0

    train("alone", "budget.steps=4", "tuning=lora", "export.at_end=true")
    train("packed", "budget.steps=2", "data.packing=true", "data.max_length=96", "export.at_end=false")
    train("held-out", "budget.steps=1", f"data.path={others}", f"data.eval_path={data}", "export.at_end=false")
    adapter = root / "runs" / "alone" / "export"
    train(
        "after", "budget.steps=1", f"data.path={others}", f"tuning.from={adapter}", "tuning=lora", "export.at_end=false"
    )
    return root, taken


def asked(capsys, root, word, *flags):
    assert main(["status", str(root / "runs"), word, *flags]) == 0
    out = capsys.readouterr().out
    return out if flags else " ".join(out.split())  # sentences are folded


def test_sighted_count_of_each_document_is_what_the_loader_handed_out(taken, capsys):
    from trainer.data.store.sequences import TokenDataset

    root, counted = taken
    place = json.loads((root / "runs" / "alone" / "run.json").read_text())["data_directory"]
    packed = json.loads((root / "runs" / "packed" / "run.json").read_text())["data_directory"]
    for number in range(0, 12, 1 if EVERYTHING else 3):
        word = f"document={root / 'rows.jsonl'}:{number + 1}"
        found = {row["run"].rpartition("/")[2]: row for row in json.loads(asked(capsys, root, word, "--json"))["runs"]}
        for name, directory in (("alone", place), ("packed", packed)):
            train = TokenDataset.open(f"{directory}/train")
            (sequence,) = [n for n, row in enumerate(train.documents) if row == number]
            assert found[name]["times"] == counted[name][train.sample(sequence).input_ids.tobytes()], (name, number)
            assert found[name]["documents"] == {"train": 1}
        assert (found["held-out"]["documents"], found["held-out"]["trained"]) == ({"eval": 1}, False)
        assert found["after"]["trained"] == (found["alone"]["times"] > 0) and found["after"]["documents"] == {}
    assert len({*counted["alone"].values()}) > 1, "an epoch that was not finished tells times apart"


def test_sighted_text_is_found_where_it_was_prepared_and_the_unknown_is_named(taken, capsys, tmp_path):
    root, _ = taken
    said = asked(capsys, root, f"text={SECRET}")
    assert f'"{SECRET}": in 4 of 4 runs below' in said and "began with the weights of" in said
    assert "held out, evaluated on alone" in said and "keep what they learned" in said
    assert "in no run below" in asked(capsys, root, "text=nobody ever said this")
    assert "in no run below" in asked(capsys, root, "document=rows.jsonl:99")
    (root / "cache").rename(root / "elsewhere")
    try:
        gone = asked(capsys, root, "document=rows.jsonl:5")
    finally:
        (root / "elsewhere").rename(root / "cache")
    assert "not known for 4" in gone and "is not there; the same command prepares it again" in gone


def test_sighted_count_of_a_killed_run_is_from_its_rows(taken, capsys, tmp_path):
    """It leaves no outcome, and a status of its start."""
    root, _ = taken
    shutil.copytree(root / "runs" / "alone", tmp_path / "runs" / "killed")
    for name, change in (("run.json", {"outcome": None}), ("status.json", {"state": "running", "step": 0})):
        path = tmp_path / "runs" / "killed" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    word = f"text={SECRET}"
    (killed,) = json.loads(asked(capsys, tmp_path, word, "--json"))["runs"]
    whole = json.loads(asked(capsys, root, word, "--json"))["runs"]
    assert killed["times"] == next(row["times"] for row in whole if row["run"].endswith("alone")) > 0
    assert killed["step"] == 4


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["document=rows.jsonl"], "must be a file and a line, as in document=train.jsonl:12"),
        (["text= "], "text needs a value, as in text='Jane Roe'"),
        (["text=a", "document=b:1"], "name one document"),
        (["text=a", "--watch"], "leave --watch and --verify out"),
    ],
)
def test_sighted_refuses_what_cannot_be_searched_for(tmp_path, capsys, words, part):
    assert main(["status", str(tmp_path), *words]) == 64
    assert part in capsys.readouterr().err
