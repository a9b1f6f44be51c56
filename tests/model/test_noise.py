"""NEFTune: the size and spread of the paper, and the same noise in any layout, order and company."""

import pytest
import torch
from torch import nn

from trainer.data.batches.collate import Collator
from trainer.data.batches.cutting import RowCut
from trainer.data.config import Layout
from trainer.data.store.sequences import Sample
from trainer.model.noise import add_embedding_noise, embedding_noise_of_batch

WIDTH, ALPHA = 64, 5.0
DOCUMENTS = [torch.arange(5, 5 + length) for length in (40, 9, 40)]
BY = (42, 7)


def in_one_row(documents, by=BY):
    position = torch.cat([torch.arange(len(each)) for each in documents])
    return {"input_ids": torch.cat(documents)[None], "position_ids": position[None], "seed_and_step": by}


def padded(documents, by=BY):
    rows = nn.utils.rnn.pad_sequence(documents, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in documents], batch_first=True)
    return {"input_ids": rows, "attention_mask": mask, "seed_and_step": by}


def test_noise_is_the_same_in_any_layout_and_company():
    alone = [embedding_noise_of_batch(in_one_row([each]), WIDTH, ALPHA)[0] for each in DOCUMENTS]
    together = embedding_noise_of_batch(in_one_row(DOCUMENTS[::-1]), WIDTH, ALPHA)[0].split([40, 9, 40])[::-1]
    apart = embedding_noise_of_batch(padded(DOCUMENTS), WIDTH, ALPHA)
    for number, each in enumerate(DOCUMENTS):
        assert torch.equal(alone[number], together[number]) and torch.equal(alone[number], apart[number, : len(each)])
    for by in ((42, 8), (43, 7)):
        assert not torch.equal(
            embedding_noise_of_batch(in_one_row(DOCUMENTS, by), WIDTH, ALPHA),
            embedding_noise_of_batch(in_one_row(DOCUMENTS), WIDTH, ALPHA),
        )


@pytest.mark.parametrize("number", [0, 1])
def test_noise_is_uniform_up_to_the_size_of_the_paper(number):
    length = len(DOCUMENTS[number])
    size = ALPHA / (length * WIDTH) ** 0.5
    many = torch.cat(
        [
            embedding_noise_of_batch(in_one_row([DOCUMENTS[number]], (42, step)), WIDTH, ALPHA).view(-1)
            for step in range(20)
        ]
    )
    assert many.abs().max() <= size and many.abs().max() > 0.99 * size
    assert many.mean().abs() < 0.05 * size and many.var().item() == pytest.approx(size**2 / 3, rel=0.05)
    counts = torch.histc(many / size, 20, -1, 1) / len(many)
    assert (counts - 0.05).abs().max() < 0.006
    rows = many.view(20, length, WIDTH)
    for one, other in (
        (rows[0], rows[1]),
        (rows[:, 0], rows[:, 1]),
        (rows[..., 0], rows[..., 1]),
    ):  # steps, places, dimensions
        assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].abs() < 0.3


def test_noise_is_added_in_training_alone():
    model = nn.Module()
    model.table = nn.Embedding(64, WIDTH)
    model.get_input_embeddings = lambda: model.table
    batch = in_one_row(DOCUMENTS)
    plain = model.table(batch["input_ids"])
    with add_embedding_noise(model, batch, ALPHA):
        assert torch.equal(model.table(batch["input_ids"]), plain + embedding_noise_of_batch(batch, WIDTH, ALPHA))
        with torch.no_grad():
            assert torch.equal(model.table(batch["input_ids"]), plain)
    assert torch.equal(model.table(batch["input_ids"]), plain)
    with torch.no_grad(), add_embedding_noise(model, batch, ALPHA):
        assert torch.equal(model.table(batch["input_ids"]), plain)


@pytest.mark.parametrize("size", [2, 3, 7, 100])
def test_noise_of_a_slice_is_the_slice_of_the_row_s_noise(size):
    """A slice begins and ends within documents, which are known by all their tokens. The last row has fewer tokens than ranks."""
    collator = Collator(Layout.padding_free, 0)
    collator.keeps_row_ids = True
    samples = [Sample(document.numpy(), document.numpy() > 0) for document in DOCUMENTS]
    expected = embedding_noise_of_batch(in_one_row(DOCUMENTS), WIDTH, ALPHA)[0]
    parts = []
    for rank in range(size):
        part = collator(samples, RowCut(rank, size)) | {"seed_and_step": BY}
        parts.append(embedding_noise_of_batch(part, WIDTH, ALPHA)[0])
    assert torch.equal(torch.cat(parts)[: len(expected)], expected)
