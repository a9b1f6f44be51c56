"""Sections of the audit page on what the data set is made of: flow, splits, sources, labels, languages, samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.data.report.charts import Bar, Mark, bars, flow, histogram, stacked, usable_histogram
from trainer.data.report.markup import (
    Limits,
    anything,
    clipped,
    details,
    drawn,
    figure,
    left_out,
    paragraph,
    table,
)
from trainer.data.report.schema import count, items, mapping, number, share
from trainer.data.report.svg import escape, percent, plural


def flow_section(audit: Mapping[str, Any], limits: Limits) -> str:
    """Rows through the stages, with the places of what was dropped."""
    stages = [mapping(stage) for stage in items(audit.get("flow"))]
    conserved = mapping(audit.get("conserved"))
    if not stages and not conserved:
        return ""
    parts = []
    if conserved:
        rows, kept, dropped = (count(conserved.get(key)) for key in ("rows_in", "kept", "dropped"))
        adds_up = rows == kept + dropped
        words = f"{plural(rows, 'row')} read = {kept:,} kept + {dropped:,} dropped"
        parts.append(paragraph(words if adds_up else f"{words}: this does not add up", "" if adds_up else "warn"))
    if stages:
        parts.append(drawn(flow(stages[: limits.rows])))
    rows_of = []
    for stage in stages:
        examples = mapping(stage.get("examples"))
        for kind in ("dropped", "noted"):
            for reason, amount in mapping(stage.get(kind)).items():
                places = ", ".join(str(place) for place in items(examples.get(reason)))
                rows_of.append((stage.get("stage", ""), kind, str(reason).replace("_", " "), count(amount), places))
    heads = ("stage", "", "reason", "documents", "first places")
    parts.append(details("By reason, with the first places", table(heads, rows_of, limits)))
    return "".join(parts)


def splits_section(audit: Mapping[str, Any], limits: Limits) -> str:
    """Sizes, learned share and distributions of each split."""
    splits = {str(name): mapping(split) for name, split in mapping(audit.get("splits")).items()}
    if not splits:
        return ""
    heads = ("split", "documents", "tokens", "learned tokens", "learned", "p50", "p90", "longest", "ends learned")
    keys = ("documents", "tokens", "supervised_tokens")
    rows = [
        (
            name,
            *(count(split.get(key)) for key in keys),
            percent(number(split.get("supervised_share"))),
            *(count(split.get(key)) for key in ("length_p50", "length_p90", "length_max", "ends_supervised")),
        )
        for name, split in splits.items()
    ]
    parts = [table(heads, rows, limits)]
    if any(not split.get("labelled") and "supervised_share" in split for split in splits.values()):
        shares = []
        for name, split in list(splits.items())[: limits.rows]:
            part = number(split.get("supervised_share"))
            words = f"{percent(part)} of {plural(count(split.get('tokens')), 'token')}"
            shares.append((name, part, words))
        parts.append("<h3>Learned share of the tokens</h3>")
        parts.append(drawn(stacked(shares, "Learned share of the tokens", ("learned", "context only"))))
    for name, split in list(splits.items())[:6]:
        parts.append(_distributions(name, split, mapping(audit.get("words")), limits))
    return "".join(parts)


def _distributions(name: str, split: Mapping[str, Any], words: Mapping[str, Any], limits: Limits) -> str:
    limit = number(words.get("data.max_length"))
    marks = [
        Mark(number(split[key]), f"{label} {count(split[key]):,}")
        for key, label in (("length_p50", "p50"), ("length_p90", "p90"))
        if key in split
    ]
    if limit > 0:
        marks.append(Mark(limit, f"max_length {limit:,.0f}", "limit-line"))
    learned = items(mapping(split.get("supervised_histogram")).get("edges"))
    shares = bool(learned) and number(learned[-1]) <= 1
    parts = []
    for key, title, unit, lines, style in (
        ("length_histogram", "length of documents", "tokens", marks, "kept"),
        (
            "supervised_histogram",
            "learned share of a document" if shares else "learned tokens of a document",
            "of its tokens" if shares else "tokens",
            [],
            "learned",
        ),
        ("turns_histogram", "turns a document", "turns", [], "kept2"),
    ):
        if (found := usable_histogram(split.get(key))) is not None and any(found[1]):
            title = f"{name}: {title}"
            parts += [f"<h3>{escape(title)}</h3>", drawn(histogram(*found, title, unit, lines, style))]
            if lines and limit > found[0][-1]:
                parts.append(paragraph(f"data.max_length={limit:,.0f} is beyond the longest one.", "muted-text"))
            bins = [(figure(a), figure(b), n) for a, b, n in zip(found[0], found[0][1:], found[1], strict=False) if n]
            parts.append(details("As a table", table(("from", "below", "documents"), bins, limits)))
    return "".join(parts)


def sources_section(audit: Mapping[str, Any], limits: Limits) -> str:
    """Where the data came from, and the share of each source that was asked for beside the one it got."""
    sources = [mapping(source) for source in items(audit.get("sources"))]
    mixing = {str(name): mapping(part) for name, part in mapping(audit.get("mixing")).items()}
    parts = []
    if mixing:
        asked = _asked(mixing)
        rows = []
        for name, part in list(mixing.items())[: limits.rows // 2]:
            documents, tokens = number(part.get("share_documents")), number(part.get("share_tokens"))
            values = [
                (asked[name], "neutral", f"{percent(asked[name])} asked for"),
                (documents, "kept", f"{percent(documents)} of documents ({count(part.get('documents')):,})"),
                (tokens, "kept2", f"{percent(tokens)} of tokens ({count(part.get('tokens')):,})"),
            ]
            rows.append(Bar(name, values))
        legend = (("neutral", "asked for"), ("kept", "documents"), ("kept2", "tokens"))
        title = "Shares of the sources, asked for and got"
        parts.append(drawn(bars(rows, title, f"{plural(len(mixing), 'source')}", legend=legend)))
        parts.append(left_out(len(mixing) - limits.rows // 2))
    heads = ("source", "format", "rows", "kept", "tokens", "learned tokens", "weight", "licence")
    rows_of = [
        (
            s.get("name", ""),
            s.get("format", ""),
            *(count(s.get(key)) for key in ("rows", "kept", "tokens", "supervised_tokens")),
            "" if s.get("weight") is None else figure(s["weight"]),
            s.get("licence") or "not stated",
        )
        for s in sources
    ]
    parts.append(table(heads, rows_of, limits))
    files = [
        (s.get("name", ""), f.get("path", ""), count(f.get("rows")), count(f.get("bytes")), f.get("sha256", ""))
        for s in sources
        for f in map(mapping, items(s.get("files")))
    ]
    listed = table(("source", "file", "rows", "bytes", "sha256"), files, limits)
    parts.append(details(plural(len(files), "file"), listed))
    return "".join(parts)


def _asked(mixing: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The share asked for of each source: what was requested, else its weight; as a part of the sum where that is above 1."""
    key = "requested" if any(number(part.get("requested")) > 0 for part in mixing.values()) else "weight"
    total = max(sum(number(part.get(key)) for part in mixing.values()), 1.0)
    return {name: share(number(part.get(key)), total) for name, part in mixing.items()}


def labels_section(audit: Mapping[str, Any], limits: Limits) -> str:
    """Labels and balanced groups, before and after."""
    labels = mapping(audit.get("labels"))
    before, after = mapping(labels.get("before")), mapping(labels.get("after"))
    parts = []
    if before or after:
        names = sorted({*before, *after}, key=lambda name: -max(count(before.get(name)), count(after.get(name))))
        both = bool(before) and bool(after)
        rows = []
        for name in names[: limits.rows // 2]:
            shown = [(before, "kept2", "before"), (after, "kept", "after")]
            values = [
                (float(count(t.get(name))), style, f"{count(t.get(name)):,}{f' {when}' if both else ''}")
                for t, style, when in shown
                if t
            ]
            rows.append(Bar(str(name), values))
        legend = (("kept2", "before"), ("kept", "after")) if both else ()
        parts.append(drawn(bars(rows, "Documents of each label", plural(len(names), "label"), legend=legend)))
        table_rows = [(str(name), count(before.get(name)), count(after.get(name))) for name in names]
        parts.append(details("As a table", table(("label", "before", "after"), table_rows, limits)))
        parts.append(left_out(len(names) - limits.rows // 2))
    balance = {str(name): mapping(group) for name, group in mapping(audit.get("balance")).items()}
    if balance:
        rows = []
        for name, group in list(balance.items())[: limits.rows // 2]:
            keys = (("share_before", "kept2"), ("share_after", "kept"), ("share_target", "neutral"))
            rows.append(
                Bar(
                    name,
                    [
                        (number(group[k]), style, f"{percent(number(group[k]))} {k.removeprefix('share_')}")
                        for k, style in keys
                        if group.get(k) is not None
                    ],
                )
            )
        three = (("kept2", "before"), ("kept", "after"), ("neutral", "target"))
        parts.append("<h3>Balance of groups</h3>")
        parts.append(drawn(bars(rows, "Shares of the balanced groups", plural(len(balance), "group"), legend=three)))
        parts.append(details("As a table", anything([{"group": n, **g} for n, g in balance.items()], limits)))
    return "".join(parts)


def languages_section(audit: Mapping[str, Any], limits: Limits) -> str:
    """Documents of each language."""
    languages = {str(name): count(amount) for name, amount in mapping(audit.get("languages")).items()}
    if not languages:
        return ""
    ranked = sorted(languages.items(), key=lambda entry: -entry[1])
    total = sum(languages.values())
    shown = ranked[: limits.rows // 3]
    if len(ranked) > len(shown):
        shown.append((f"{len(ranked) - len(shown)} others", sum(n for _, n in ranked[len(shown) :])))
    rows = [Bar(name, [(n, "kept", f"{n:,} ({percent(share(n, total))})")]) for name, n in shown]
    return drawn(bars(rows, "Documents of each language", plural(len(languages), "language")))


def samples_section(audit: Mapping[str, Any], limits: Limits) -> str:
    """Decoded documents; what is learned is marked in colour and underlined."""
    samples = [mapping(sample) for sample in items(audit.get("samples"))]
    if not samples:
        return ""
    parts = [
        paragraph("Text as the model sees it, decoded from the tokens. Marked text is learned; the rest is context.")
    ]
    for sample in samples[: limits.samples]:
        label = f" · label {clipped(sample['label'], limits)}" if sample.get("label") is not None else ""
        caption = f'<figcaption class="place">{escape(clipped(sample.get("where", ""), limits) + label)}</figcaption>'
        body = _pieces([mapping(piece) for piece in items(sample.get("pieces"))], limits.characters)
        parts.append(f'<figure>{caption}<pre dir="auto" tabindex="0">{body}</pre></figure>')
    return "".join(parts) + left_out(len(samples) - limits.samples)


def _pieces(pieces: list[Mapping[str, Any]], room: int) -> str:
    """Marked-up text of at most `room` characters: head and tail, with what lies between counted."""
    total = sum(len(str(piece.get("text", ""))) for piece in pieces)
    head = room if total <= room else room * 2 // 3
    tail = total if total <= room else total - room // 3
    out, at, told = [], 0, total <= room
    for piece in pieces:
        text = str(piece.get("text", ""))
        for begin, end in ((0, head), (tail, total)) if total > room else ((0, total),):
            if begin and not told and at + len(text) > head:
                out.append(f"<b> … {tail - head:,} characters … </b>")
                told = True
            part = text[max(begin - at, 0) : max(end - at, 0)]
            if part:
                out.append(f"<mark>{escape(part)}</mark>" if piece.get("learned") else escape(part))
        at += len(text)
    return "".join(out)
