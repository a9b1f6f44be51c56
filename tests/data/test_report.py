"""The audit page and the data card: everything shown, nothing obeyed, no figure that is not a number."""

import copy
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from trainer.data.report.card import CardConfig, datacard
from trainer.data.report.charts import Bar, Mark, bars, flow, forest, histogram
from trainer.data.report.gaps import known_gaps
from trainer.data.report.page import MAX_BYTES, page
from trainer.data.report.svg import Scale, coordinate, fit, percent, short, spread, text_width
from trainer.data.report.verdict import Level, overall, tiles

VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = [
    '<script>alert("x")</script>',
    "\"><img src=x onerror='y'>",
    "</pre></section></body>",
    "&lt;b&gt; &amp;",
    "\u202eevil\u202c",
    "\ud800 lone",
    "\x00\x1b[31m",
    "w" * 5000,
    "مرحبا بالعالم",
    "`| **x** |\n# not a heading\n[a](javascript:b)",
]


def example():
    edges = [0, 100, 200, 400, 2048]
    return {
        "schema": 1,
        "created": "2026-01-02T03:04:05+00:00",
        "shardtune": "0.3",
        "fingerprint": "f00d" * 16,
        "words": {"data.max_length": 2048, "data.over_length": "drop", "data.eval_path": None},
        "sources": [
            {
                "name": "chat",
                "files": [
                    {"path": "/home/someone/secret-project/chat.jsonl", "bytes": 9, "sha256": "ab" * 32, "rows": 800}
                ],
                "format": "messages",
                "rows": 800,
                "kept": 700,
                "weight": 0.75,
                "licence": "CC-BY-4.0",
                "tokens": 60000,
                "supervised_tokens": 20000,
            },
            {"name": "web", "files": [], "rows": 200, "kept": 190, "tokens": 9000},
        ],
        "flow": [
            {
                "stage": "read",
                "in": 1000,
                "out": 997,
                "dropped": {"not_json": 3},
                "examples": {"not_json": ["chat.jsonl:7"]},
            },
            {
                "stage": "checks",
                "in": 997,
                "out": 950,
                "dropped": {f"reason_{n}": n for n in range(2, 11)},
                "noted": {},
            },
            {"stage": "duplicates", "in": 950, "out": 900, "dropped": {"exact": 50}},
            {"stage": "tokenise", "in": 900, "out": 890, "dropped": {"too_long": 10}, "noted": {"truncated": 5}},
        ],
        "conserved": {"rows_in": 1000, "kept": 890, "dropped": 110},
        "quarantine": {"rows": 3, "file": "quarantine.jsonl"},
        "splits": {
            "train": {
                "documents": 800,
                "tokens": 61000,
                "supervised_tokens": 20000,
                "supervised_share": 0.328,
                "labelled": False,
                "length_p50": 90,
                "length_p90": 95,
                "length_max": 2048,
                "length_histogram": {"edges": edges, "counts": [500, 200, 90, 10]},
                "supervised_histogram": {"edges": [0, 0.25, 0.5, 0.75, 1.0], "counts": [400, 200, 100, 100]},
                "turns_histogram": {"edges": [1, 2, 3], "counts": [700, 100]},
            },
            "eval": {"documents": 90, "tokens": 8000, "supervised_tokens": 3000, "supervised_share": 0.375},
        },
        "labels": {"before": {"yes": 700, "no": 90}, "after": {"yes": 90, "no": 90}},
        "balance": {
            "yes": {"before": 700, "after": 90, "share_before": 0.886, "share_after": 0.5, "share_target": 0.5}
        },
        "mixing": {
            "chat": {"weight": 0.75, "requested": 0.75, "documents": 600.0, "tokens": 5e4, "share_documents": 0.74}
        },
        "duplicates": {
            "exact": {"documents": 40, "groups": 30, "policy": "drop"},
            "near": {
                "documents": 10,
                "groups": 5,
                "policy": "drop",
                "threshold": 0.8,
                "examples": [{"a": "c:1", "b": "c:9"}],
            },
        },
        "leakage": {"eval": {"exact": 1, "normalized": 2, "near": 3, "prompt": 4, "policy": "drop_train"}},
        "decontamination": {"gsm8k": {"documents": 3}, "mmlu": {"documents": 0}},
        "privacy": {
            "mode": "report",
            "preset": "general",
            "engine": "patterns",
            "documents_scanned": {"chat": 300, "web": 100},
            "documents_with_findings": {"chat": 21},
            "types": {"EMAIL": {"findings": 23, "documents": 21, "examples": ["j***@e***"]}},
        },
        "languages": {"en": 800, "de": 85, "fr": 3, "und": 2},
        "quality": {"mean_words": 81.5},
        "novelty": {"surprise": 4711},
        "samples": [
            {"where": "chat.jsonl:1", "pieces": [{"text": "ask", "learned": False}, {"text": "tell", "learned": True}]}
        ],
    }


class Checker(HTMLParser):
    """Nesting, and every tag, attribute and text of a page."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.stack, self.tags, self.attributes, self.texts, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.texts.append(data)


def checked(audit):
    """The page, after the checks that every page must pass."""
    text = page(audit)
    assert len(text.encode()) < MAX_BYTES
    found = Checker(text)
    assert len(found.ids) == len(set(found.ids)), "ids are unique"
    assert {value[1:] for _, name, value in found.attributes if name == "href"} <= set(found.ids)
    assert not {"script", "iframe", "img", "link", "object"} & set(found.tags)
    assert not [a for a in found.attributes if a[1].startswith("on") or a[1] in ("src", "xlink:href")]
    assert not re.search(r"https?://|url\(|@import", text)
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        root = ET.fromstring(drawing)
        assert root.get("role") == "img" and root.get("aria-label") and root[0].tag == "title"
        for node in root.iter():
            for name in ("x", "y", "width", "height", "x1", "x2", "y1", "y2", "cx", "cy", "d", "viewBox"):
                if name in node.attrib:
                    words = re.sub("[MLCZ,]", " ", node.attrib[name]).split()
                    assert all(math.isfinite(float(word)) for word in words), ET.tostring(node)
                    if name in ("width", "height"):
                        assert float(node.attrib[name]) >= 0
    return text, found


def test_every_part_of_the_audit_is_on_the_page():
    text, found = checked(example())
    words = " ".join(found.texts)
    for shown in (
        "89.0%", "890 of 1,000 rows", "32.8%", "not json", "chat.jsonl:7", "max_length 2,048", "p50 90", "CC-BY-4.0", "75.0%",
        "j***@e***", "23 in 21 documents", "gsm8k", "f00d" * 16, "81.5",
        "surprise", "4,711", "de", "data.over_length", "c:9", "drop_train", "learned share of a document",
    ):  # fmt: skip
        assert shown in words, shown
    assert "<mark>tell</mark>" in text and "<mark>ask" not in text
    assert {"flow", "splits", "sources", "labels", "duplicates", "leakage", "privacy", "samples"} <= set(found.ids)


def test_parts_may_be_missing_one_by_one_and_all_at_once():
    for name in example():
        checked({key: part for key, part in example().items() if key != name})
        checked({name: example()[name]})
    text, found = checked({})
    assert "Nothing was measured" in text and "section" not in found.tags


def poisoned(value, word):
    """Every text replaced by `word`, which also becomes a key of every table of numbers."""
    if isinstance(value, dict):
        counts = bool(value) and all(isinstance(inner, int) for inner in value.values())
        return {key: poisoned(inner, word) for key, inner in value.items()} | ({word: 3} if counts else {})
    if isinstance(value, list):
        return [poisoned(inner, word) for inner in value]
    return word if isinstance(value, str) else value


@pytest.mark.parametrize("word", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_shown_and_nothing_else(word):
    _, plain = checked(example())
    text, found = checked(poisoned(example(), word))
    assert set(found.tags) == set(plain.tags), "no tag came from the data"
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x0b-\x1f\ud800-\udfff]", text)
    card = datacard(poisoned(example(), word), CardConfig(licence=word, contact=word, title=word))
    card.encode()
    body = card.split("\n---\n", 1)[1]
    assert "<script" not in body and "<img" not in body and "\n# not a heading" not in body
    lengths = {
        len(re.findall(r"(?<!\\)\|", line)) for line in body.split("\n") if line.startswith("| split | documents")
    }
    for line in body.split("\n\n"):
        rows = [row for row in line.split("\n") if row.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1, "every row has as many cells"
    assert lengths


@pytest.mark.parametrize(
    "value", [0, 1, -5, 10**7, 10**400, math.nan, math.inf, -math.inf, None, "x", [], {}, True, 1e308]
)
def test_any_number_can_be_drawn(value):
    def replaced(part, key=""):
        if isinstance(part, dict):
            return {k: replaced(v, k) for k, v in part.items()}
        if isinstance(part, list):
            return [replaced(v) for v in part]
        return value if isinstance(part, int | float) and not isinstance(part, bool) else part

    checked(replaced(example()))
    datacard(replaced(example()), CardConfig()).encode()
    for name, part in example().items():
        checked({**example(), name: value})
        if isinstance(part, dict):
            checked({**example(), name: dict.fromkeys(part, value)})


def test_size_stays_bounded_and_what_is_left_out_is_said():
    audit = example()
    audit["words"] = {f"data.key_{n}": "v" * 900 for n in range(3000)}
    audit["labels"] = {"before": {f"label {n}": n for n in range(5000)}}
    audit["samples"] = [{"where": "a:1", "pieces": [{"text": "<" * 10**6, "learned": True}]}] * 50
    audit["sources"] = [{**audit["sources"][0], "name": f"source {n}"} for n in range(2000)]
    audit["unknown"] = {f"k{n}": {f"j{m}": {"deep": ["x" * 500] * 9} for m in range(50)} for n in range(50)}
    text, _ = checked(audit)
    assert "more, in audit.json" in text


def test_long_samples_keep_head_and_tail():
    pieces = [
        {"text": "a" * 4000, "learned": False},
        {"text": "b" * 4000, "learned": True},
        {"text": "END", "learned": False},
    ]
    text, _ = checked({"samples": [{"where": "f:1", "pieces": pieces}]})
    body = re.search(r"<pre[^>]*>(.*?)</pre>", text)[1]
    (left_out,) = re.findall(r"<b> … ([\d,]+) characters … </b>", body)
    shown = re.sub(r"<b>.*?</b>|<[^>]+>", "", body)
    assert len(shown) + int(left_out.replace(",", "")) == 8003 and shown.startswith("aaa") and shown.endswith("bEND")
    assert "<mark>b" in body and body.index("</b>") < body.index("<mark>")


def level_of(audit, what):
    (tile,) = (tile for tile in tiles(audit) if what in tile.what)
    return tile.level


def test_verdict_by_its_rules():
    def changed(**parts):
        audit = copy.deepcopy(example())
        for name, part in parts.items():
            audit[name] = {**audit[name], **part}
        return audit

    assert (
        level_of(example(), "Rows") is Level.look
        and level_of(changed(conserved={"kept": 990, "dropped": 10}), "Rows") is Level.good
    )
    assert level_of(changed(conserved={"kept": 880}), "Rows") is Level.act, "rows that are unaccounted for"
    assert level_of(example(), "Duplicates") is Level.good, "taken out"
    kept = {"near": {"documents": 60, "policy": "report"}}
    assert level_of(changed(duplicates=kept), "Duplicates") is Level.look
    assert level_of(changed(duplicates={"near": {"documents": 101}, "exact": {}}), "Duplicates") is Level.act
    assert level_of(example(), "Leakage") is Level.good
    assert level_of(changed(leakage={"eval": {"near": 1, "policy": "report"}}), "Leakage") is Level.act
    assert level_of(example(), "Personal") is Level.look
    assert level_of(changed(privacy={"mode": "redact"}), "Personal") is Level.good
    assert level_of(changed(privacy={"types": {"US_SSN": {"findings": 1}}}), "Personal") is Level.act
    assert (
        level_of(example(), "Quarantine") is Level.look
        and level_of(changed(quarantine={"rows": 0}), "Quarantine") is Level.good
    )
    assert level_of({"splits": {"train": {"supervised_share": 0.0}}}, "Learned") is Level.act
    assert overall(tiles(example()))[0] is Level.look
    assert overall(tiles(changed(leakage={"eval": {"near": 1}}))) == (Level.act, "Calls for action: leakage")


def test_flow_drawing_is_to_scale_and_counts_every_reason():
    root = ET.fromstring(flow(example()["flow"]))
    bars_drawn = [(float(node.get("width")), node.get("class")) for node in root.iter("rect")]
    kept = [width for width, style in bars_drawn if style == "kept"]
    assert np.allclose(kept, np.array([997, 950, 900, 890, 890]) / 1000 * 420, atol=0.1)
    words = [node.text for node in root.iter("text")]
    amounts = [int(re.match(r"\N{MINUS SIGN}(\d+)", word)[1]) for word in words if word.startswith("\N{MINUS SIGN}")]
    assert sum(amounts) == 3 + sum(range(2, 11)) + 50 + 10


def test_histogram_areas_and_marks():
    root = ET.fromstring(histogram([0, 10, 20, 30], [1, 4, 0], "t", "tokens", [Mark(15, "p50"), Mark(99, "outside")]))
    heights = [float(node.get("height")) for node in root.iter("rect")]
    assert len(heights) == 2 and heights[1] == pytest.approx(4 * heights[0], abs=0.3)
    (mark,) = (node for node in root.iter("line") if node.get("class") == "mark-line")
    (middle,) = (
        float(n.get("x")) + float(n.get("width")) / 2 for n in root.iter("rect") if n[0].text.startswith("10 to 20")
    )
    assert float(mark.get("x1")) == pytest.approx(middle, abs=1) and "outside" not in ET.tostring(root, "unicode")


def boxes(drawing):
    """(left, right, baseline) of every text, by the estimate that the layout itself is checked against."""
    for node in ET.fromstring(drawing).iter("text"):
        words, x = node.text or "", float(node.get("x"))
        width = text_width(words, 11 if node.get("class") in ("axis", "mark-text") else 12)
        left = {"end": x - width, "middle": x - width / 2}.get(node.get("text-anchor"), x)
        yield left, left + width, float(node.get("y"))


def test_texts_do_not_overlap():
    marks = [Mark(v, f"label {v}") for v in (100, 101, 102, 103, 2047)]
    drawings = [histogram([0, 1, 2, 4, 2000, 2048], [1] * 5, "t", "tokens", marks), flow(example()["flow"])]
    drawings.append(histogram(list(range(0, 2100, 50)), [3] * 41, "t", "tokens", marks))
    drawings.append(
        bars([Bar("x" * 90, [(1e6, "kept", "y" * 90), (1, "kept2", "z")])] * 3, "t", "d", legend=[("kept", "a")])
    )
    for drawing in drawings:
        found = list(boxes(drawing))
        for position, (left, right, y) in enumerate(found):
            assert left >= -2 and right <= 903
            for other_left, other_right, other_y in found[:position]:
                assert abs(y - other_y) >= 11 or right <= other_left + 1 or other_right <= left + 1


def test_scales_and_numbers():
    for low, high in ((0, 7), (0, 1), (-3.2, 4.4), (0, 123456), (5, 5.001), (0, 1e-7)):
        ticks = Scale(low, high, 0, 1).ticks(5)
        assert 2 <= len(ticks) <= 12 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
        assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])
    assert Scale(3, 3, 10, 20)(3) == 10 and Scale(0, 10, 0, 100)(25) == 100
    assert [coordinate(v) for v in (-0.0, 100, 0.25, -3.14159, math.nan, math.inf)] == [
        "0",
        "100",
        "0.2",
        "-3.1",
        "0",
        "0",
    ]
    assert [percent(v) for v in (0, 1e-6, 0.5, 0.99999, 1)] == ["0%", "<0.1%", "50.0%", ">99.9%", "100%"]
    assert [short(v) for v in (0, 999, 1500, 2_000_000)] == ["0", "999", "1.5k", "2M"]
    assert spread([(0, 10), (5, 15), (30, 40), (8, 12)]) == [0, 1, 0, 2]
    assert text_width(fit("漢字" * 100, 100)) <= 100 and fit("short", 100) == "short"
    assert "<svg" in forest([], "empty")


def test_card_answers_the_questions_and_keeps_paths_to_itself():
    card = datacard(example(), CardConfig(description="Chats.", licence="Our Own 1.0", languages=["en"]))
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    import yaml

    meta = yaml.safe_load(head)
    assert meta["license"] == "other" and meta["license_name"] == "Our Own 1.0" and meta["language"] == ["en"]
    assert meta["size_categories"] == ["n<1K"] and meta["task_categories"] == ["text-generation"]
    titles = re.findall("^## (.*)", body, re.MULTILINE)
    assert titles == [
        "Motivation", "Composition", "Collection", "Preprocessing and cleaning", "Personal data", "Splits and leakage",
        "Balance", "Uses", "Distribution and licence", "Maintenance", "Known gaps",
    ]  # fmt: skip
    assert "Chats." in body and "1,000 rows read = 890 kept + 110 dropped" in body and "chat.jsonl" in body
    assert "/home/someone" not in card and "secret-project" not in card
    assert datacard(example(), CardConfig(licence="Apache-2.0")).count('license: "apache-2.0"') == 1
    assert json.dumps("Fine-tuning data: chat, web") in card


def test_known_gaps_are_computed():
    gaps = known_gaps(example(), {"licence": "MIT", "description": "x"})
    assert "licence not stated for 1 source: web" in gaps
    assert "3 rows quarantined: listed in quarantine.jsonl, not in the data set" in gaps
    assert "PII scan covered 400 of 890 documents" in gaps
    assert "personal data found in 21 documents and left in" in gaps
    assert "5 documents truncated to data.max_length" in gaps
    assert not [gap for gap in gaps if "duplicate" in gap or "held-out" in gap or "motivation" in gap]
    audit = example()
    audit["leakage"]["eval"]["policy"] = audit["duplicates"]["near"]["policy"] = "report"
    gaps = known_gaps(audit, {})
    assert "10 training documents also in a held-out split, left there" in gaps
    assert any("left in" in gap and "duplicate" in gap for gap in gaps)
    everything = known_gaps({}, {})
    assert "not scanned for personal data" in everything and "duplicates were not looked for" in everything
    assert "licence not stated (data.card.licence)" in everything
    assert "None known." not in datacard({}, CardConfig())
