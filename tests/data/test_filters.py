import re

import pytest

from trainer.data.config import FilterConfig
from trainer.data.document import Document, Tally
from trainer.data.transforms import filters
from trainer.data.transforms.filters import Filters

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


def ask(question, answer, **more):
    return Document(
        "f", 1, messages=[{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]
    )


def plain(text):
    return Document("f", 1, text=text)


TABLE = [
    # config, document, the reason expected (None: kept)
    (FilterConfig(), plain("x"), None),
    (FilterConfig(min_characters=5), plain("abcd"), "too_few_characters"),
    (FilterConfig(min_characters=4), ask("ab", "cd"), None),
    (FilterConfig(max_characters=3), ask("ab", "cd"), "too_many_characters"),
    (FilterConfig(max_characters=4), ask("ab", "cd"), None),
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
    (FilterConfig(languages=["en"]), plain(PROSE), None),
    (FilterConfig(languages=["en"]), plain(GERMAN), "other_language"),
    (FilterConfig(languages=["en", "de"]), plain(GERMAN), None),
    (FilterConfig(languages=["en"]), ask(GERMAN, GERMAN), "other_language"),
    (FilterConfig(languages=["en"]), plain("Guten Tag"), None),
    (FilterConfig(languages=["de"]), plain(CODE), None),
]


@pytest.mark.parametrize("row", range(len(TABLE)))
def test_filters_judge_a_table_of_good_and_bad_rows(row):
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


def test_filters_take_code_out_by_its_fences():
    text = "a\n```py\nb ~~~ ``\n```\nc ```x``` y\n````\n```\n````\nd\n   ~~~\ne"
    assert filters.FENCED_CODE_REGEX.sub("", text) == "a\n\nc ```x``` y\n\nd\n"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FilterConfig(languages=["english"]), "'english'.*did you mean en?"),
        (FilterConfig(languages=["EN"]), "'EN'.*did you mean en?"),
        (FilterConfig(min_characters=5, max_characters=4), "max_characters=4 is below .*min_characters=5"),
        (FilterConfig(drop_phrases=[" "]), "empty phrase"),
    ],
)
def test_filters_refuse_unusable_settings(config, message):
    (line,) = filters.filter_problems(config)
    assert re.search(message, line)


def test_filters_count_the_languages_of_a_sample(monkeypatch):
    monkeypatch.setattr(filters, "MIN_JUDGED_CHARACTERS", 50)
    texts = [PROSE, GERMAN, GERMAN, FRENCH, CHINESE, THAI, "ok", CODE, FRENCH]
    documents = [plain(text) for text in texts]
    counts = filters.count_languages(documents)
    assert counts == {"de": 2, "fr": 2, "unjudged": 2, "en": 1, "th": 1, "zh": 1}
    assert list(counts) == ["de", "fr", "unjudged", "en", "th", "zh"]
