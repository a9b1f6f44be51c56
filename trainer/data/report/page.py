"""The audit page: `audit.json` as one HTML file that needs no network, for people who would rather look than read.

Only shows what it is given; every figure on it stands in `audit.json` too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trainer.data.report import composition
from trainer.data.report import seen as findings
from trainer.data.report.markup import Limits, anything, clipped, details, table
from trainer.data.report.schema import items, mapping
from trainer.data.report.style import STYLE
from trainer.data.report.svg import escape, fit
from trainer.data.report.verdict import SIGNS, Tile, overall, tiles

MAX_BYTES = 400_000
"""A page larger than this is made anew with shorter lists."""
LIMITS = (
    Limits(),
    Limits(rows=24, characters=1200, samples=5, words=160),
    Limits(rows=8, characters=300, samples=2, words=60),
)
Section = Callable[[Mapping[str, Any], Limits], str]
SECTIONS: dict[str, tuple[str, Section]] = {
    "flow": ("Rows through the stages", composition.flow_section),
    "splits": ("Splits and lengths", composition.splits_section),
    "sources": ("Sources", composition.sources_section),
    "labels": ("Labels and balance", composition.labels_section),
    "duplicates": ("Duplicates", findings.duplicates_section),
    "leakage": ("Leakage between splits", findings.leakage_section),
    "privacy": ("Personal data", findings.privacy_section),
    "languages": ("Languages", composition.languages_section),
    "quality": ("Quality", findings.quality_section),
    "samples": ("Samples", composition.samples_section),
}
SHOWN_ELSEWHERE = frozenset(
    {"schema", "created", "shardtune", "fingerprint", "words", "conserved", "quarantine", "mixing", "balance"}
    | {"decontamination"}
)


def page(audit: Mapping[str, Any]) -> str:
    """The page for an audit of the form `schema.Audit`; parts that are missing are left out, unknown ones shown plainly.

    UTF-8 can encode the result whatever the data holds. It stays below `MAX_BYTES`: of long lists the beginning is
    shown, with the number left out.
    """
    made = ""
    for limits in LIMITS:
        made = _page(audit, limits)
        if len(made.encode()) < MAX_BYTES:
            break
    return made


def _page(audit: Mapping[str, Any], limits: Limits) -> str:
    made = {}
    for name, (title, section) in SECTIONS.items():
        if inside := section(audit, limits):
            made[name] = (title, inside)
    if rest := {k: v for k, v in audit.items() if k not in SHOWN_ELSEWHERE and k not in SECTIONS and v}:
        made["more"] = ("More findings", anything(rest, limits))
    if words := mapping(audit.get("words")):
        rows = [(str(key), "null" if value is None else str(value)) for key, value in sorted(words.items())]
        longer = Limits(rows=limits.rows * 6, words=limits.words)
        made["settings"] = ("Settings", details(f"All {len(rows)} settings", table(("setting", "value"), rows, longer)))
    found = tiles(audit)
    level, words_on_it = overall(found)
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, (title, _) in made.items())
    sections = "".join(
        f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{escape(title)}</h2>{inside}</section>'
        for name, (title, inside) in made.items()
    )
    tile_row = "".join(_tile(tile, linked=tile.anchor in made) for tile in found)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Data audit</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        # Nothing may be loaded or run, whatever a text of the data set contains.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{STYLE}</style></head><body><header><h1>Data audit</h1>{_subtitle(audit, limits)}"
        f'<p class="verdict {level}">{escape(words_on_it)}</p><div class="tiles">{tile_row}</div>'
        f'<nav aria-label="Sections">{links}</nav></header><main>{sections}</main>'
        f"<footer>{_footer(audit, limits)}</footer></body></html>\n"
    )


def _subtitle(audit: Mapping[str, Any], limits: Limits) -> str:
    names = [fit(mapping(s).get("name", ""), 400) for s in items(audit.get("sources"))]
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    parts = [shown, f"made {audit['created']}" if audit.get("created") else ""]
    return f'<p class="sub">{escape(clipped(" · ".join(p for p in parts if p), limits))}</p>'


def _tile(tile: Tile, *, linked: bool) -> str:
    sign, words = SIGNS[tile.level]
    tag, target = ("a", f' href="#{tile.anchor}"') if linked else ("div", "")
    state = f'<span class="unseen"> ({words})</span>' if words else ""
    return (
        f'<{tag} class="tile {tile.level}"{target}><span class="what"><span aria-hidden="true">{sign}</span> '
        f"{escape(tile.what)}{state}</span><b>{escape(tile.value)}</b>"
        f'<span class="note">{escape(tile.note)}</span></{tag}>'
    )


def _footer(audit: Mapping[str, Any], limits: Limits) -> str:
    version = f"shardtune {audit['shardtune']}" if audit.get("shardtune") else "shardtune"
    made = f"<p>{escape(clipped(version, limits))}</p>"
    if audit.get("fingerprint"):
        mark = escape(clipped(audit["fingerprint"], limits))
        made = f"<p>Fingerprint of the data <code>{mark}</code></p>{made}"
    return made
