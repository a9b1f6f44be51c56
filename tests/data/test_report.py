"""The audit page, the data card and the terminal, all made of what a real preparation wrote."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml

from launch.prepare import command as verb
from strategies.errors import DataError
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import chat_rows, tiny_tokenizer, write_jsonl
from trainer.data.config import (
    BalanceBy,
    BalanceConfig,
    BalanceTarget,
    CardConfig,
    DataConfig,
    DuplicatePolicy,
    DuplicatesConfig,
    LeakageConfig,
    LeakagePolicy,
    OverLength,
    PrivacyConfig,
    PrivacyMode,
    SourceConfig,
)
from trainer.data.objective_spec import DataSpec
from trainer.data.prepare import Preparation
from trainer.data.report.audit import Audit
from trainer.data.report.pages import audit_page_html, datacard_text
from trainer.data.report.preview import summary_text
from trainer.data.report.wording import Severity, audit_tiles, known_gaps, overall_verdict
from trainer.data.store.documents import DocumentTable
from trainer.objectives.classification import LabelDataSpec
from trainer.objectives.pairs import PairDataSpec
from trainer.pages.numbers import format_percent

ROOT = Path(__file__).parents[2]
VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = [
    '<script>alert("x")</script>',
    "\"><img src=x onerror='y'>",
    "</pre></section></body>",
    "&lt;b&gt; &amp; {{ 7 * 7 }} {% raw %}",
    "\u202eevil\u202c",
    "\x1b[31m\x07",
    "مرحبا بالعالم",
    "`| **x** |\n# not a heading\n[a](javascript:b)",
]


def prepare(tmp_path, rows=None, *, tokenizer=None, data_spec=None, **settings):
    """A real preparation of `rows`: its directory, its report and its audit."""
    if rows is not None:
        settings["path"] = str(write_jsonl(tmp_path / "train.jsonl", rows))
    config = DataConfig(cache_dir=str(tmp_path / "cache"), **settings)
    made = Preparation(config, tokenizer or tiny_tokenizer(), data_spec or DataSpec(), seed=1).open_or_prepare()
    return made, Audit.read(made.directory)


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

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.texts.append(data)


def words_of(text):
    """What a reader of the page sees, on one line; after the checks that every page must pass."""
    found = Checker(text)
    assert len(text.encode()) < 400_000
    assert len(found.ids) == len(set(found.ids)), "ids are unique"
    assert {value[1:] for tag, name, value in found.attributes if (tag, name) == ("a", "href")} <= set(found.ids)
    assert not {"iframe", "img", "object"} & set(found.tags)
    assert found.tags.count("script") == found.tags.count("link") == 1, "the shared script, and an icon that is empty"
    assert not [a for a in found.attributes if a[1].startswith("on") or a[1] in ("src", "xlink:href")]
    assert not re.search(r"https?://|url\(|@import", text)
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x0b-\x1f\ud800-\udfff]", text)
    for share in re.findall(
        r"(?:width|height):([-.\d]+|[^-.\d]\w*)%", re.sub("<style>.*</style>", "", text, flags=re.S)
    ):
        assert 0 <= float(share) <= 100
    return " ".join(" ".join(found.texts).split())


def read(directory):
    """The words of the page that preparation wrote, and the card."""
    return words_of((directory / "audit.html").read_text()), (directory / "datacard.md").read_text()


def test_report_on_terminal_page_and_card_has_the_same_leaks(tmp_path, monkeypatch, capsys):
    # Found: page, verdict and card said "Leakage 0" whatever leaked; they looked for keys that nobody writes.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    tiny_tokenizer().save_pretrained(tiny_model_dir(tmp_path / "model", vocab_size=384))
    rows = chat_rows(200)
    files = write_jsonl(tmp_path / "train.jsonl", rows), write_jsonl(tmp_path / "eval.jsonl", rows[:100])
    places = [f"model.path={tmp_path / 'model'}", f"data.cache_dir={tmp_path / 'cache'}"]
    assert verb.main([*places, f"data.path={files[0]}", f"data.eval_path={files[1]}"]) == 0
    out = capsys.readouterr().out
    assert "leakage: 100 training documents are in the eval split too" in out
    directory = Path(re.search("prepared: (.*)", out)[1])
    shown, card = read(directory)
    assert "Calls for action: leakage" in shown and "Leakage 100 training documents are in eval too" in shown
    assert "100 training documents are in the eval split too (policy: report)" in shown
    assert f"{files[0]}:1 = {files[1]}:1" in shown
    assert "| eval | 100 | 0 | 0 | 0 | report |" in card and "leakage: 100 training documents are in eval too" in card
    dropped = [*places, f"data.path={files[0]}", f"data.eval_path={files[1]}", "data.leakage.policy=drop_train"]
    assert verb.main(dropped) == 0
    out = capsys.readouterr().out
    assert out.startswith("rows: 300 rows read = 200 kept + 100 dropped (33.3% lost)")
    shown, card = read(Path(re.search("prepared: (.*)", out)[1]))
    assert "Leakage 100 taken out of training" in shown and "| eval | 100 | 0 | 0 | 0 | drop_train |" in card.replace(
        "\\", ""
    )


def test_report_distinguishes_a_shared_prompt_from_a_leak(tmp_path):
    rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(20)]
    other = [{"prompt": f"question {n}", "completion": "another one"} for n in range(5)]
    path = str(write_jsonl(tmp_path / "eval.jsonl", other))
    made, audit = prepare(tmp_path, rows, eval_path=path)
    assert audit.leakage["eval"].train["prompt"] == 5 and audit.leakage["eval"].num_leaked == 0
    assert "5 training documents have a prompt of the eval split, with another answer or system turn" in summary_text(
        made.report
    )
    shown, card = read(made.directory)
    assert "near (not looked for) 0" in shown and "near leaks were not looked for" in card
    assert severity_of(audit, "Leakage") is Severity.warning and "no shared document; 5 prompts shared" in shown


def test_report_shows_lost_rows_in_its_first_lines(tmp_path):
    # Found: 13 of 44 documents went in one quiet line.
    rows = (
        chat_rows(31)
        + [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "fox " * 400}]}] * 13
    )
    made, audit = prepare(tmp_path, rows, max_length=200, over_length=OverLength.drop)
    first, *_ = summary_text(made.report).split("\n")
    assert first == "rows: 44 rows read = 31 kept + 13 dropped (29.5% lost)"
    shown, card = read(made.directory)
    head = shown[: shown.index("What is learned")]
    assert "44 rows read = 31 kept + 13 dropped: 29.5% of the rows are lost" in head
    assert "13 of 44 rows; most: longer than data.max_length (13)" in head and "raise data.max_length" in head
    assert severity_of(audit, "Rows") is Severity.critical and "Calls for action: rows lost" in head
    assert f"{tmp_path / 'train.jsonl'}:32" in shown and "44 rows read = 31 kept + 13 dropped (29.5%)" in card


def everything(tmp_path, **settings):
    """Two weighted sources, an evaluation split, copies, personal data, a long document, bad rows."""
    chat = chat_rows(60)
    chat[3]["messages"][0]["content"] += " write to jane.doe@clinic-mail.org"
    chat += [*chat[10:14], {"messages": [{"role": "user", "content": "x"}]}]
    chat.append({"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "lazy dog " * 300}]})
    facts = [{"prompt": f"what is {n} ?", "completion": f"it is {n} over the lazy dog"} for n in range(20)]
    sources = {
        "chat": SourceConfig(path=str(write_jsonl(tmp_path / "chat.jsonl", chat)), weight=0.75, licence="CC-BY-4.0"),
        "facts": SourceConfig(path=str(write_jsonl(tmp_path / "facts.jsonl", facts)), weight=0.25),
    }
    given = {"sources": sources, "eval_share": 0.1, "languages": True, "max_length": 256, "max_bad_share": 0.1}
    return prepare(tmp_path, duplicates=DuplicatesConfig(exact=DuplicatePolicy.drop), **{**given, **settings})


def test_report_page_has_everything_that_was_counted(tmp_path):
    made, audit = everything(tmp_path)
    shown, _ = read(made.directory)
    train = made.train
    lengths, rows = train.lengths, audit.conserved
    assert rows == {"rows_in": 86, "kept": 81, "dropped": 5}
    for words in (
        "86 rows read = 81 kept + 5 dropped", format_percent(5 / 86), "no assistant turn", f"{tmp_path / 'chat.jsonl'}:65",
        f"{int(lengths.sum()):,}", format_percent(train.num_supervised.sum() / lengths.sum()), "truncated: 1 document",
        f"{int(np.quantile(lengths, 0.5).round()):,}", "data.max_length=256", "CC-BY-4.0", "not stated", "75.0%",
        "Personal data 1 documents with findings", f"{tmp_path / 'chat.jsonl'}:4 j***@c***.org", "EMAIL",
        "people and places were not looked for", "Duplicates 4 taken out", "Leakage 0 no held-out document",
        audit.fingerprint, "data.over_length", "quarantine.jsonl", "Judged on", "not stated: who answers questions",
        f"{tmp_path / 'chat.jsonl'}:61 = {tmp_path / 'chat.jsonl'}:11", audit.sources[0].files[0].sha256,
    ):  # fmt: skip
        assert words in shown, words
    text = (made.directory / "audit.html").read_text()
    marked = "".join(re.findall("<mark>(.*?)</mark>", text.split('id="rows"')[0]))
    assert "&lt;|im_end|&gt;" in marked and "&lt;|im_start|&gt;" not in marked, "answers are learned, questions are not"


def test_report_histograms_count_every_sequence_and_gather_the_longest(tmp_path):
    made, audit = everything(tmp_path)
    for found, values in (
        (audit.splits["train"].length_histogram, made.train.lengths),
        (audit.splits["train"].supervised_histogram, made.train.num_supervised / made.train.lengths),
        (audit.splits["eval"].length_histogram, made.evaluation.lengths),
    ):
        edges = np.array(found.edges)
        assert sum(found.counts) == len(values) and len(edges) == len(found.counts) + 1 <= 27
        inside = [int(((values >= a) & (values < b)).sum()) for a, b in pairwise(edges)]
        inside[-1] += int((values == edges[-1]).sum())
        assert found.counts == inside
    long = audit.splits["train"].length_histogram
    assert long.edges[-1] == 257 and long.edges[-2] < 150 and long.counts[-1] == 1
    text = (made.directory / "audit.html").read_text()
    assert f'class="tail" style="height:{100 / max(long.counts):.1f}%"' in text and "<span>105 to 256</span>" in text


@pytest.mark.parametrize("word", HOSTILE, ids=range(len(HOSTILE)))
def test_report_shows_hostile_text_and_obeys_none_of_it(tmp_path, word):
    def made(name, word):
        rows = [{"text": f"a lazy dog {n} {word}", "label": f"{n % 2} {word}"} for n in range(12)]
        (tmp_path / name).mkdir()
        name = name + re.sub(r"[/\x00-\x1f]", "", word)
        (tmp_path / name).mkdir(exist_ok=True)
        source = SourceConfig(path=str(write_jsonl(tmp_path / name / f"{name}.jsonl", rows)), licence=word)
        card = CardConfig(licence=word, contact=word, title=word)
        sources = {f"x{word}": source}
        made, _ = prepare(tmp_path / name, sources=sources, card=card, tokenizer=tiny_tokenizer(None))
        return made.directory

    plain = "word\x07" if "\x07" in word else "word"  # noted in either, so that both pages have as many lines
    plain, hostile = made("plain", plain), made("hostile", word)
    words_of((hostile / "audit.html").read_text())
    tags = [Checker((directory / "audit.html").read_text()).tags for directory in (plain, hostile)]
    assert tags[0] == tags[1], "no tag came from the data"
    if word.startswith("<script"):
        assert "a lazy dog 0 <script>" in words_of((hostile / "audit.html").read_text())
    front, body = (hostile / "datacard.md").read_text().removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["license"] == "other"
    assert "<script" not in body and "<img" not in body and "\n# not a heading" not in body and "\x1b" not in body
    for block in body.split("\n\n"):
        rows = [row for row in block.split("\n") if row.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1, "every row has as many cells"


def test_report_cuts_lists_and_texts_and_says_what_is_left_out(tmp_path):
    rows = [{"text": f"fox {n} " + "dog " * 30, "label": f"label {n} " + "w" * 300} for n in range(300)]
    rows.append({"text": "<&" * 4000, "label": "label 0"})
    made, _ = prepare(tmp_path, rows, tokenizer=tiny_tokenizer(None), max_length=20000)
    shown, card = read(made.directory)
    assert "… and 261 more, in audit.json" in shown and "and 251 more labels, in audit.json" in card
    assert "characters)" in shown
    body = re.findall("<pre[^>]*>(.*?)</pre>", (made.directory / "audit.html").read_text(), re.DOTALL)[-1]
    (left_out,) = re.findall(r"<b>… ([\d,]+) characters …</b>", body)
    kept = re.sub("<b>.*?</b>|</?mark>", "", body).replace("&lt;", "<").replace("&amp;", "&")
    assert len(kept) == 3000 and len(kept) + int(left_out.replace(",", "")) >= 8000 and kept.startswith("<&<&")


def severity_of(audit, what):
    (tile,) = (tile for tile in audit_tiles(audit) if what in tile.title)
    return tile.severity


def test_report_verdict_by_its_rules(tmp_path):
    _, audit = everything(tmp_path)
    assert [tile.severity for tile in audit_tiles(audit)] == [
        Severity.warning,
        Severity.good,
        Severity.warning,
        Severity.good,
        Severity.good,
        Severity.warning,
    ]
    assert overall_verdict(audit_tiles(audit)) == (
        Severity.warning,
        "Worth a look: rows lost, truncated, personal data",
    )
    _, kept = everything(tmp_path, eval_share=0.0, max_bad_share=0.02, max_length=4096)
    assert severity_of(kept, "Truncated") is Severity.good and severity_of(kept, "Leakage") is Severity.not_measured
    _, cut = everything(tmp_path, max_length=24, max_bad_share=1.0)
    assert severity_of(cut, "Truncated") is Severity.critical
    _, redacted = everything(tmp_path, privacy=PrivacyConfig(mode=PrivacyMode.redact))
    assert severity_of(redacted, "Personal") is Severity.good
    _, unseen = everything(tmp_path, privacy=PrivacyConfig(mode=PrivacyMode.none))
    assert severity_of(unseen, "Personal") is Severity.not_measured
    rows = chat_rows(40)
    rows[0]["messages"][0]["content"] += " my card is 4111 1111 1111 1111"
    _, grave = prepare(tmp_path, rows + rows[:9])
    assert severity_of(grave, "Personal") is Severity.critical and severity_of(grave, "Duplicates") is Severity.critical
    _, copied = prepare(tmp_path, rows[1:] + rows[1:3])
    assert severity_of(copied, "Duplicates") is Severity.warning
    assert overall_verdict(audit_tiles(prepare(tmp_path, rows[1:])[1])) == (Severity.good, "Nothing stands out")


def test_report_warns_if_few_documents_teach_where_to_stop(tmp_path):
    rows = chat_rows(40)
    prepared, audit = prepare(tmp_path, rows)
    assert audit.splits["train"].ends_supervised == 40 and severity_of(audit, "Learned") is Severity.good
    assert "where to stop" not in summary_text(prepared.report)
    # Each answer is longer than `max_length`, so that its end is cut off.
    prompt_and_answer = [{"prompt": row["messages"][0]["content"], "completion": "many words " * 60} for row in rows]
    prepared, audit = prepare(tmp_path, prompt_and_answer, max_length=64, over_length=OverLength.truncate)
    train = audit.splits["train"]
    assert train.ends_supervised < train.documents / 2 and train.supervised_tokens > 0
    assert severity_of(audit, "Learned") is Severity.warning
    assert (
        f"only {train.ends_supervised} of {train.documents} documents teach where to stop"
        in read(prepared.directory)[0]
    )
    assert "warning: fewer than half of the documents teach the model where to stop" in summary_text(prepared.report)


def test_report_says_what_was_not_searched_for(tmp_path):
    none = DuplicatesConfig(exact=DuplicatePolicy.none, normalized=DuplicatePolicy.none)
    made, _ = prepare(tmp_path, chat_rows(9), privacy=PrivacyConfig(mode=PrivacyMode.none), duplicates=none)
    shown, card = read(made.directory)
    for words in ("Duplicates were not looked for", "Personal data was not looked for", "There is no held-out split"):
        assert words in shown
    for words in (
        "The texts were not searched for personal data", "Duplicates were not looked for", "There is no held-out split",
        "- personal data was not looked for", "- there is no evaluation split", "- languages neither stated nor detected",
    ):  # fmt: skip
        assert words in card, words
    privacy = PrivacyConfig(scan_documents=4)
    made, audit = prepare(tmp_path, chat_rows(9), privacy=privacy)
    shown, card = read(made.directory)
    assert "looked for in 4 of 9 documents" in shown and "looked for in 4 of 9 documents" in card
    assert "organisations were not looked for: only what has a pattern" in shown
    assert "organisations were not looked for." in card and "organisations were not looked for (data.privacy" in card
    looked_for = [*audit.privacy.looked_for, "PERSON"]
    named = replace(audit, privacy=replace(audit.privacy, looked_for=looked_for))
    assert "organisations were looked for" in words_of(audit_page_html(named, CardConfig()))
    assert "organisations were looked for" in datacard_text(named, CardConfig())
    assert not [gap for gap in known_gaps(named, CardConfig()) if "organisations" in gap]


def test_report_names_unread_columns_once_a_source(tmp_path):
    made, audit = prepare(tmp_path, [{**row, "score": 1, "an<b>notator\x1b": "x"} for row in chat_rows(9)])
    assert audit.unread_columns == {"data": ["score", "an<b>notator\x1b"]}
    assert "unused columns of data: score, an<b>notator\\x1b" in summary_text(made.report)
    shown, card = read(made.directory)
    assert "Unused columns of data: score , an<b>notator" in shown
    assert "score, an&lt;b&gt;notator\\\\x1b |" in card and "unused columns of data" in card
    made, _ = prepare(tmp_path, chat_rows(10))
    assert "nobody read" not in summary_text(made.report) and "nobody read:" not in read(made.directory)[0]


def test_report_samples_say_which_answer_is_wanted(tmp_path, capsys):
    """A mark alone would make a rejected answer look as if it were taught."""
    rows = [{"prompt": f"a fox {i}", "chosen": f"a dog {i}", "rejected": "quick"} for i in range(9)]
    made, audit = prepare(tmp_path, rows, data_spec=PairDataSpec())
    assert [sample.note for sample in audit.samples] == ["chosen", "rejected"] * 5
    taught = ["".join(piece["text"] for piece in sample.pieces if piece["learned"]) for sample in audit.samples]
    assert all(("quick" in text) == (n % 2 == 1) for n, text in enumerate(taught)), taught
    shown = words_of(audit_page_html(audit, CardConfig()))
    assert "train.jsonl:1 · rejected" in shown and "is learned, as what is said above it; the rest is context" in shown
    verb.print_audit(audit.report(), made.directory, PrivacyConfig(), 2, cached=False)
    said = capsys.readouterr().out
    assert "train.jsonl:1 · chosen:" in said and "train.jsonl:1 · rejected:" in said and "train.jsonl:3" not in said


def test_report_numbers_the_rows_of_a_list_on_one_line(tmp_path, capsys):
    """Their line is the same for all. A row with a line of its own is named by that, and stored tables have no numbers."""
    rows = [{"prompt": f"a fox {i}", "completion": "a dog"} for i in range(6)]
    rows[1] = {"prompt": "", "completion": "a dog"}
    rows[4] = rows[2]
    rows[3] = {"prompt": "write to jane@example.com", "completion": "a dog"}
    text = json.dumps(rows[:5]).removesuffix("]") + ",\n" + json.dumps(rows[5]) + "]"
    file = tmp_path / "list.json"
    file.write_text(text)
    made, audit = prepare(tmp_path, path=str(file), max_bad_share=0.5)
    assert audit.duplicates["exact"].examples == [{"a": f"{file}:1 (row 3)", "b": f"{file}:1 (row 5)"}]
    assert audit.privacy.types["EMAIL"].examples[0].startswith(f"{file}:1 (row 4) j***")
    (dropped,) = map(json.loads, (made.directory / "dropped.jsonl").read_text().splitlines())
    assert dropped["where"] == f"{file}:1 (row 2)"
    (bad,) = map(json.loads, (made.directory / "quarantine.jsonl").read_text().splitlines())
    assert (bad["line"], bad["row_number"]) == (1, 2)
    places = [sample.where for sample in audit.samples]
    assert places == [f"{file}:1 (row {n})" for n in (1, 3, 4, 5)] + [f"{file}:2"]
    assert DocumentTable(made.directory).document(0).location == f"{file}:1"
    verb.print_audit(audit.report(), made.directory, PrivacyConfig(), 1, cached=False)
    assert capsys.readouterr().out.count("a fox") == 1, "one document is shown"
    with pytest.raises(DataError, match=r"list\.json:1 \(row 2\): "):
        prepare(tmp_path / "strict", path=str(file))


def test_report_of_labels_and_balance(tmp_path):
    rows = [{"text": f"a lazy dog {i}", "label": "many" if i % 5 else "few"} for i in range(50)]
    balance = BalanceConfig(by=BalanceBy.label, target=BalanceTarget.uniform, max_repeats=10)
    made, audit = prepare(tmp_path, rows, tokenizer=tiny_tokenizer(None), balance=balance, data_spec=LabelDataSpec())
    shown, card = read(made.directory)
    after = audit.labels["after"]
    assert f"many 40 {after['many']}" in shown and f"| few | 10 | {after['few']} |" in card
    assert (
        f"few {format_percent(0.2)}" in shown
        and f"({made.label_names[made.train.labels[0]]})" in audit.samples[0].note in shown
    )
    assert "one label a document" in shown and yaml.safe_load(card.split("---\n")[1])["task_categories"] == [
        "text-classification"
    ]


def test_report_page_is_made_of_the_audit_file_and_refuses_another_form(tmp_path):
    leaking = str(write_jsonl(tmp_path / "eval.jsonl", chat_rows(20)[:5]))
    made, audit = prepare(
        tmp_path, chat_rows(20), eval_path=leaking, leakage=LeakageConfig(policy=LeakagePolicy.report)
    )
    path = made.directory / "audit.json"
    told = json.loads(path.read_text())
    assert asdict(audit) == told
    told["leakage"]["eval"]["train"]["exact"] = 17
    path.write_text(json.dumps(told))
    assert "Leakage 17" in words_of(audit_page_html(Audit.read(made.directory), CardConfig()))

    def refused(change, place):
        broken = json.loads(json.dumps(told))
        change(broken)
        path.write_text(json.dumps(broken))
        with pytest.raises(DataError, match=re.escape(f"audit.json: {place}")):
            Audit.read(made.directory)

    refused(lambda a: a.pop("leakage"), "leakage: Field required")
    refused(lambda a: a["leakage"]["eval"].pop("train"), "leakage.eval.train")
    refused(lambda a: a["leakage"]["eval"].update(near=3), "leakage.eval.near")
    refused(lambda a: a["splits"]["train"].update(tokens="12"), "splits.train.tokens")
    refused(lambda a: a.update(bias={}), "bias")


def test_report_card_answers_the_questions_and_shows_no_paths(tmp_path):
    stated = CardConfig(description="Chats.", licence="Our Own 1.0", languages=["en"])
    made, audit = everything(tmp_path, card=stated)
    card = (made.directory / "datacard.md").read_text()
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    meta = yaml.safe_load(head)
    assert meta["license"] == "other" and meta["license_name"] == "Our Own 1.0" and meta["language"] == ["en"]
    assert meta["size_categories"] == ["n<1K"] and meta["task_categories"] == ["text-generation"]
    assert meta["pretty_name"] == "Fine-tuning data: chat, facts" and meta["tags"] == ["shardtune", "fine-tuning"]
    assert re.findall("^## (.*)", body, re.MULTILINE) == [
        "Motivation", "Composition", "Collection", "Preprocessing and cleaning", "Personal data", "Splits and leakage",
        "Balance", "Uses", "Distribution and licence", "Maintenance", "Known gaps",
    ]  # fmt: skip
    assert "Chats." in body and "86 rows read = 81 kept + 5 dropped" in body and "chat.jsonl" in body
    assert "| read | 86 | 85 | no assistant turn 1 |" in body and "truncated to data.max\\_length 1" in body
    assert str(tmp_path) not in card and "motivation" not in " ".join(known_gaps(audit, stated)).lower()
    assert datacard_text(audit, CardConfig(licence="Apache-2.0")).count("license: apache-2.0") == 1


def test_report_rounds_shares_honestly():
    assert [format_percent(v) for v in (0, 1e-6, 0.5, 0.99999, 1)] == ["0%", "<0.1%", "50.0%", ">99.9%", "100%"]


def test_report_templates_are_packaged(tmp_path):
    code = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(code, cwd=ROOT, check=True, capture_output=True)
    built, here = tmp_path / "trainer/data/report", ROOT / "trainer/data/report"
    assert {path.name for path in built.iterdir()} == {path.name for path in here.iterdir() if path.is_file()}
