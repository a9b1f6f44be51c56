import json
import math
import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.errors import ConfigError
from trainer.data.document import Document
from trainer.data.stages.bias import (
    ATTRIBUTES,
    GROUPS,
    MOST_LABELS,
    BiasConfig,
    BiasCounter,
    family_of,
    log_odds_ratio,
)

CONFIG = BiasConfig(
    groups={"g/a": ["apple"], "g/b": ["pear", "big pear"], "h/c": ["pear", "red apple"]},
    attributes={"good": ["nice", "very nice"], "bad": ["rotten"]},
    window=3,
)
VOCABULARY = ["apple", "pear", "big", "red", "nice", "very", "rotten", "x", "y"]


def text(words, **fields):
    return Document(file="f", line=1, text=words, **fields)


def counted(config, *documents):
    counter = BiasCounter(config)
    for document in documents:
        counter.add(document)
    return counter


def plainly(config, documents):
    """The same counts with one regular expression a family, tried longest first at every place, and all pairs."""

    def spans(sentence, terms):
        ordered = sorted(terms, key=lambda term: -len(term))
        words = [match.span() for match in re.finditer(r"\w+", sentence)]
        pattern = re.compile(r"\b(" + "|".join(ordered) + r")\b")
        for match in pattern.finditer(sentence):
            covered = [n for n, (begin, end) in enumerate(words) if match.start() <= begin and end <= match.end()]
            yield covered, match.group()

    mentions, near, near_documents, documents_with = {}, {}, {}, {}
    for sentence in documents:
        seen, pairs = set(), set()
        found = []
        for family in {family_of(name)[0] for name in config.groups}:
            own = {name: terms for name, terms in config.groups.items() if family_of(name)[0] == family}
            for covered, term in spans(sentence, [term for terms in own.values() for term in terms]):
                found.extend((name, covered) for name, terms in own.items() if term in terms)
        attributes = list(spans(sentence, [word for words in config.attributes.values() for word in words]))
        for name, covered in found:
            mentions[name] = mentions.get(name, 0) + 1
            seen.add(name)
            for attribute, words in config.attributes.items():
                if any(
                    term in words and not set(places) & set(covered)
                    and min(abs(p - q) for p in places for q in covered) <= config.window
                    for places, term in attributes
                ):  # fmt: skip
                    near[name, attribute] = near.get((name, attribute), 0) + 1
                    pairs.add((name, attribute))
        for name in seen:
            documents_with[name] = documents_with.get(name, 0) + 1
        for pair in pairs:
            near_documents[pair] = near_documents.get(pair, 0) + 1
    return mentions, near, near_documents, documents_with


@given(st.lists(st.lists(st.sampled_from(VOCABULARY), max_size=14).map(" ".join), max_size=5), st.integers(1, 6))
def test_counts_agree_with_a_plain_search(documents, window):
    config = BiasConfig(groups=CONFIG.groups, attributes=CONFIG.attributes, window=window)
    counter = counted(config, *map(text, documents))
    wanted = plainly(config, documents)
    assert (counter.mentions, counter.near, counter.near_documents, counter.mentioning) == wanted
    assert counter.words == sum(len(sentence.split()) for sentence in documents)


@given(st.lists(st.lists(st.sampled_from(VOCABULARY), max_size=10).map(" ".join), max_size=6), st.integers(0, 6))
def test_blocks_add_up_to_the_whole(documents, cut):
    rows = [text(words, label=str(number % 2)) for number, words in enumerate(documents)]
    first, second = counted(CONFIG, *rows[:cut]), pickle.loads(pickle.dumps(counted(CONFIG, *rows[cut:])))
    first.merge(second)
    first = BiasCounter.of_state(CONFIG, json.loads(json.dumps(first.state())))
    assert first.as_dict() == counted(CONFIG, *rows).as_dict()


def test_counts_of_different_settings_do_not_add():
    with pytest.raises(ValueError, match="different settings"):
        BiasCounter(CONFIG).merge(BiasCounter(BiasConfig()))


def test_whole_words_in_any_case_with_hyphens_and_apostrophes():
    sentence = "The WOMAN's aide, an African-American; humans, mankind and the heron are no men."
    counter = counted(BiasConfig(), text(sentence))
    assert counter.mentions == {"gender/female": 1, "ethnicity/black": 1, "gender/male": 1}


def test_the_longest_term_counts_within_a_family_and_families_do_not_hide_each_other():
    counter = counted(BiasConfig(), text("a trans woman and a black woman"))
    assert counter.mentions == {"gender/transgender and non-binary": 1, "gender/female": 1, "ethnicity/black": 1}


def test_a_word_is_not_near_itself_and_texts_are_not_crossed():
    config = BiasConfig(groups={"a": ["nice"], "b": ["x"]}, attributes={"good": ["nice"]}, window=5)
    assert not counted(config, text("a nice day")).near
    assert counted(config, text("nice and nice")).near == {("a", "good"): 2}
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "nice"}]
    assert not counted(config, Document(file="f", line=1, messages=turns)).near
    assert counted(config, Document(file="f", line=1, prompt="nice x", completion="y")).near == {("b", "good"): 1}


def test_log_odds_ratio_against_the_textbook_formula_and_by_hand():
    # (10 + 1/2)(35 + 1/2) / ((20 + 1/2)(5 + 1/2)) by hand
    ratio, low, high = log_odds_ratio(10, 30, 5, 40)
    assert math.exp(ratio) == pytest.approx(10.5 * 35.5 / (20.5 * 5.5))
    error = math.sqrt(1 / 10.5 + 1 / 20.5 + 1 / 5.5 + 1 / 35.5)
    assert (low, high) == pytest.approx((ratio - 1.96 * error, ratio + 1.96 * error), abs=1e-4)
    assert log_odds_ratio(5, 40, 10, 30)[0] == pytest.approx(-ratio)
    assert log_odds_ratio(0, 5, 0, 5)[0] == 0 and all(map(math.isfinite, log_odds_ratio(5, 5, 0, 5)))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    import numpy as np

    rng = np.random.default_rng(0)
    truth = math.log(0.3 / 0.7) - math.log(0.2 / 0.8)
    draws = zip(rng.binomial(80, 0.3, 2000).tolist(), rng.binomial(120, 0.2, 2000).tolist(), strict=True)
    inside = [low <= truth <= high for _, low, high in (log_odds_ratio(a, 80, c, 120) for a, c in draws)]
    assert 0.94 < np.mean(inside) < 0.975


def test_a_planted_skew_is_found_and_an_even_word_is_not():
    rows = [text("she is caring and has a job") for _ in range(60)] + [text("she has a job") for _ in range(40)]
    rows += [text("he is caring and has a job") for _ in range(20)] + [text("he has a job") for _ in range(80)]
    report = counted(BiasConfig(), *rows).as_dict()
    skew = {(row["group"], row["attribute"]): row for row in report["skew"]}
    assert skew["female", "warmth"]["low"] > 0 > skew["male", "warmth"]["high"]
    assert skew["female", "warmth"]["count"] == 60 and skew["female", "warmth"]["share_others"] == 0.2
    assert skew["female", "career"]["low"] < 0 < skew["female", "career"]["high"]
    assert {row["family"] for row in report["skew"]} == {"gender"}  # families with a single group have no comparison
    female = report["families"]["gender"]["female"]
    assert female["documents"] == female["mentions"] == 100 and female["share_documents"] == 0.5
    assert female["terms"] == {"she": 100} and female["near"] == {"warmth": 60, "career": 100}
    assert female["per_1000_words"] == pytest.approx(1000 * 100 / (60 * 7 + 40 * 4 + 20 * 7 + 80 * 4))


def test_labels_of_a_group_against_the_other_groups():
    rows = [text("she", label="toxic")] * 30 + [text("she", label="fine")] * 10
    rows += [text("he", label="toxic")] * 5 + [text("he", label="fine")] * 15 + [text("he")] * 7
    labels = {(row["group"], row["label"]): row for row in counted(BiasConfig(), *rows).as_dict()["labels"]}
    row = labels["female", "toxic"]
    assert (row["share"], row["share_others"], row["difference"]) == (0.75, 0.25, 0.5) and row["low"] > 0
    assert labels["male", "toxic"]["documents"] == 20  # unlabelled rows are no part of the comparison
    rated = counted(BiasConfig(), Document(file="f", line=1, prompt="she", completion="he", desirable=False))
    assert rated.labelled == {("gender/female", "undesirable"): 1, ("gender/male", "undesirable"): 1}


def test_many_labels_are_bounded_in_the_report_and_the_rest_is_counted():
    rows = [text("she he", label=str(number)) for number in range(MOST_LABELS + 7)]
    report = counted(BiasConfig(), *rows).as_dict()
    assert report["labels_left_out"] == 7 and len(report["labels"]) == 2 * MOST_LABELS


def test_an_empty_counter_reports_without_dividing():
    report = BiasCounter(BiasConfig()).as_dict()
    assert report["documents"] == 0 and report["skew"] == report["labels"] == [] and report["limits"]


def test_groups_without_a_family_are_compared_to_each_other():
    config = BiasConfig(groups={"cats": ["cat"], "dogs": ["dog"]}, attributes={"nice": ["nice"]})
    report = counted(config, text("nice cat"), text("dog")).as_dict()
    assert [row["group"] for row in report["skew"]] == ["cats", "dogs"] and set(report["families"]) == {"groups"}


def test_unusable_settings_are_all_named():
    config = BiasConfig(groups={"g/a": [], "g/b": ["--"]}, attributes={"x": [""]}, window=0)
    with pytest.raises(ConfigError) as error:
        BiasCounter(config)
    assert [problem.split(":")[0].split("=")[0] for problem in error.value.problems] == [
        "data.bias.window", "data.bias.groups.g/a", "data.bias.groups.g/b", "data.bias.attributes.x",
    ]  # fmt: skip


def test_every_built_in_list_is_counted_and_families_are_the_promised_ones():
    families = {family_of(name)[0] for name in GROUPS}
    assert families == {"gender", "religion", "ethnicity", "age", "disability", "sexual orientation"}
    for lists, config in ((GROUPS, "mentions"), (ATTRIBUTES, None)):
        for name, terms in lists.items():
            for term in terms.split(", "):
                counter = counted(BiasConfig(window=9), text(f"{term} ; she" if config is None else term))
                if config:
                    assert counter.mentions[name] >= 1, term
                else:
                    assert counter.near["gender/female", name] == 1, term
