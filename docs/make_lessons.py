"""Records what the commands of the lessons print, and checks that they still print it.

    python docs/make_lessons.py 05-workflow            # run its commands, write their outputs into the page
    python docs/make_lessons.py --check 05-workflow    # run them again and compare; exit code 1 if they differ
    python docs/make_lessons.py                        # every lesson
    python docs/make_lessons.py --scratch /tmp/lessons 05-workflow    # keep the directory; go on there after an interruption

Each lesson has a scratch directory, in which its marked blocks (docs/marked_blocks.py) run from top to bottom; those that say
`run tiny` are left out. What a run has printed is recorded below it:

    <!-- output: NAME -->            between this line and `<!-- end -->` stands what the run above it has printed

An output may be shortened, and parts of it may differ from machine to machine:

    <!-- output: NAME; show: ^step 1/; ^evaluation +2; free: ^note -->

`show` keeps the lines in which a pattern is found; `+2` keeps two lines after them too. `free` names the lines whose words may
differ, such as an answer that a model wrote. Everything else must be the same in a check, and numbers nearly so (`TOLERANCE`).
Times, speeds, paths and used memory may differ in every line (`MACHINE`).

`<!-- after: 05-workflow -->` on a page runs the blocks of that lesson first, in the same directory.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from marked_blocks import MarkedBlock, marked_blocks  # noqa: E402

from strategies.cache_dir import VARIABLE, cache_directory  # noqa: E402

LESSONS = ROOT / "docs" / "lessons"
OUTPUT = re.compile(
    r"<!-- output: (?P<name>[\w-]+)(?P<options>(?:; (?:show|free): .*?)*) -->\n(?P<text>.*?)<!-- end -->", re.S
)
AFTER = re.compile(r"^<!-- after: (\S+) -->$", re.MULTILINE)
CACHED = ("models", "demo", "judge", "files", "wheels")
"""Folders of the cache that lessons may use as they are. Prepared data is made anew in each lesson."""
HOME = ".home"
"""Folder of a scratch directory that its commands take for the home directory."""
OMITTED = "..."
"""Stands for lines that `show` leaves out."""
WIDTH = "100"
"""Columns of the terminal that commands see."""
TOLERANCE = 0.05
"""Largest relative difference of two numbers that count as the same."""
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
DURATION = r"\d[\d.,]* ?(?:ms|s|min|h|seconds|minutes|hours)\b"
MACHINE = (
    re.compile(r"(?<![\w.])~?(?:/[\w.@+-]+){2,}/?"),  # absolute paths
    re.compile(r"\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d)?)?Z?|\b\d{8}-\d{6}\b"),  # dates
    re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{7,64}\b"),  # identities and commits
    re.compile(rf"{DURATION}(?: {DURATION})*"),
    re.compile(r"\d[\d.,]* (?:tok/s|tokens/s|documents/s|rows/s)"),
    re.compile(r"\bmem \d[\d.]* [KMG]iB|\d[\d.]* [KMG]iB free"),
    re.compile(r"\b\d+ (?:CPU )?(?:cores|CPUs|threads)\b"),
    re.compile(r"\b\d+\.\d+\.\d+\S*"),  # versions
)
"""What tells of a machine or a moment, and not of the training."""


@dataclass(frozen=True)
class Output:
    """The place of an output in a page."""

    name: str
    show: tuple[str, ...]
    """Patterns of the lines that are kept; none: all lines."""
    free: tuple[str, ...]
    """Patterns of the lines whose words may differ."""
    text: str
    """What was recorded, without the fence."""
    start: int
    """Position in the page where the recorded text begins, fence included."""
    stop: int


@dataclass(frozen=True)
class LessonBlock(MarkedBlock):
    """A marked block of a lesson."""

    output: Output | None
    """Where what it prints is recorded."""


def blocks_of(page: str) -> list[LessonBlock]:
    """The marked blocks of a lesson, each with the output that stands between it and the next marked block."""
    marked = marked_blocks(page)
    ends = [block.start for block in marked[1:]] + [len(page)]
    blocks = []
    for block, end in zip(marked, ends, strict=True):
        if block.mark == "run tiny":
            continue
        found = OUTPUT.search(page, block.stop, end)
        output = output_of(found) if found else None
        blocks.append(LessonBlock(**vars(block), output=output))
    return blocks


def output_of(match: re.Match[str]) -> Output:
    """The output of a match of `OUTPUT`. Each word after `show:` and `free:` that a semicolon ends is a pattern."""
    options: dict[str, list[str]] = {"show": [], "free": []}
    kind = "show"
    for part in filter(None, match["options"].split("; ")):
        named = re.match(r"(show|free): (.*)", part)
        if named:
            kind, part = named[1], named[2]
        options[kind].append(part)
    text = re.sub(r"^```\w*\n|^```$\n?", "", match["text"], flags=re.MULTILINE)
    span = match.span("text")
    return Output(match["name"], tuple(options["show"]), tuple(options["free"]), text, *span)


def shortened(text: str, show: tuple[str, ...]) -> str:
    """The lines that `show` keeps, with `OMITTED` for the others. ValueError if a pattern is found in no line."""
    lines = text.splitlines()
    if not show:
        return "\n".join(lines)
    kept: set[int] = set()
    for words in show:
        pattern, _, more = words.partition(" +")
        found = [index for index, line in enumerate(lines) if re.search(pattern, line)]
        if not found:
            raise ValueError(f"no line has {pattern!r}:\n{text}")
        for index in found:
            kept |= set(range(index, min(index + int(more or 0) + 1, len(lines))))
    shown: list[str] = []
    for index, line in enumerate(lines):
        if index in kept:
            shown.append(line)
        elif shown and shown[-1] != OMITTED:
            shown.append(OMITTED)
    return "\n".join(shown)


def run_lesson(name: str, scratch: Path) -> dict[str, str]:
    """What each recorded output of a lesson is now, by its name. Runs the blocks of the lesson before it, if it names one.

    RuntimeError if a command fails.
    """
    page = (LESSONS / f"{name}.md").read_text(encoding="utf-8")
    earlier = AFTER.search(page)
    if earlier:
        run_lesson(earlier[1], scratch)
    outputs = {}
    for block in blocks_of(page):
        if block.file is not None:
            (scratch / block.file).write_text(block.text, encoding="utf-8")
            continue
        kept = scratch / HOME / "printed" / hashlib.sha256(f"{name} {block.text}".encode()).hexdigest()[:16]
        if not kept.exists():
            print(f"{name}.md:{block.line}: {block.text.splitlines()[0]}", flush=True)
            printed = run_block(block, name, scratch)
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(printed, encoding="utf-8")
        if block.output is not None:
            outputs[block.output.name] = shortened(kept.read_text(encoding="utf-8"), block.output.show)
    return outputs


def run_block(block: LessonBlock, name: str, scratch: Path) -> str:
    """What a block prints, with a reader's paths. RuntimeError if it fails."""
    program = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
    done = subprocess.run(
        [*program, block.text],
        cwd=scratch,
        env=environment(scratch),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    printed = readers_paths(done.stdout, scratch)
    if done.returncode != 0:
        raise RuntimeError(f"{name}.md:{block.line}: exit code {done.returncode}\n{printed}")
    return printed


def environment(scratch: Path) -> dict[str, str]:
    """The variables of a reader who has done lesson 0, with a home of their own, whose cache has no prepared data yet."""
    home = scratch / HOME
    cache = home / ".cache" / "shardtune"
    programs = home / "bin"
    for folder in (cache, programs):
        folder.mkdir(parents=True, exist_ok=True)
    for name in CACHED:
        here = cache_directory().resolve() / name
        if here.exists() and not (cache / name).exists():
            (cache / name).symlink_to(here)
    command = programs / "shardtune"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m launch.main "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if name != VARIABLE}
    return {
        **inherited,
        "HOME": str(home),
        "MODEL": str(cache / "models" / "SmolLM2-135M-Instruct"),
        "DATA": str(cache / "demo" / "train.jsonl"),
        "HELD_OUT": str(cache / "demo" / "held-out.jsonl"),
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": WIDTH,
        "NO_COLOR": "1",
        "WANDB_MODE": "disabled",
    }


def readers_paths(text: str, scratch: Path) -> str:
    """The text with the paths that a reader would see: `~` for the home, and none before what is in the working directory."""
    text = text.replace(str(scratch / HOME), "~")
    return text.replace(f"{scratch}/", "").replace(str(scratch), ".")


def fetch() -> None:
    """The model and the data of the lessons, into this machine's cache; the first time it downloads them.

    Errors: FetchError, StorageError.
    """
    # Only here, because they take seconds to import.
    from launch.demo.command import CONVERSATIONS_FILE, prepare_demo
    from launch.demo.embedded import fetch_demo_file, fetch_demo_model
    from launch.demo.results import load_tokenizer

    model = fetch_demo_model()
    prepare_demo(fetch_demo_file(CONVERSATIONS_FILE), load_tokenizer(model), cache_directory() / "demo")


def recorded(page: str, outputs: dict[str, str]) -> str:
    """The page with its outputs replaced."""
    for block in reversed(blocks_of(page)):
        if block.output is not None:
            text = f"```text\n{outputs[block.output.name].rstrip()}\n```\n"
            page = page[: block.output.start] + text + page[block.output.stop :]
    return page


def differences(before: str, after: str, free: tuple[str, ...] = ()) -> list[str]:
    """What differs between two outputs, line by line, but for what may: see the head of this file."""
    old_lines = before.rstrip().splitlines()
    new_lines = after.rstrip().splitlines()
    if len(old_lines) != len(new_lines):
        return [f"{len(old_lines)} lines were recorded, {len(new_lines)} are printed:\n{after}"]
    found = []
    for old, new in zip(old_lines, new_lines, strict=True):
        is_free = any(re.search(pattern, old) and re.search(pattern, new) for pattern in free)
        if not is_free and not same_line(old, new):
            found.append(f"- {old}\n+ {new}")
    return found


def same_line(old: str, new: str) -> bool:
    """Whether two lines have the same words, and numbers within the tolerance."""
    old, new = without_machine(old), without_machine(new)
    old_words = NUMBER.sub("#", old).split()
    new_overrides = NUMBER.sub("#", new).split()
    old_numbers = NUMBER.findall(old)
    new_numbers = NUMBER.findall(new)
    return old_words == new_overrides and all(map(same_number, old_numbers, new_numbers))


def without_machine(line: str) -> str:
    """The line with a mark for everything that `MACHINE` lets differ."""
    for pattern in MACHINE:
        line = pattern.sub("<machine>", line)
    return line


def same_number(old: str, new: str) -> bool:
    """Whether two numbers are within the tolerance, or two units of the last digit shown apart."""
    first, second = float(old.replace(",", "")), float(new.replace(",", ""))
    decimals = len(re.sub(r"e.*", "", old).partition(".")[2])
    last_digit = 0.0 if decimals == 0 or "e" in old else 2.01 * 10.0**-decimals
    return abs(first - second) <= max(TOLERANCE * abs(first), last_digit)


def names() -> list[str]:
    """The lessons, in the order of the course."""
    return sorted(path.stem for path in LESSONS.glob("[0-9][0-9]-*.md"))


def changes(name: str, outputs: dict[str, str]) -> Iterator[str]:
    """Each difference between a lesson's page and what its commands print now."""
    for block in blocks_of((LESSONS / f"{name}.md").read_text(encoding="utf-8")):
        if block.output is not None:
            for difference in differences(block.output.text, outputs[block.output.name], block.output.free):
                yield f"{name}.md: output {block.output.name}\n{difference}"


def main(words: list[str] | None = None) -> int:
    """Record or check lessons; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="make_lessons.py [--check] [--scratch DIRECTORY] [LESSON ...]",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument("--scratch", type=Path, help="directory to keep; commands that have run in it do not run again")
    parser.add_argument("lessons", nargs="*", metavar="LESSON", help="such as 05-workflow; default: all")
    options = parser.parse_args(words)
    unknown = sorted(set(options.lessons) - set(names()))
    if unknown:
        parser.error(f"no such lesson: {', '.join(unknown)}; there are {', '.join(names())}")
    fetch()
    failed = False
    for name in options.lessons or names():
        with tempfile.TemporaryDirectory(prefix="lesson-") as temporary:
            scratch = (options.scratch / name if options.scratch else Path(temporary)).resolve()
            scratch.mkdir(parents=True, exist_ok=True)
            outputs = run_lesson(name, scratch)
        if options.check:
            found = list(changes(name, outputs))
            failed = failed or bool(found)
            print("\n".join(found) or f"{name}.md: nothing differs", flush=True)
        else:
            path = LESSONS / f"{name}.md"
            path.write_text(recorded(path.read_text(encoding="utf-8"), outputs), encoding="utf-8")
            print(f"{name}.md: wrote {len(outputs)} outputs", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
