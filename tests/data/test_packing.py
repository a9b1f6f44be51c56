"""Packed, concatenated and padded rows of the same documents give the same summed loss and the same gradients."""

import numpy as np
import pytest
import torch

from tests.helpers.building import model_dir, samples
from tests.helpers.stores import write
from trainer.data.batches.collate import Collator
from trainer.data.batches.loader import BatchShare, StepLoader
from trainer.data.batches.mixing import best_fit_decreasing
from trainer.data.batches.order import GlobalOrder
from trainer.data.config import Layout
from trainer.data.objective_spec import DataSpec
from trainer.data.store.sequences import TokenDataset
from trainer.losses.fuse import head_transform
from trainer.losses.next_token import LossHead
from trainer.model import attention
from trainer.objectives.sft import Sft

NUM = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("packing") / "data"
    write(root, samples(NUM, uneven=True), DataSpec().counts, {"fingerprint": "x"})
    return TokenDataset.open(root)


def gradients(path, data, layout, units):
    """(summed loss, flat gradient) of one step over all documents."""
    from transformers import AutoModelForCausalLM

    attention.register()
    name = attention.VARLEN_ATTENTION if layout is Layout.padding_free else "eager"
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=name)
    softcap, scale = head_transform(model.config)
    model.set_output_embeddings(LossHead.of_linear(model.get_output_embeddings(), softcap=softcap, logit_scale=scale))
    num = NUM if units is None else len(units)
    loader = StepLoader(
        data,
        order=GlobalOrder(num, seed=1, shuffle=True),
        units=units,
        share=BatchShare(num, 1 if units is not None else 4, 0, 1),
        collator=Collator(layout, 0),
        device="cpu",
    )
    (step,) = loader.steps(0, 1)
    total = 0.0
    for batch in step.micro_batches:
        loss = Sft().terms(model, batch)["loss"]
        loss.backward()
        total += loss.item()
    assert step.totals["loss"] == data.counts["loss"].sum()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_packing_trains_as_separate_documents_do(tmp_path, data, architecture):
    path = model_dir(tmp_path, architecture)
    packs = best_fit_decreasing(data.lengths, 96)
    assert len(packs) < NUM / 2 and sorted(np.concatenate(packs)) == list(range(NUM))
    packed, packed_gradient = gradients(path, data, Layout.padding_free, packs)
    for layout in (Layout.padding_free, Layout.padded):
        loss, gradient = gradients(path, data, layout, None)
        assert packed == pytest.approx(loss, rel=1e-5)
        assert (packed_gradient - gradient).norm() <= 1e-5 * gradient.norm()
