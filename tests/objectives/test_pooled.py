"""Classifiers on rows without padding: which architectures it is proven for, and what each rank of a shared row computes."""

import numpy as np
import pytest
import torch
import transformers

from strategies.parameters import meta_context
from tests.models.tiny import tiny_config
from trainer.data.batches.cutting import RowCut
from trainer.data.config import Layout
from trainer.data.store.sequences import LABEL, Sample
from trainer.model import attention
from trainer.model.architecture import transformers_class
from trainer.model.config import ModelKind
from trainer.objectives import pooled
from trainer.objectives.classification import LabelCollator
from trainer.objectives.pooled_proof import classifier_packing_problem

PADDING = 2
LENGTHS = (9, 1, 5, 20)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Proofs of this test alone."""
    attention.register()
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path))
    return tmp_path


def problem_of(config):
    config.pad_token_id = PADDING

    def build():
        with meta_context():
            return transformers_class(ModelKind.classifier, config).from_config(config, attn_implementation="eager")

    return classifier_packing_problem(config, build, attention.VARLEN_ATTENTION)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "gemma3_text"])
def test_classifier_that_scores_the_last_token_is_proven_without_padding(model_type):
    assert problem_of(tiny_config(model_type)) is None


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("bert", "does not score the last token"), ("bloom", "its logits differ"), ("zamba2", "its logits differ")],
)
def test_encoders_and_models_of_padded_rows_are_refused_with_the_reason(model_type, reason):
    assert reason in problem_of(tiny_config(model_type))


def test_proof_of_a_classifier_finds_another_token_and_is_kept(monkeypatch, home):
    real = pooled.last_token_index
    monkeypatch.setattr(pooled, "last_token_index", lambda ids, padding: len(ids) - 1)
    assert "its logits differ" in problem_of(tiny_config("llama"))
    monkeypatch.setattr(pooled, "last_token_index", real)
    assert "its logits differ" in problem_of(tiny_config("llama")), "kept"
    for file in (home / "proofs").iterdir():
        file.unlink()
    assert problem_of(tiny_config("llama")) is None


def samples():
    """Documents of which one ends with the token that pads."""
    made = []
    for number, length in enumerate(LENGTHS):
        ids = np.arange(10, 10 + length, dtype=np.int32)
        if number == 2:
            ids[-1] = PADDING
        made.append(Sample(ids, np.ones(length, dtype=bool), {LABEL: number}))
    return made


def test_each_sequence_belongs_to_the_rank_with_its_last_token():
    collator = LabelCollator(Layout.padding_free, PADDING)
    row = collator(samples())
    assert row["last_token_positions"].tolist() == [8, 9, 13, 34]
    assert row["is_supervised"].tolist() == [True, False, True, True]
    for size in (2, 3, 4, 7):
        owned = []
        for rank in range(size):
            part = collator(samples(), RowCut(rank, size))
            start, stop = part["row_span"]
            own = pooled.select_local_sequences(part, part["labels"]).tolist()
            places = [place for place in row["last_token_positions"].tolist() if start <= place < stop]
            assert (part["last_token_positions"] + start).tolist() == places and len(own) == len(places)
            owned += own
        assert owned == [0, 1, 2, 3]


def test_a_rank_without_a_sequence_of_its_own_has_logits_with_gradients():
    config = tiny_config("llama")
    config.pad_token_id = PADDING
    model = transformers.AutoModelForSequenceClassification.from_config(
        config, attn_implementation=attention.VARLEN_ATTENTION
    )
    row = LabelCollator(Layout.padding_free, PADDING)(samples())
    logits = pooled.classifier_logits(model, row)
    assert logits.shape == (4, config.num_labels)
    none = row | {"last_token_positions": row["last_token_positions"][:0], "local_sequences": (0, 0)}
    empty = pooled.classifier_logits(model, none)
    assert empty.shape == (0, config.num_labels)
    empty.sum().backward()
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    assert torch.isfinite(logits).all()
