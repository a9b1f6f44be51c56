# ruff: noqa: RUF001 - sentences of many languages are the point
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.covering import examples
from trainer.data.config import ChecksConfig, DataConfig
from trainer.data.document import Document, Tally
from trainer.data.selection.document_hashes import content_json
from trainer.data.sources import data_problems
from trainer.data.transforms.checks import CHECK_KINDS, MIN_REPEATED_CHARACTERS, Checks

LONG = "a sentence that is long enough to count as said twice"
SENTENCES = [
    "Das Mädchen fährt über die Straße, größer als „früher“ – wie schön!",
    "L’été dernier, où êtes-vous allé ? «Ça va», dit-il… à côté",
    "Příliš žluťoučký kůň úpěl ďábelské ódy – „ano“",
    "Zażółć gęślą jaźń – „tak”",
    "Привет, мир! Ещё раз — «да», ёлка",
    "Ђорђе рекао је: „ћуприја“",
    "Γειά σου Κόσμε, τι κάνεις;",
    "你好,世界。今天天气很好",
    "日本語のテキストです。「はい」",
    "안녕하세요 세계",
    "yes 😀, ok 👍🏽",
    "NÃO É possível, CORAÇÃO à noite",
    "It’s a “test” – 50 € or £20, 20°C ±1 µm ½ Â",
    "הבית הגדול שלי",
    "مرحبا بالعالم كيف الحال",
    "Tiếng Việt có dấu",
    "ÅÄÖ är bokstäver, Århus, naïve façade",
    "İstanbul’da ğüşıöç",
    "हिन्दी में लिखा हुआ",
]


def chat(*roles_and_texts):
    turns = [{"role": role, "content": text} for role, text in roles_and_texts]
    return Document("f.jsonl", 7, messages=turns)


def turns(roles):
    names = {"s": "system", "u": "user", "a": "assistant"}
    return chat(*((names[letter], f"{letter}{number}") for number, letter in enumerate(roles)))


def verdicts(document, **config):
    return list(Checks(ChecksConfig(**config))._first_problems(document))


@pytest.mark.parametrize(
    ("roles", "found"),
    [
        ("ua", []),
        ("suaua", []),
        ("uas", ["system_late", "trailing_turns"]),
        ("usa", ["system_late"]),
        ("ssua", ["system_late"]),
        ("saua", ["assistant_before_user"]),
        ("uuaa", ["same_role_twice"]),
        ("uau", ["trailing_turns"]),
        ("uauu", ["same_role_twice", "trailing_turns"]),
    ],
)
def test_checks_find_roles_out_of_order(roles, found):
    assert verdicts(turns(roles)) == found


def test_checks_look_at_role_order_in_both_halves_of_a_preference_pair():
    answer = [{"role": "assistant", "content": "a"}]
    pair = Document("f", 1, messages=[{"role": "user", "content": "q"}], chosen=answer, rejected=answer)
    assert verdicts(pair) == []
    pair.rejected = answer + answer
    assert verdicts(pair) == ["same_role_twice"]
    pair.chosen, pair.rejected = [*answer, {"role": "user", "content": "q"}], answer
    assert verdicts(pair) == ["trailing_turns"]


def test_checks_find_repeated_turns():
    repeated = chat(("user", LONG), ("assistant", "a"), ("user", LONG), ("assistant", "b"))
    echoed = chat(("user", LONG), ("assistant", LONG))
    short = chat(("user", "yes"), ("assistant", "a"), ("user", "yes"), ("assistant", "a"))
    assert verdicts(repeated) == ["repeated_turn"]
    assert verdicts(echoed) == verdicts(short) == []
    for length, found in ((MIN_REPEATED_CHARACTERS, ["repeated_turn"]), (MIN_REPEATED_CHARACTERS - 1, [])):
        said = "a" * length
        assert verdicts(chat(("user", said), ("assistant", "a"), ("user", said), ("assistant", "b"))) == found


def test_checks_look_at_the_texts_of_every_kind_of_document():
    turn = [{"role": "assistant", "content": "a\0"}]
    for document in (
        Document("f", 1, text="a\0"),
        Document("f", 1, prompt="a\0", completion="b"),
        Document("f", 1, prompt="a", completion="b\0"),
        chat(("user", "q"), ("assistant", "a\0")),
        Document("f", 1, messages=[{"role": "user", "content": "q"}], chosen=turn, rejected=turn),
    ):
        assert verdicts(document) == ["control_characters"]


@pytest.mark.parametrize("text", ["a\x1b[0m", "\x7f", "a\x85b", "\ufeffa", "\uffff", "\x0b"])
def test_checks_find_control_characters(text):
    assert "control_characters" in verdicts(Document("f", 1, text=text))


def test_checks_accept_tabs_and_line_ends():
    assert verdicts(Document("f", 1, text="a\tb\r\nc\u2028d")) == []


@pytest.mark.parametrize("text", ["", " \n", "\u3000"])
def test_checks_find_empty_texts(text):
    assert verdicts(Document("f", 1, text=text)) == ["empty_text"]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_sound_text_of_many_languages_is_no_damage_and_misread_text_is(sentence):
    assert verdicts(Document("f", 1, text=sentence)) == []
    for encoding in ("latin-1", "cp1252", "cp1250"):
        try:
            misread = sentence.encode("utf-8").decode(encoding)
        except UnicodeDecodeError:
            continue
        assert "encoding_damage" in verdicts(Document("f", 1, text=misread)), misread


@pytest.mark.parametrize("text", ["caf\ufffd", "itâ€™s", "Ã©tÃ©", "itвЂ™s", "Ð¿Ñ€Ð¸Ð²ÐµÑ‚"])
def test_checks_find_well_known_encoding_damage(text):
    assert verdicts(Document("f", 1, text=f"{'so it is ' * 50}{text}")) == ["encoding_damage"]


def test_checks_find_russian_read_as_windows_1251():
    assert verdicts(Document("f", 1, text="Привет, мир".encode().decode("cp1251"))) == ["encoding_damage"]


def test_checks_policies_count_or_quarantine_under_the_first_reason():
    document = turns("uuaau")
    kept, dropped = Tally(), Tally()
    assert Checks(ChecksConfig())(document, kept) is document
    assert kept.noted == {"checks": {"same_role_twice": 1, "trailing_turns": 1}} and not kept.dropped
    assert kept.examples["checks/same_role_twice"] == ["f.jsonl:7 (turn 2)"]
    strict = ChecksConfig(quarantine=["trailing_turns", "encoding_damage"])
    assert Checks(strict)(document, dropped) is None
    assert dropped.dropped == {"checks": {"trailing_turns": 1}} and not dropped.noted
    assert dropped.examples == {"checks/trailing_turns": ["f.jsonl:7 (turn 5)"]}
    assert Checks(strict)(turns("ua"), dropped) is not None and len(dropped.drops) == 1


@pytest.mark.parametrize("kind", CHECK_KINDS)
def test_checks_of_every_kind_can_be_found_and_quarantined(kind):
    document = chat(("assistant", LONG), ("system", ""), ("user", "\0\ufffd"), ("assistant", LONG), ("assistant", "a"))
    document.messages.append({"role": "user", "content": "b" * 90})
    config = ChecksConfig(quarantine=[kind])
    assert verdicts(document) == list(CHECK_KINDS)
    tally = Tally()
    assert Checks(config)(document, tally) is None
    assert tally.dropped == {"checks": {kind: 1}}


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), st.text()), min_size=1))
def test_checks_leave_any_conversation_as_it_is_and_note_known_kinds(said):
    document = chat(*said)
    before = content_json(document)
    tally = Tally()
    assert Checks(ChecksConfig())(document, tally) is document
    assert content_json(document) == before
    found = verdicts(document)
    assert found == [kind for kind in CHECK_KINDS if kind in found]
    assert tally.noted.get("checks", {}) == dict.fromkeys(found, 1)


def test_checks_kind_that_does_not_exist_is_a_problem():
    (line,) = data_problems(DataConfig(path="x", checks=ChecksConfig(quarantine=["empty_text", "empty_texts"])))
    assert "'empty_texts'" in line and "encoding_damage" in line
