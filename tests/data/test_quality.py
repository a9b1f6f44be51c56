import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.errors import ConfigError
from trainer.data.document import Document, Tally
from trainer.data.stages import language
from trainer.data.stages.filters import FilterConfig, Filters, GopherConfig, Quality, measures, words

PROSE = (
    "The river rose in the night and covered the lower road. By morning the farmers had moved their sheep up to the "
    "church, where the old walls kept the wind away. Nobody had seen such water since the mill was built, and the miller "
    "himself stood on the bridge with a lantern, counting planks as they went by.\nLater the rain stopped, birds came "
    "back, and a boy found a boat in an apple tree."
)
CODE = "```python\n" + "x = x + 1  # ###\n" * 40 + "```"
CHINESE = (
    "昨天晚上河水上涨。淹没了下面的道路。"
    "早晨农民们把羊群赶到教堂旁边。那里的老墙可以挡风。自从磨坊建成以来没有人见过这么大的水。"
)
THAI = "เมื่อคืนแม่น้ำสูงขึ้นและท่วมถนนด้านล่าง ในตอนเช้าชาวนาย้ายแกะขึ้นไปที่โบสถ์ซึ่งกำแพงเก่าช่วยกันลมไว้ ไม่มีใครเคยเห็นน้ำมากขนาดนี้"
GERMAN = (
    "Der Fluss stieg in der Nacht und bedeckte die untere Straße. "
    "Am Morgen hatten die Bauern ihre Schafe zur Kirche gebracht."
)
FRENCH = (
    "La rivière a monté pendant la nuit et a couvert la route du bas. Le matin, les paysans avaient mené leurs moutons."
)
LINES = ["one line of plain text here", "another line that says things", "a third with its own words"]
GOPHER = FilterConfig(quality=Quality.gopher, gopher=GopherConfig(min_words=20))


def gopher(**bounds):
    return FilterConfig(quality=Quality.gopher, gopher=GopherConfig(min_words=20, **bounds))


def ask(question, answer, **more):
    return Document(
        "f", 1, messages=[{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]
    )


def plain(text):
    return Document("f", 1, text=text)


distinct = [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(200)]
TABLE = [
    # config, document, the reason expected (None: kept)
    (FilterConfig(), plain("x"), None),
    (FilterConfig(min_characters=5), plain("abcd"), "too_few_characters"),
    (FilterConfig(min_characters=4), ask("ab", "cd"), None),
    (FilterConfig(max_characters=3), ask("ab", "cd"), "too_many_characters"),
    (FilterConfig(max_characters=4), ask("ab", "cd"), None),
    (FilterConfig(min_words=4), plain("one two three"), "too_few_words"),
    (FilterConfig(min_words=4), plain("日本語文"), None),
    (FilterConfig(max_words=2), ask("one two", "three"), "too_many_words"),
    (FilterConfig(min_completion_characters=3), ask("long question here", " a "), "completion_too_short"),
    (FilterConfig(min_completion_characters=3), plain("a"), None),
    (FilterConfig(drop_echoes=True), ask("What is the capital?", "what is the CAPITAL"), "echoes_prompt"),
    (FilterConfig(drop_echoes=True), ask("What is the capital?", "What is the capital? Paris."), None),
    (FilterConfig(drop_echoes=True), ask("Hello!", "Hello"), None),
    (
        FilterConfig(drop_echoes=True),
        Document("f", 1, prompt="say it all again", completion=" Say it all again."),
        "echoes_prompt",
    ),
    (FilterConfig(drop_phrases=["as an AI language model"]), ask("x", "Well, As an  AI\nlanguage model, no"), "phrase"),
    (FilterConfig(drop_phrases=["as an AI language model"]), ask("as an AI language model", "Yes."), None),
    (FilterConfig(drop_phrases=["a.c"]), plain("abc"), None),
    (FilterConfig(drop_phrases=["sorry"]), ask("x", "sorry", train=False), None),
    (FilterConfig(drop_phrases=["sorry"]), Document("f", 1, prompt="x", completion="sorry", desirable=False), None),
    (
        FilterConfig(drop_phrases=["sorry"]),
        Document("f", 1, messages=[], chosen=[], rejected=[{"role": "assistant", "content": "sorry"}]),
        None,
    ),
    (GOPHER, plain(PROSE), None),
    (GOPHER, plain(CODE), None),
    (GOPHER, plain(CHINESE), None),
    (GOPHER, plain(THAI), None),
    (GOPHER, ask("# " * 100, "42"), None),
    (GOPHER, plain("a b " * 5), None),
    (GOPHER, plain(" ".join("ab" if i % 2 else w[-2:] for i, w in enumerate(distinct[:60]))), "low_mean_word_length"),
    (GOPHER, plain(" ".join(w * 3 for w in distinct[:60])), "high_mean_word_length"),
    (GOPHER, plain(" ".join(f"{i}{i}{i}" for i in range(50))), "low_alphabetic_share"),
    (gopher(min_letter_share=0.6), plain(" ".join(f"{w[:2]}123456" for w in distinct[:50])), "low_letter_share"),
    (gopher(min_stop_words=2), plain(" ".join(distinct[:60])), "low_stop_words"),
    (gopher(min_stop_words=2), plain(PROSE), None),
    (GOPHER, plain(" #".join(distinct[:40])), "high_symbol_ratio"),
    (GOPHER, plain("\n".join(f"- {a} {b} {a}x" for a, b in pairwise(distinct[:50]))), "high_bullet_share"),
    (
        gopher(max_symbol_ratio=1),
        plain("\n".join(" ".join(distinct[i * 9 : i * 9 + 9]) + "..." * (i % 2) for i in range(10))),
        "high_ellipsis_share",
    ),
    (GOPHER, plain("\n".join(LINES * 3)), "high_duplicate_line_share"),
    (
        GOPHER,
        plain("\n".join([*distinct[:10], " ".join(distinct[10:18]), " ".join(distinct[10:18])])),
        "high_duplicate_line_characters",
    ),
    (GOPHER, plain(" ".join(f"good day {w}" for w in distinct[:30])), "high_top_2gram_share"),
    (
        GOPHER,
        plain(" ".join([*distinct[:60], *(distinct[:14]), *distinct[60:80]])),
        "high_repeated_6gram_share",
    ),
    (FilterConfig(languages=["en"]), plain(PROSE), None),
    (FilterConfig(languages=["en"]), plain(GERMAN), "other_language"),
    (FilterConfig(languages=["en", "de"]), plain(GERMAN), None),
    (FilterConfig(languages=["en"]), ask(GERMAN, GERMAN), "other_language"),
    (FilterConfig(languages=["en"]), plain("Guten Tag"), None),
    (FilterConfig(languages=["en"], min_language_probability=1.0), plain(PROSE[:80]), "uncertain_language"),
    (FilterConfig(languages=["de"]), plain(CODE), None),
]


@pytest.mark.parametrize("row", range(len(TABLE)))
def test_table_of_good_and_bad_rows(row):
    config, document, reason = TABLE[row]
    tally = Tally()
    kept = Filters(config)(document, tally)
    found = [name for counter in tally.dropped.values() for name in counter]
    assert found == ([] if reason is None else [reason])
    assert (kept is document) == (reason is None)


def test_drop_names_place_and_language():
    tally = Tally()
    Filters(FilterConfig(languages=["en"]))(Document("x.jsonl", 3, text=GERMAN), tally)
    Filters(FilterConfig(languages=["en"]))(Document("x.jsonl", 4, text="Tag"), tally)
    assert tally.examples["filters/other_language"][0].startswith("x.jsonl:3 (de ")
    assert tally.noted == {"filters": {"language_not_judged": 1}}


def brute(tokens, n):
    spots = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    total = sum(map(len, tokens)) or 1
    counts = [spots.count(spot) for spot in spots]
    top = max((sum(map(len, s)) * c for s, c in zip(spots, counts, strict=True) if c == max(counts) > 1), default=0)
    inside = [
        any(spots[s] in spots[:s] for s in range(max(0, i - n + 1), i + 1) if s < len(spots))
        for i in range(len(tokens))
    ]
    return min(top / total, 1), sum(len(t) for t, dup in zip(tokens, inside, strict=True) if dup) / total


@given(st.lists(st.sampled_from(["a", "bb", "ccc"]), max_size=40))
def test_ngram_shares_equal_brute_force(tokens):
    figures = measures(" ".join(tokens))
    for n in (2, 3, 4):
        assert figures[f"top_{n}gram_share"] == pytest.approx(brute(tokens, n)[0])
    for n in range(5, 11):
        assert figures[f"repeated_{n}gram_share"] == pytest.approx(brute(tokens, n)[1])


@given(st.text())
def test_measures_hold_their_bounds_for_any_text(text):
    figures = measures(text)
    assert all(0 <= value <= 1 for name, value in figures.items() if name.endswith("_share"))
    assert all(type(value) is float and (value >= 0 or math.isnan(value)) for value in figures.values())


def test_measures_by_hand():
    figures = measures("- The cat # 12\n\n- The cat # 12\nend ...")
    assert figures["words"] == 12
    assert figures["symbol_ratio"] == 2 / 12
    assert figures["alphabetic_share"] == 5 / 10
    assert figures["letter_share"] == 15 / 26
    assert figures["bullet_share"] == 2 / 3
    assert figures["ellipsis_share"] == 1 / 3
    assert figures["duplicate_line_share"] == 1 / 3
    assert figures["duplicate_line_characters"] == 14 / 35
    assert figures["mean_word_length"] == 26 / 12
    assert math.isnan(measures(CHINESE)["mean_word_length"])
    assert words("日本 abc") == ["日", "本", "abc"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FilterConfig(languages=["english"]), "'english'.*did you mean en?"),
        (FilterConfig(languages=["EN"]), "'EN'.*did you mean en?"),
        (FilterConfig(min_words=5, max_words=4), "max_words=4 is below .*min_words=5"),
        (FilterConfig(drop_phrases=[" "]), "empty phrase"),
        (FilterConfig(gopher=GopherConfig(max_top_ngram_shares=[0.1])), "give 3 numbers"),
        (FilterConfig(gopher=GopherConfig(max_mean_word_length=2)), "below min_mean_word_length"),
    ],
)
def test_unusable_settings_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        Filters(config)


def test_the_list_of_languages_is_the_detectors():
    labels = set(language._identifier().labels)
    assert labels - {language.NO_LANGUAGE} == language.LANGUAGES


def test_language_counts_of_a_sample():
    texts = [PROSE, GERMAN, GERMAN, FRENCH, CHINESE, THAI, "ok", CODE, FRENCH]
    documents = [plain(text) for text in texts]
    counts = language.share(documents, min_characters=50)
    assert counts == {"de": 2, "fr": 2, "unjudged": 2, "en": 1, "th": 1, "zh": 1}
    assert list(counts) == ["de", "fr", "unjudged", "en", "th", "zh"]
    assert language.share(documents, max_documents=3) == {"de": 2, "en": 1}


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(language, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install py3langid"):
        Filters(FilterConfig(languages=["en"]))
