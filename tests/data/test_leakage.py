"""Leakage and decontamination: planted overlaps of every kind, against plain readings of the same rules."""

import pickle
import random
import re

import numpy as np
import pytest

from strategies.errors import DataError
from trainer.data.config import (
    ComparedText,
    DataConfig,
    DecontaminationConfig,
    DecontaminationPolicy,
    DuplicatePolicy,
    DuplicatesConfig,
    LeakageConfig,
    LeakagePolicy,
)
from trainer.data.document import Document, Tally
from trainer.data.selection.document_hashes import DocumentHasher, compared_text
from trainer.data.selection.leakage import LEAK_KINDS, find_leaks, first_matching_documents, train_documents_to_drop
from trainer.data.transforms.decontamination import Decontaminator, texts_to_decontaminate_from

HASHER = DocumentHasher(DuplicatesConfig(near=DuplicatePolicy.report))
DRAW = random.Random(1)
WORDS = ["".join(DRAW.choices("abcdefghijklmnop", k=DRAW.randint(3, 9))) for _ in range(3000)]


def prose(draw, number):
    return " ".join(draw.choices(WORDS, k=number))


def row(prompt, completion, file="train.jsonl", line=1):
    return Document(file=file, line=line, prompt=prompt, completion=completion)


def leaks_of(train, held_out, *, near=True):
    """Leaks by document number: the training documents come first."""
    both, numbers = [*train, *held_out], np.arange(len(train) + len(held_out))
    config = DataConfig(leakage=LeakageConfig(near=near))
    text_of = lambda number: compared_text(both[number], ComparedText.document)  # noqa: E731
    return find_leaks(HASHER.hash_documents(both), numbers[: len(train)], numbers[len(train) :], config, text_of)


@pytest.fixture(scope="module")
def planted():
    """(train, held-out, {train row: (held-out row, kind)}): 400 training rows, 60 held-out ones, 5 leaks of each kind."""
    draw = random.Random(9)
    train = [row(prose(draw, 30), prose(draw, 50)) for _ in range(400)]
    held_out = [row(prose(draw, 30), prose(draw, 50), "eval.jsonl") for _ in range(60)]
    truth = {}
    for number in range(20):
        place, kind = 7 + 13 * number, LEAK_KINDS[number // 5]
        other = held_out[number]
        texts = {
            "exact": (other.prompt, other.completion),
            "normalized": (other.prompt.upper(), other.completion + "."),
            "near": ("In short: " + other.prompt, other.completion + " or so"),
            "prompt": (other.prompt.title() + "?", prose(draw, 50)),
        }
        train[place] = row(*texts[kind])
        truth[place] = (number, kind)
    for documents in (train, held_out):
        for line, document in enumerate(documents, start=1):
            document.line = line
    return train, held_out, truth


def test_leakage_of_every_kind_is_found_and_nothing_else(planted):
    train, held_out, truth = planted
    leaks = leaks_of(train, held_out)
    found = zip(leaks.train.tolist(), leaks.held_out.tolist(), leaks.kind.tolist(), strict=True)
    assert {place: (other - len(train), LEAK_KINDS[kind]) for place, other, kind in found} == truth
    assert leaks.num_incomplete == 0


def test_leakage_of_near_duplicates_is_found_only_where_asked(planted):
    train, held_out, _ = planted
    assert np.bincount(leaks_of(train, held_out, near=False).kind, minlength=4).tolist() == [5, 5, 0, 5]


def test_leakage_policies(planted):
    train, held_out, truth = planted
    leaks, both = leaks_of(train, held_out), [*train, *held_out]
    where = lambda number: both[number].location  # noqa: E731
    report = leaks.to_report(where)
    taken = train_documents_to_drop(leaks, LeakagePolicy.report, len(train), report)
    assert not len(taken) and report["train"] == report["held_out"] == dict.fromkeys(LEAK_KINDS, 5)
    assert report["examples"]["exact"][0] == "train.jsonl:8 = eval.jsonl:1"
    taken = train_documents_to_drop(leaks, LeakagePolicy.drop_train, len(train), report)
    leaking = {place for place, (_, kind) in truth.items() if kind != "prompt"}  # a shared prompt is only reported
    assert set(taken.tolist()) == leaking and len(leaking) == 15
    with pytest.raises(
        DataError, match=r"15 of 400 .*exact 5, normalized 5.*train.jsonl:8 = eval.jsonl:1.*=drop_train"
    ):
        train_documents_to_drop(leaks, LeakagePolicy.fail, len(train), report)
    clean = leaks_of(train[:5], held_out[40:])
    assert not len(train_documents_to_drop(clean, LeakagePolicy.fail, 5, clean.to_report(where)))


def test_leakage_through_a_held_out_template_is_cut_and_reported():
    draw = random.Random(2)
    base = WORDS[:150]
    train = [row(" ".join([*base, *draw.choices(WORDS, k=40)]), "") for _ in range(40)]
    held_out = [row(" ".join([*base, *draw.choices(WORDS, k=40)]), "", "eval.jsonl") for _ in range(300)]
    train[-1] = row(held_out[250].prompt + " end", "")
    leaks = leaks_of(train, held_out)
    assert leaks.train.tolist() == [39] and leaks.held_out.tolist() == [len(train) + 250] and leaks.num_incomplete >= 30


def test_leakage_without_held_out_rows_is_empty():
    assert len(leaks_of([row("a b c", "d e")], []).train) == 0
    assert len(leaks_of([], [row("a b c", "d e")]).train) == 0


def test_leakage_plain_texts_share_no_prompt():
    train, held_out = [Document(file="a", line=1, text=prose(random.Random(seed), 30)) for seed in (1, 2)]
    assert len(leaks_of([train], [held_out]).train) == 0


def test_leakage_of_a_prompt_is_not_hidden_by_system_turns():
    def chat(system, answer):
        turns = [("system", system), ("user", "Who wrote it?"), ("assistant", answer)]
        return Document(file="a", line=1, messages=[{"role": role, "content": text} for role, text in turns])

    leaks = leaks_of([chat("Be brief.", "Nobody.")], [chat("Be kind.", "Somebody did.")])
    assert leaks.kind.tolist() == [LEAK_KINDS.index("prompt")]


# Decontamination


def runs(text, ngram=13):
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[start : start + ngram]) for start in range(len(words) - ngram + 1)}


def build(texts, **settings):
    return Decontaminator([(f"bench.jsonl:{line}", text) for line, text in texts], DecontaminationConfig(**settings))


@pytest.fixture(scope="module")
def bench():
    draw = random.Random(21)
    return [(line, prose(draw, draw.choice((13, 14, 20, 60)))) for line in range(1, 301)]


@pytest.fixture(scope="module")
def training(bench):
    """1,000 texts; a fifth hold 8 to 30 words in a row of an evaluation text, with other case and punctuation."""
    draw = random.Random(22)
    texts = []
    for number in range(1000):
        text = prose(draw, 120)
        if number % 5 == 0:
            words = draw.choice(bench)[1].split()
            length = min(len(words), draw.randint(8, 30))
            begin = draw.randrange(len(words) - length + 1)
            piece = ", ".join(words[begin : begin + length]).title()
            text = f'{text}\n"{piece}!" {prose(draw, 40)}'
        texts.append(text)
    return texts


def test_decontamination_overlaps_agree_with_plain_sets_of_runs(bench, training):
    every = set().union(*(runs(text) for _, text in bench))
    expected = [bool(runs(text) & every) for text in training]
    stage = build(bench)
    assert [stage.find_best_match(text) is not None for text in training] == expected
    assert 60 < sum(expected) < 200, "some plants must be shorter than a run"
    assert not stage.skipped.total()


def test_decontamination_share_of_an_evaluation_text(bench, training):
    sets = {f"bench.jsonl:{line}": runs(text) for line, text in bench}
    stage = build(bench)
    for text in training:
        own = runs(text)
        best = max(len(own & found) / len(found) for found in sets.values())
        tally = Tally()
        assert stage(Document(file="t", line=1, text=text), tally) is not None
        assert bool(tally.noted) is (best > 0)
        if got := stage.find_best_match(text):
            assert got[1] == pytest.approx(best) and len(own & sets[got[0]]) / len(sets[got[0]]) == pytest.approx(best)


def test_decontamination_reports_or_drops_with_the_place(bench):
    line, text = next((line, text) for line, text in bench if len(text.split()) == 60)
    stage = pickle.loads(pickle.dumps(build(bench, policy=DecontaminationPolicy.drop)))
    tally = Tally()
    dirty = Document(file="t.jsonl", line=4, messages=[{"role": "user", "content": "Q: " + text}])
    assert stage(dirty, tally) is None
    assert stage(Document(file="t.jsonl", line=5, text="quite another text"), tally) is not None
    assert tally.dropped == {"decontamination": {"holds evaluation text": 1}}
    assert tally.examples["decontamination/holds evaluation text"] == [f"t.jsonl:4 (100% of bench.jsonl:{line})"]
    tally = Tally()
    assert build(bench)(dirty, tally) is dirty and tally.noted["decontamination"] == {"holds evaluation text": 1}


def test_decontamination_searches_for_short_evaluation_texts_as_a_whole():
    stage = build([(1, "What is the capital of France?"), (2, "Is it so?"), (3, "what is the capital of France")])
    assert stage.skipped == {"too_short": 1, "repeated": 1, "only_shared_wording": 0}
    assert stage.find_best_match("Question: what is the CAPITAL of France? Answer: Paris.") == ("bench.jsonl:1", 1.0)
    assert stage.find_best_match("What is the capital of Spain? Is it so?") is None
    assert stage.find_best_match("What is the capital of France? " * 3) == ("bench.jsonl:1", 1.0)


def test_decontamination_ignores_wording_shared_by_a_set():
    intro = "read the following passage with care and then choose the one best answer from the list below"
    draw = random.Random(3)
    texts = [(line, f"{intro} {prose(draw, 30)}") for line in range(40)] + [(99, intro)]
    stage = build(texts)
    assert stage.find_best_match(f"{intro} {prose(draw, 30)}") is None
    assert stage.find_best_match(f"so {texts[5][1]}") == ("bench.jsonl:5", 1.0)
    assert stage.skipped["only_shared_wording"] == 1
    assert build(texts[:10]).find_best_match(f"{intro} {prose(draw, 30)}") is not None


def test_decontamination_with_nothing_to_search_for_is_an_error():
    with pytest.raises(DataError, match=r"none of the 2 evaluation texts.*2 have fewer than 5 words"):
        build([(1, "too short"), (2, "")])


def test_decontamination_texts_of_an_evaluation_document():
    long = " ".join(WORDS[:20])
    turns = [("system", long), ("user", "Who?"), ("assistant", "short answer"), ("user", "Why?"), ("assistant", long)]
    chat = Document(file="e", line=3, messages=[{"role": role, "content": text} for role, text in turns])
    assert list(texts_to_decontaminate_from(chat)) == [("e:3", "Who?"), ("e:3", "Why?"), ("e:3", long)]
    assert list(texts_to_decontaminate_from(row("p", "yes", "e", 4))) == [("e:4", "p")]


def test_leakage_first_equal_is_the_first_index_of_each_digest():
    digest = np.array([5, 7, 5, 9, 7, 5], dtype=np.uint64)
    assert first_matching_documents(digest, digest, np.arange(6)).tolist() == [0, 1, 0, 3, 1, 0]
    assert first_matching_documents(digest, digest[1:], np.arange(1, 6)).tolist() == [2, 1, 2, 3, 1, 2]
    assert first_matching_documents(digest, digest[3:4], np.array([8])).tolist() == [-1, -1, -1, 8, -1, -1]
    assert first_matching_documents(digest, digest[:0], np.arange(0)).tolist() == [-1] * 6
