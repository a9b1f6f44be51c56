"""Encoder-decoder models: the loss against transformers' own, the two sides of a batch, the data, the refusals."""

import pytest
import torch

from strategies import runtime as processes
from tests.helpers.building import GLOBAL_BATCH, run_config, trainer_for, two_sided_set
from tests.helpers.seq2seq import CONFIGS, seq2seq_dir
from trainer.data.two_sides import boundary
from trainer.objectives.base import Seq2seqConfig


@pytest.fixture(scope="module")
def runtime():
    import os

    before = dict(os.environ)
    yield processes.start("cpu", timeout_s=60, threads=1)
    processes.stop()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("seq2seq")


def trainer(root, architecture, runtime, tuning="full", **changes):
    config = run_config(
        seq2seq_dir(root, architecture), "single", tuning, micro=4, objective=Seq2seqConfig(), **changes
    )
    return trainer_for(config, two_sided_set(root), runtime)


def plain_loss(model, samples) -> float:
    """Summed cross-entropy by `model(labels=...)`, one document at a time: no padding, no mask."""
    total = 0.0
    with torch.no_grad():
        for sample in samples:
            ids, cut = torch.tensor(sample.input_ids, dtype=torch.int64)[None], boundary(sample)
            labels = ids[:, cut:]
            total += float(model(input_ids=ids[:, :cut], labels=labels).loss) * labels.shape[1]
    return total


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_loss_is_that_of_transformers(root, runtime, architecture):
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(seq2seq_dir(root, architecture), dtype=torch.float32).eval()
    assert architecture not in ("bart", "marian") or model.final_logits_bias.abs().max() > 0.5
    here = trainer(root, architecture, runtime)
    batch = next(iter(here.loader.steps(0, 1)))
    chosen = here.loader.order.units(0, GLOBAL_BATCH)
    samples = [here.loader.dataset.sample(int(number)) for number in chosen]
    found = sum(float(here.engine.forward(micro, last=False)["loss"].detach()) for micro in batch.micro_batches)
    assert len(batch.micro_batches) == 4
    assert batch.totals["loss"] == sum(len(s.input_ids) - boundary(s) for s in samples)
    assert found == pytest.approx(plain_loss(model, samples), rel=1e-5)
