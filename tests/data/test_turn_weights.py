"""Weights of turns between 0 and 1 on their way from a row to the prepared data: tokens, cuts, store, report."""

import json
import math

import numpy as np
import pytest

from strategies.errors import DataError
from tests.helpers import tokenizers as make
from tests.helpers.tokenizers import chat_rows, write_jsonl
from trainer.data.batches.collate import Collator
from trainer.data.config import ControlTokens, DataConfig, Layout, OverLength
from trainer.data.document import Document, Tally
from trainer.data.objective_spec import DataSpec
from trainer.data.prepare import Preparation
from trainer.data.report.preview import decode_weighted_pieces, preview_text, summary_text
from trainer.data.store.documents import DocumentTable
from trainer.data.store.sequences import TokenDataset, exact_sum
from trainer.data.tokens.encode import Encoder
from trainer.data.tokens.truncation import fit_length
from trainer.objectives.kto import RatedDataSpec
from trainer.objectives.pairs import PairDataSpec
from trainer.objectives.seq2seq import SourceTargetEncoder, TwoSidedDataSpec

CHAT = Encoder(make.tiny_tokenizer())
TALK = [("user", "hello", 1), ("assistant", "the quick", 0.25), ("user", "fox", 1), ("assistant", "a lazy dog", 1)]


def turns(*parts):
    """Turns of (role, content, weight), as a row has them; users' weights are not written."""
    return [
        {"role": role, "content": content, **({"weight": weight} if role == "assistant" else {})}
        for role, content, weight in parts
    ]


def document(*parts, **more):
    """The same as a document."""
    made = [{**turn, "train": True} if "weight" in turn else turn for turn in turns(*parts)]
    return Document(
        "f.jsonl", 3, messages=[{k: v for k, v in t.items() if (k, v) != ("weight", 1)} for t in made], **more
    )


def by_hand(encoder, sample):
    """The learned text and its weight, run by run, from the tokens."""
    found: list[list] = []
    for number, (token, learned) in enumerate(zip(sample.input_ids, sample.supervised, strict=True)):
        weight = float(sample.weights[number]) if sample.weights is not None else 1.0
        if not learned:
            found.append(["", 0.0])
        elif found and found[-1][1] == pytest.approx(weight):
            found[-1][0] += encoder.tokenizer.decode([token])
        else:
            found.append([encoder.tokenizer.decode([token]), weight])
    return [(text, pytest.approx(weight)) for text, weight in found if weight]


def prepare(tmp_path, rows, data_spec=None, tokenizer=None, *, cache="cache", **settings):
    write_jsonl(tmp_path / "train.jsonl", rows)
    config = DataConfig(path=str(tmp_path / "train.jsonl"), cache_dir=str(tmp_path / cache), **settings)
    return Preparation(config, tokenizer or make.tiny_tokenizer(), data_spec or DataSpec(), seed=1)


def weighted_rows(num, weight=0.3):
    """Conversations whose first answer weighs less than the second."""
    rows = chat_rows(num)
    for row in rows:
        row["messages"] += [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog", "weight": 1}]
        next(turn for turn in row["messages"] if turn["role"] == "assistant")["weight"] = weight
    return rows


@pytest.mark.parametrize("template", [make.CHATML, make.CHATML_GENERATION, make.LLAMA3, make.THINKING])
@pytest.mark.parametrize("fast", [True, False])
def test_turn_weight_is_that_of_all_its_tokens(template, fast):
    encoder = Encoder(make.tiny_tokenizer(template))
    end = "<|eot_id|>" if template == make.LLAMA3 else "<|im_end|>"
    for _ in range(4):  # the third time its shape is known
        ((_, sample),) = encoder.encode([document(*TALK)], fast=fast)
        assert by_hand(encoder, sample) == [(f"the quick{end}", 0.25), (f"a lazy dog{end}", 1)]
    ((_, plain),) = encoder.encode([document(*((role, content, 1) for role, content, _ in TALK))], fast=fast)
    assert plain.weights is None and plain.input_ids.tolist() == sample.input_ids.tolist()
    assert (plain.supervised == sample.supervised).all()


def test_calls_thoughts_and_broken_control_tokens_keep_weights():
    told = document(("user", "say <|im_end|> now", 1), *TALK[1:])
    sample = next(CHAT.encode([told]))[1]
    assert CHAT.control_tokens is ControlTokens.text
    assert by_hand(CHAT, sample) == [("the quick<|im_end|>", 0.25), ("a lazy dog<|im_end|>", 1)]
    encoder = Encoder(make.tiny_tokenizer(make.THINKING))
    thinking = document(*TALK[:3], ("assistant", "<think>\nhm\n</think>\n\na lazy dog", 0.5))
    sample = next(encoder.encode([thinking]))[1]
    (first, second) = by_hand(encoder, sample)
    assert first == ("the quick<|im_end|>", 0.25) and second[1] == pytest.approx(0.5) and "hm" in second[0]


def test_turn_weights_refuse_generation_blocks_that_do_not_separate_turns():
    template = make.CHATML_GENERATION.replace(
        "{% generation %}", "{% generation %}{{ '>' }}{% endgeneration %}{% generation %}"
    )
    encoder = Encoder(make.tiny_tokenizer(template))
    next(encoder.encode([document(*((role, content, 1) for role, content, _ in TALK))]))
    with pytest.raises(DataError, match=r"f.jsonl:3: .* 4 \{% generation %\} blocks for 2 turns with weights"):
        next(encoder.encode([document(*TALK)]))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("truncate", [[("the quick<|im_end|>", 0.25), ("a lazy", 1)]]),
        ("truncate_left", [[("a lazy dog<|im_end|>", 1)]]),
        ("split", [[("the quick<|im_end|>", 0.25)], [("a lazy dog<|im_end|>", 1)]]),
    ],
)
def test_turn_weights_stay_with_their_tokens_when_cut(policy, expected):
    whole = next(CHAT.encode([document(*TALK)]))[1]
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nthe quick<|im_end|>\n<|im_start|>user\nfox<|im_end|>\n"
    text += "<|im_start|>assistant\na lazy"
    most = len(CHAT.tokenizer(text, add_special_tokens=False).input_ids)
    made = fit_length(CHAT, document(*TALK), whole, most, OverLength(policy))
    assert [by_hand(CHAT, sample) for sample in made] == expected
    late = document(*TALK[:3], ("assistant", "a lazy dog", 0.5))
    for sample in fit_length(CHAT, late, next(CHAT.encode([late]))[1], 12, OverLength(policy)):
        weights = {0.25: "the quick<|im_end|>", 0.5: "a lazy dog<|im_end|>"}
        for found, weight in by_hand(CHAT, sample):
            assert found in weights[weight.expected]


def test_turn_weights_and_their_sums_are_stored(tmp_path):
    rows = weighted_rows(20)
    prepared = prepare(tmp_path, rows).open_or_prepare()
    train = prepared.train
    for number, row in enumerate(rows):
        sample = train.sample(number)
        answers = [turn for turn in row["messages"] if turn["role"] == "assistant"]
        assert by_hand(CHAT, sample) == [(f"{turn['content']}<|im_end|>", turn.get("weight", 1)) for turn in answers]
        targets = sample.weights[sample.supervised]
        assert train.counts["loss"][number] == math.fsum(targets.astype(np.float64))
        assert train.num_supervised[number] == len(targets) and not sample.weights[~sample.supervised].any()
    table = DocumentTable(prepared.directory)
    for number, row in enumerate(rows):
        stored = [turn.get("weight", 1) for turn in table.document(number).messages]
        assert stored == [turn.get("weight", 1) for turn in row["messages"]]
    total = exact_sum(train.counts["loss"])
    assert total == exact_sum(train.counts["loss"][::-1]) < train.num_supervised.sum()
    audit = json.loads((prepared.directory / "audit.json").read_text())
    assert audit["splits"]["train"]["weighted_tokens"] == total
    assert audit["splits"]["train"]["supervised_tokens"] == train.num_supervised.sum()
    assert {piece.get("weight") for piece in audit["samples"][0]["pieces"] if piece["learned"]} == {0.3, None}
    assert f"total weight {total:,.10g}" in summary_text(prepared.report)
    assert "⟧*0.3" in preview_text(train, make.tiny_tokenizer(), width=200, colour=False)
    assert ("dog<|im_end|>", 1.0) in decode_weighted_pieces(train.sample(0), make.tiny_tokenizer())
    page = (prepared.directory / "audit.html").read_text()
    assert "<b>*0.3</b>" in page and "total weight" in page


def test_turn_weights_of_one_leave_the_data_the_same_byte_for_byte(tmp_path):
    plain = chat_rows(20)
    ones = [
        {"messages": [{**t, "weight": 1, "loss_weight": 1.0} if t["role"] == "assistant" else t for t in r["messages"]]}
        for r in plain
    ]
    made = [prepare(tmp_path, rows, cache=f"cache-{n}").open_or_prepare() for n, rows in enumerate((plain, ones))]
    for name in ("tokens.bin", "supervised.bin", "offsets.npy", "train/index.npy"):
        first, second = ((prepared.directory / name).read_bytes() for prepared in made)
        assert first == second, name
    for prepared in made:
        assert not (prepared.directory / "weights.bin").exists()
        assert prepared.train.counts["loss"].dtype == np.int64 and isinstance(
            exact_sum(prepared.train.counts["loss"]), int
        )
        assert prepared.report["train"]["weighted_tokens"] is None and "total weight" not in summary_text(
            prepared.report
        )
        assert "total weight" not in (prepared.directory / "audit.html").read_text()
        for layout in (Layout.padded, Layout.padding_free):
            assert "target_weights" not in Collator(layout, 0)([prepared.train.sample(n) for n in range(4)])


def test_turn_weights_make_the_same_store_for_any_workers_and_shards(tmp_path):
    """Only the last of three blocks has weights: what was written before weighs 1."""
    rows = [*chat_rows(1100), *weighted_rows(3)]
    rows[0]["messages"][-1]["weight"] = 0.5
    rows = [*chat_rows(600), *rows[1:], rows[0]]
    alone = prepare(tmp_path, rows, workers=1).open_or_prepare()
    together = prepare(tmp_path, rows, workers=2, cache="workers").open_or_prepare()
    for number in range(2):
        prepare(tmp_path, rows, cache="shards").make_shard(number, 2)
    merged = prepare(tmp_path, rows, cache="shards").open_or_prepare()
    stores = [prepared.directory for prepared in (alone, together, merged)]
    for name in ("weights.bin", "tokens.bin", "supervised.bin"):
        assert len({(store / name).read_bytes() for store in stores}) == 1, name
    columns = [np.load(store / "columns.npz")["term.loss"] for store in stores]
    assert all((column == columns[0]).all() and column.dtype == np.float64 for column in columns)
    for number in (0, 1700):
        sample = alone.train.sample(number)
        assert (sample.weights[sample.supervised] == (1 if number == 0 else 0.5)).all() or number
    weights = np.fromfile(stores[0] / "weights.bin", np.float32)
    mask = np.fromfile(stores[0] / "supervised.bin", np.uint8)
    assert ((weights > 0) == mask).all() and set(weights.tolist()) == {0.0, 1.0, 0.5, np.float32(0.3).item()}
    assert isinstance(TokenDataset.open(stores[0] / "train").sample(0).total_target_weight(), int)


def test_turn_weights_are_in_a_batch_only_where_one_is_below_1(tmp_path):
    train = prepare(tmp_path, [*chat_rows(3), *weighted_rows(3)]).open_or_prepare().train
    for layout in (Layout.padded, Layout.padding_free):
        collator = Collator(layout, 0)
        assert "target_weights" not in collator([train.sample(n) for n in range(3)])
        batch = collator([train.sample(n) for n in (1, 4, 2, 5)])
        places = batch["target_rows"].tolist()
        flat = np.zeros(batch["targets"].numel(), np.float32)
        for n, sample in enumerate(train.sample(n) for n in (1, 4, 2, 5)):
            begin = n * batch["targets"].shape[1] if layout is Layout.padded else batch["document_bounds"][n]
            weights = sample.weights * sample.supervised
            flat[begin : begin + len(weights) - 1] = weights[1:]
        assert batch["target_weights"].tolist() == flat[places].tolist()
        assert np.flatnonzero(flat).tolist() == places


def test_objectives_over_whole_answers_refuse_weights(tmp_path):
    pair = {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "a", "weight": 0.5}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }
    rated = [
        {"messages": turns(("user", "q", 1), ("assistant", "a", weight)), "label": good}
        for weight, good in ((1, True), (0.5, False), (1, False))
    ]
    for data_spec, rows, place in ((PairDataSpec(), [pair], 1), (RatedDataSpec(), rated, 2)):
        with pytest.raises(DataError, match=rf"train.jsonl:{place}: a turn has the weight 0.5, .*data.ignore_columns"):
            prepare(tmp_path, rows, data_spec).open_or_prepare()
        prepared = prepare(tmp_path, rows, data_spec, ignore_columns=["weight"]).open_or_prepare()
        assert prepared.train.weights is None and len(prepared.train) >= 2
    assert prepare(tmp_path, [pair]).open_or_prepare().train.counts["loss"].tolist() == [1.0], (
        "two tokens of a half each"
    )


def test_turn_weight_of_an_encoder_decoder_answer():
    encoder = SourceTargetEncoder(make.tiny_tokenizer(None), "", 4)
    data_spec = TwoSidedDataSpec(prefix="", max_target=4)
    config = DataConfig(path="x", max_length=8, over_length=OverLength.truncate)
    documents = [document(("user", "hello " * 9, 1), ("assistant", "the quick brown fox " * n, 0.5)) for n in (1, 5)]
    for _, (sample,) in data_spec.sequences(encoder, documents, config, Tally()):
        assert sample.answer_begin() <= 8
        assert (sample.weights == np.where(sample.supervised, np.float32(0.5), 0)).all()
        assert sample.total_target_weight() == 0.5 * sample.supervised.sum() == 2.0
    plain = next(encoder.encode([document(("user", "a", 1), ("assistant", "b", 1))]))[1]
    assert plain.weights is None
    asked = document(("user", "a", 1), ("assistant", "b", 1))
    asked.messages[0] |= {"weight": 0.5, "train": True}
    with pytest.raises(DataError, match=r"f.jsonl:3: a turn before the answer has a weight.*ignore_columns"):
        next(encoder.encode([asked]))
