"""The command `shardtune`: picks the verb and turns errors into messages and exit codes.

Imports nothing heavy, so that `shardtune --help` answers at once; each verb imports what it needs.
"""

from __future__ import annotations

import difflib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from launch import streams
from trainer.stopping.signals import hold

if TYPE_CHECKING:
    from launch.config.verb_words import VerbWords

VERBS_BY_GROUP = {
    "start": {
        "demo": "fine-tune a small real model on this machine, from nothing",
        "init": "write a commented settings file; from= converts axolotl's and others",
        "doctor": "check what this machine has, and what a run would miss",
        "download": "fetch model and data from the hub, pinned, for offline nodes",
    },
    "train": {
        "prepare": "read, check, clean and tokenise data; --print shows it",
        "plan": "predict memory, time and price of a run, for each strategy",
        "train": "fine-tune a model: in one process, with torchrun, or under SLURM",
        "submit": "hand a run to SLURM; --print shows the script",
    },
    "follow": {
        "status": "show the runs below a directory, or one run; --watch, --verify",
        "logs": "show the last lines of a run's output; --follow",
        "stop": "make a run save and end, on this host or under SLURM",
    },
    "judge": {
        "compare": "run combinations of settings and compare them, or existing runs",
        "evaluate": "run tasks on a run or a model: metrics with intervals",
        "review": "let people judge: `review make` a blind page, `review score` it",
    },
    "ship": {
        "export": "turn a checkpoint into a model directory that transformers loads",
        "serve": "serve the exported model at an OpenAI-compatible address",
        "chat": "chat with the exported model, next to its base",
    },
}
VERBS = {verb: text for verbs in VERBS_BY_GROUP.values() for verb, text in verbs.items()}
"""Every verb with a line about it."""
VERBS_THAT_SAVE = ("train", "prepare")
"""Verbs that save, or undo, before a signal ends them."""
READ_ONLY_VERBS = ("status", "logs", "stop")
"""Verbs that write no file of text and load no model: they work whatever the environment's encoding and options are."""
VERBS_THAT_DRAW = ("demo", "chat")
"""Verbs that draw on the terminal. They make the text of a model printable themselves."""
EXIT_CODES = (
    "exit codes: 0 done, 64 wrong setting, 65 wrong data, 69 does not fit or a\n"
    "limit failed, 74 disk, 75 preempted (resumable), 130 Ctrl-C, 70 anything else"
)
OTHER_MODULES = {
    "train": "train",
    "submit": "submit",
    "status": "runs.status_command",
    "logs": "runs.logs_command",
    "stop": "runs.stop_command",
    "chat": "serve.chat",
    "job": "cluster.job",
}
"""The modules of verbs that are not in `launch/<verb>/command.py`. Job scripts call `job`, people never do."""


def main(argv: list[str] | None = None) -> int:
    """Run `shardtune <verb> ...`; returns the exit code."""
    if argv is None:
        streams.restart_in_utf8()
    words = sys.argv[1:] if argv is None else list(argv)
    verb = words[0] if words else "--help"
    if verb in ("-h", "--help", "help"):
        print(usage())
        return 0
    if verb in ("--version", "-V", "version"):
        print(version())
        return 0
    if verb in ("--shell-completion", "-sc") or verb.startswith("--shell-completion="):
        return print_completion(words)
    if verb not in VERBS:
        problem = _unknown_verb(verb)
        print(f"shardtune: {problem}", file=sys.stderr)
        return _report_failure(words, [problem], 64)
    if "--version" in words:
        print(version())
        return 0
    if verb in VERBS_THAT_SAVE:
        hold()
    return run_guarded(verb, words[1:])


def _unknown_verb(verb: str) -> str:
    """The message about a verb that does not exist, with the one that was probably meant."""
    from launch.config import misspelled

    if verb in misspelled.VERBS:
        return f"there is no verb {verb}; did you mean {misspelled.VERBS[verb]}?"
    similar = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f"did you mean {similar[0]}?" if similar else f"one of {', '.join(VERBS)}"
    return f"there is no verb {verb}; {hint}"


def version() -> str:
    """The text of `--version`: shardtune's version, its git revision and directory, and the version of Python."""
    from importlib import metadata

    from trainer.reporting.code_revision import ROOT, revision

    try:
        number = metadata.version("shardtune")
    except metadata.PackageNotFoundError:
        number = "(not installed)"
    commit = revision()
    revision_text = f", revision {commit}" if commit else ""
    return f"shardtune {number}{revision_text} ({ROOT}), Python {sys.version.split()[0]}"


def print_completion(words: list[str]) -> int:
    """Print the completion script of a shell; returns the exit code."""
    from launch.config.completion import script
    from strategies.errors import ConfigError

    shell = words[0].partition("=")[2]
    if not shell and len(words) > 1:
        shell = words[1]
    try:
        print(script(shell, VERBS, declared_words()), end="")
    except ConfigError as error:
        print(f"shardtune: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def declared_words() -> dict[str, list[type[VerbWords]]]:
    """The classes that declare the words of each verb."""
    from importlib import import_module

    from launch.config.verb_words import declared_in

    return {verb: declared_in(import_module(module_of(verb))) for verb in VERBS}


def module_of(verb: str) -> str:
    """The module whose `main` does the verb."""
    return f"launch.{OTHER_MODULES.get(verb, f'{verb}.command')}"


def run_guarded(verb: str, argv: list[str]) -> int:
    """Run a verb with its words, and turn every error into a message and an exit code, which is returned.

    A verb that saves (`VERBS_THAT_SAVE`) does so even if nobody can read its output any more.
    """
    streams.prepare_streams()
    with _output_context(verb), _note_interrupts() as interrupts:
        return _run_with_messages(verb, argv, interrupts)


def _output_context(verb: str) -> AbstractContextManager[None]:
    """The context in which a verb writes to stdout and stderr: with control characters spelled out, unless it needs them."""
    from launch.output import tolerate_closed_streams

    if verb in VERBS_THAT_SAVE:
        return tolerate_closed_streams()
    return nullcontext() if verb in VERBS_THAT_DRAW else streams.only_printable()


@contextmanager
def _note_interrupts() -> Iterator[list[int]]:
    """Within the block, collect each Ctrl-C in the list that is yielded, beside the usual KeyboardInterrupt.

    A library that is being imported may turn that exception into an error of its own.
    """
    interrupts: list[int] = []

    def note(signal_number: int, frame: Any) -> None:
        interrupts.append(signal_number)
        signal.default_int_handler(signal_number, frame)

    # Only the main thread may set handlers, and whoever has set another one keeps it.
    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupts
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _run_with_messages(verb: str, argv: list[str], interrupts: list[int]) -> int:
    """Run a verb and turn its errors into messages and an exit code. `interrupts`: fills with each Ctrl-C."""
    from strategies.errors import ConfigError, ShardtuneError, is_panic, tokenizer_panic
    from strategies.redaction import redacted

    try:
        return _run_verb(verb, argv)
    except ConfigError as error:
        number = len(error.problems)
        title = f"{number} problems" if number > 1 else "1 problem"
        lines = [f"shardtune {verb}: {title}", *(f"  {problem}" for problem in error.problems)]
        print("\n".join(lines), file=sys.stderr)
        return _report_failure(argv, error.problems, error.exit_code)
    except ShardtuneError as error:
        print(f"shardtune {verb}: {error}", file=sys.stderr)
        return _report_failure(argv, [str(error)], error.exit_code)
    except KeyboardInterrupt:
        print(f"shardtune {verb}: interrupted", file=sys.stderr)
        return _report_failure(argv, ["interrupted"], 130)
    except BrokenPipeError:  # the reader of our output went away, as in `shardtune train --cfg | head`
        # Python writes what is buffered at exit, and would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as error:
        if is_panic(error):
            problem = str(tokenizer_panic(error, "the tokenizer"))
            print(f"shardtune {verb}: {problem}", file=sys.stderr)
            return _report_failure(argv, [problem], ConfigError.exit_code)
        if not isinstance(error, Exception):
            raise
        if interrupts:  # a library turned Ctrl-C into this error
            print(f"shardtune {verb}: interrupted", file=sys.stderr)
            return _report_failure(argv, ["interrupted"], 130)
        print(redacted(traceback.format_exc()), end="", file=sys.stderr)
        return _report_failure(argv, [redacted(f"{type(error).__name__}: {error}")], 70)


def _run_verb(verb: str, argv: list[str]) -> int:
    """Check the environment and the words, as far as all verbs do, and run one verb; returns the exit code."""
    from importlib import import_module

    from launch.config.user_files import take_config_dirs

    if verb not in READ_ONLY_VERBS:
        streams.refuse_stripped_docstrings()
        streams.refuse_unwritable_words(argv)
    _refuse_addresses(argv)
    return int(import_module(module_of(verb)).main(take_config_dirs(argv)) or 0)


def _report_failure(words: list[str], problems: list[str], code: int) -> int:
    """If the words have `--json`, print the error as JSON, as the last thing on stdout; returns the exit code `code`.

    The ranks of a job print none: their launcher says how the run ended.
    """
    from launch.output import JSON_FLAG, print_json

    if JSON_FLAG in words and not _is_rank():
        answer = {"error": "\n".join(problems), "problems": problems, "exit_code": code}
        prints_an_object_a_line = bool({"--follow", "--watch"} & set(words))
        print_json(answer, one_line=prints_an_object_a_line)
    return code


def _is_rank() -> bool:
    """Whether a launcher started this process as a rank. False if its variables make no sense: then the verb refused them."""
    from launch.config.process_role import is_worker
    from strategies.errors import ConfigError

    try:
        return is_worker(os.environ)
    except ConfigError:
        return False


def _refuse_addresses(words: list[str]) -> None:
    """Refuse an address behind `to=`, which would become a local directory called `s3:`. Errors: ConfigError."""
    from strategies.errors import ConfigError

    for word in words:
        if word.startswith("to=") and "://" in word:
            raise ConfigError(
                f"{word}: is an address, and only local directories are written to; name a directory, and copy it afterwards. "
                "`shardtune export <run> to=hub:<owner>/<name>` pushes to the hub"
            )


def usage() -> str:
    """The text of `shardtune --help`."""
    lines = []
    for group, verbs in VERBS_BY_GROUP.items():
        lines.append(group)
        lines += [f"  {verb:<9}{text}" for verb, text in verbs.items()]
    verb_lines = "\n".join(lines)
    return (
        "usage: shardtune <verb> [key=value ...]\n\n"
        f"{verb_lines}\n\n"
        "  shardtune train model.path=models/smollm2 data.path=train.jsonl tuning=lora\n"
        "  shardtune train --help lists the most used settings and all choices.\n"
        "  --version; --shell-completion bash|zsh|fish prints a completion script.\n\n"
        f"{EXIT_CODES}"
    )


if __name__ == "__main__":
    sys.exit(main())
