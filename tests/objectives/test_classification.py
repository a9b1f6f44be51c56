"""One label and several: losses against transformers' and torch's, weights, F1 against a count by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from strategies.errors import ConfigError, DataError
from tests.helpers.tokenizers import tiny_tokenizer, write_jsonl
from trainer.data.config import DataConfig
from trainer.data.fields import RowError
from trainer.data.prepare import Preparation
from trainer.data.store.sequences import Sample
from trainer.evaluation.loss import f1_scores
from trainer.objectives.classification import (
    Classification,
    ClassificationConfig,
    LabelDataSpec,
    MultiLabel,
    balanced_weights,
    join_labels,
    settle_class_weights,
)
from trainer.objectives.registry import build_objective, data_spec_of

ROWS, LABELS = 40, 5


def logits():
    return torch.randn(ROWS, LABELS, generator=torch.Generator().manual_seed(3))


def terms(objective, labels, given=None):
    """The terms of rows whose logits are `logits()`."""
    given = logits() if given is None else given
    batch = {"input_ids": None, "attention_mask": None, "labels": torch.as_tensor(labels)}
    return objective.terms(lambda **inputs: SimpleNamespace(logits=given), batch)


def masks(seed=0):
    return np.random.default_rng(seed).integers(0, 2**LABELS, ROWS)


def bits(labels):
    return ((np.asarray(labels)[:, None] >> np.arange(LABELS)) & 1).astype(bool)


def f1_by_hand(predicted, true):
    """(macro, micro) from sets of documents, label by label."""
    scores, sums = [], np.zeros(2)
    for label in range(LABELS):
        right = sum(1 for p, t in zip(predicted[:, label], true[:, label], strict=True) if p and t)
        named = int(predicted[:, label].sum()) + int(true[:, label].sum())
        sums += [2 * right, named]
        if named:
            precision = right / max(1, predicted[:, label].sum())
            recall = right / max(1, true[:, label].sum())
            scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    return float(np.mean(scores)), float(sums[0] / sums[1])


def test_several_labels_have_the_loss_of_transformers_summed_over_labels():
    labels = masks()
    mean = torch.nn.BCEWithLogitsLoss()(logits(), torch.from_numpy(bits(labels)).float())  # as transformers computes it
    assert terms(MultiLabel(), labels)["loss"].item() == pytest.approx(mean.item() * ROWS * LABELS, rel=1e-6)


@pytest.mark.parametrize(
    "objective", [Classification(), MultiLabel(), Classification([1.0] * 5), MultiLabel([2.0] * 5)]
)
def test_classification_filler_row_counts_nothing(objective):
    labels = np.random.default_rng(1).integers(0, LABELS, ROWS)
    given = logits()
    with torch.no_grad():
        alone = terms(objective, labels, given)
        filled = terms(objective, [*labels, -100], torch.cat([given, torch.full((1, LABELS), 9.0)]))
    for name, value in alone.items():
        assert torch.allclose(value, filled[name], rtol=1e-6), name


def test_classification_weights_multiply_documents_and_positives():
    weights = [0.5, 1.0, 2.0, 4.0, 1.0]
    labels = torch.arange(ROWS) % LABELS
    each = F.cross_entropy(logits(), labels, reduction="none")
    expected = (each * torch.tensor(weights)[labels]).sum().item()
    assert terms(Classification(weights), labels)["loss"].item() == pytest.approx(expected, rel=1e-6)
    true = torch.from_numpy(bits(masks())).float()
    each = F.binary_cross_entropy_with_logits(logits(), true, reduction="none")
    expected = (each * (1 + true * (torch.tensor(weights) - 1))).sum().item()
    assert terms(MultiLabel(weights), masks())["loss"].item() == pytest.approx(expected, rel=1e-6)


def test_a_wrong_number_of_weights_is_refused():
    with pytest.raises(ConfigError, match="the data has 5 labels; give a weight for each"):
        terms(Classification([1.0, 2.0]), [0] * ROWS)


def test_classification_balanced_weights_are_those_of_the_definition():
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    assert balanced_weights(labels, "abc", multi_label=False) == pytest.approx([10 / 12, 10 / 6, 10 / 12])
    assert np.mean(np.array(balanced_weights(labels, "abc", multi_label=False))[labels]) == pytest.approx(1.0)
    several = np.array([0b01, 0b01, 0b11, 0b00])
    assert balanced_weights(several, "ab", multi_label=True) == pytest.approx([1 / 3, 3.0])
    for many, seen in ((False, labels), (True, several)):
        with pytest.raises(DataError, match=r"no training document has the label '[cd]'"):
            balanced_weights(seen, "abcd", multi_label=many)
    with pytest.raises(DataError, match="every training document has the label 'a'"):
        balanced_weights(np.array([1, 3]), "ab", multi_label=True)


def test_classification_balanced_weights_are_settled_once_and_lists_are_kept():
    config = ClassificationConfig(class_weights="balanced")
    found, noted = settle_class_weights(config, SimpleNamespace(labels=np.array([0, 0, 1])), ["a", "b"])
    assert noted == {"objective.class_weights": "balanced -> [0.75, 1.5]"}
    assert found.class_weights == pytest.approx([0.75, 1.5]) and config.class_weights == "balanced"
    given = ClassificationConfig(class_weights=[1.0, 2.0])
    assert settle_class_weights(given, None, None) == (given, {})
    assert isinstance(build_objective(ClassificationConfig(multi_label=True)), MultiLabel)
    assert data_spec_of(config).counts(None) == {"loss": 1}


@pytest.mark.parametrize("several", [False, True])
def test_classification_f1_is_that_of_a_count_by_hand(several):
    labels = masks(5) if several else np.random.default_rng(5).integers(0, LABELS - 1, ROWS)  # one label never occurs
    objective = MultiLabel() if several else Classification()
    assert "confusion" not in terms(objective, labels)  # in training
    sums = torch.zeros(3, LABELS, dtype=torch.float64)
    right = 0.0
    with torch.no_grad():
        for start in range(0, ROWS, 7):
            found = terms(objective, labels[start : start + 7], logits()[start : start + 7])
            sums += found["confusion"].double()
            right += found["accuracy"].item()
    predicted = (logits() > 0).numpy() if several else np.eye(LABELS, dtype=bool)[logits().argmax(-1).numpy()]
    true = bits(labels) if several else np.eye(LABELS, dtype=bool)[labels]
    assert right == (predicted == true).all(1).sum()
    macro, micro = f1_scores(sums)
    assert (macro, micro) == pytest.approx(f1_by_hand(predicted, true), rel=1e-12)
    if not several:
        assert micro == pytest.approx(right / ROWS)


@pytest.mark.parametrize("several", [False, True])
def test_f1_is_that_of_scikit_learn(several):
    metrics = pytest.importorskip("sklearn.metrics", reason="compared where it is installed")
    labels = masks(6) if several else np.random.default_rng(6).integers(0, LABELS - 1, ROWS)
    with torch.no_grad():
        confusion = terms(MultiLabel() if several else Classification(), labels)["confusion"]
    predicted = (logits() > 0).numpy() if several else logits().argmax(-1).numpy()
    true = bits(labels) if several else labels
    expected = [metrics.f1_score(true, predicted, average=average) for average in ("macro", "micro")]
    assert f1_scores(confusion.double()) == pytest.approx(expected, rel=1e-12)


def test_classification_f1_of_predicting_nothing_is_zero():
    assert f1_scores(torch.zeros(3, 2)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (["b", "a"], "a|b"),
        ("b|a", "a|b"),
        (" b | a ", "a|b"),
        ([3, 1, 3], "1|3"),
        ([], ""),
        ("", ""),
        ("a", "a"),
        (2, "2"),
    ],
)
def test_classification_labels_in_every_spelling(value, found):
    assert join_labels(value) == found


@pytest.mark.parametrize("value", [None, ["a|b"], [1.5], [""], [["a"]], {"a": 1}])
def test_classification_value_that_is_no_list_of_labels_is_refused(value):
    with pytest.raises(RowError):
        join_labels(value)


def prepared(tmp_path, rows, eval_rows=None, **options):
    write_jsonl(tmp_path / "train.jsonl", rows)
    settings = DataConfig(path=str(tmp_path / "train.jsonl"), cache_dir=str(tmp_path / "cache"))
    if eval_rows is not None:
        write_jsonl(tmp_path / "eval.jsonl", eval_rows)
        settings.eval_path = str(tmp_path / "eval.jsonl")
    data_spec = LabelDataSpec(**{"multi_label": True, **options})
    return Preparation(settings, tiny_tokenizer(None), data_spec, seed=1).open_or_prepare()


def test_several_labels_become_bits(tmp_path):
    rows = [{"text": f"a lazy dog {i}", "label": label} for i, label in enumerate((["up", "in"], "down|up", [], "up"))]
    found = prepared(tmp_path, rows, [{"text": "a", "label": "in|down"}])
    assert found.label_names == ["down", "in", "up"]
    assert found.train.labels.tolist() == [0b110, 0b101, 0, 0b100]
    assert found.evaluation.labels.tolist() == [0b011]
    given = prepared(tmp_path, rows, label_names=["up", "down", "in"])
    assert given.label_names == ["up", "down", "in"] and given.train.labels.tolist() == [0b101, 0b011, 0, 0b001]


def test_classification_preview_shows_labels_by_name():
    def said(label, names, several):
        sample = Sample(np.zeros(1, np.int32), np.zeros(1, bool), {"label": label})
        return LabelDataSpec(multi_label=several).note(sample, names)

    assert said(0b101, ["a", "b", "c"], True) == "label: a, c"
    assert said(0, ["a", "b"], True) == "label: none"
    assert said(1, ["a", "b"], False) == "label: 1 (b)" and said(1, None, False) == "label: 1"


def test_classification_label_unknown_in_training_is_refused_with_its_place(tmp_path):
    rows = [{"text": "a lazy dog", "label": ["up", "down"]}]
    with pytest.raises(DataError, match=r"eval\.jsonl:1: label 'down\|sideways' is none of"):
        prepared(tmp_path, rows, [{"text": "a", "label": ["sideways", "down"]}])


def test_classification_of_only_one_label_is_refused(tmp_path):
    with pytest.raises(
        DataError, match="all training documents have the label 'up', and objective=classification tells"
    ):
        prepared(tmp_path, [{"text": f"a dog {i}", "label": "up"} for i in range(3)], multi_label=False)
    assert prepared(tmp_path, [{"text": "a dog", "label": ["up"]}]).label_names == ["up"]  # it has it, or has it not
    with pytest.raises(DataError, match="all training documents have no label"):
        prepared(tmp_path, [{"text": "a dog", "label": []}])


def test_more_labels_than_bits_are_refused(tmp_path):
    rows = [{"text": f"a lazy dog {i}", "label": [f"l{i}", f"m{i}"]} for i in range(32)]
    with pytest.raises(DataError, match="64 labels, at most 62 fit"):
        prepared(tmp_path, rows)
    fits = prepared(tmp_path, rows[:31])
    assert fits.train.labels.min() >= 0 and len(fits.label_names) == 62


def test_classification_of_one_label_and_of_several_are_prepared_separately(tmp_path):
    rows = [{"text": f"a lazy dog {i}", "label": label} for i, label in enumerate(("a|b", "a", "b"))]
    assert prepared(tmp_path, rows).label_names == ["a", "b"]
    assert prepared(tmp_path, rows, multi_label=False).label_names == ["a", "a|b", "b"]
