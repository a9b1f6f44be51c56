"""`shardtune init`: writes a commented settings file, from words or from another trainer's file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.help_text import show_help
from launch.config.user_files import SUFFIXES
from launch.config.verb_words import VerbWords, asks_for_help, flag, help_rows, read_words, setting_words, word
from launch.output import give
from strategies.errors import ConfigError, StorageError, key_of_problem

if TYPE_CHECKING:
    from launch.config.importers.conversion import Converted, SettingNote


@dataclass(kw_only=True)
class InitWords(VerbWords):
    """What `shardtune init` takes."""

    to: Path = word(
        "the file to write; one that is there is never overwritten",
        like="my.yaml",
        required="name the file to write, as in to=my.yaml",
    )
    source: str | None = word(
        "a file of another trainer, whose settings are turned into ours", key="from", like="axolotl.yml"
    )
    settings: list[str] = setting_words()
    as_json: bool = flag("the answer for programs", key="--json")


USAGE = f"""usage: shardtune init model.path=<model> data.path=<data> [key=value ...] to=my.yaml
       shardtune init from=<file of another trainer> [key=value ...] to=my.yaml

Writes a file of settings for `shardtune train my.yaml`: what was typed is set, and what people set most stands beside it
as a comment, with its meaning and default.

from= takes a file of axolotl, LLaMA-Factory, Hugging Face's Trainer and TRL (YAML), or DeepSpeed's (JSON); what is typed goes
before it. What has no equal is listed with the reason, in the answer and at the end of the file.

  shardtune init model.path=models/smollm2 data.path=train.jsonl tuning=lora to=my.yaml
  shardtune init from=axolotl.yml to=my.yaml
  shardtune init from=ds_config.json model.path=models/llama data.path=train.jsonl budget.epochs=1 to=my.yaml

{help_rows(InitWords)}"""
WIDTH = 80


@dataclass(slots=True)
class InitResult:
    """What was written, and what is to be known of it."""

    to: str
    settings: dict[str, Any]
    """What the file sets, by full key, the choices of groups included."""
    converted: Converted | None = None
    to_settle: list[str] = field(default_factory=list)
    """Why a run of the file would be refused as it is."""
    replaced: list[str] = field(default_factory=list)
    """Settings of the other trainer's file in whose place something was typed."""


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code. Errors: ConfigError, StorageError."""
    if asks_for_help(argv):
        show_help(USAGE)
        return 0
    words, problems = read_words("init", InitWords, argv)
    if words.to is not None:
        problems += _target_problems(words.to)
    if problems:
        raise ConfigError(problems)
    if words.source is not None:
        written, text = _from_file(words.source, words.settings, words.to)
    else:
        written, text = _typed(words.settings, words.to)
    _write(words.to, text)
    if words.as_json:
        give(as_dict(written))
    else:
        print("\n".join(said(written)))
    return 0


def _target_problems(to: Path) -> Iterator[str]:
    """Why the file cannot be written, one line each."""
    if to.suffix not in SUFFIXES:
        yield f"to={to}: must end in .yaml, so that `shardtune train {to}.yaml` takes it"
    if to.exists() or to.is_symlink():
        yield f"to={to}: is there already, and is not overwritten; name another file, or remove it"
    if not to.parent.is_dir():
        yield f"to={to}: there is no directory {to.parent}; make it first"


def _typed(words: list[str], target: Path) -> tuple[InitResult, str]:
    """A file of what was typed alone, which must be a run that could start."""
    from launch.config.compose import compose

    _no_removals(words)
    compose(words)
    head = [f"Settings of a run, written by `shardtune init`. Train with: shardtune train {target}", *_HOW]
    return _made(words, target, None, head)


def _from_file(source: str, typed: list[str], target: Path) -> tuple[InitResult, str]:
    """A file of another trainer's settings, with what was typed before them."""
    from launch.config.compose import compose
    from launch.config.hints import ranks_of
    from launch.config.importers.files import convert

    _no_removals(typed)
    ranks = ranks_of(dict(word.partition("=")[::2] for word in typed), {})
    converted = convert(Path(source), ranks)
    replaced = _give_way(converted, typed)
    while True:
        words = [f"{key}={value}" for key, value in _theirs(converted).items()] + typed
        try:
            compose(words, check=False)
            break
        except ConfigError as error:
            problems = error.problems
        bad = {
            key: problem.removeprefix(f"{key}={value}").removeprefix(key).removeprefix(": ")
            for key, value in _theirs(converted).items()
            for problem in problems
            if key_of_problem(problem) == key
        }
        if not bad:
            raise ConfigError(problems)
        for key, why in bad.items():
            converted.drop(key, why)
    try:
        compose(words)
        to_settle = []
    except ConfigError as error:
        to_settle = error.problems
    head = [
        f"Settings of a run, written by `shardtune init from={source}`, a file of {converted.trainer}. Train with: shardtune "
        f"train {target}",
        "A comment behind a setting says what it was there. What has no equal here is listed at the end.",
        *_HOW,
    ]
    written, text = _made(words, target, converted, head, to_settle)
    written.to_settle, written.replaced = to_settle, replaced
    return written, text


_HOW = [
    "A setting behind a `#` has the value shown unless it is set: remove the mark to set it. All are in docs/config.md."
]


def _no_removals(words: list[str]) -> None:
    if bad := [f"{word}: a new file has nothing to go back from; leave it out" for word in words if word[:1] == "~"]:
        raise ConfigError(bad)


def _theirs(converted: Converted) -> dict[str, str]:
    """The words of their file, in which nothing is looked up."""
    from trainer.reporting.settings_file import literal

    return {key: literal(value) for key, value in converted.words.items()}


def _give_way(converted: Converted, typed: list[str]) -> list[str]:
    """Take out what is typed anew: the same key, another budget, other data; returns their settings."""
    keys = {word.lstrip("+").partition("=")[0] for word in typed if "=" in word}
    replaced: list[str] = []
    for key in list(converted.words):
        again = key in keys
        again |= key.startswith("budget.") and any(each.startswith("budget.") for each in keys)
        again |= key.startswith("data.sources.") and "data.path" in keys
        again |= key == "data.path" and any(each.startswith("data.sources.") for each in keys)
        again |= key == "data.eval_share" and "data.eval_path" in keys
        if again:
            del converted.words[key]
            replaced += converted.origin.pop(key)
    return replaced


def _made(
    words: list[str], target: Path, converted: Converted | None, head: list[str], to_settle: list[str] | None = None
) -> tuple[InitResult, str]:
    from launch.config.overrides import parse
    from launch.init.file import commented, text

    parsed = parse(words)
    origin = {key: "; ".join(theirs) for key, theirs in converted.origin.items()} if converted else {}
    body = text(commented(head), parsed, origin, commented(_tail(converted, to_settle or [])))
    settings = {**parsed.choices, **{key.removesuffix("_"): value for key, value, _ in parsed.values}}
    return InitResult(str(target), settings, converted), body


def _tail(converted: Converted | None, to_settle: list[str]) -> list[str]:
    """What a file of another trainer said besides, for the end of ours."""
    if converted is None:
        return []
    lines: list[str] = []
    for title, entries in _parts(converted, to_settle):
        lines += ["", f"{title}:", *(f"- {entry}" for entry in entries)] if entries else []
    return lines[1:]


def _parts(converted: Converted, to_settle: list[str]) -> list[tuple[str, list[str]]]:
    needless = [f"{each.setting}: {each.value}: {each.why}" for each in converted.needless]
    return [
        ("to settle before it trains", to_settle),
        ("empty there, so nothing was said", [", ".join(converted.empty)] if converted.empty else []),
        ("needs no setting here", needless),
        ("taken, with a difference", [str(each) for each in converted.remarks]),
        ("no equal here", [str(each) for each in converted.no_equal]),
    ]


def _write(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(f"to={path}: is there already, and is not overwritten; name another file") from error
    except OSError as error:
        raise StorageError(f"to={path}: cannot be written ({error.strerror})") from error


def as_dict(written: InitResult) -> dict[str, Any]:
    """The answer for programs."""
    found: dict[str, Any] = {"to": written.to, "settings": written.settings}
    if (converted := written.converted) is not None:

        def rows(entries: list[SettingNote]) -> list[dict[str, str]]:
            return [asdict(each) for each in entries]

        found |= {
            "trainer": converted.trainer,
            "origin": converted.origin,
            "no_equal": rows(converted.no_equal),
            "differs": rows(converted.remarks),
            "needless": rows(converted.needless),
            "empty": converted.empty,
            "replaced": written.replaced,
            "to_settle": written.to_settle,
        }
    return found


def said(written: InitResult) -> list[str]:
    """The answer for a person, in 80 columns."""
    converted = written.converted
    taken = f" of {converted.trainer}" if converted else ""
    lines = [f"{written.to}: written, {len(written.settings)} settings{taken}", f"  shardtune train {written.to}"]
    if converted is None:
        return lines
    parts = [("typed instead", written.replaced), *_parts(converted, written.to_settle)]
    for title, entries in parts:
        if title == "needs no setting here":
            entries = [", ".join(each.setting for each in converted.needless)] if entries else []
            title += f" (why: {written.to})"
        lines += [f"{title}:", *(line for entry in entries for line in _folded(entry))] if entries else []
    return lines if converted.no_equal else [*lines, "everything in it has an equal here"]


def _folded(entry: str) -> list[str]:
    return textwrap.wrap(
        entry, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False, break_long_words=False
    )
