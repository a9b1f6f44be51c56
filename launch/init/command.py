"""`shardtune init`: writes a commented settings file, from arguments or from another trainer's file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.config.help_text import show_help
from launch.config.user_files import YAML_SUFFIXES
from launch.config.verb_arguments import (
    VerbArguments,
    asks_for_help,
    flag,
    forwarded_settings,
    help_rows,
    option,
    read_arguments,
)
from launch.output import print_json
from strategies.errors import ConfigError, StorageError, key_of_problem

if TYPE_CHECKING:
    from launch.config.importers.conversion import ConvertedSettings


@dataclass(kw_only=True)
class InitArguments(VerbArguments):
    """What `shardtune init` takes."""

    to: Path = option(
        "the file to write; an existing file is never overwritten",
        example="my.yaml",
        advice_if_missing="name the file to write, as in to=my.yaml",
    )
    source: str | None = option("a settings file of another trainer, to convert", key="from", example="axolotl.yml")
    settings: list[str] = forwarded_settings()
    as_json: bool = flag("print the answer as JSON, for a script", key="--json")


USAGE = f"""usage: shardtune init model.path=<model> data.path=<data> [key=value ...] to=my.yaml
       shardtune init from=<file of another trainer> [key=value ...] to=my.yaml

  shardtune init model.path=models/smollm2 data.path=train.jsonl tuning=lora to=my.yaml
  shardtune init from=axolotl.yml to=my.yaml
  shardtune init from=ds_config.json model.path=models/llama data.path=train.jsonl budget.epochs=1 to=my.yaml

init writes a settings file for `shardtune train my.yaml`. The file sets what you typed. It also lists the settings
that people change most, as comments with their meaning and default.

from= converts a file of axolotl, LLaMA-Factory, Hugging Face's Trainer or TRL (YAML), or of DeepSpeed (JSON). Settings
that you type override that file. A setting that has no equal here is listed with the reason, on the screen and at the
end of the new file.

{help_rows(InitArguments)}"""
ANSWER_WIDTH_COLUMNS = 80
"""Columns of the answer in a terminal."""
HOW_TO_EDIT = [
    "A setting behind a `#` has the value shown unless it is set: remove the mark to set it. All are in docs/config.md."
]
"""Lines at the top of each file."""
NOT_NEEDED_TITLE = "needs no setting here"
"""Title of the settings of another trainer that a run does without."""


@dataclass(slots=True)
class InitResult:
    """The file that was written, and what the user should know about it."""

    written_file: str
    settings: dict[str, Any]
    """The settings of the file, by full key, the choices of groups included."""
    converted: ConvertedSettings | None = None
    problems_to_settle: list[str] = field(default_factory=list)
    """Problems for which `train` would refuse the file as it is; the user has to settle them."""
    overridden_names: list[str] = field(default_factory=list)
    """Settings of the other trainer's file that a setting of the command line overrides."""


class ReportSection(NamedTuple):
    """What became of some settings of another trainer's file, for the screen and for the end of the new file."""

    title: str
    entries: list[str]


def main(argv: list[str]) -> int:
    """Run `shardtune init` with the arguments `argv`: write a settings file, and print what is in it; returns the exit code.

    The file comes from another trainer's file, or from settings on the command line alone. Raises ConfigError or StorageError.
    """
    if asks_for_help(argv):
        show_help(USAGE)
        return 0
    arguments, problems = read_arguments("init", InitArguments, argv)
    if arguments.to is not None:
        problems += _target_file_problems(arguments.to)
    if problems:
        raise ConfigError(problems)
    if arguments.source is not None:
        result, contents = _file_from_other_trainer(arguments.source, arguments.settings, arguments.to)
    else:
        result, contents = _file_from_settings(arguments.settings, arguments.to)
    _write_new_file(arguments.to, contents)
    if arguments.as_json:
        print_json(init_result_as_json(result))
    else:
        print("\n".join(init_result_lines(result)))
    return 0


def _target_file_problems(target: Path) -> Iterator[str]:
    """Error messages for a file that cannot be written as `to=`: a wrong suffix, an existing file, no directory for it."""
    if target.suffix not in YAML_SUFFIXES:
        yield f"to={target}: must end in .yaml, so that `shardtune train {target}.yaml` takes it"
    if target.exists() or target.is_symlink():
        yield f"to={target}: is there already, and is not overwritten; name another file, or remove it"
    if not target.parent.is_dir():
        yield f"to={target}: there is no directory {target.parent}; make it first"


def _file_from_settings(arguments: list[str], target: Path) -> tuple[InitResult, str]:
    """Make the settings file from settings of the command line alone: (result for the screen, text of the file).

    `target`: the file, which its text names. Raises ConfigError if a run could not start with the settings.
    """
    from launch.config.compose import compose_config

    _raise_if_any_reset(arguments)
    # Raises ConfigError for problems; the configuration itself is not needed.
    compose_config(arguments)
    head_sentences = [
        f"Settings of a run, written by `shardtune init`. Train with: shardtune train {target}",
        *HOW_TO_EDIT,
    ]
    return _build_settings_file(arguments, target, head_sentences, converted=None)


def _file_from_other_trainer(source: str, cli_settings: list[str], target: Path) -> tuple[InitResult, str]:
    """Make the settings file from the file `source` of another trainer: (result for the screen, text of the file).

    `cli_settings`: settings of the command line, which override what is in it.

    A setting of the other file that cannot be used here is left out, and listed with its reason. The rest may still have problems
    for which a run is refused, such as a missing budget: they are listed too, and do not keep the file from being written. Raises
    ConfigError if the file cannot be read, or a setting of the command line cannot be used.
    """
    from launch.config.compose import compose_config
    from launch.config.hints import num_requested_ranks
    from launch.config.importers.files import convert_settings_file

    _raise_if_any_reset(cli_settings)
    values_by_key = dict(setting.partition("=")[::2] for setting in cli_settings)
    # The number of ranks is needed, because the other trainer's batch is that of a rank, and ours of all.
    ranks = num_requested_ranks(values_by_key, {})
    converted = convert_settings_file(Path(source), ranks)
    overridden_names = _drop_overridden_settings(converted, cli_settings)
    arguments = _overrides_that_compose(converted, cli_settings)
    problems_to_settle: list[str] = []
    try:
        # Checks too what a run needs beyond single settings, which `_overrides_that_compose` does not.
        compose_config(arguments)
    except ConfigError as error:
        problems_to_settle = error.problems
    head_sentences = [
        f"Settings of a run, written by `shardtune init from={source}`, a file of {converted.trainer}. Train with: shardtune "
        f"train {target}",
        "A comment behind a setting says what it was there. What has no equal here is listed at the end.",
        *HOW_TO_EDIT,
    ]
    return _build_settings_file(
        arguments,
        target,
        head_sentences,
        converted=converted,
        problems_to_settle=problems_to_settle,
        overridden_names=overridden_names,
    )


def _overrides_that_compose(converted: ConvertedSettings, cli_settings: list[str]) -> list[str]:
    """Find the settings of the other trainer's file that can be used here.

    Returns them, then those of the command line, as overrides (`key=value`). Those that cannot be used are withdrawn from
    `converted`, each with its reason, until the rest composes to a configuration. Raises ConfigError if a setting of the command
    line cannot be used.
    """
    from launch.config.compose import compose_config

    # Repeated, because a value that could not be read may have hidden a problem of another setting.
    while True:
        file_overrides = _escaped_overrides_by_key(converted)
        arguments = [f"{key}={value}" for key, value in file_overrides.items()] + cli_settings
        try:
            compose_config(arguments, check=False)
        except ConfigError as error:
            problems = error.problems
        else:
            return arguments
        reason_by_key: dict[str, str] = {}
        for problem in problems:
            key = key_of_problem(problem)
            if key in file_overrides:
                # The reason is the message without the `key=value: ` that it begins with.
                without_key = problem.removeprefix(f"{key}={file_overrides[key]}").removeprefix(key)
                reason_by_key[key] = without_key.removeprefix(": ")
        if not reason_by_key:  # then the problems are those of the command line
            raise ConfigError(problems)
        for key in [key for key in file_overrides if key in reason_by_key]:
            converted.withdraw(key, reason_by_key[key])


def _raise_if_any_reset(arguments: list[str]) -> None:
    """Raise ConfigError for arguments such as `~optim.lr`, which reset a setting of an experiment file."""
    resets = [argument for argument in arguments if argument.startswith("~")]
    if resets:
        raise ConfigError([f"{argument}: a new file has nothing to go back from; leave it out" for argument in resets])


def _escaped_overrides_by_key(converted: ConvertedSettings) -> dict[str, str]:
    """Values by key from the other trainer's file. `${...}` in them is escaped, so that it reads no variables of this machine."""
    from trainer.reporting.settings_file import escape_interpolations

    return {key: escape_interpolations(value) for key, value in converted.overrides.items()}


def _drop_overridden_settings(converted: ConvertedSettings, cli_settings: list[str]) -> list[str]:
    """Remove from the converted file what `cli_settings` override: the same key, another budget, other data.

    Returns the names that these settings have in the other trainer's file, to tell the user.
    """
    cli_keys = {argument.lstrip("+").partition("=")[0] for argument in cli_settings if "=" in argument}
    has_budget = any(key.startswith("budget.") for key in cli_keys)
    has_sources = any(key.startswith("data.sources.") for key in cli_keys)
    replaced: list[str] = []
    for key in list(converted.overrides):
        is_overridden = (
            key in cli_keys
            or (key.startswith("budget.") and has_budget)
            or (key.startswith("data.sources.") and "data.path" in cli_keys)
            or (key == "data.path" and has_sources)
            or (key == "data.eval_share" and "data.eval_path" in cli_keys)
        )
        if is_overridden:
            del converted.overrides[key]
            replaced += [str(source) for source in converted.sources_by_key.pop(key)]
    return replaced


def _build_settings_file(
    arguments: list[str],
    target: Path,
    head_sentences: list[str],
    *,
    converted: ConvertedSettings | None,
    problems_to_settle: Sequence[str] = (),
    overridden_names: Sequence[str] = (),
) -> tuple[InitResult, str]:
    """Build (result for the screen, text of the settings file) from settings that compose to a configuration. Writes nothing.

    `arguments`: the settings, as `key=value`.
    `head_sentences`: those at the top of the file.
    `converted`: the other trainer's file, of which the end of the new file lists what has no equal here; None without one.
    `problems_to_settle`: listed there too.
    `overridden_names`: for the result alone.
    """
    from launch.config.overrides import parse_overrides
    from launch.init.file import comment_lines_of_sentences, settings_file_text

    parsed = parse_overrides(arguments)
    foreign_text_by_key = {}  # such as {"optim.lr": "learning_rate: 2e-5"}
    if converted is not None:
        foreign_text_by_key = {key: "; ".join(map(str, sources)) for key, sources in converted.sources_by_key.items()}
    tail = _closing_sentences(converted, problems_to_settle)
    contents = settings_file_text(
        comment_lines_of_sentences(head_sentences), parsed, foreign_text_by_key, comment_lines_of_sentences(tail)
    )
    settings: dict[str, Any] = dict(parsed.choices)
    for setting in parsed.values:
        settings[setting.key.removesuffix("_")] = setting.value  # keys that are a Python keyword end with _ in the code
    result = InitResult(
        str(target),
        settings,
        converted,
        problems_to_settle=list(problems_to_settle),
        overridden_names=list(overridden_names),
    )
    return result, contents


def _closing_sentences(converted: ConvertedSettings | None, problems_to_settle: Sequence[str]) -> list[str]:
    """Sentences for the end of the file: problems for the user to solve, and what of the other file has no equal here.

    Empty for a file that was not converted (`converted` is None).
    """
    if converted is None:
        return []
    lines: list[str] = []
    for section in _report_sections(converted, problems_to_settle):
        lines += ["", f"{section.title}:", *(f"- {entry}" for entry in section.entries)]
    return lines[1:]  # an empty line stands between sections, not before the first one


def _report_sections(converted: ConvertedSettings, problems_to_settle: Sequence[str]) -> list[ReportSection]:
    """Sort what the user should know about a converted file into sections, the most important first.

    Sections without an entry are left out. Settings without a value are in the other file, but empty there. Remarks: settings
    that were taken, and mean something a little different here.
    """
    names_without_value = ", ".join(converted.names_without_value)
    sections = [
        ReportSection("to settle before it trains", list(problems_to_settle)),
        ReportSection("without a value there, so left out", [names_without_value] if names_without_value else []),
        ReportSection(NOT_NEEDED_TITLE, list(map(str, converted.not_needed))),
        ReportSection("taken, with a difference", list(map(str, converted.remarks))),
        ReportSection("no equal here", list(map(str, converted.unsupported))),
    ]
    return [section for section in sections if section.entries]


def _write_new_file(path: Path, contents: str) -> None:
    """Write a file that must not exist yet. Raises ConfigError if it does, StorageError if it cannot be written."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(contents)
    except FileExistsError as error:
        raise ConfigError(f"to={path}: is there already, and is not overwritten; name another file") from error
    except OSError as error:
        raise StorageError(f"to={path}: cannot be written ({error.strerror})") from error


def init_result_as_json(result: InitResult) -> dict[str, Any]:
    """What `init --json` prints: the file, its settings and, for a converted file, what became of each setting.

    Scripts read these keys, so they stay as they are.
    """
    answer: dict[str, Any] = {"to": result.written_file, "settings": result.settings}
    converted = result.converted
    if converted is not None:
        answer |= {
            "trainer": converted.trainer,
            "origin": {key: list(map(str, sources)) for key, sources in converted.sources_by_key.items()},
            "no_equal": list(map(asdict, converted.unsupported)),
            "differs": list(map(asdict, converted.remarks)),
            "needless": list(map(asdict, converted.not_needed)),
            "empty": converted.names_without_value,
            "replaced": result.overridden_names,
            "to_settle": result.problems_to_settle,
        }
    return answer


def init_result_lines(result: InitResult) -> list[str]:
    """What `init` prints, in 80 columns: the file, the command that trains with it, and what to know of a converted file."""
    converted = result.converted
    trainer_text = f" of {converted.trainer}" if converted else ""
    lines = [
        f"{result.written_file}: written, {len(result.settings)} settings{trainer_text}",
        f"  shardtune train {result.written_file}",
    ]
    if converted is None:
        return lines
    sections = _report_sections(converted, result.problems_to_settle)
    if result.overridden_names:
        sections.insert(0, ReportSection("typed instead", result.overridden_names))
    for section in sections:
        title = section.title
        entries = section.entries
        if title == NOT_NEEDED_TITLE:  # only the names, because there are usually dozens; the file has the reasons
            title = f"{title} (why: {result.written_file})"
            entries = [", ".join(note.setting for note in converted.not_needed)]
        lines.append(f"{title}:")
        for entry in entries:
            lines += _wrap_entry(entry)
    if not converted.unsupported:
        lines.append("everything in it has an equal here")
    return lines


def _wrap_entry(entry: str) -> list[str]:
    """Wrap an entry of a section into lines of at most `ANSWER_WIDTH_COLUMNS` columns; names and paths are never broken."""
    return textwrap.wrap(
        entry,
        ANSWER_WIDTH_COLUMNS,
        initial_indent="  ",
        subsequent_indent="    ",
        break_on_hyphens=False,
        break_long_words=False,
    )
