"""The audit page, one HTML file that needs no network (`page.html.j2`), and the data card in Markdown (`card.md.j2`).

The card is in the form of the Hugging Face hub and follows the questions of Gebru et al., "Datasheets for Datasets" (2021,
arXiv:1803.09010). Both say what preparation counted and what its settings say; what nobody stated or measured is listed
under known gaps. The card has no paths, only names of files: it travels, the machine's layout does not.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Any

from trainer.data.config import CardConfig
from trainer.data.report.audit import Audit, DecodedSample
from trainer.data.report.wording import known_gaps, overall_level, templates, tiles, visible

MAX_TEXT_CHARACTERS = 200
"""Characters of any text but a sample: what is longer is cut, and stands in audit.json."""
MAX_SAMPLE_CHARACTERS = 3000
"""Characters of one decoded sample."""


def audit_page(audit: Audit, stated: CardConfig) -> str:
    """The text of `audit.html`. Whatever comes from the data is escaped; long lists are cut, with the number left out."""
    all_tiles = tiles(audit)
    level, words = overall_level(all_tiles)
    environment = templates(_shorten, autoescape=True)
    # Only the page needs it; the environment of the card is another one.
    environment.filters["runs"] = sample_runs
    return environment.get_template("page.html.j2").render(
        audit=audit, tiles=all_tiles, level=level, words=words, gaps=known_gaps(audit, stated), card=stated
    )


def _shorten(text: str) -> str:
    """Any text of the page: nothing invisible, nothing endless."""
    if len(text) > MAX_TEXT_CHARACTERS:
        text = f"{text[:MAX_TEXT_CHARACTERS]}… ({len(text):,} characters)"
    return visible(text)


def sample_runs(sample: DecodedSample, room: int = MAX_SAMPLE_CHARACTERS) -> list[tuple[Any, str]]:
    """The sample's runs as (escaped text, "learned", "context" or "cut"), at most `room` characters: its head and tail."""
    from markupsafe import escape

    total = sum(len(piece["text"]) for piece in sample.pieces)
    # Characters [head_end, tail_begin) of the sample are left out.
    head_end = tail_begin = total
    if total > room:
        head_end = room * 2 // 3
        tail_begin = total - room // 3
    page_runs: list[tuple[Any, str]] = []
    position = 0
    for piece in sample.pieces:
        text = piece["text"]
        kind = "learned" if piece["learned"] else "context"
        head = text[: max(head_end - position, 0)]
        if head:
            page_runs.append((escape(visible(head)), kind))
        if position <= head_end < position + len(text) and head_end < tail_begin:
            page_runs.append((f"… {tail_begin - head_end:,} characters …", "cut"))
        tail = text[max(tail_begin - position, 0) :]
        if tail:
            page_runs.append((escape(visible(tail)), kind))
        if "weight" in piece and page_runs[-1][1] == "learned":
            page_runs.append((f"*{piece['weight']:g}", "cut"))
        position += len(text)
    return page_runs


HUB_LICENCES = re.compile(
    r"(apache-2\.0|mit|openrail|bigscience-.*|creativeml-.*|bsd(-.*)?|cc(-.*)?|cc0-1\.0|[al]?gpl(-.*)?|mpl-2\.0|odc-by|"
    r"odbl|pddl|cdla-.*|gfdl|isc|unlicense|wtfpl|zlib|llama.*|gemma|etalab-2\.0|afl-3\.0|artistic-2\.0|bsl-1\.0|"
    r"eupl-.*|epl-.*|ecl-2\.0|ms-pl|ncsa|osl-3\.0|postgresql|lppl-1\.3c|ofl-1\.1|unknown|other)"
)
"""Licence identifiers that the hub knows."""
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")
"""The hub's size categories, in documents: the first is below a thousand, each further one goes ten times as far."""


def hub_licence(licence: str | None) -> tuple[str | None, str | None]:
    """(`license`, `license_name`) of a card's metadata: a licence that the hub has no identifier for is `other` by name."""
    if not licence:
        return None, None
    if HUB_LICENCES.fullmatch(licence.lower()):
        return licence.lower(), None
    return "other", licence


def datacard(audit: Audit, config: CardConfig) -> str:
    """The text of `datacard.md`. Text from the data is escaped for Markdown, what the owner states is Markdown of theirs."""
    from huggingface_hub import DatasetCard, DatasetCardData
    from markupsafe import Markup

    source_names = ", ".join(dict.fromkeys(source.name for source in audit.sources[:5]))
    title = " ".join(visible(config.title or f"Fine-tuning data: {source_names}").split())
    languages = list(config.languages) or _common_languages(audit.languages)
    documents = sum(split.documents for split in audit.splits.values())
    licence, licence_name = hub_licence(visible(config.licence or "").strip())
    labelled = any(split.labelled for split in audit.splits.values())
    size_category = bisect_right([10**power for power in range(3, 10)], documents)
    metadata = DatasetCardData(
        pretty_name=title,
        license=licence,
        license_name=licence_name,
        language=languages or None,
        size_categories=[SIZES[size_category]],
        task_categories=["text-classification" if labelled else "text-generation"],
        tags=["shardtune", "fine-tuning"],
    )
    environment = templates(escape, autoescape=False)
    environment.globals["stated"] = lambda words: Markup(visible(words or "").strip() or "Not stated.")
    body = environment.get_template("card.md.j2").render(
        audit=audit, card=config, title=title, languages=languages, gaps=known_gaps(audit, config)
    )
    return str(DatasetCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}"))


def escape(words: str) -> str:
    """`words` on one line, at most 300 characters, with nothing that Markdown or HTML would act on."""
    line = " ".join(visible(words).split())
    if len(line) > 300:
        line = f"{line[:300]}…"
    line = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", line)
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # A heading or the item of a list at the beginning.
    return re.sub(r"^(#+|[-+]|\d+[.)])(?= )", r"\\\1", line)


def _common_languages(languages: dict[str, int]) -> list[str]:
    """Codes of the languages of at least one judged document in a hundred, the commonest first."""
    ranked = sorted(languages.items(), key=lambda entry: -entry[1])
    least = sum(languages.values()) / 100
    return [code for code, number in ranked if re.fullmatch("[a-z]{2,3}", code) and number >= least]
