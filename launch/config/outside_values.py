"""Values of a configuration that reach out of its run: the overrides that allow each, and the key that remembers it.

To reach out is to run code, read or write files elsewhere, or talk to a server or tracker. Verbs that read a run use such a
value only if this user typed it once (`launch.config.read_run`): the run may be somebody else's.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.code_digest import NoDigest, local_model_directory, model_code_digest, task_code_digest
from strategies.settings import Reach
from trainer.config.reach import GROUPS_OF_EACH_START, USER_NAMED_TABLES, reach_of
from trainer.config.resuming import default_settings, flatten_settings, settings_as_dict
from trainer.data.read.paths import is_hub_path, is_remote_address
from trainer.rollout.rewards.copies import code_digest

if TYPE_CHECKING:
    from trainer.config.run import RunConfig

HARNESS_KIND = "lm_eval"
"""The kind of task whose YAML may name functions."""
EMPTY_VALUES: tuple[Any, ...] = (None, False, "", [], {})
"""Values with which no setting reaches out."""
SILENT_TRACKER_MODES = ("auto", "disabled")
"""Values of a tracker's switch with which only a tracker of the reader's own choice hears of the run."""


@dataclass(frozen=True, slots=True)
class ValueNeedingConsent:
    """A value of a run that reaches out of it, such as an address that data would be sent to: the user must have typed it once.

    It has several settings if they only mean something together.
    """

    reach: Reach
    """In which way it reaches out: it runs code, sends to an address, reads a file, and so on."""
    settings: dict[str, Any]
    """The settings with their values, by full key. A user allows the value by setting them on the command line."""
    identity: dict[str, Any] | None
    """What the value is remembered by once the user has typed it; None if it cannot be told from another value."""
    effect: str
    """What it would do, for messages that begin with "it": `sends rows and answers to that address`."""

    @property
    def overrides(self) -> list[str]:
        """The overrides that allow it, such as `model.trust_remote_code=true`."""
        return [f"{key}={_cli_text(value)}" for key, value in self.settings.items()]

    @property
    def shell_text(self) -> str:
        """The overrides that allow it, quoted for a shell and without control characters."""
        return " ".join(shell_argument(override) for override in self.overrides)

    def is_set_by_user(self, cli_keys: set[str]) -> bool:
        """Whether the user allows the value by the command line: each of its settings is set there, or a table that holds it.

        `cli_keys`: the full keys that the command line sets, such as {"evaluation.judge"}.
        """
        return all(self._is_set_by(key, cli_keys) for key in self.settings)

    def _is_set_by(self, key: str, cli_keys: set[str]) -> bool:
        return any(key == cli_key or key.startswith(f"{cli_key}.") for cli_key in cli_keys)


def shell_argument(override: str) -> str:
    """An override quoted for a shell. One with control characters becomes `$'...\\x1b...'`, which is printable."""
    if override.isprintable():
        return shlex.quote(override)
    escaped = "".join(_escaped_for_shell(char) for char in override)
    return f"$'{escaped}'"


def _escaped_for_shell(char: str) -> str:
    """A character as it stands within `$'...'` of a shell: a quote as `\\'`, the escape character as `\\x1b`."""
    if char in "\\'":
        return f"\\{char}"
    if char.isprintable():
        return char
    return "".join(f"\\x{byte:02x}" for byte in char.encode(errors="surrogateescape"))


def _cli_text(value: Any) -> str:
    """Write a value as it is typed behind `key=` on the command line: None as `null`, ["a b"] as `['a b']`.

    A dictionary is written as JSON.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        entries = [_cli_list_entry(entry) for entry in value]
        return f"[{','.join(entries)}]"
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value)


def _cli_list_entry(value: Any) -> str:
    """A value as an entry of a list on the command line, in quotes if it has characters that could separate entries."""
    text = _cli_text(value)
    needs_no_quotes = all(char.isalnum() or char in "/._-" for char in text)
    return text if needs_no_quotes else f"'{text}'"


def values_needing_consent(config: RunConfig) -> list[ValueNeedingConsent]:
    """Every value of a run's configuration that reaches out of the run: code that would run, files, addresses and trackers.

    Somebody else may have written the configuration, so a command that reads it uses such a value only if this user typed it
    once. For example the file in `objective.rewards.x.function`, which is Python code that the run executes.
    """
    values: list[ValueNeedingConsent] = []
    for key, value in _settings_with_outside_effect(config).items():
        values += _outside_values_of_setting(config, key, value, reach_of(key))
    return values


def reset_to_default(config: RunConfig, key: str) -> None:
    """Set one setting of a configuration to its default, because its value reaches out of the run and nobody has allowed it.

    `key`: its full key, such as `evaluation.tasks.facts.path`.
    Every dataclass that holds such a setting can be built without arguments.
    """
    parent: Any = config
    *parent_names, field_name = key.split(".")
    for name in parent_names:
        # A table is a dictionary of dataclasses, whose names the user chose.
        parent = _table_entry(parent, name) if isinstance(parent, dict) else getattr(parent, name)
    default = getattr(type(parent)(), field_name)
    setattr(parent, field_name, default)


def _table_entry(table: dict[str, Any], name: str) -> Any:
    """The entry of a table by its name, or by its number if `_with_undotted_names` has numbered the entries."""
    return table[name] if name in table else list(table.values())[int(name)]


def _settings_with_outside_effect(config: RunConfig) -> dict[str, Any]:
    """The settings of a run with an effect outside of it, by full key: {"data.path": "/data/a.jsonl", ...}.

    They run code, read or write files elsewhere, or talk to a server or tracker. Left out are settings that are empty or at their
    default, those that each start sets anew (such as `launcher.*`), and trackers that send nothing.
    """
    defaults = default_settings(config)
    settings_with_effect = {}
    for key, value in flatten_settings(_with_undotted_names(settings_as_dict(config))).items():
        if value in EMPTY_VALUES or value == defaults.get(key):
            continue
        # The groups `run` and `launcher` are never taken from somebody's run.
        if key.partition(".")[0] in GROUPS_OF_EACH_START:
            continue
        reach = reach_of(key)
        is_silent_tracker = reach is Reach.tracker and value in SILENT_TRACKER_MODES
        only_describes_run = reach is Reach.describes
        if not only_describes_run and not is_silent_tracker:
            settings_with_effect[key] = value
    return settings_with_effect


def _with_undotted_names(tree: dict[str, Any]) -> dict[str, Any]:
    """Give numbers for names to the entries of each table that has a dot in a name, so that full keys can be split at dots.

    Otherwise a task that is called `x.kind` would be taken for the setting `kind` of a task `x`.
    `tree`: a configuration as nested dictionaries, which is changed and returned.
    """
    for table in USER_NAMED_TABLES:
        group, _, name = table.partition(".")
        entries = tree[group].get(name) or {}
        if any("." in entry for entry in entries):
            tree[group][name] = {str(number): settings for number, settings in enumerate(entries.values())}
    return tree


def _outside_values_of_setting(config: RunConfig, key: str, value: Any, reach: Reach) -> Iterator[ValueNeedingConsent]:
    """What one setting reaches outside of its run, as values that need the user's consent, each with how it is remembered.

    `key`, `value`: the setting.
    `reach`: in which way it reaches out, such as `Reach.code`.
    Several values come from a list of paths, or from a flag that allows several things; none if the setting turns out to do
    nothing.
    """
    if reach is Reach.address:
        yield from _server_address_values(config, key)
    elif reach is Reach.code and key.endswith(".function"):
        yield _reward_code_value(key, str(value))
    elif reach is Reach.code:
        yield from _model_code_values(config, key)
    elif reach is Reach.network:
        yield from _network_values(config, key)
    elif reach is Reach.file:
        yield from _file_values(config, key, value)
    elif reach is Reach.place:
        identity = {key: _absolute_path(value)}
        yield ValueNeedingConsent(reach, settings={key: value}, identity=identity, effect=f"writes into {value}")
    else:  # Reach.tracker
        effect = "sends to a tracker, or decides who gets its messages"
        yield ValueNeedingConsent(reach, settings={key: value}, identity={key: value}, effect=effect)


def _server_address_values(config: RunConfig, key: str) -> Iterator[ValueNeedingConsent]:
    """The value that needs consent for a server: its address and the environment variable sent to it as its API key, as one.

    The user consents to both together, and the consent is remembered for exactly this pair: the variable must not go to another
    address.
    `key`: a setting of the server, such as `evaluation.judge.url`; any that does not end in `.url` gives nothing.
    """
    group, _, name = key.rpartition(".")
    if name != "url":
        return  # the variable's name (`.key_env`) is part of the value of the address that it is sent to
    server = getattr(config.evaluation, group.rpartition(".")[2])
    settings = {f"{group}.url": server.url}
    sent_data = "rows and answers"
    if server.key_env is not None:
        settings[f"{group}.key_env"] = server.key_env
        sent_data += f", and your environment variable {server.key_env}"
    effect = f"sends {sent_data} to that address"
    yield ValueNeedingConsent(Reach.address, settings=settings, identity=settings, effect=effect)


def _reward_code_value(key: str, function: str) -> ValueNeedingConsent:
    """The value that needs consent for a reward function: the Python file that the run would execute.

    `key`: the setting, and `function`: its value, `FILE.py:NAME`. The consent is remembered for the content of the file and of
    what it imports from beside, not for its path: changed code is asked for again.
    """
    file = function if function.endswith(".py") else function.rpartition(":")[0]
    identity = reward_code_identity(Path(file).expanduser().resolve())
    return ValueNeedingConsent(
        Reach.code, settings={key: function}, identity=identity, effect=f"runs the Python code in {file}"
    )


def reward_code_identity(file: Path) -> dict[str, Any] | None:
    """What a reward file is remembered by: {"code": SHA-256}; None if the file cannot be read, since it then runs nothing."""
    with suppress(OSError):
        return {"code": code_digest(file)}
    return None


def _models_with_code(config: RunConfig, flag_key: str) -> list[tuple[str, str | None]]:
    """The models, as (path or hub id, revision), whose Python code a flag such as `model.trust_remote_code` lets run.

    For `flag_key` `model.trust_remote_code` these are the model and its tokenizer, otherwise the teacher of the objective.
    """
    if flag_key == "model.trust_remote_code":
        models = [(config.model.path, config.model.revision), (config.model.tokenizer, config.model.revision)]
    else:
        objective: Any = config.objective
        models = [(objective.teacher.path, objective.teacher.revision)]
    return [(path, revision) for path, revision in dict.fromkeys(models) if path is not None]


def _model_code_values(config: RunConfig, key: str) -> Iterator[ValueNeedingConsent]:
    """The Python code that a flag such as `model.trust_remote_code` lets run, as values that need the user's consent.

    `key`: the flag, for the code of model and tokenizer, or for that of a teacher model.
    For each of these models:

    - a value for code that can still be fetched, which is remembered by the path of the model;
    - a value for code on this machine, which is remembered by its digest. Code without a digest is not remembered (identity
      None).

    None of the two if there is no code.
    """
    for path, revision in _models_with_code(config, key):
        directory = local_model_directory(config.model, path, revision)
        if config.model.download and not Path(path).expanduser().is_dir():
            # Even if code is in the cache, files that are missing there are still fetched.
            effect = f"fetches and runs the Python code of {path}"
            yield ValueNeedingConsent(Reach.code, settings={key: True}, identity={"code_of": path}, effect=effect)
        if directory is None:
            continue  # there is nothing here that could be run
        effect = f"runs the Python code in {path}"
        # By its digest, because other code at the same path must be allowed anew.
        try:
            digest = model_code_digest(directory, download=config.model.download)
        except NoDigest:
            yield ValueNeedingConsent(Reach.code, settings={key: True}, identity=None, effect=effect)
            continue
        if digest is not None:
            yield ValueNeedingConsent(Reach.code, settings={key: True}, identity={"code": digest}, effect=effect)


def _network_values(config: RunConfig, flag_key: str) -> Iterator[ValueNeedingConsent]:
    """What a flag allows to be fetched over the network, as one value that needs consent for each model or data set.

    By `flag_key`:

    - `model.download`: the model, tokenizer and teacher, as far as they are no directory here;
    - `data.remote`: addresses of data;
    - any other flag: data sets of the hub.
    """
    sources: list[str]
    if flag_key == "model.download":
        names = [config.model.path, config.model.tokenizer]
        if hasattr(config.objective, "teacher"):
            names.append(config.objective.teacher.path)
        sources = []
        for name in names:
            if name is not None and not Path(name).expanduser().is_dir():
                sources.append(str(name))
    elif flag_key == "data.remote":
        sources = [path for path in _data_paths(config) if is_remote_address(path)]
    else:
        sources = [path for path in _data_paths(config) if is_hub_path(path)]
    for source in dict.fromkeys(sources):
        effect = f"fetches {source} over the network"
        yield ValueNeedingConsent(Reach.network, settings={flag_key: True}, identity={flag_key: source}, effect=effect)


def _data_paths(config: RunConfig) -> Iterator[str]:
    """Every path of training data, evaluation data and tasks in a configuration, as typed: local, an address or `hub:...`."""
    data = config.data
    path_values = [data.path, data.eval_path, data.test_path, data.decontamination.paths]
    path_values += [source.path for source in data.sources.values()]
    path_values += [task.path for task in config.evaluation.tasks.values()]
    for path_value in path_values:
        yield from _paths_in_value(path_value)


def _file_values(config: RunConfig, key: str, value: Any) -> Iterator[ValueNeedingConsent]:
    """The files that a setting names, as values that need consent, since their texts would stand in what a command writes.

    `key`, `value`: the setting; the value may be one path, a list or a dictionary of paths.

    - The path of a task of lm_eval (EleutherAI's harness): a value that runs code, because the YAML there names functions.
    - An option of a task that names no file: nothing.
    - Any other setting: a value that reads the file.
    """
    group, _, name = key.rpartition(".")
    task_name = key.split(".")[2] if key.startswith("evaluation.tasks.") else None
    task = config.evaluation.tasks.get(task_name) if task_name is not None else None
    if task is not None and task.kind == HARNESS_KIND and name == "path":
        for path in _paths_in_value(value):
            yield _task_code_value(key, path)
        return
    if task is not None and ".options" in group and name not in _file_option_names(task.kind):
        return
    # Remembered without the name of the task, so that the same file in another task needs no new override.
    shared_key = key if task is None else key.replace(f".{task_name}.", ".*.", 1)
    for path in _paths_in_value(value):
        effect = f"reads your file {path}, whose texts then stand in what is written"
        identity = {shared_key: _absolute_path(path)}
        yield ValueNeedingConsent(Reach.file, settings={key: value}, identity=identity, effect=effect)


def _file_option_names(kind: str) -> tuple[str, ...]:
    """The options of a kind of task that name a file."""
    from trainer.evaluation.tasks.registry import TASK_KINDS

    task = TASK_KINDS.get(kind)
    return () if task is None else task.file_options


def _task_code_value(key: str, path: str) -> ValueNeedingConsent:
    """The value that needs consent for an lm_eval task: the Python functions that its YAML names, which would run.

    `key`: the setting that names the task.
    `path`: its YAML, or a directory of them.
    The consent is remembered for the content of the code. If that cannot be read whole it is not remembered (identity None), so
    the user is asked each time.
    """
    identity: dict[str, Any] | None
    try:
        identity = {"code": task_code_digest(Path(path).expanduser())}
    except NoDigest:
        identity = None
    effect = f"runs the functions that the task in {path} names"
    return ValueNeedingConsent(Reach.code, settings={key: path}, identity=identity, effect=effect)


def _paths_in_value(value: Any) -> Iterator[str]:
    """Each path in the value of a setting that may be one path, a list of paths, or a dictionary whose values are paths."""
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _paths_in_value(entry)
    elif value is not None:
        yield str(value)


def _absolute_path(path: str) -> str:
    """The absolute path of a file or directory. An address, or the name of a data set of the hub, is returned as it is."""
    if is_remote_address(path) or is_hub_path(path):
        return path
    return str(Path(path).expanduser().resolve())
