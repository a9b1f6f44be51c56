"""Reads a run directory's configuration for verbs. Values that reach out of the run count only if this user typed them.

A run directory may be somebody else's, so its config.yaml is data and gives no orders: it must not send this user's
environment variables, run code, read files or write directories. The owner of the directory proves nothing: a
downloaded run belongs to this user, and a run made in a container may not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.config import trusted_values
from launch.config.outside_values import (
    ValueNeedingConsent,
    reset_to_default,
    reward_code_identity,
    shell_argument,
    values_needing_consent,
)
from strategies.errors import ConfigError
from strategies.settings import Reach
from trainer.config.reach import GROUPS_OF_EACH_START, reach_of
from trainer.config.resuming import flatten_settings, settings_as_dict
from trainer.rollout.rewards.copies import function_locations
from trainer.session.base_files import pin_base_to_recorded_commit

if TYPE_CHECKING:
    from trainer.config.run import RunConfig
    from trainer.objectives.rollouts import RewardEntry

TASKS_PREFIX = "evaluation.tasks."
WRITTEN_BY_EVALUATION = ("evaluation", "against", "reports")
"""Directories of a run that an evaluation writes into."""
UsesValuePredicate = Callable[[ValueNeedingConsent, "RunConfig"], bool]
"""Whether a verb uses a value of a run's configuration."""


def uses_model_alone(value: ValueNeedingConsent, config: RunConfig) -> bool:
    """Whether a command that loads a run's model and reads no data, such as `export`, uses a value of its configuration.

    `value`: one that reaches out of the run.
    Such a command uses the model's own code and its chat template. `config` is not read: other predicates of this kind need it.
    """
    if value.reach is Reach.code:  # neither tasks nor rewards run
        return not any(key.startswith(("evaluation.", "objective.rewards.")) for key in value.settings)
    return "model.chat_template" in value.settings


@dataclass(frozen=True, slots=True)
class RunReader:
    """A verb such as `export` that reads a run, and which of the run's values it uses."""

    command: list[str]
    """The command line: the verb, then its arguments."""
    uses: UsesValuePredicate
    prefix: str = ""
    """What stands before overrides that allow a value, if the command names several runs: `from.` or `against.`."""
    own_groups: frozenset[str] = frozenset()
    """Groups of settings that the verb takes as its own arguments."""
    settled_groups: frozenset[str] = frozenset()
    """Groups whose values do not come from this run. The verb has checked before that they may be used."""


def is_allowing_argument(override: str) -> bool:
    """Whether an override `key=value` sets something that reaches out of a run, so that typing it beside a run allows it."""
    key, assigned, _ = override.partition("=")
    if not assigned or key.partition(".")[0] in GROUPS_OF_EACH_START:
        return False
    try:
        return reach_of(key) is not Reach.describes
    except KeyError:  # no setting
        return False


def split_allowing_arguments(overrides: list[str], prefix: str = "") -> tuple[list[str], list[str]]:
    """Split a command's overrides in two: those that allow a value of the run it reads, without their `prefix`, and all others.

    An allowing override sets something that reaches out of the run, such as `model.trust_remote_code=true`.
    `prefix`: such as `from.`, for a command that names several runs.
    """
    allowing: list[str] = []
    other_arguments: list[str] = []
    for override in overrides:
        if override.startswith(prefix) and is_allowing_argument(override.removeprefix(prefix)):
            allowing.append(override.removeprefix(prefix))
        else:
            other_arguments.append(override)
    return allowing, other_arguments


def read_run(
    run_dir: Path,
    reader: RunReader,
    overrides: list[str],
    change: Callable[[RunConfig, list[str]], RunConfig] = lambda config, _: config,
) -> RunConfig:
    """Read a run's configuration for a command such as `export`, without letting it do what this user never allowed.

    The run may be somebody else's. A value that reaches out of it runs code, reads or writes files elsewhere, or talks to a
    server. What happens to such a value:

    - The user has set it, now or earlier: it stays, and is remembered.
    - The command uses it: ConfigError, which names the overrides that allow it.
    - The command does not use it: it is set to its default, and a line says so.

    `reader`: the command, and which values it uses.
    `overrides`: the settings that the user has typed for this command. Those that only allow a value of the run are applied here;
        `change` gets the others and applies them.
    """
    from launch.config.compose import keys_set_by, load_frozen_config

    allowing_arguments, other_arguments = _split_overrides(overrides, reader.own_groups)
    frozen = load_frozen_config(run_dir / "config.yaml")
    # First, because another commit of a model on the hub may have other code, and `values_needing_consent` looks at the code.
    pin_base_to_recorded_commit(frozen, run_dir, may_fetch=False)
    # Consent is judged after the user's changes, which may replace a value or bring one in.
    config = change(_with_allowing_arguments(frozen, allowing_arguments), other_arguments)

    allowed_keys = keys_set_by(overrides) | reader.settled_groups
    allowed_values: list[ValueNeedingConsent] = []
    refused_values: list[ValueNeedingConsent] = []
    unused_values: list[ValueNeedingConsent] = []
    for value in values_needing_consent(config):
        is_of_task = any(key.startswith(TASKS_PREFIX) for key in value.settings)
        if value.is_set_by_user(allowed_keys) or trusted_values.was_value_allowed_before(value.identity):
            allowed_values.append(value)
        elif reader.uses(value, config):
            refused_values.append(value)
        elif not is_of_task:  # a value of a task may stay, since a verb that does not use it runs no task
            unused_values.append(value)
    if refused_values:
        raise ConfigError(_refusal_message(run_dir, reader, refused_values))
    for value in unused_values:
        for key in value.settings:
            reset_to_default(config, key)

    # Rank 0 alone remembers and prints, since every rank of a job reads the run.
    if os.environ.get("RANK", "0") == "0":
        trusted_values.remember_values(allowed_values)
        _print_unused_settings(run_dir, unused_values)
    return config


def use_trusted_reward_copies(config: RunConfig, run_dir: Path, overrides: list[str]) -> None:
    """Point the rewards in `config` to the copies of their files in the run's directory, by which its training was scored.

    A run copies its reward files, since the originals may change. A copy is used only if this user has allowed its code once,
    because the run may be somebody else's. A reward that the user sets on the command line (`overrides`, such as
    `objective.rewards.maths.function=...`) is left alone.
    """
    rewards: dict[str, RewardEntry] = getattr(config.objective, "rewards", {})
    for name, (file, function) in function_locations(rewards, run_dir).items():
        is_set_by_user = any(override.startswith(f"objective.rewards.{name}.") for override in overrides)
        if not is_set_by_user and trusted_values.was_value_allowed_before(reward_code_identity(file)):
            rewards[name].function = f"{file}:{function}"


def may_write_results(run_dir: Path) -> bool:
    """Whether a command may write results into a run's directory: this user owns it, and no link there leads out of it.

    The links are checked because a downloaded run belongs to this user too, and somebody else may have put links into it.
    """
    is_owner = all(path.stat().st_uid == os.geteuid() for path in (run_dir, run_dir / "config.yaml"))
    return is_owner and not any(contains_link_out_of_run(run_dir / name, run_dir) for name in WRITTEN_BY_EVALUATION)


def contains_link_out_of_run(directory: Path, run_dir: Path) -> bool:
    """Whether `directory`, or anything in it, is a symbolic link to a place outside of the run, where one must not write."""
    resolved_run_dir = run_dir.resolve()
    entries = [directory]
    for parent, folders, files in os.walk(directory):
        entries += [Path(parent, name) for name in (*folders, *files)]
    links = [entry for entry in entries if entry.is_symlink()]
    return any(not link.resolve().is_relative_to(resolved_run_dir) for link in links)


def _split_overrides(overrides: list[str], own_groups: frozenset[str]) -> tuple[list[str], list[str]]:
    """Split the overrides of a command in two: (those that only allow a value of the run, all others).

    `model.trust_remote_code=true` beside an export allows the run's own value. An override of a group that the command takes for
    itself (`own_groups`) is never one that only allows.
    """
    allowing_arguments: list[str] = []
    other_arguments: list[str] = []
    for override in overrides:
        group = override.partition(".")[0]
        if is_allowing_argument(override) and group not in own_groups:
            allowing_arguments.append(override)
        else:
            other_arguments.append(override)
    return allowing_arguments, other_arguments


def _with_allowing_arguments(config: RunConfig, allowing_arguments: list[str]) -> RunConfig:
    """Apply overrides that allow a value of a run, such as `model.trust_remote_code=true`, to the run's configuration.

    Raises ConfigError for an override that names another file than the run has, because that would change the run's result. A
    setting of another reach (code, an address, a place to write) may differ from the run's.
    """
    from launch.config.compose import apply_overrides

    if not allowing_arguments:
        return config
    allowed_config = apply_overrides(config, allowing_arguments)
    run_values = flatten_settings(settings_as_dict(config))
    problems = []
    for key, value in flatten_settings(settings_as_dict(allowed_config)).items():
        run_value = run_values.get(key)
        if value != run_value and reach_of(key) is Reach.file:
            problems.append(f"{key}={value}: the run has {run_value}, which stays; give that, or leave it out")
    if problems:
        raise ConfigError(problems)
    return allowed_config


def _refusal_message(run_dir: Path, reader: RunReader, refused_values: list[ValueNeedingConsent]) -> str:
    """Write the error message about values of a run that this user never typed, with the command that allows them.

    Such a value reaches out of the run: it runs code, reads or writes files elsewhere, or talks to a server.
    `reader`: the command that was typed, which the message repeats with the overrides added.
    """
    # A dictionary as an ordered set, because two values may need the same override.
    allowing_arguments: dict[str, None] = {}
    for value in refused_values:
        for override in value.overrides:
            allowing_arguments[f"{reader.prefix}{shell_argument(override)}"] = None
    typed_command = " ".join(shell_argument(override) for override in reader.command)
    lines = [f"{run_dir}: its config.yaml reaches out of the run, by values that you have not typed before:"]
    lines += dict.fromkeys(f"{value.shell_text}: it {value.effect}" for value in refused_values)
    lines += ["if you trust them, type them once:", f"  shardtune {typed_command} {' '.join(allowing_arguments)}"]
    state_dir = trusted_values.trusted_values_directory()
    if state_dir is not None:
        lines.append(f"what you typed is kept in {state_dir}; in a container, mount that directory")
    return "\n    ".join(lines)


def _print_unused_settings(run_dir: Path, unused_values: list[ValueNeedingConsent]) -> None:
    """Print on stderr which settings of the run are not used, because this user never set them."""
    if not unused_values:
        return
    keys: dict[str, None] = {}  # as an ordered set
    for value in unused_values:
        keys |= dict.fromkeys(value.settings)
    print(f"{run_dir}: not used, since you have not typed it before: {', '.join(keys)}", file=sys.stderr, flush=True)
