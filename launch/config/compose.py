"""Composes the overrides of the command line into one typed, validated and hashed configuration.

All problems are reported together. Freezing the configuration into a run directory is the task of
`launch.config.frozen`, whose functions are also offered here. Composing imports torch at most, never transformers,
peft, datasets, wandb or deepspeed.
"""

from __future__ import annotations

import copy
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from launch.config import hints
from launch.config.broken_files import composition_problem_line, suspected_files_text
from launch.config.choices import (
    CONF_DIR,
    USER_CONFIG_DIRS,
    add_table_entry,
    register_schemas,
    settings_class_of,
    settings_classes_by_group,
)
from launch.config.earlier_overrides import earlier_config_of_same_overrides, keep_first_budget
from launch.config.frozen import ComposedConfig, default_run_dir, is_finished, load_frozen_config
from launch.config.host_devices import device_problems, resolve_auto_for_this_host
from launch.config.known_settings import Setting, find_setting
from launch.config.learning_rate import keep_learning_rate_of_run, learning_rate_problems, set_usual_learning_rate
from launch.config.overrides import describe_type, parse_overrides
from launch.config.parsed_overrides import ParsedOverrides, SettingValue
from launch.config.resume import keep_learning_rate_of_checkpoint
from launch.config.reward_copies import use_copies_of_missing_reward_files
from launch.config.secrets import secret_problems
from strategies.errors import ConfigError, key_of_problem
from trainer.config.resuming import settings_as_dict
from trainer.config.run import TEMPLATE_DATE_KEY, Device, RunConfig
from trainer.config.validate import config_problems
from trainer.export.config import set_default_merge
from trainer.objectives.registry import objective_family
from trainer.optim.schedule import ScheduleConfig
from trainer.reporting.settings_file import escape_interpolations
from trainer.reporting.trackers.environment import wandb_mode_problems
from trainer.tuning.initial_adapter import adopt_adapter_settings

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["ComposedConfig", "compose_config", "default_run_dir", "is_finished", "load_frozen_config"]


def compose_config(overrides: list[str], *, check: bool = True) -> ComposedConfig:
    """Compose the command line of a run into its configuration, fill in what depends on this host, and validate it.

    `overrides`: `key=value` as typed, and settings files such as `my.yaml`.
    `check`: whether to validate; values of a wrong type are refused in any case.
    Raises ConfigError with every problem found.
    """
    use_copies_of_missing_reward_files(overrides)  # first, because a missing file would be a problem of its override
    # Every stage adds to the problems instead of raising, so that the user sees all of them at once.
    parsed = parse_overrides(overrides)
    tree, problems = _compose_choices(parsed.choices)
    problems = parsed.problems + problems
    problems += _apply_values(tree, parsed)
    config = _config_from_tree(tree, problems)
    if config is not None:
        resolve_auto_for_this_host(config)
        _set_dependent_defaults(config, keys_set_by_user={value.key for value in parsed.values})
        if check:
            for problem in _start_problems_adopting_earlier_defaults(config, overrides):
                # `buget.steps=10` is one mistake; that no budget is set follows from it.
                # Nor is it one that a setting is missing which a settings file that cannot be read may well hold.
                is_repeated = repeats_problem_of_override(problem, parsed.probably_meant_keys)
                if not is_repeated and not parsed.explains(problem):
                    problems.append(problem)
    if problems or config is None:
        raise ConfigError([*parsed.empty_file_problems, *problems])
    return ComposedConfig(config, list(overrides))


def _set_dependent_defaults(config: RunConfig, keys_set_by_user: set[str]) -> None:
    """Set the defaults of a composed configuration that depend on its other settings, such as the usual learning rate.

    `keys_set_by_user`: full keys, which settings of an adapter to start from do not replace.
    Notes on what was chosen are added to `config.substitutions`.
    """
    config.substitutions |= adopt_adapter_settings(config.tuning, keys_set_by_user)
    config.substitutions |= set_default_merge(config.export, config.tuning)
    set_usual_learning_rate(config)
    keep_learning_rate_of_checkpoint(config)
    # The metric by which the best checkpoint is told depends on what is trained.
    if config.evaluation.watch is None:
        config.evaluation.watch = objective_family(config.objective).watched_metric


def repeats_problem_of_override(problem: str, probably_meant_keys: set[str]) -> bool:
    """Whether a problem of validation (`budget: set ...`) only repeats that an override could not be used (`buget.steps=10`).

    `probably_meant_keys`: the settings that such overrides were probably meant for. They are unset now, so validation complains
        about them, about settings below them, or about their whole group (`budget`, for `budget.steps`).
    """
    problem_key = key_of_problem(problem)
    groups = {meant_key.rpartition(".")[0] for meant_key in probably_meant_keys if "." in meant_key}
    is_below_meant_key = any(problem_key.startswith(f"{meant_key}.") for meant_key in probably_meant_keys)
    return problem_key in probably_meant_keys or problem_key in groups or is_below_meant_key


def recompose_frozen_config(config: RunConfig, overrides: list[str], allowed_groups: frozenset[str]) -> RunConfig:
    """Put command-line overrides on top of the configuration of a run that exists, for this process with its own devices.

    For commands that use a run, such as an evaluation, perhaps on another machine than it trained on.

    `config`: as the run was started with.
    `allowed_groups`: the groups of settings that overrides may set, such as `launcher`.
    Raises ConfigError with every problem, also for an override of another group. The values are not validated against each other.
    """
    parsed = parse_overrides(overrides)
    composed_tree, problems = _compose_choices(parsed.choices)
    problems += _problems_of_groups(parsed, allowed_groups)

    # The launcher is always this start's, because the run's may be of another machine; other groups only if they are chosen here.
    tree = _frozen_config_as_tree(config)
    for group in {"launcher", *parsed.choices} & {*settings_classes_by_group()}:
        tree[group] = composed_tree[group]
    # The run may have trained elsewhere: this process looks for its own device.
    tree.run.device = Device.auto
    # `substitutions` are what a start chose for settings of `auto`. This start chooses anew, except for the date that the chat
    # template writes, which stays the run's.
    tree.substitutions = {key: note for key, note in config.substitutions.items() if key == TEMPLATE_DATE_KEY}
    if not problems:
        problems = _apply_values(tree, parsed)
    problems = parsed.problems + problems
    recomposed = _config_from_tree(tree, problems)
    if recomposed is None or problems:
        raise ConfigError(problems)
    resolve_auto_for_this_host(recomposed)
    return recomposed


def _problems_of_groups(parsed: ParsedOverrides, allowed_groups: frozenset[str]) -> list[str]:
    """A problem for each override beside an existing run that would set something the run has decided already.

    `parsed`: the overrides, as values and choices. `allowed_groups`: the groups that may be set, such as `launcher`.
    """
    override_by_key = {value.key: value.source_text for value in parsed.values}
    override_by_key |= {group: f"{group}={choice}" for group, choice in parsed.choices.items()}
    problems = []
    for key, override in override_by_key.items():
        if key.split(".")[0] not in allowed_groups:
            problems.append(_unsettable_override_problem(key, override, allowed_groups))
    return problems


def apply_overrides(config: RunConfig, overrides: list[str]) -> RunConfig:
    """A copy of a run's configuration with overrides on top; everything else stays. Raises ConfigError with every problem."""
    parsed = parse_overrides(overrides)
    tree = _frozen_config_as_tree(config)
    problems = parsed.problems or _apply_values(tree, parsed)
    changed_config = _config_from_tree(tree, problems)
    if changed_config is None or problems:
        raise ConfigError(problems)
    return changed_config


def _frozen_config_as_tree(config: RunConfig) -> Any:
    """A run's configuration as an OmegaConf tree, on which overrides can be set.

    `${...}` in its texts is escaped, since somebody else may have written them: OmegaConf would look it up.
    """
    from omegaconf import OmegaConf

    tree = OmegaConf.structured(RunConfig)
    for group in settings_classes_by_group():
        tree[group] = OmegaConf.structured(type(getattr(config, group)))
    return OmegaConf.merge(tree, escape_interpolations(settings_as_dict(config)))


def keys_set_by(overrides: list[str]) -> set[str]:
    """The full keys that command-line overrides set: settings, such as {"optim.lr"}, and tables that they replace or reset."""
    parsed = parse_overrides(overrides)
    value_keys = {value.key for value in parsed.values}
    reset_keys = {key for key, _ in parsed.resets}
    return value_keys | parsed.replaced_tables | reset_keys


def _unsettable_override_problem(key: str, override: str, allowed_groups: frozenset[str]) -> str:
    """Write the message about an override beside an existing run, whose settings are decided: an unknown key, or one that stays.

    `override`: such as `optim.lr=1`, whose key is `key`. `allowed_groups`: the groups that may be set, for the message.
    """
    if find_setting(key) is None and key not in settings_classes_by_group():
        return hints.explain_unknown_key(key, override).problem
    return (
        f"{override}: is the run's, and stays as it was; beside a run one can set {', '.join(sorted(allowed_groups))}"
    )


def _start_problems_adopting_earlier_defaults(config: RunConfig, overrides: list[str]) -> list[str]:
    """Why a run of these overrides would be refused; empty if it may start.

    If an earlier version began a run of the same overrides in this directory, the budget and the learning rate of that run are
    set in `config` before it is judged again: the run is resumed with them, although this version would refuse to begin it.
    """
    problems = start_problems(config)
    if not problems:
        return []
    earlier_config = earlier_config_of_same_overrides(overrides, config.run.dir)
    if earlier_config is None:
        return problems
    keep_first_budget(config, earlier_config)
    keep_learning_rate_of_run(config, earlier_config)
    return start_problems(config, frozen_config=earlier_config)


def start_problems(config: RunConfig, *, frozen_config: RunConfig | None = None) -> list[str]:
    """The problems for which a run of this configuration is refused before anything starts; empty if it may start.

    They are of its values and their combinations, the learning rate, this host's devices, and secrets among the values.
    `frozen_config`: what the run's config.yaml holds already; a secret among its values is not refused again.
    """
    return [
        *config_problems(config, world_size=world_size_of(config)),
        *learning_rate_problems(config),
        *device_problems(config),
        *secret_problems(config, frozen_config),
        *wandb_mode_problems(config.logging, os.environ),
    ]


def world_size_of(config: RunConfig) -> int | None:
    """The number of ranks of the run; None if it is not known.

    In a process that torchrun or SLURM has started, it is that of its job (WORLD_SIZE), otherwise what the launcher will start.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return num_launched_ranks(config)


def num_launched_ranks(config: RunConfig) -> int | None:
    """How many ranks the launcher will start; None if its settings leave the number open."""
    num_nodes = config.launcher.nodes
    ranks_per_node = config.launcher.per_node
    is_known = num_nodes > 0 and ranks_per_node > 0
    return num_nodes * ranks_per_node if is_known else None


def _compose_choices(choices: dict[str, str]) -> tuple[DictConfig, list[str]]:
    """Compose the chosen files of `conf/` into one tree of settings, and return it with a problem for a file that is broken.

    `choices`: by group, such as {"tuning": "lora"}; groups without one have their default.
    A broken settings file of the user (an experiment, say) is a problem; the tree then has the defaults of the code.
    """
    # The cache is asked with the time of each file's last change, so that a changed file is composed anew.
    modification_times = []
    for directory in (CONF_DIR, *USER_CONFIG_DIRS):
        # Choices lie at most one folder deep. A search below would take long if the user's directory is a whole project.
        for pattern in ("*.yaml", "*/*.yaml"):
            for file in directory.glob(pattern):
                if file.exists():
                    modification_times.append((file, file.stat().st_mtime_ns))
    tree, problems = _compose_choices_cached(tuple(choices.items()), tuple(modification_times))
    return copy.deepcopy(tree), list(problems)


@lru_cache(maxsize=64)
def _compose_choices_cached(
    choices: tuple[tuple[str, str], ...], modification_times: tuple[tuple[Path, int], ...]
) -> tuple[DictConfig, list[str]]:
    """Compose the chosen configuration files by Hydra; returns (tree, problems). Callers copy the tree before they change it.

    `choices`: (group, chosen file) pairs, such as (("tuning", "lora"),). If Hydra fails, the tree has the defaults of the code,
        so that the other problems of the command line can still be found.

    Cached because Hydra takes a quarter of a second, a copy a twentieth of that. `modification_times` is unused here: as a part
    of the cache's key it has changed files composed anew.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    register_schemas()
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        try:
            return hydra_compose("train", hydra_arguments(dict(choices))), []
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            default_tree = OmegaConf.structured(RunConfig)
            # As in the tree from Hydra, an unknown key is then an error.
            OmegaConf.set_struct(default_tree, True)
            return default_tree, [f"{suspected_files_text(dict(choices))}: {composition_problem_line(error)}"]


def hydra_arguments(choices: dict[str, str]) -> list[str]:
    """The arguments that Hydra is called with: the choice of each group, and the user's directories (`--config-dir`)."""
    arguments = [f"{group}={choice}" for group, choice in choices.items()]
    if USER_CONFIG_DIRS:
        search_path = ",".join(f"'{directory}'" for directory in USER_CONFIG_DIRS)
        arguments.append(f"hydra.searchpath=[{search_path}]")
    return arguments


def _apply_values(tree: DictConfig, parsed: ParsedOverrides) -> list[str]:
    """Set the values of the command line and the user's files in the composed `tree`, in their order.

    Tables that were typed as a whole and settings that were set back (`~key`) come first, so that an override of one entry is set
    after them. Returns a problem for each value that cannot be set, and adds the settings that were probably meant to
    `parsed.probably_meant_keys`.
    """
    from omegaconf import OmegaConf

    problems: list[str] = []
    choice_by_group = {group: str(tree[group].name) for group in (*settings_classes_by_group(), "schedule")}
    run_has_begun = _run_has_begun(parsed)
    for table in parsed.replaced_tables:
        OmegaConf.update(tree, table, {}, merge=False)
    for key, _ in parsed.resets:
        _reset_to_default(tree, key, choice_by_group)
    for setting_value in parsed.values:
        refused = _apply_value(tree, setting_value, choice_by_group, run_has_begun=run_has_begun)
        if refused is not None:
            problems.append(refused.problem)
            parsed.probably_meant_keys |= refused.probably_meant_keys
    _drop_outranked_budgets(tree, parsed)
    return problems


def _apply_value(
    tree: DictConfig, setting_value: SettingValue, choice_by_group: dict[str, str], *, run_has_begun: bool
) -> hints.RefusedOverride | None:
    """Set one value of the command line or a user's file in the composed `tree`; returns why that cannot be, or None.

    `choice_by_group`: the chosen settings classes, such as {"tuning": "lora"}.
    `run_has_begun`: the run's directory has a configuration already.
    A value is refused if:

    - its key does not exist;
    - its setting needs another choice of its group, as `tuning.rank` needs `tuning=lora`;
    - its key names the choice of a group: `tuning.name=lora`, which must be typed as `tuning=lora`;
    - it has the wrong type.
    """
    from omegaconf.errors import OmegaConfBaseException

    key = setting_value.key
    source_text = setting_value.source_text
    setting = find_setting(key)
    if setting is None:
        return hints.explain_unknown_key(key, source_text)
    if _needs_another_choice(setting, key, setting_value.value, choice_by_group, run_has_begun=run_has_begun):
        needed_choice = hints.needed_choice(key, setting.available_under)
        return hints.RefusedOverride(
            source_text, f"needs {needed_choice}; add it, or leave {key.removesuffix('_')} out"
        )
    if key.endswith(".name") and key.split(".")[0] in settings_classes_by_group():
        # It would keep the settings class of another choice.
        return hints.explain_unknown_key(key, source_text)
    try:
        _set_value(tree, key, setting_value.value)
    except (OmegaConfBaseException, ValueError):
        reason = f"{key} must be {describe_type(setting.type)}"
        return hints.RefusedOverride(source_text, reason, probably_meant_keys=frozenset({key}))
    return None


def _reset_to_default(tree: DictConfig, key: str, choice_by_group: dict[str, str]) -> None:
    """Set a setting or table of the composed `tree` back to its default in the code, for `~key` on the command line.

    `choice_by_group`: such as {"tuning": "lora"}, because the defaults of a group are those of its choice.
    Does nothing for an unknown key, which was reported before.
    """
    from omegaconf import OmegaConf

    group = key.split(".")[0]
    defaults = OmegaConf.structured(RunConfig)
    if group in choice_by_group:
        defaults[group] = OmegaConf.structured(settings_class_of(group, choice_by_group[group]))
    no_such_key = object()  # None is a value
    default = OmegaConf.select(defaults, key, default=no_such_key)
    if default is not no_such_key:
        OmegaConf.update(tree, key, default, merge=False)


def _drop_outranked_budgets(tree: DictConfig, parsed: ParsedOverrides) -> None:
    """Leave one budget in `tree`, that of the highest precedence, since a run has one of steps, epochs and tokens.

    The command line goes before a file of the user, and that before an experiment; the others become None. Two budgets of the
    command line both stay, and validation refuses them.
    `parsed`: its first `num_file_values` values are those of files.
    """
    from omegaconf import OmegaConf

    budgets = {"budget.steps", "budget.epochs", "budget.tokens"}
    file_keys = {value.key for value in parsed.values[: parsed.num_file_values]}
    cli_keys = {value.key for value in parsed.cli_values}
    budgets_to_keep = (budgets & cli_keys) or (budgets & file_keys)
    if budgets_to_keep:  # otherwise the experiment's stays
        for budget in budgets - budgets_to_keep:
            OmegaConf.update(tree, budget, None)


def _needs_another_choice(
    setting: Setting, key: str, value: Any, choice_by_group: dict[str, str], *, run_has_begun: bool
) -> bool:
    """Whether a setting has no meaning under the chosen choice of its group, such as `tuning.rank` under `tuning=full`.

    `choice_by_group`: such as {"tuning": "full"}.
    All schedules share one class, so a setting of another schedule can be set. It is accepted with its default, which a file of
    all settings holds, and in a run that began with it (`run_has_begun`: its directory has a configuration already).
    """
    group, _, name = key.partition(".")
    if not setting.available_under or choice_by_group[group] in setting.available_under:
        return False
    if group != "schedule":
        return True
    is_default = value == getattr(ScheduleConfig(), name)
    return not run_has_begun and not is_default


def _run_has_begun(parsed: ParsedOverrides) -> bool:
    """Whether the overrides name a run directory (`run.dir`) that holds a frozen configuration already."""
    for value in parsed.values:
        is_run_dir = value.key == "run.dir" and value.value is not None
        if is_run_dir and (Path(str(value.value)).expanduser() / "config.yaml").is_file():
            return True
    return False


def _set_value(tree: DictConfig, key: str, value: Any) -> None:
    """Set one setting of the composed tree, such as `optim.lr` to 1e-4, with OmegaConf checking its type.

    A table is a setting whose names the user chooses, such as `data.sources`. A key in it (`data.sources.chat.path`) adds its
    entry (`chat`) with the defaults of an entry first, if the table lacks it. Raises ValueError or an OmegaConfBaseException if
    the value is of the wrong type.
    """
    from omegaconf import OmegaConf

    add_table_entry(tree, key)
    # A dictionary as the value adds names to the setting itself, any other value to the setting that holds it.
    parent_key = key if isinstance(value, dict) else key.rpartition(".")[0]
    parent = OmegaConf.select(tree, parent_key) if parent_key else None
    is_plain_dict = parent is not None and OmegaConf.get_type(parent) is dict
    # `batch` is a plain dictionary too, but its names are fixed, so a mistyped one must be an error.
    takes_any_name = is_plain_dict and not key.startswith("batch.")
    OmegaConf.update(tree, key, value, merge=True, force_add=takes_any_name)


def _config_from_tree(tree: DictConfig, problems: list[str]) -> RunConfig | None:
    """Turn the composed tree into a `RunConfig`, resolving `${...}`; None if it cannot be built.

    The reason is then appended to `problems`. Also None if `problems` says already that a file could not be composed: the tree
    then lacks the settings of some groups.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

    try:
        # Only once: a second resolution would look up what `escape_interpolations` has escaped.
        config: Any = OmegaConf.to_object(tree)
    except InterpolationResolutionError as error:
        reason = str(error).splitlines()[0].removesuffix(".")
        problems.append(
            f"{error.full_key}: {reason}; ${{...}} stands for another setting, or as ${{oc.env:NAME}} for a variable of the "
            "environment; in a text for the shell write $NAME"
        )
        return None
    except (OmegaConfBaseException, TypeError) as error:
        problems.append(" ".join(str(error).split()))
        return None
    assert isinstance(config, RunConfig)
    for group in settings_classes_by_group():
        settings = getattr(config, group)
        # Without its file, a group has the class of the default choice, and not that of the chosen one.
        has_class_of_choice = isinstance(settings, settings_class_of(group, str(settings.name)))
        if problems and not has_class_of_choice:
            return None
        assert has_class_of_choice, f"{group}: composed without its schema"
    return config
