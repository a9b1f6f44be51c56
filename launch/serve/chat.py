"""`shardtune chat`: talk with an exported model in the terminal, its base beside it."""

from __future__ import annotations

import json
import math
import re
import sys
from typing import TYPE_CHECKING, Any

from launch.config.help_text import show_help
from launch.streams import printable
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.serve.conversation import Talk, TalkSettings

USAGE = """usage: shardtune chat <run or export> ["prompt"] [against=base|none|<run or export>] [--json]

  shardtune chat runs/first                       in the terminal, tuned beside base
  shardtune chat runs/first "Sum this up: ..."    one answer
  cat letter.txt | shardtune chat runs/first > answer.txt

The export's own chat template and stop tokens hold. A model without a template goes on with the text it is given.

  against=base      what to show beside it; default: base in a terminal, none where the output goes elsewhere
  system="..."      what the models are told first
  max_tokens=512    most new tokens of an answer
  temperature=null  0 takes the most likely token; null: as the export says, else 0
  seed=0            of the draws
  device=auto  dtype=auto
  accept=[base]     talk with an adapter on another base than it was trained on
  prompt="..."      the prompt, where it looks like a setting

  --json            one JSON object an answer

In the terminal: /new begins anew, /quit or Ctrl-D ends, Ctrl-C stops an answer."""
KEYS = ("run.dir", "against", "system", "max_tokens", "temperature", "seed", "device", "dtype", "prompt", "accept")


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code. Errors: ConfigError."""
    if {"-h", "--help"} & set(argv):
        show_help(USAGE)
        return 0
    from launch.export.words import accepted_kinds, parse
    from launch.serve.exported import compare_base, find_export

    as_json = "--json" in argv
    words, problems = parse(_with_prompt([word for word in argv if word != "--json"]), KEYS)
    settings = _settings(words, problems)
    if "run.dir" not in words:
        problems.append("no model is named; give a run or an export, as in shardtune chat runs/x")
    if problems:
        raise ConfigError(problems)
    exported = find_export(words["run.dir"])
    for line in compare_base(exported, accept=bool(accepted_kinds(words, reads_rows=False))):
        print(f"accepted: base: {line}", file=sys.stderr, flush=True)
    against = words.get("against", "base" if sys.stdout.isatty() and not as_json else "none")
    other = None if against in ("base", "none") else find_export(against)
    prompt = words.get("prompt")
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().removesuffix("\n")
    if prompt is not None and not prompt.strip():
        raise ConfigError("the prompt is empty; give one in quotes, or pipe one in")
    talks = _talks(exported, other, against, words, settings)
    if prompt is None:
        return _converse(talks)
    _one_answer(talks, prompt, as_json)
    return 0


def _with_prompt(argv: list[str]) -> list[str]:
    """The second bare word, which is anything that is no `key=value`, as `prompt=`."""
    bare = [at for at, word in enumerate(argv) if not re.match(r"[a-z_]+(\.[a-z_]+)*=|-", word)]
    if len(bare) == 2:
        argv = [f"prompt={word}" if at == bare[1] else word for at, word in enumerate(argv)]
    elif len(bare) > 2:
        raise ConfigError(f"{argv[bare[2]]}: a prompt is one word for the shell; put it into quotes")
    return argv


def _settings(words: dict[str, str], problems: list[str]) -> TalkSettings:
    from launch.serve.config import ServedType
    from launch.serve.conversation import TalkSettings

    found = TalkSettings(system=words.get("system"))
    for key, least, most in (("max_tokens", 1, math.inf), ("seed", 0, 2**63 - 1), ("temperature", 0, 2)):
        if (typed := words.get(key)) is None or (key == "temperature" and typed == "null"):
            continue
        try:
            value: Any = float(typed) if key == "temperature" else int(typed)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            what = "a number" if key == "temperature" else "a whole number"
            problems.append(f"{key}={typed}: must be {what} from {least}" + (f" to {most}" if most < math.inf else ""))
            continue
        setattr(found, key, value)
    if words.get("dtype", "auto") not in [*ServedType]:
        problems.append(f"dtype={words['dtype']}: must be one of {', '.join(ServedType)}")
    return found


def _talks(exported: Any, other: Any, against: str, words: dict[str, str], settings: TalkSettings) -> list[Talk]:
    """The models, loaded: what is shown beside first, the tuned one last."""
    from launch.serve.conversation import Talk
    from launch.serve.models import load, load_base

    where = {"device": words.get("device", "auto"), "dtype": words.get("dtype", "auto")}
    tuned = load(exported, **where)
    beside = None
    if against == "base":
        beside = load_base(exported, **where)
        if beside is None and "against" in words:
            raise ConfigError(
                f"against=base: the base of {exported.path} is not on this machine; name another export, or against=none"
            )
        if beside is None:
            print("(its base is not on this machine: the tuned model alone)", file=sys.stderr)
    elif other is not None:
        beside = load(other, **where)
    return [Talk(each, settings) for each in (beside, tuned) if each is not None]


def _one_answer(talks: list[Talk], prompt: str, as_json: bool) -> None:
    from launch.serve.chat_screen import columns

    if as_json:
        answers = [
            {"model": talk.talking.name, "text": "".join(talk.ask(prompt)), "tokens": talk.tokens, "cut": talk.cut}
            for talk in talks
        ]
        print(json.dumps({"prompt": prompt, "answers": answers}, ensure_ascii=False))
        return
    if sys.stdout.isatty() and len(talks) > 1:
        columns(talks, prompt)
        return
    for talk in talks:
        if len(talks) > 1:
            print(f"{talk.talking.name}:")
        for piece in talk.ask(prompt):
            print(printable(piece) if sys.stdout.isatty() else piece, end="", flush=True)
        print()
        if talk.cut:
            print(f"(cut at max_tokens={talk.settings.max_tokens})", file=sys.stderr)


def _converse(talks: list[Talk]) -> int:
    from launch.serve.chat_screen import columns

    names = " and ".join(talk.talking.name for talk in talks)
    print(f"{names}; /new begins anew, /quit or Ctrl-D ends, Ctrl-C stops an answer")
    if not talks[-1].templated:
        print("(no chat template: the model goes on with what you type, and remembers nothing)")
    while True:
        try:
            prompt = input("> ").strip()
        except EOFError:
            print()
            return 0
        if prompt == "/quit":
            return 0
        if prompt == "/new":
            for talk in talks:
                talk.forget()
        elif prompt:
            try:
                columns(talks, prompt)
            except ConfigError as error:
                print(error)
