"""Duplicates: against true Jaccard similarities by brute force, hand-made cases, and any division into blocks."""

import gc
import json
import os
import random
import re
import subprocess
import sys
import weakref
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from trainer.data.config import ComparedText, DuplicatePolicy, DuplicatesConfig
from trainer.data.document import Document
from trainer.data.selection.document_hashes import DocumentHasher, compared_text, normalize, prompt_text
from trainer.data.selection.near_duplicates import MAX_COMPARISONS, NearIndex, jaccard_similarity, ngrams
from trainer.data.selection.splits import COPY_KINDS, duplicate_policies, find_duplicates

ROOT = Path(__file__).parents[2]
NEAR = DuplicatesConfig(near=DuplicatePolicy.drop)
LETTERS = "abcdefghijklmnoprstuvw"
RANDOM = random.Random(7)
WORDS = ["".join(RANDOM.choices(LETTERS, k=RANDOM.randint(2, 9))) for _ in range(4000)]


def text_document(text, line=1, **more):
    return Document(file="a.jsonl", line=line, text=text, **more)


def decide(documents, config=NEAR):
    columns, policies = DocumentHasher(config).hash_documents(documents), duplicate_policies(config)
    found = find_duplicates(config, columns, lambda row: compared_text(documents[row], config.text))
    kinds = {kind: found.copy_kind == 1 + COPY_KINDS.index(kind) for kind in policies}
    dropped = [copies for kind, copies in kinds.items() if policies[kind] is DuplicatePolicy.drop]
    kept = ~np.any([np.zeros(len(documents), bool), *dropped], axis=0)
    report = {kind: int(copies.sum()) for kind, copies in kinds.items()}
    return SimpleNamespace(
        representative=found.representative, kind=found.copy_kind, kept=kept, report=report, search=found.search_report
    )


def plain_ngrams(text, ngram=5):
    """The oracle's own reading of ASCII prose: a set of tuples of words."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    if len(words) < ngram:
        return {tuple(words)} if words else set()
    return {tuple(words[start : start + ngram]) for start in range(len(words) - ngram + 1)}


def true_similarities(texts):
    """Jaccard similarity of every pair with a shared n-gram, by counting in an inverted index."""
    sets = [plain_ngrams(text) for text in texts]
    holders = defaultdict(list)
    for row, runs in enumerate(sets):
        for ngram in runs:
            holders[ngram].append(row)
    shared = Counter()
    for rows in holders.values():
        shared.update((rows[a], rows[b]) for a in range(len(rows)) for b in range(a + 1, len(rows)))
    return {(a, b): both / (len(sets[a]) + len(sets[b]) - both) for (a, b), both in shared.items()}


def sentences(draw, number):
    return [" ".join(draw.choices(WORDS, k=draw.randint(6, 14))).capitalize() + "." for _ in range(number)]


def changed(draw, parts):
    way = draw.randrange(4)
    if way == 0:
        words = " ".join(parts).split()
        for place in draw.sample(range(len(words)), max(1, round(len(words) * draw.uniform(0.005, 0.1)))):
            words[place] = draw.choice(WORDS)
        return " ".join(words)
    if way == 1:
        moved = list(parts)
        moved.append(moved.pop(draw.randrange(len(moved))))
        return " ".join(moved)
    if way == 2:
        return "Posted by " + draw.choice(WORDS) + " | 12 replies\n\n" + " ".join(parts)
    return "  ".join(parts).upper().replace(".", " !")


@pytest.fixture(scope="module")
def corpus():
    draw = random.Random(3)
    originals = [sentences(draw, draw.randint(4, 20)) for _ in range(1700)]
    copies = [changed(draw, draw.choice(originals)) for _ in range(700)]
    texts = [" ".join(parts) for parts in originals] + copies
    draw.shuffle(texts)
    return texts


@pytest.fixture(scope="module")
def similarities(corpus):
    return true_similarities(corpus)


def test_near_duplicates_agree_with_brute_force(corpus, similarities):
    result = decide([text_document(text) for text in corpus])
    rows = np.flatnonzero(result.representative != np.arange(len(corpus)))
    for row in rows.tolist():
        leader = int(result.representative[row])
        assert leader < row and result.representative[leader] == leader and result.kept[leader]
        assert similarities[leader, row] >= 0.8
    greedy, expected = set(), set()
    alike = defaultdict(list)
    for (a, b), value in similarities.items():
        if value >= 0.8:
            alike[b].append(a)
    for row in range(len(corpus)):
        (expected if any(other in greedy for other in alike[row]) else greedy).add(row)
    found = set(rows.tolist())
    assert len(expected) > 350
    assert len(found & expected) >= 0.97 * len(expected) and len(found - expected) <= 0.01 * len(expected)
    assert set(np.flatnonzero(~result.kept).tolist()) == found
    assert result.report["normalized"] > 50, "changes of case and punctuation are the same words"
    below = [value for value in similarities.values() if 0.5 <= value < 0.8]
    assert len(below) > 100, "the corpus must hold pairs that candidates have to be refused for"


def test_files_of_the_search_go_with_its_index(tmp_path):
    """A cycle of references would keep them, gigabytes of a large data set, until Python happens to look for cycles."""
    texts = ["one two three four five six"] * 2
    index = NearIndex(np.arange(2), lambda row: texts[row], np.zeros(2, np.uint64), 0.8, tmp_path)
    index.add(0)
    assert index.find_most_similar(1) == 0, "and its memory of sketches has been used"
    gone = weakref.ref(index._index)
    gc.disable()
    try:
        del index
        assert gone() is None
    finally:
        gc.enable()


def test_duplicates_are_the_same_in_another_process_and_no_thread_is_left():
    """A process forked after rensa had started threads would hang: loaders of batches are forked after preparation."""
    script = (
        "import os, random; from tests.data.test_duplicates import changed, decide, sentences, text_document\n"
        "draw = random.Random(8); originals = [sentences(draw, 6) for _ in range(60)]\n"
        "texts = [' '.join(parts) for parts in originals] + [changed(draw, parts) for parts in originals]\n"
        "before = len(os.listdir('/proc/self/task')); stands = decide([text_document(text) for text in texts]).representative\n"
        "print(len(os.listdir('/proc/self/task')) - before, stands.tolist())"
    )
    said = [
        subprocess.check_output(
            [sys.executable, "-c", script], text=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}
        )
        for seed in ("1", "2")
    ]
    assert said[0] == said[1] and said[0].startswith("0 [0, 1, 2,")
    assert sum(place != row for row, place in enumerate(json.loads(said[0][2:]))) > 20, "copies must be among them"


def test_duplicates_jaccard_similarity_is_the_true_one(corpus, similarities):
    pairs = sorted(similarities)[:400]
    for first, second in pairs:
        got = jaccard_similarity(*(set(ngrams(normalize(corpus[row]))) for row in (first, second)))
        assert got == pytest.approx(similarities[first, second], abs=1e-12)
    assert jaccard_similarity(set(), set()) == 0


def test_duplicates_of_short_texts_need_the_same_words():
    documents = [text_document(text) for text in ("one two three", "one two four", "One, two, three!")]
    result = decide(documents)
    assert result.representative.tolist() == [0, 1, 0] and result.report["normalized"] == 1


def test_texts_without_spaces_between_words():
    draw = random.Random(2)
    long = "".join(chr(draw.randrange(0x4E00, 0x5E00)) for _ in range(300))
    documents = [text_document(long), text_document(long[:150] + "好" + long[151:]), text_document(long[::-1])]
    result = decide(documents)
    assert result.representative.tolist() == [0, 0, 2] and result.report["near"] == 1


def test_duplicates_of_texts_without_words_need_the_same_characters():
    documents = [text_document(text) for text in ("", "...", "", "?!")]
    result = decide(documents)
    assert result.representative.tolist() == [0, 1, 0, 3] and result.search["comparisons"] == 0


def test_duplicates_of_boilerplate_cost_one_comparison_each():
    boiler = " ".join(WORDS[:200])
    documents = [text_document(f"{boiler} number {number}") for number in range(5000)]
    result = decide(documents)
    assert result.kept.sum() == 1 and result.report["near"] == 4999
    assert result.search["comparisons"] == 4999


def test_duplicates_bucket_of_unlike_documents_is_cut_and_reported():
    draw = random.Random(4)
    shared = WORDS[:150]
    texts = [" ".join([*shared, *draw.choices(WORDS, k=40)]) for _ in range(600)]
    copies = [text.rsplit(" ", 1)[0] for text in texts[80:120]]
    result = decide([text_document(text) for text in texts + copies])
    search = result.search
    assert search["comparisons"] <= MAX_COMPARISONS * len(texts + copies) and search["incomplete"] > 100
    assert result.kept[:600].all() and (~result.kept[600:]).sum() >= 38, "the likest are compared first"


def test_duplicates_likeness_is_not_passed_along_chains():
    words = WORDS[:120]
    texts = [" ".join(words[shift : shift + 90]) for shift in (0, 6, 12, 18, 24, 30)]
    similar = true_similarities(texts)
    assert similar[0, 1] > 0.85 and similar[0, 2] < 0.8
    result = decide([text_document(text) for text in texts])
    assert result.representative.tolist() == [0, 0, 2, 2, 4, 4]


def test_duplicates_policies():
    documents = [text_document(text) for text in (" ".join(WORDS[:80]), " ".join(WORDS[:79]), " ".join(WORDS[:80]))]
    documents.append(text_document(" ".join(WORDS[:80]).upper()))
    kept = {}
    for name, settings in {
        "default": {},
        "exact": {"exact": "drop"},
        "normalized": {"normalized": "drop"},
        "near": {"near": "drop", "exact": "none", "normalized": "none"},
        "none": {"exact": "none", "normalized": "none"},
    }.items():
        config = DuplicatesConfig(**{key: DuplicatePolicy(value) for key, value in settings.items()})
        result = decide(documents, config)
        kept[name] = result.kept.tolist()
        if name == "default":
            assert result.report == {"exact": 1, "normalized": 1}
    assert kept["default"] == kept["none"] == [True] * 4
    assert kept["exact"] == [True, True, False, True]
    assert kept["normalized"] == [True, True, False, False]
    assert kept["near"] == [True, False, False, False], "a copy is never treated more leniently than a near duplicate"


def test_duplicates_of_a_near_duplicate_are_represented_by_the_kept_document():
    texts = [" ".join(WORDS[:80]), " ".join(WORDS[:79]), " ".join(WORDS[:79]), " ".join(WORDS[:79]).upper()]
    result = decide([text_document(text) for text in texts])
    assert result.representative.tolist() == [0, 0, 0, 0] and result.kind.tolist() == [0, 3, 1, 2]


def test_duplicates_need_the_same_label_and_verdict():
    long = " ".join(WORDS[:80])
    labelled = [
        text_document(long, label="good"),
        text_document(long, label="bad"),
        text_document(long + " x", label="bad"),
    ]
    assert decide(labelled).representative.tolist() == [0, 1, 1]
    thumbs = [Document(file="a", line=1, prompt="p", completion=long, desirable=value) for value in (True, False)]
    assert decide(thumbs).representative.tolist() == [0, 1]


def _pair(chosen, rejected):
    answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    prompt = [{"role": "user", "content": "Which one?"}]
    return Document(file="a", line=1, messages=prompt, chosen=answers[0], rejected=answers[1])


def test_turned_preference_pairs_are_no_duplicates():
    one, other = " ".join(WORDS[:80]), " ".join(WORDS[100:180])
    documents = [_pair(one, other), _pair(other, one), _pair(one + " more", other)]
    assert decide(documents).representative.tolist() == [0, 1, 0]


def _chat(*turns):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]
    return Document(file="a", line=1, messages=messages)


def test_duplicates_compare_document_prompt_or_completion():
    documents = [
        _chat("s:be kind", "u:hello there", "a:hi"),
        _chat("u:Hello there!", "a:go away"),
        _chat("u:bye", "a:hi"),
    ]
    assert [prompt_text(document) for document in documents] == ["hello there", "Hello there!", "bye"]
    assert prompt_text(text_document("x")) is None and prompt_text(text_document("x", label="l")) == "x"
    by = {which: decide(documents, DuplicatesConfig(text=which)).representative.tolist() for which in ComparedText}
    assert by == {"document": [0, 1, 2], "prompt": [0, 0, 2], "completion": [0, 1, 0]}
    columns = DocumentHasher(DuplicatesConfig()).hash_documents([*documents, text_document("plain")])
    assert columns["prompt"][0] == columns["prompt"][1] != columns["prompt"][2] and columns["prompt"][3] == 0
    assert "verdict" not in columns
    empty = [Document(file="a", line=1, prompt="", completion=text) for text in ("one", "two")]
    assert decide(empty, DuplicatesConfig(text=ComparedText.prompt)).representative.tolist() == [0, 1]
