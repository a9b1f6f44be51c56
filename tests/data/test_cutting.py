"""A row of documents is cut into slices for the ranks that share it, and nothing of it is lost or counted twice."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.runtime import Runtime
from tests.helpers.covering import examples
from trainer.data.batches.collate import Collator
from trainer.data.batches.cutting import AXES, Axis, RowCut, all_to_all_row_counts, cut_batch, sequence_cut
from trainer.data.config import Layout
from trainer.data.store.sequences import Sample
from trainer.objectives.sft import ReplayCollator


def samples_of(lengths, *, seed=0, marks=None):
    """Documents of random tokens and masks; their first token is never supervised."""
    generator = np.random.default_rng(seed)
    documents = []
    for number, length in enumerate(lengths):
        supervised = generator.random(length) < 0.5
        supervised[0] = False
        weights = np.where(supervised, generator.uniform(0.1, 1, length), 0).astype(np.float32)
        own_marks = {} if marks is None else {"replay": marks[number]}
        documents.append(Sample(generator.integers(1, 99, length).astype(np.int32), supervised, own_marks, weights))
    return documents


def slices_of(samples, size, collator=None):
    collator = collator or Collator(Layout.padding_free, 0)
    return [collator(samples, RowCut(rank, size)) for rank in range(size)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(2, 5))
@settings(max_examples=examples(60), deadline=None)
def test_slices_of_a_row_joined_are_the_row(lengths, size):
    samples = samples_of(lengths)
    whole = Collator(Layout.padding_free, 0)(samples)
    slices = slices_of(samples, size)
    num_tokens = sum(lengths)
    for name in ("input_ids", "position_ids", "targets"):
        assert torch.equal(torch.cat([part[name] for part in slices], dim=1)[:, :num_tokens], whole[name])
    for name in {"row_sequence", "target_weights"} & whole.keys():  # a row without targets has no weights
        assert torch.equal(torch.cat([part[name] for part in slices]), whole[name])
    rows = [part["target_rows"] + part["row_span"][0] for part in slices]
    assert torch.equal(torch.cat(rows), whole["target_rows"])
    # What a rank scores are the positions of its slice that have a target.
    for part in slices:
        assert torch.equal((part["targets"][0] != -100).nonzero()[:, 0], part["target_rows"])
        assert part["input_ids"].shape[1] >= 1
    assert sum(part["owner"] for part in slices) == 1


@pytest.mark.parametrize("size", range(2, 13))
def test_document_of_one_token_at_a_border_keeps_its_place(size):
    slices = slices_of(samples_of([5, 1, 6]), size)
    assert [part["row_slices"] for part in slices] == [[12 * rank // size for rank in range(size + 1)]] * size
    assert slices[0]["document_bounds"] == [0, 5, 6, 12]
    positions = torch.cat([part["position_ids"] for part in slices], dim=1)
    assert positions.tolist() == [[*range(5), 0, *range(6)]]


def test_target_of_the_last_token_of_a_slice_is_the_first_token_of_the_next():
    document = Sample(np.arange(10, 18, dtype=np.int32), np.arange(8) > 0)
    left, right = slices_of([document], 2)
    assert left["targets"].tolist() == [[11, 12, 13, 14]]
    assert right["input_ids"][0, 0] == 14
    assert right["targets"].tolist() == [[15, 16, 17, -100]]


@pytest.mark.parametrize("lengths", ([1], [2], [1, 2]))
def test_row_shorter_than_the_group_gets_a_document_that_nobody_learns(lengths):
    slices = slices_of(samples_of(lengths), 4)
    assert [part["input_ids"].numel() for part in slices] == [1, 1, 1, 1]
    assert slices[0]["document_bounds"] == [0, *np.cumsum(lengths).tolist(), 4]
    assert slices[0]["num_sequences"] == len(lengths)
    is_token = torch.cat([part["is_token"] for part in slices], dim=1)
    assert is_token.tolist() == [[position < sum(lengths) for position in range(4)]]
    assert sum(len(part["target_rows"]) for part in slices) == sum(
        int(s.supervised[1:].sum()) for s in samples_of(lengths)
    )


def test_entry_that_does_not_say_what_it_goes_by_is_refused():
    batch = Collator(Layout.padding_free, 0)(samples_of([4, 4]))
    batch["scores"] = torch.zeros(8)
    with pytest.raises(ValueError, match="'scores' does not say what it goes by"):
        cut_batch(batch, RowCut(0, 2), AXES)
    assert torch.equal(cut_batch(batch, RowCut(1, 2), AXES | {"scores": Axis.sequence})["scores"], batch["scores"])


def test_padded_rows_are_not_cut():
    with pytest.raises(ValueError, match=r"data\.layout=padding_free"):
        Collator(Layout.padded, 0)(samples_of([4, 3]), RowCut(0, 2))


def test_rank_that_shares_its_rows_with_nobody_has_no_cut():
    runtime = Runtime(7, 8, 7, 8, torch.device("cpu"), None)
    assert sequence_cut(runtime) is None
    assert sequence_cut(replace(runtime, sequence_size=4)) == RowCut(3, 4)


@given(st.lists(st.integers(2, 9), min_size=2, max_size=6), st.integers(2, 4), st.integers(0, 99))
@settings(max_examples=examples(60), deadline=None)
def test_replayed_rows_get_from_their_own_cut_to_that_of_the_row(lengths, size, seed):
    marks = np.random.default_rng(seed).integers(0, 2, len(lengths)).tolist()
    slices = slices_of(samples_of(lengths, seed=seed, marks=marks), size, ReplayCollator(Layout.padding_free, 0))
    sent = [part["replay_moves"][0] for part in slices]
    received = [part["replay_moves"][1] for part in slices]
    for rank, part in enumerate(slices):
        assert sum(sent[rank]) == len(part["replay"]["target_rows"])
        assert sum(received[rank]) == len(part["replay_rows"])
        assert received[rank] == [sent[other][rank] for other in range(size)]
        both = torch.cat([part["replay_rows"], part["other_rows"]]).sort().values
        assert both.tolist() == list(range(len(part["target_rows"])))


def test_moved_rows_keep_their_order():
    # Six rows lie on two ranks as 4 and 2, and come to lie as 1 and 5.
    assert all_to_all_row_counts([0, 4, 6], [0, 1, 6], 0) == ([1, 3], [1, 0])
    assert all_to_all_row_counts([0, 4, 6], [0, 1, 6], 1) == ([0, 2], [3, 2])
