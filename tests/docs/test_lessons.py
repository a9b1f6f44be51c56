"""The lessons: each has the same parts, and its commands print what the page says."""

import re
import runpy

import pytest

from tests.helpers.covering import whole
from tests.helpers.launching import ROOT

LESSONS = ROOT / "docs" / "lessons"
MAKER = runpy.run_path(str(ROOT / "docs" / "make_lessons.py"))
PAGES = [LESSONS / f"{name}.md" for name in MAKER["names"]()]
FENCED = re.compile(r"^```\w*\n.*?^```$", re.MULTILINE | re.DOTALL)
ANSWER = re.compile(r"<details><summary>Answer</summary>\n\n(.*?)\n\n</details>", re.DOTALL)
MADE = re.compile(r"<!-- (output|begin experiment): [^\n]*-->\n.*?<!-- end -->\n", re.DOTALL)
"""What a script has written into the page; its lines and words are not counted."""
MAX_COMMANDS, MAX_WORDS, MAX_LINES, MAX_SENTENCE = 6, 900, 150, 25

each_lesson = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def prose(text: str) -> str:
    """A page without blocks, comments and addresses; code between backticks counts as one word."""
    text = re.sub(r"<!--.*?-->|<[^>]*>", "", FENCED.sub("", text), flags=re.DOTALL)
    return re.sub(r"`[^`]*`", "code", re.sub(r"\]\([^)]*\)", "]", text))


def sentences(text: str) -> list[str]:
    """Sentences of the prose. An item of a list and a cell of a table ends a sentence, too."""
    parts = []
    for paragraph in re.split(r"\n\s*\n|^\s*(?:- |\d+\. |#+ )", prose(text), flags=re.MULTILINE):
        cells = paragraph.split("|") if paragraph.lstrip().startswith("|") else [paragraph]
        for cell in cells:
            parts += re.split(r"(?<=[.?!:])[)*\"]*\s+", " ".join(cell.split()))
    return parts


def commands(text: str) -> int:
    """Commands that the lesson shows, without those of its answers."""
    number = 0
    for block in MAKER["blocks_of"](ANSWER.sub("", text)):
        if not block.mark.startswith("file: "):
            lines = block.text.replace("\\\n", " ").splitlines()
            number += len(list(filter(None, lines))) if block.language == "bash" else 1
    return number


def faults(text: str) -> list[str]:
    """What a lesson lacks or has too much of."""
    found = []
    required = {
        "a title": r"\A# Lesson \d+: \S",
        "what the reader can do afterwards": r"After this lesson you can:\n\n- ",
        "time and hardware": r"\*\*Time:\*\* \d+ minutes.*\*\*Hardware:\*\* ",
        "a picture": r"^!\[[^\]]{20,}\]\(\.\./",
        "a table": r"^\|[ :-]*-[ :|-]*\|$",
        "what comes next": r"^\*\*Next:\*\* \[",
    }
    for name, pattern in required.items():
        if not re.search(pattern, text, re.MULTILINE | re.DOTALL):
            found.append(f"no {name}")
    exercises = text.partition("\n## Exercises\n")[2]
    if len(re.findall(r"^\d\. ", exercises, re.MULTILINE)) != 3 or len(ANSWER.findall(exercises)) != 3:
        found.append("not three exercises with an answer each")
    if not 1 <= commands(text) <= MAX_COMMANDS:
        found.append(f"{commands(text)} commands")
    words = len(prose(MADE.sub("", text)).split())
    if words > MAX_WORDS:
        found.append(f"{words} words")
    lines = ANSWER.sub("", MADE.sub("", text)).count("\n")
    if lines > MAX_LINES:
        found.append(f"{lines} lines")
    for block in MAKER["blocks_of"](text):
        if not block.mark.startswith("file: ") and (block.output is None or not block.output.text.strip()):
            found.append(f"no output below line {block.line}")
    for sentence in sentences(MADE.sub("", text)):
        if len(sentence.split()) > MAX_SENTENCE:
            found.append(f"{len(sentence.split())} words: {sentence}")
    return found


@each_lesson
def test_a_lesson_has_its_parts(page):
    assert faults(page.read_text(encoding="utf-8")) == []


@each_lesson
def test_a_lesson_is_in_the_path_and_leads_on(page):
    number = PAGES.index(page)
    assert page.name in (LESSONS / "README.md").read_text(encoding="utf-8")
    following = re.findall(r"^\*\*Next:\*\* \[[^\]]*\]\(([^)]*)\)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(following) == 1
    if number + 1 < len(PAGES) and int(PAGES[number + 1].name[:2]) == int(page.name[:2]) + 1:
        assert following[0] == PAGES[number + 1].name


def test_the_path_stands_behind_the_door_of_the_readme():
    assert "(docs/lessons/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_lesson_without_a_part_is_found():
    text = PAGES[0].read_text(encoding="utf-8")
    assert faults(text.replace("</details>", "", 1)) == ["not three exercises with an answer each"]
    assert faults(text.replace("](../terminal.svg)", "](https://example.org/terminal.svg)")) == ["no a picture"]
    assert faults(text.replace("**Next:**", "Then:")) == ["no what comes next"]
    emptied = re.sub(r"(<!-- output: [^>]*-->\n)```text\n.*?```\n", r"\1", text, count=1, flags=re.DOTALL)
    assert len(faults(emptied)) == 1 and "no output below" in faults(emptied)[0]
    assert len(faults(text + "\n" + "word " * 26 + "\n")) == 1
    assert any(fault.endswith(" lines") for fault in faults(text + "\n" * 200))


TABLE = re.compile(r"^<!-- begin experiment: (\w+) -->\n\|.*?^<!-- end -->\n+(.*)", re.MULTILINE | re.DOTALL)


def unexplained(text: str) -> list[str]:
    """The experiments whose table no sentence follows. A table alone lets a reader conclude too much."""
    names = []
    while match := TABLE.search(text):
        text = match[2]
        if not re.match(r"[A-Z`*]", text):
            names.append(match[1])
    return names


@each_lesson
def test_a_sentence_says_what_the_table_of_an_experiment_shows(page):
    assert unexplained(page.read_text(encoding="utf-8")) == []


def test_a_table_without_a_sentence_is_found():
    table = "<!-- begin experiment: {} -->\n| a |\n<!-- end -->\n\n"
    empty = "<!-- begin experiment: later -->\n<!-- end -->\n\n"
    assert unexplained(table.format("x") + table.format("y") + "It shows.\n\n" + empty + "## Next\n") == ["x"]


@each_lesson
def test_a_lesson_installs_nothing_that_a_folder_of_its_own_does_not_have(page):
    """A reader stands in a folder of their own, where `-e .` finds no project. `make install` has brought all extras."""
    assert "pip install -e" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("recorded", "now", "same"),
    [
        ("eval/loss 2.3360", "eval/loss 2.3371", True),
        ("eval/loss 2.3360", "eval/loss 2.8360", False),
        ("eval/loss 2.3360", "eval/accuracy 2.3360", False),
        ("step 1/19 | lr 1.00e-03", "step 1/19 | lr 1.00e-04", False),
        ("214 tok/s | mem 1.6 GiB | eta 1 min 20 s", "98.5 tok/s | mem 2.1 GiB | eta 3 min 0 s", True),
        ("  total   1.93 GiB", "  total   3.93 GiB", False),
        ("wrote /home/a/x/audit.html", "wrote ~/.cache/y/audit.html", True),
        ("wrote runs/first", "wrote runs/second", False),
        ("44 documents", "45 documents", True),
        ("5,838 tokens", "8,838 tokens", False),
        ("differ by at most 0.00e+00", "differ by at most 3.20e-06", False),
        ("p 0.01", "p 0.02", True),  # two units of the last digit
        ("one line", "one line\nand another", False),
    ],
)
def test_outputs_are_compared_by_words_and_numbers(recorded, now, same):
    assert (MAKER["differences"](recorded, now) == []) is same


def test_lines_whose_words_may_differ_are_named():
    before = "base: This is\ntuned: Pain.\nloss 1.0"
    after = "base: It is\ntuned: Pains.\nloss 1.0"
    assert MAKER["differences"](before, after, free=("^(base|tuned): ",)) == []
    assert len(MAKER["differences"](before, after, free=("^base: ",))) == 1


def test_an_output_is_shortened_and_recorded():
    page = "<!-- run -->\n```bash\nx\n```\n\n<!-- output: x; show: ^b +1; ^e; free: ^e -->\n<!-- end -->\nafter\n"
    [block] = MAKER["blocks_of"](page)
    assert (block.output.show, block.output.free) == (("^b +1", "^e"), ("^e",))
    assert MAKER["shortened"]("a\nb\nc\nd\ne", block.output.show) == "b\nc\n...\ne"
    with pytest.raises(ValueError, match="no line has"):
        MAKER["shortened"]("a", ("^b",))
    written = MAKER["recorded"](page, {"x": "b\nc"})
    assert written == page.replace("<!-- end -->", "```text\nb\nc\n```\n<!-- end -->")
    [again] = MAKER["blocks_of"](written)
    assert again.output.text == "b\nc\n"
    assert MAKER["recorded"](written, {"x": "b"}).count("```text") == 1


NEEDS = {"06-small-hardware": "bitsandbytes", "10-responsible": "presidio_analyzer"}
"""Packages of extras without which the commands of a lesson cannot run."""


@whole("the demo's model, minutes a lesson, and 113 MB the first time")
@each_lesson
def test_the_commands_of_a_lesson_print_what_it_says(page):
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    assert MAKER["main"](["--check", page.stem]) == 0
