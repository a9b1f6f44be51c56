"""The held-out loss by position: against plain transformers, whose loss of each token is put into its group by hand."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from strategies.errors import ConfigError
from tests.helpers.building import model_dir, run_config, trainer_for
from tests.objectives.test_turn_weights import prepared, rows
from trainer.data.batches.loader import EvalShare, eval_batches
from trainer.data.config import DataConfig, Layout
from trainer.data.store.sequences import exact_sum
from trainer.evaluation.base import EvaluationConfig
from trainer.evaluation.build import _raise_if_watched_part_is_missing
from trainer.evaluation.by_position import position_group_bounds, position_metric_names, with_position_groups
from trainer.evaluation.loss import LossEvaluator

BOUNDS = [8, 16, 32, 1024, 2048]
"""Small ones, so that short documents have several groups; of the last nobody has a token."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_dir(tmp_path_factory.mktemp("positions"))


def losses_by_hand(model, dataset):
    """The weighed mean of the losses of the tokens in each group of positions, and of all."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    sums = np.zeros((len(BOUNDS), 2))
    for number in range(len(dataset)):
        sample = dataset.sample(number)
        ids = torch.tensor(sample.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            losses = F.cross_entropy(plain(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none").numpy()
        weights = np.zeros(len(losses))
        own_weights = sample.target_weights()
        weights[sample.supervised[1:]] = 1.0 if own_weights is None else own_weights
        for position, (loss, weight) in enumerate(zip(losses, weights, strict=True), 1):
            group = next(row for row, bound in enumerate(BOUNDS) if position < bound)
            sums[group] += weight * loss, weight
    return sums


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layout", [Layout.padding_free, Layout.padded])
def test_loss_by_position_is_that_of_the_tokens_there(tmp_path, runtime, model, layout, weighted):
    data = prepared(tmp_path, model, rows(20, weighted=weighted))
    config = run_config(model, "single", "full", micro=4, data=DataConfig(layout=layout))
    trainer = trainer_for(config, data, runtime)
    batches = partial(eval_batches, data.train, EvalShare(7, 0, 1), trainer.loader.collator, "cpu")
    count = exact_sum(data.train.counts["loss"])
    plain = dict(LossEvaluator(batches, loss_denominator=count).run(trainer.engine))
    grouped = partial(with_position_groups, batches, BOUNDS)
    found = dict(LossEvaluator(grouped, loss_denominator=count).run(trainer.engine))

    sums = losses_by_hand(model, data.train)
    expected = {}
    for bound, (total, weight) in zip(BOUNDS, sums, strict=True):
        if weight:
            expected[f"eval/loss_by_position/{bound}"] = pytest.approx(total / weight, rel=1e-5)
    assert len(expected) >= 3 and "eval/loss_by_position/2048" not in expected
    assert found == {**plain, **expected}


def test_loss_is_told_by_position_of_long_documents_alone_unless_asked():
    assert position_group_bounds(8192, loss_by_position=None) == []
    assert position_group_bounds(8193, loss_by_position=None) == [1024, 2048, 4096, 8192, 16384]
    assert position_group_bounds(1_048_576, loss_by_position=None)[-1] == 1_048_576
    assert position_group_bounds(100, loss_by_position=True) == [1024]
    assert position_group_bounds(1_000_000, loss_by_position=False) == []


def test_watched_position_must_be_one_of_the_groups():
    names = [f"eval/{name}" for name in position_metric_names(position_group_bounds(10_000, loss_by_position=None))]
    held_out = type(
        "HeldOut", (), {"__len__": lambda self: 3, "sources": np.zeros(3, np.int64), "source_names": ["data"]}
    )()
    _raise_if_watched_part_is_missing(EvaluationConfig(watch="eval/loss_by_position/16384"), held_out, {}, names)
    with pytest.raises(ConfigError, match="eval/loss_by_position/1024"):
        _raise_if_watched_part_is_missing(EvaluationConfig(watch="eval/loss_by_position/32768"), held_out, {}, names)
