"""Preference rows as pairs of sequences: prepared, cut, dealt and evaluated together."""

import numpy as np
import pytest
import torch

from strategies.errors import DataError
from tests.helpers.building import pair_set
from tests.helpers.tokenizers import pair_rows, tiny_tokenizer, write_chat_data, write_jsonl, write_pairs
from trainer.data.batches.collate import Collator
from trainer.data.batches.loader import BatchShare, EvalShare, StepLoader, eval_batches
from trainer.data.batches.order import GlobalOrder
from trainer.data.config import DataConfig, Layout, OverLength
from trainer.data.prepare import Preparation
from trainer.data.report.preview import preview_text, summary_text
from trainer.objectives.pairs import PairDataSpec
from trainer.objectives.preference import DpoConfig
from trainer.objectives.registry import data_spec_of
from trainer.objectives.sft import SftConfig

NUM = 24


def preparation(tmp_path, *, objective=DpoConfig, **settings):
    config = DataConfig(path=str(tmp_path / "train.jsonl"), cache_dir=str(tmp_path / "cache"), **settings)
    return Preparation(config, tiny_tokenizer(), data_spec_of(objective()), seed=1)


def prepared(tmp_path, **settings):
    return preparation(tmp_path, **settings).open_or_prepare()


def dropped(made):
    (stage,) = [stage for stage in made.report["flow"] if stage["stage"] == "tokenise"]
    return stage["dropped"]


def test_pairs_row_becomes_its_chosen_and_its_rejected_answer(tmp_path):
    write_pairs(tmp_path / "train.jsonl", NUM)
    data = prepared(tmp_path).train
    tokenizer = tiny_tokenizer()
    assert len(data) == 2 * NUM
    assert data.counts["loss"].tolist() == [1, 0] * NUM
    assert data.documents.tolist() == np.repeat(np.arange(NUM), 2).tolist()
    for number, row in enumerate(pair_rows(NUM)):
        chosen, rejected = data.sample(2 * number), data.sample(2 * number + 1)
        for sample, answer in ((chosen, row["chosen"]), (rejected, row["rejected"])):
            assert tokenizer.decode(sample.input_ids[sample.supervised]) == answer + "<|im_end|>"
        begin = int(chosen.supervised.argmax())
        assert begin == int(rejected.supervised.argmax()) > 0
        assert chosen.input_ids[:begin].tolist() == rejected.input_ids[:begin].tolist()


def test_pairs_or_single_answers_of_the_objective_are_in_the_fingerprint(tmp_path):
    write_pairs(tmp_path / "train.jsonl", NUM)
    pairs, single = preparation(tmp_path), preparation(tmp_path, objective=SftConfig)
    assert pairs.fingerprint != single.fingerprint
    learned = single.open_or_prepare().train
    assert len(learned) == NUM
    tokenizer, sample = tiny_tokenizer(), learned.sample(0)
    assert tokenizer.decode(sample.input_ids[sample.supervised]) == pair_rows(1)[0]["chosen"] + "<|im_end|>"


def test_data_without_pairs_is_refused(tmp_path):
    write_chat_data(tmp_path / "train.jsonl", 4)
    with pytest.raises(DataError, match=r"train.jsonl:1: has no preferred and rejected answer.*data.format=preference"):
        prepared(tmp_path)


def test_pairs_are_cut_alike_in_both_answers(tmp_path):
    rows = [
        {"prompt": "a", "chosen": "b " * 40, "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c " * 40},
        {"prompt": "z " * 40, "chosen": "b", "rejected": "c"},
        {"prompt": "d", "chosen": "b", "rejected": "c"},
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    made = prepared(tmp_path, max_length=30, max_bad_share=0.25)
    assert dropped(made) == {"nothing_to_learn": 1}
    assert made.train.documents.tolist() == [0, 0, 1, 1, 2, 2]
    assert made.train.lengths.max() == 30 and made.train.lengths[0] == made.train.lengths[3] == 30
    assert (made.train.num_supervised > 0).all()

    made = prepared(tmp_path, max_length=30, over_length=OverLength.drop)
    assert dropped(made) == {"too_long": 3} and len(made.train) == 2
    with pytest.raises(DataError, match=r"jsonl:1: \d+ tokens are more than data.max_length=30.* truncate or drop"):
        prepared(tmp_path, max_length=30, over_length=OverLength.fail)


def test_pairs_whose_answers_are_equal_once_cut_are_dropped(tmp_path):
    row = {"prompt": "a", "chosen": "b " * 20 + "x", "rejected": "b " * 20 + "y"}
    write_jsonl(tmp_path / "train.jsonl", [row, {"prompt": "a", "chosen": "yes", "rejected": "no"}])
    assert len(prepared(tmp_path).train) == 4
    with pytest.raises(
        DataError, match=r"1 of 2 rows cannot be used \(same_answers 1\), more than data.max_bad_share=0"
    ):
        prepared(tmp_path, max_length=24)
    made = prepared(tmp_path, max_length=24, max_bad_share=0.5)
    assert dropped(made) == {"same_answers": 1} and len(made.train) == 2
    assert "both answers of a pair are the same: 1" in summary_text(made.report)


def test_pairs_held_out_are_complete(tmp_path):
    write_pairs(tmp_path / "train.jsonl", NUM)
    made = prepared(tmp_path, eval_share=0.25)
    assert len(made.evaluation) == 12 and len(made.train) == 2 * NUM - 12
    for split in (made.train, made.evaluation):
        assert (split.documents[::2] == split.documents[1::2]).all()
        assert split.counts["loss"].tolist() == [1, 0] * (len(split) // 2)
    assert not set(made.train.documents) & set(made.evaluation.documents)


def test_pairs_preview_shows_both_answers(tmp_path):
    write_pairs(tmp_path / "train.jsonl", NUM)
    text = preview_text(prepared(tmp_path).train, tiny_tokenizer(), width=200, colour=False, data_spec=PairDataSpec())
    row = pair_rows(1)[0]
    chosen, rejected = text.split("rejected:\n")
    assert chosen.startswith("chosen:\n") and f"⟦{row['chosen']}<|im_end|>⟧" in chosen
    assert f"⟦{row['rejected']}<|im_end|>⟧" in rejected


@pytest.mark.parametrize("layout", [Layout.padding_free, Layout.padded])
@pytest.mark.parametrize(("size", "micro"), [(1, 12), (2, 3), (3, 2), (4, 1)])
def test_pairs_stay_together_on_every_rank(tmp_path, size, micro, layout):
    data = pair_set(tmp_path, num=NUM).train
    data.attach_mark("reference", np.arange(2 * NUM, dtype=np.float32))  # tells which sequences a batch holds
    units = [[2 * pair, 2 * pair + 1] for pair in range(NUM)]
    order = GlobalOrder(NUM, 7, True)
    seen = []
    for rank in range(size):
        loader = StepLoader(
            data,
            order=order,
            units=units,
            share=BatchShare(12, micro, rank, size),
            collator=Collator(layout, 0),
            device="cpu",
        )
        (step,) = loader.steps(0, 1)
        assert step.totals == {"loss": 12} and step.samples == 12
        for batch in step.micro_batches:
            held = batch["reference_logps"].long().tolist()
            assert batch["num_sequences"] == len(held) == 2 * micro
            assert all(b == a + 1 and a % 2 == 0 for a, b in zip(held[::2], held[1::2], strict=True))
            seen += held[::2]
            # each supervised row belongs to the sequence whose token it predicts
            targets = batch["targets"].view(-1)[batch["target_rows"]]
            for place, number in enumerate(held):
                sample = data.sample(number)
                assert targets[batch["row_sequence"] == place].tolist() == sample.input_ids[sample.supervised].tolist()
    assert sorted(seen) == sorted(2 * unit for unit in order.units(0, 12).tolist())


@pytest.mark.parametrize(("batch", "size", "limit"), [(1, 1, None), (5, 2, None), (5, 3, 7), (100, 2, None)])
def test_every_pair_is_evaluated_once(tmp_path, batch, size, limit):
    data = pair_set(tmp_path, num=NUM).train
    data.attach_mark("reference", np.arange(2 * NUM, dtype=np.float32))
    collator = Collator(Layout.padded, 0)
    ranks = [list(eval_batches(data, EvalShare(batch, r, size, limit, 2), collator, "cpu")) for r in range(size)]
    assert len({len(rank) for rank in ranks}) == 1
    scored, fillers = [], 0
    for made in (batch for rank in ranks for batch in rank):
        held = made["reference_logps"].long().tolist()
        assert len(held) % 2 == 0
        if len(made["target_rows"]):
            assert all(b == a + 1 for a, b in zip(held[::2], held[1::2], strict=True))
            scored += held
        else:
            fillers += 1
    assert sorted(scored) == list(range(2 * (limit or NUM)))
    assert fillers == (1 if batch == 100 else sum(map(len, ranks)) - -(-(limit or NUM) // batch))
    assert all(torch.is_tensor(made["row_sequence"]) for rank in ranks for made in rank)


def test_pairs_objective_decides_where_a_row_fits_several_formats(tmp_path):
    """As in UltraFeedback: a pair, with its preferred conversation once more as `messages`."""
    turns = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}] for answer in ("good", "bad")]
    write_jsonl(
        tmp_path / "train.jsonl", [{"prompt": "q", "chosen": turns[0], "rejected": turns[1], "messages": turns[0]}]
    )
    assert len(prepared(tmp_path).train) == 2
    with pytest.raises(DataError, match=r"several formats; choose with data\.format=messages\|preference"):
        preparation(tmp_path, objective=SftConfig).open_or_prepare()
