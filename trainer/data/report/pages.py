"""The audit page, one HTML file that needs no network (`page.html.j2`), and the data card in Markdown (`card.md.j2`).

The card is in the form of the Hugging Face hub and follows the questions of Gebru et al., "Datasheets for Datasets" (2021,
arXiv:1803.09010). Both say what preparation counted and what its settings say; what nobody stated or measured is listed
under known gaps. The card has no paths, only names of files: it travels, the machine's layout does not.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

from trainer.data.config import CardConfig
from trainer.data.report.audit import Audit, DecodedSample
from trainer.data.report.wording import (
    Severity,
    audit_tiles,
    escape_control_characters,
    known_gaps,
    overall_verdict,
    plural,
    reason_text,
    template_environment,
)
from trainer.pages.pieces import PageCard, Tone
from trainer.pages.render import render

MAX_TEXT_CHARACTERS = 200
"""Characters of any text but a sample: what is longer is cut, and stands in audit.json."""
MAX_SAMPLE_CHARACTERS = 3000
"""Characters of one decoded sample."""


def audit_page_html(audit: Audit, data_statement: CardConfig) -> str:
    """Write the audit page of a prepared data set, the text of `audit.html`.

    Whatever comes from the data is escaped; long texts and lists are cut. `data_statement`: what the owner of the data states
    about it (`data.card`).
    """
    all_tiles = audit_tiles(audit)
    severity, verdict = overall_verdict(all_tiles)
    cards = []
    for tile in all_tiles:
        tone = TONE_BY_SEVERITY[tile.severity]
        cards.append(PageCard(tile.title, tile.value, tile.note, tone, href=f"#{tile.anchor}"))
    return render(
        "trainer.data.report",
        "page.html.j2",
        filters=PAGE_FILTERS,
        finalize=_shorten_plain_text,  # Jinja applies it to each value that the page prints
        audit=audit,
        cards=cards,
        tone=TONE_BY_SEVERITY[severity],
        verdict=verdict,
        advice=[tile for tile in all_tiles if tile.severity in (Severity.critical, Severity.warning)],
        known_gaps=known_gaps(audit, data_statement),
        data_statement=data_statement,
        plural=plural,
    )


TONE_BY_SEVERITY: dict[Severity, Tone] = {
    Severity.good: "good",
    Severity.warning: "warning",
    Severity.critical: "bad",
    Severity.not_measured: "",
}
"""How a finding is tinted."""


def _shorten_plain_text(expression: Any) -> Any:
    """What the page inserts for an expression of its template: a plain text as `_shorten` returns it; all else as it is."""
    from markupsafe import Markup

    is_plain_text = isinstance(expression, str) and not isinstance(expression, Markup)
    return _shorten(expression) if is_plain_text else expression


def _shorten(text: str) -> str:
    """A text as the page shows it: without invisible characters, and cut if it is long."""
    if len(text) > MAX_TEXT_CHARACTERS:
        text = f"{text[:MAX_TEXT_CHARACTERS]}… ({len(text):,} characters)"
    return escape_control_characters(text)


def sample_spans(sample: DecodedSample, max_characters: int = MAX_SAMPLE_CHARACTERS) -> list[tuple[Any, str]]:
    """Divide a decoded sample into spans for the page: (escaped text, its CSS class "learned", "context" or "cut").

    Example: [("Hi", "context"), ("Hello", "learned")]; "cut" is a note of the page's own, such as "… 900 characters …". If a
    sample has more than `max_characters`, two thirds of what is shown are its beginning and one third its end.
    """
    from markupsafe import escape

    num_characters = sum(len(piece["text"]) for piece in sample.pieces)
    # Characters [gap_begin, gap_end) of the sample are left out.
    gap_begin = gap_end = num_characters
    if num_characters > max_characters:
        gap_begin = max_characters * 2 // 3
        gap_end = num_characters - max_characters // 3
    spans: list[tuple[Any, str]] = []
    position = 0  # of the piece in the sample
    for piece in sample.pieces:
        text = piece["text"]
        css_class = "learned" if piece["learned"] else "context"
        text_before_gap = text[: max(gap_begin - position, 0)]
        if text_before_gap:
            spans.append((escape(escape_control_characters(text_before_gap)), css_class))
        gap_begins_here = position <= gap_begin < position + len(text)
        if gap_begins_here and gap_begin < gap_end:
            spans.append((f"… {gap_end - gap_begin:,} characters …", "cut"))
        text_after_gap = text[max(gap_end - position, 0) :]
        if text_after_gap:
            spans.append((escape(escape_control_characters(text_after_gap)), css_class))
        position += len(text)
        # A weight below 1 is shown behind the piece, as "*0.5", if the end of the piece is shown.
        is_end_in_gap = gap_begin < position <= gap_end
        if "weight" in piece and not is_end_in_gap:
            spans.append((f"*{piece['weight']:g}", "cut"))
    return spans


PAGE_FILTERS: dict[str, Callable[..., Any]] = {
    "reason": reason_text,
    "count": lambda number: f"{number:,.0f}",
    "figure": lambda number: f"{number:,.4g}",
    "spans": sample_spans,
}
"""What the page's template has beside the filters of all pages."""
HUB_LICENCES_REGEX = re.compile(
    r"(apache-2\.0|mit|openrail|bigscience-.*|creativeml-.*|bsd(-.*)?|cc(-.*)?|cc0-1\.0|[al]?gpl(-.*)?|mpl-2\.0|odc-by|"
    r"odbl|pddl|cdla-.*|gfdl|isc|unlicense|wtfpl|zlib|llama.*|gemma|etalab-2\.0|afl-3\.0|artistic-2\.0|bsl-1\.0|"
    r"eupl-.*|epl-.*|ecl-2\.0|ms-pl|ncsa|osl-3\.0|postgresql|lppl-1\.3c|ofl-1\.1|unknown|other)"
)
"""Licence identifiers that the hub knows."""
SIZE_CATEGORIES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")
"""The hub's size categories, in documents: the first is below a thousand, each further one goes ten times as far."""


def parse_hub_licence(licence: str | None) -> tuple[str | None, str | None]:
    """Find the metadata for a licence: (`license`, `license_name`) of a data card, "MIT" -> ("mit", None).

    The hub knows a licence by its identifier; any other one is `other`, with its name: "My terms" -> ("other", "My terms").
    Without a licence, both are None.
    """
    if not licence:
        return None, None
    if HUB_LICENCES_REGEX.fullmatch(licence.lower()):
        return licence.lower(), None
    return "other", licence


def datacard_text(audit: Audit, config: CardConfig) -> str:
    """Write the data card of a prepared data set, the text of `datacard.md`: the hub's metadata as YAML, then the card.

    Text from the data is escaped for Markdown; what the owner states in `config` (`data.card`) is taken as Markdown.
    """
    from huggingface_hub import DatasetCard
    from markupsafe import Markup

    source_names = ", ".join(dict.fromkeys(source.name for source in audit.sources[:5]))
    title = " ".join(escape_control_characters(config.title or f"Fine-tuning data: {source_names}").split())
    languages = list(config.languages) or _common_languages(audit.languages)
    environment = template_environment(escape_markdown)
    # What the owner states is not escaped once more.
    environment.globals["stated"] = lambda words: Markup(
        escape_control_characters(words or "").strip() or "Not stated."
    )
    body = environment.get_template("card.md.j2").render(
        audit=audit, card=config, title=title, languages=languages, gaps=known_gaps(audit, config)
    )
    metadata_yaml = _card_metadata_yaml(audit, config, title, languages)
    return str(DatasetCard(f"---\n{metadata_yaml}\n---\n\n{body}"))


def _card_metadata_yaml(audit: Audit, config: CardConfig, title: str, languages: list[str]) -> str:
    """Write the hub's metadata of a data set, as YAML: title, licence, languages, size and kind of task.

    The Hugging Face hub reads it from the head of the data card, to list and filter data sets.
    """
    from huggingface_hub import DatasetCardData

    licence, licence_name = parse_hub_licence(escape_control_characters(config.licence or "").strip())
    num_documents = sum(split.documents for split in audit.splits.values())
    # How many of the limits 1,000, 10,000, ..., 1,000,000,000 are reached.
    size_category_index = bisect_right([10**power for power in range(3, 10)], num_documents)
    is_labelled = any(split.labelled for split in audit.splits.values())
    metadata = DatasetCardData(
        pretty_name=title,
        license=licence,
        license_name=licence_name,
        language=languages or None,
        size_categories=[SIZE_CATEGORIES[size_category_index]],
        task_categories=["text-classification" if is_labelled else "text-generation"],
        tags=["shardtune", "fine-tuning"],
    )
    return str(metadata.to_yaml())


MAX_CARD_CHARACTERS = 300
"""Characters of any text of the data in the card."""


def escape_markdown(text: str) -> str:
    """Put a text of the data on one line of the card, cut if it is long, with nothing that Markdown or HTML would act on."""
    line = " ".join(escape_control_characters(text).split())
    if len(line) > MAX_CARD_CHARACTERS:
        line = f"{line[:MAX_CARD_CHARACTERS]}…"
    line = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", line)
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # A heading or the item of a list at the beginning.
    return re.sub(r"^(#+|[-+]|\d+[.)])(?= )", r"\\\1", line)


def _common_languages(languages: dict[str, int]) -> list[str]:
    """The codes of the languages of at least one judged document in a hundred, the most frequent first.

    `languages`: documents by language code; "unjudged" is no code.
    """
    most_frequent_first = sorted(languages.items(), key=lambda entry: -entry[1])
    min_documents = sum(languages.values()) / 100
    codes = []
    for code, num_documents in most_frequent_first:
        if re.fullmatch("[a-z]{2,3}", code) and num_documents >= min_documents:
            codes.append(code)
    return codes
