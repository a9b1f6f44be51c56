"""What common files hold: verdicts as tables write them, numbers for classes, pointers of git-lfs in the place of files."""

import pytest

from launch.main import main
from strategies.errors import ConfigError, DataError
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data, write_jsonl
from trainer.data.config import DataConfig
from trainer.data.prepare import Preparation
from trainer.model.config import ModelConfig
from trainer.model.loading import load_tokenizer
from trainer.objectives.classification import ClassificationConfig
from trainer.objectives.kto import KtoConfig
from trainer.objectives.registry import data_spec_of
from trainer.objectives.sft import SftConfig

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2145\nsize 12345\n"


def prepare(tmp_path, rows, objective):
    write_jsonl(tmp_path / "train.jsonl", rows)
    config = DataConfig(path=str(tmp_path / "train.jsonl"), cache_dir=str(tmp_path / "cache"))
    return Preparation(config, tiny_tokenizer(), data_spec_of(objective), seed=1).open_or_prepare()


def rated(*labels, column="label"):
    return [{"prompt": f"q{n}", "completion": f"a{n}", column: label} for n, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (1.0, 0.0),
        ("yes", "no"),
        ("YES", " No "),
        ("desirable", "undesirable"),
        ("Desirable", "UNDESIRABLE"),
        ("1.0", "0.0"),
    ],
)
def test_kto_reads_the_usual_verdicts(tmp_path, good, bad):
    for column in ("label", "thumbs"):
        made = prepare(tmp_path, rated(good, bad, bad, column=column), KtoConfig())
        assert made.train.marks["desirable"].tolist() == [1, 0, 0]


def test_kto_verdict_that_is_unknown_is_refused_with_column_and_value(tmp_path):
    with pytest.raises(
        DataError, match=r'train\.jsonl:1: "label" is \'maybe\'; it must be true or false, .* or undesirable'
    ):
        prepare(tmp_path, rated("maybe", "yes"), KtoConfig())


def test_kto_verdict_spellings_are_classes_for_other_objectives(tmp_path):
    made = prepare(tmp_path, rated("no", "yes", "no"), SftConfig())
    assert len(made.train) == 3, "prompts and answers, as before: nothing is left out as a thumb down"


@pytest.mark.parametrize("several", [False, True])
def test_classification_numbers_are_ids_of_the_given_label_names(tmp_path, several):
    objective = ClassificationConfig(labels=["neg", "neu", "pos"], multi_label=several)
    labels = [[0], [2, 1], ["pos"]] if several else [0, 2.0, "1", "pos"]
    made = prepare(tmp_path, [{"text": f"t{n}", "label": label} for n, label in enumerate(labels)], objective)
    assert made.label_names == ["neg", "neu", "pos"]
    assert made.train.marks["label"].tolist() == ([0b001, 0b110, 0b100] if several else [0, 2, 1, 2])


def test_classification_number_that_is_no_label_id_is_refused(tmp_path):
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 3}]
    with pytest.raises(
        DataError,
        match=r"label '3' is none of \['neg', 'neu', 'pos'\] \(objective.labels\), and no id of one \(0 to 2\)",
    ):
        prepare(tmp_path, rows, ClassificationConfig(labels=["neg", "neu", "pos"]))
    with pytest.raises(DataError, match="label '0' is none of"):  # names that are numbers themselves
        prepare(tmp_path, rows, ClassificationConfig(labels=["1", "3"]))


@pytest.mark.parametrize(
    "name",
    [
        "train.parquet",
        "train.jsonl",
        "train.json",
        "train.csv",
        "train.tsv",
        "train.txt",
        "train.arrow",
        "train.jsonl.gz",
    ],
)
def test_git_lfs_pointers_of_data_are_named(tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    config = DataConfig(path=str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(
        DataError, match=rf"{name}: is a pointer that git-lfs left .* run `git lfs pull` in its directory"
    ):
        Preparation(config, tiny_tokenizer(), data_spec_of(SftConfig()), seed=1).open_or_prepare()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"])
def test_git_lfs_pointers_of_the_tokenizer_are_named(tmp_path, name, capsys):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / name).write_text(POINTER)
    with pytest.raises(ConfigError, match=rf"{name}: is a pointer that git-lfs left"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "model")))
    template = tmp_path / "own.jinja"
    template.write_text(POINTER)
    (tmp_path / "model" / name).unlink()
    with pytest.raises(ConfigError, match=r"own\.jinja: is a pointer"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "model"), chat_template=str(template)))


def test_git_lfs_pointer_is_named_by_the_command(tmp_path, capsys):
    model = tiny_model_dir(tmp_path)
    tiny_tokenizer().save_pretrained(model)
    data = tmp_path / "train.parquet"
    data.write_text(POINTER)
    assert main(["prepare", f"model.path={model}", f"data.path={data}", f"data.cache_dir={tmp_path / 'cache'}"]) == 65
    assert "run `git lfs pull`" in capsys.readouterr().err
    (model / "tokenizer.json").write_text(POINTER)
    write_chat_data(tmp_path / "train.jsonl", 4)
    assert main(["prepare", f"model.path={model}", f"data.path={tmp_path / 'train.jsonl'}"]) == 64
    assert "tokenizer.json: is a pointer" in capsys.readouterr().err
