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
from typing import TYPE_CHECKING, Any, NamedTuple

from launch import streams
from strategies import exit_codes
from trainer.stopping.signals import block_signals

if TYPE_CHECKING:
    from launch.config.verb_arguments import VerbArguments

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
DESCRIPTION_BY_VERB = {verb: text for verbs in VERBS_BY_GROUP.values() for verb, text in verbs.items()}
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
MODULE_BY_VERB = {
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
    """Run the command `shardtune <verb> ...`, such as `shardtune train`; returns the exit code of the process.

    `argv`: the arguments; None for the process's own.
    Options without a verb (`--help`, `--version`, `--shell-completion`) are answered here.
    """
    if argv is None:
        streams.restart_in_utf8()
    arguments = sys.argv[1:] if argv is None else list(argv)
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help", "help"):
        print(usage_text())
        return 0
    if verb in ("--version", "-V", "version"):
        print(version_text())
        return 0
    if verb in ("--shell-completion", "-sc") or verb.startswith("--shell-completion="):
        return print_completion(arguments)
    if verb not in DESCRIPTION_BY_VERB:
        problem = _unknown_verb_message(verb)
        print(f"shardtune: {problem}", file=sys.stderr)
        return _report_failure(arguments, [problem], exit_codes.WRONG_SETTING)
    if "--version" in arguments:
        print(version_text())
        return 0
    if verb in VERBS_THAT_SAVE:
        block_signals()  # from the first moment: one that comes while libraries are loaded stays pending until the run can save
    return run_guarded(verb, arguments[1:])


def _unknown_verb_message(verb: str) -> str:
    """Write the message about a verb that does not exist, with the one that was probably meant: `trian` is `train`."""
    from launch.config import misspelled

    if verb in misspelled.COMMAND_BY_WRONG_VERB:
        return f"there is no verb {verb}; did you mean {misspelled.COMMAND_BY_WRONG_VERB[verb]}?"
    similar = difflib.get_close_matches(verb, DESCRIPTION_BY_VERB, n=1)
    hint = f"did you mean {similar[0]}?" if similar else f"one of {', '.join(DESCRIPTION_BY_VERB)}"
    return f"there is no verb {verb}; {hint}"


def version_text() -> str:
    """The text of `--version`: shardtune's version, its git revision and directory, and the version of Python."""
    from importlib import metadata

    from trainer.reporting.code_revision import CODE_DIRECTORY, code_revision

    try:
        number = metadata.version("shardtune")
    except metadata.PackageNotFoundError:
        number = "(not installed)"
    commit = code_revision()
    revision_text = f", revision {commit}" if commit else ""
    return f"shardtune {number}{revision_text} ({CODE_DIRECTORY}), Python {sys.version.split()[0]}"


def print_completion(arguments: list[str]) -> int:
    """Print the script that completes shardtune's command line in a shell; returns the exit code.

    `arguments`: like `--shell-completion bash` or `--shell-completion=bash`.
    Without a known shell, the message names those that there are, and the exit code is that of a wrong setting.
    """
    from launch.config.completion import completion_script
    from strategies.errors import ConfigError

    shell = arguments[0].partition("=")[2]
    if not shell and len(arguments) > 1:
        shell = arguments[1]
    try:
        print(completion_script(shell, DESCRIPTION_BY_VERB, declared_arguments()), end="")
    except ConfigError as error:
        print(f"shardtune: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def declared_arguments() -> dict[str, list[type[VerbArguments]]]:
    """The classes in which each verb declares its arguments, for the completion in a shell: {"stop": [StopArguments], ...}.

    Imports the module of every verb.
    """
    from importlib import import_module

    from launch.config.verb_arguments import verb_arguments_in

    return {verb: verb_arguments_in(import_module(module_of_verb(verb))) for verb in DESCRIPTION_BY_VERB}


def module_of_verb(verb: str) -> str:
    """The module whose `main` runs the verb, such as `launch.compare.command`."""
    return f"launch.{MODULE_BY_VERB.get(verb, f'{verb}.command')}"


def run_guarded(verb: str, argv: list[str]) -> int:
    """Run a verb with its arguments, and turn every error into a message and an exit code, which is returned.

    A verb that saves (`VERBS_THAT_SAVE`) does so even if nobody can read its output any more.
    """
    streams.prepare_streams()
    with _output_context(verb), _record_interrupts() as interrupts:
        return _run_with_messages(verb, argv, interrupts)


def _output_context(verb: str) -> AbstractContextManager[None]:
    """The context in which a verb writes to stdout and stderr, by what it must survive.

    - A verb that saves, such as train, goes on if nobody reads its output any more.
    - A verb that draws on the terminal, such as chat, writes as it likes.
    - All others spell control characters out, since texts of others could move or rename the terminal.
    """
    from launch.output import tolerate_closed_streams

    if verb in VERBS_THAT_SAVE:
        return tolerate_closed_streams()
    if verb in VERBS_THAT_DRAW:
        return nullcontext()
    return streams.printable_output()


@contextmanager
def _record_interrupts() -> Iterator[list[int]]:
    """Within the block, note each Ctrl-C in the list that is yielded; the usual KeyboardInterrupt is raised, too.

    A library that is being imported may turn KeyboardInterrupt into an error of its own. The list tells
    that such an error comes from Ctrl-C.
    """
    interrupts: list[int] = []

    def record_interrupt(signal_number: int, frame: Any) -> None:
        interrupts.append(signal_number)
        signal.default_int_handler(signal_number, frame)

    # Only the main thread may set handlers. A handler that somebody else has set is kept.
    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupts
        return
    signal.signal(signal.SIGINT, record_interrupt)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _run_with_messages(verb: str, argv: list[str], interrupts: list[int]) -> int:
    """Run a verb, and turn whatever it raises into a message for the user and the exit code, which is returned.

    `verb`: such as `train`. `interrupts`: has an entry for each Ctrl-C so far.
    An error for which there is no message, such as SystemExit, is raised again.
    """
    try:
        return _run_verb(verb, argv)
    except BrokenPipeError:  # the reader of our output went away, as in `shardtune train --cfg | head`
        # Python writes buffered output at exit, which would fail once more: let it go to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as error:
        failure = _failure_of_verb(verb, error, was_interrupted=bool(interrupts))
        if failure is None:
            raise
        print(failure.text, file=sys.stderr)
        return _report_failure(argv, failure.problems, failure.exit_code)


class _VerbFailure(NamedTuple):
    """What the user is told about the error that ended a verb."""

    text: str
    """Printed on stderr: the message with the name of the verb, or a traceback."""
    problems: list[str]
    """The messages alone, for the answer of `--json`."""
    exit_code: int


def _failure_of_verb(verb: str, error: BaseException, *, was_interrupted: bool) -> _VerbFailure | None:
    """What to tell the user about an error that a verb has raised; None for one that is no failure, such as SystemExit.

    By the error:

    - one that the user can mend (ShardtuneError): its message, and its own exit code;
    - Ctrl-C: "interrupted", 130; also any other error after Ctrl-C, since a library may turn that into an error of its own;
    - a panic of the tokenizer's Rust code, whose Python error is no Exception: a message, and the code of a wrong setting;
    - any other error: its traceback without secrets, 70.
    """
    from strategies.errors import ConfigError, ShardtuneError, is_panic, tokenizer_panic
    from strategies.redaction import redact

    if isinstance(error, ConfigError):
        number = len(error.problems)
        title = f"{number} problems" if number > 1 else "1 problem"
        lines = [f"shardtune {verb}: {title}", *(f"  {problem}" for problem in error.problems)]
        return _VerbFailure("\n".join(lines), error.problems, error.exit_code)
    if isinstance(error, ShardtuneError):
        return _VerbFailure(f"shardtune {verb}: {error}", [str(error)], error.exit_code)
    if isinstance(error, KeyboardInterrupt) or (was_interrupted and isinstance(error, Exception)):
        return _VerbFailure(f"shardtune {verb}: interrupted", ["interrupted"], exit_codes.INTERRUPTED)
    if is_panic(error):
        problem = str(tokenizer_panic(error, "the tokenizer"))
        return _VerbFailure(f"shardtune {verb}: {problem}", [problem], ConfigError.exit_code)
    if not isinstance(error, Exception):
        return None
    # The traceback ends in a line break, as does what is printed.
    traceback_text = redact(traceback.format_exc()).removesuffix("\n")
    return _VerbFailure(traceback_text, [redact(f"{type(error).__name__}: {error}")], exit_codes.FAILED)


def _run_verb(verb: str, argv: list[str]) -> int:
    """Check the environment and the arguments, and run one verb; returns the exit code.

    Raises what the verb raises, and ConfigError for:

    - Python without docstrings (`python -OO`), under which no model can be loaded;
    - arguments with bytes that are no text, which could not be written into files;
    - an address behind `to=`.

    The first two are not checked for READ_ONLY_VERBS, which load no model and write no file of text.
    """
    from importlib import import_module

    from launch.config.user_files import take_config_dirs

    if verb not in READ_ONLY_VERBS:
        streams.refuse_stripped_docstrings()
        streams.refuse_undecodable_arguments(argv)
    _refuse_remote_output_directory(argv)
    remaining_arguments = take_config_dirs(argv)  # without `--config-dir <dir>`, which is noted for later
    return int(import_module(module_of_verb(verb)).main(remaining_arguments) or 0)


def _report_failure(arguments: list[str], problems: list[str], code: int) -> int:
    """Answer a failed command that was called with `--json` by a JSON object, as the last thing on stdout; returns `code`.

    {"error": ..., "problems": [...], "exit_code": 64}. Nothing without `--json` among the arguments. The ranks of a job print
    nothing: their launcher says how the run ended.
    """
    from launch.output import JSON_FLAG, print_json

    if JSON_FLAG in arguments and not _is_started_as_rank():
        answer = {"error": "\n".join(problems), "problems": problems, "exit_code": code}
        # With these options a verb prints many JSON objects, one a line.
        prints_object_per_line = bool({"--follow", "--watch"} & set(arguments))
        print_json(answer, one_line=prints_object_per_line)
    return code


def _is_started_as_rank() -> bool:
    """Whether a launcher started this process as a rank. False if its variables make no sense: then the verb refused them."""
    from launch.config.process_role import is_rank_process
    from strategies.errors import ConfigError

    try:
        return is_rank_process(os.environ)
    except ConfigError:
        return False


def _refuse_remote_output_directory(arguments: list[str]) -> None:
    """Raise ConfigError for an address behind `to=`, such as s3://bucket, which would become a local directory called `s3:`."""
    from strategies.errors import ConfigError

    for argument in arguments:
        if argument.startswith("to=") and "://" in argument:
            raise ConfigError(
                f"{argument}: is an address, and only local directories are written to; name a directory, and copy it "
                "afterwards. `shardtune export <run> to=hub:<owner>/<name>` pushes to the hub"
            )


def usage_text() -> str:
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
