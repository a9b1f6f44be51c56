"""Composes the overrides of the command line into one typed, validated and hashed configuration.

All problems are reported together. Freezing the configuration into a run directory is the task of
`launch.config.frozen`, whose functions are also offered here. Composing imports torch at most, never transformers,
peft, datasets, wandb or deepspeed.
"""

from __future__ import annotations

import copy
import os
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from launch.config import hints, overrides
from launch.config.broken_files import composition_problem, suspected_files
from launch.config.choices import (
    CONF_DIR,
    USER_CONFIG_DIRS,
    add_table_entry,
    register_schemas,
    settings_class_of,
    settings_classes,
)
from launch.config.earlier_overrides import earlier_config_of_same_overrides, keep_first_budget
from launch.config.frozen import Composed, default_run_dir, is_finished, keep_rate_of_checkpoint, load_frozen
from launch.config.learning_rate import keep_rate, rate_problems, settle_rate
from launch.config.reward_copies import use_reward_copies
from launch.config.secrets import secret_problems
from strategies.base import Precision, StrategyName
from strategies.errors import ConfigError, key_of_problem
from strategies.hardware import Gpu, best_precision, count_nvidia_gpus
from strategies.runtime import missing_cuda
from trainer.config.resuming import plain
from trainer.config.run import TEMPLATE_DATE, Device, LauncherName, RunConfig
from trainer.config.validate import problems_of
from trainer.export.config import settle_merge
from trainer.objectives.registry import family_of
from trainer.optim.schedule import ScheduleConfig
from trainer.reporting.settings_file import literal
from trainer.tuning.initial_adapter import adopt_adapter_settings

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["Composed", "compose", "default_run_dir", "is_finished", "load_frozen"]


def compose(argv: list[str], *, check: bool = True) -> Composed:
    """Compose command-line overrides (`key=value`) into the configuration of a run, and validate it unless `check` is off.

    Errors: ConfigError with every problem found.
    """
    use_reward_copies(argv)
    # Every phase adds to the problems instead of raising: the user sees all of them at once.
    parsed = overrides.parse(argv)
    tree, problems = _compose_choices(parsed.choices)
    problems = parsed.problems + problems
    problems += _apply_typed_values(tree, parsed)
    config = _to_config(tree, problems)
    if config is not None:
        _resolve_auto(config)
        # Defaults that depend on other settings, and on what was typed.
        typed = {typed_value.key for typed_value in parsed.values}
        config.substitutions |= adopt_adapter_settings(config.tuning, typed)
        config.substitutions |= settle_merge(config.export, config.tuning)
        settle_rate(config)
        keep_rate_of_checkpoint(config)
        if config.evaluation.watch is None:
            config.evaluation.watch = family_of(config.objective).watched_metric
        if check:
            for problem in _reasons_to_refuse_start(config, argv):
                if not _repeats_a_override_problem(problem, parsed.meant_keys):
                    problems.append(problem)
    if problems or config is None:
        raise ConfigError(problems)
    return Composed(config, list(argv))


def _repeats_a_override_problem(problem: str, meant_keys: set[str]) -> bool:
    """Whether a problem of validation only repeats that an override could not be used.

    `meant_keys`: the settings that such overrides were probably meant for. They are unset now, so validation complains about
    them, about settings below them, or about their whole group (`budget`, for `budget.steps`).
    """
    key = key_of_problem(problem)
    groups = {meant_key.rpartition(".")[0] for meant_key in meant_keys if "." in meant_key}
    is_below_meant_key = any(key.startswith(f"{meant_key}.") for meant_key in meant_keys)
    return key in meant_keys or key in groups or is_below_meant_key


def recompose(config: RunConfig, argv: list[str], allowed: frozenset[str]) -> RunConfig:
    """The frozen configuration of a run with command-line overrides on top, for this process: its own launcher and devices.

    `allowed`: the groups of settings that overrides may set, such as `launcher`. Errors: ConfigError with every problem, also
    for a override of another group, and for a result that could not run.
    """
    # The overrides, each of an allowed group.
    parsed = overrides.parse(argv)
    fresh, problems = _compose_choices(parsed.choices)
    override_by_key = {typed.key: typed.override for typed in parsed.values}
    override_by_key |= {group: f"{group}={choice}" for group, choice in parsed.choices.items()}
    for key, override in override_by_key.items():
        group = key.split(".")[0]
        if group not in allowed:
            problems.append(_not_beside_a_run(key, override, allowed))

    # The frozen configuration, with what belongs to this start instead.
    tree = _as_omegaconf(config)
    for group in {"launcher", *parsed.choices} & {*settings_classes()}:
        tree[group] = fresh[group]
    # The run may have trained elsewhere: this process looks for its own device.
    tree.run.device = Device.auto
    # The date that the chat template writes is the run's, whatever else this start chooses anew.
    tree.substitutions = {key: note for key, note in config.substitutions.items() if key == TEMPLATE_DATE}
    if not problems:
        problems = _apply_typed_values(tree, parsed)
    problems = parsed.problems + problems
    recomposed = _to_config(tree, problems)
    if recomposed is None or problems:
        raise ConfigError(problems)
    _resolve_auto(recomposed)
    return recomposed


def with_overrides(config: RunConfig, argv: list[str]) -> RunConfig:
    """A frozen configuration with overrides on top of it; everything else stays. Errors: ConfigError with every problem."""
    parsed = overrides.parse(argv)
    tree = _as_omegaconf(config)
    problems = parsed.problems or _apply_typed_values(tree, parsed)
    changed = _to_config(tree, problems)
    if changed is None or problems:
        raise ConfigError(problems)
    return changed


def _as_omegaconf(config: RunConfig) -> Any:
    """A frozen configuration as an OmegaConf tree. `${...}` in it stays text: somebody else may have written it."""
    from omegaconf import OmegaConf

    tree = OmegaConf.structured(RunConfig)
    for group in settings_classes():
        tree[group] = OmegaConf.structured(type(getattr(config, group)))
    return OmegaConf.merge(tree, literal(plain(config)))


def typed_keys(argv: list[str]) -> set[str]:
    """The full keys of the settings that these overrides set, with the tables that they replace as a whole or reset."""
    parsed = overrides.parse(argv)
    value_keys = {typed.key for typed in parsed.values}
    reset_keys = {key for key, _ in parsed.resets}
    return value_keys | parsed.replaced_tables | reset_keys


def _not_beside_a_run(key: str, override: str, allowed: frozenset[str]) -> str:
    """The problem with an override beside a run that is not in `allowed`: it is mistyped, or the run has its own value."""
    settings_by_key = overrides.settings()
    if overrides.find_setting(settings_by_key, key) is None and key not in settings_classes():
        return hints.explain_unknown_key(key, override, settings_by_key).problem
    return f"{override}: is the run's, and stays as it was; beside a run one can set {', '.join(sorted(allowed))}"


def _reasons_to_refuse_start(config: RunConfig, argv: list[str]) -> list[str]:
    """Why a run of these overrides would be refused; empty if it may start.

    A run that an earlier version began with the same overrides is resumed, although this version would refuse to begin it.
    """
    problems = refusals(config)
    if not problems:
        return []
    earlier_config = earlier_config_of_same_overrides(argv, config.run.dir)
    if earlier_config is None:
        return problems
    keep_first_budget(config, earlier_config)
    keep_rate(config, earlier_config)
    return refusals(config, written=earlier_config)


def refusals(config: RunConfig, *, written: RunConfig | None = None) -> list[str]:
    """The problems for which a run of this configuration is refused before anything starts; empty if it may start.

    `written`: the configuration that the run's config.yaml holds already; a secret among its values is not refused again.
    """
    return [
        *problems_of(config, world_size=world_size_of(config)),
        *rate_problems(config),
        *_device_problems(config),
        *secret_problems(config, written),
    ]


def world_size_of(config: RunConfig) -> int | None:
    """Ranks of the run: those of the job this process is part of, else as the launcher will start; None if unknown."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return ranks_of(config)


def ranks_of(config: RunConfig) -> int | None:
    """Ranks of the run as its launcher will start them; None if the settings leave the number open."""
    nodes = config.launcher.nodes
    per_node = config.launcher.per_node
    is_settled = nodes > 0 and per_node > 0
    return nodes * per_node if is_settled else None


def _compose_choices(choices: dict[str, str]) -> tuple[DictConfig, list[str]]:
    """(the settings of the chosen files of `conf/` as a tree, problems). No typed value is applied yet.

    If a file of the user's (an experiment, say) is broken, that is a problem, and the tree lacks the groups' own settings.
    """
    modification_times = []
    for directory in (CONF_DIR, *USER_CONFIG_DIRS):
        # A directory of the user's may be a whole project. Choices lie at most one folder deep.
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
    """(tree, problems) of Hydra's composition of the choices; callers copy the tree before they change it.

    Cached because Hydra takes a quarter of a second, a copy a twentieth of that. `modification_times` are only part of the
    cache's key: a changed file is composed anew.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    register_schemas()
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        try:
            return hydra_compose("train", hydra_overrides(dict(choices))), []
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            problem = f"{suspected_files(dict(choices))}: {composition_problem(error)}"
        # The defaults stand in, so that the other problems of the command line can still be found.
        tree = OmegaConf.structured(RunConfig)
        OmegaConf.set_struct(tree, True)
        return tree, [problem]


def hydra_overrides(choices: dict[str, str]) -> list[str]:
    """The overrides that Hydra is called with: the choice of each group, and where to look for the user's own files."""
    overrides = [f"{group}={choice}" for group, choice in choices.items()]
    if USER_CONFIG_DIRS:
        search_path = ",".join(f"'{directory}'" for directory in USER_CONFIG_DIRS)
        overrides.append(f"hydra.searchpath=[{search_path}]")
    return overrides


def _apply_typed_values(tree: DictConfig, parsed: overrides.ParsedOverrides) -> list[str]:
    """Set the typed values in the composed `tree`, in their order. Returns a problem for each that cannot be set."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    settings_by_key = overrides.settings()
    problems: list[str] = []
    current_choices = {group: str(tree[group].name) for group in (*settings_classes(), "schedule")}
    has_begun = _has_begun(parsed)
    # Tables and defaults first, so that a typed entry of the same table is set after them.
    for table in parsed.replaced_tables:
        OmegaConf.update(tree, table, {}, merge=False)
    for key, _ in parsed.resets:
        _set_default(tree, key, current_choices)

    for key, value, override in parsed.values:
        setting = overrides.find_setting(settings_by_key, key)
        if setting is None:
            unknown = hints.explain_unknown_key(key, override, settings_by_key)
            problems.append(unknown.problem)
            parsed.meant_keys |= unknown.meant_keys
        elif _is_of_another_choice(setting, key, value, current_choices, has_begun=has_begun):
            problems.append(overrides.needs_other_choice(key, override, setting))
        elif key.endswith(".name") and key.split(".")[0] in settings_classes():
            # `tuning.name=lora` would keep the settings class of another choice; `tuning=lora` is what works.
            problems.append(hints.explain_unknown_key(key, override, settings_by_key).problem)
        else:
            try:
                _set_value(tree, key, value)
            except (OmegaConfBaseException, ValueError):
                problems.append(f"{override}: {key} must be {overrides.describe_type(setting.type)}")
                parsed.meant_keys.add(key)
    _keep_one_budget(tree, parsed)
    return problems


def _set_default(tree: DictConfig, key: str, current_choices: dict[str, str]) -> None:
    """Set a setting or table back to its default in the code, for a typed `~key`.

    `current_choices`: the chosen file of each group, such as `lora` of `tuning`, which decides what the defaults are.
    """
    from omegaconf import OmegaConf

    group = key.split(".")[0]
    defaults = OmegaConf.structured(RunConfig)
    if group in current_choices:
        defaults[group] = OmegaConf.structured(settings_class_of(group, current_choices[group]))
    # `defaults` itself stands for "no such key", since null is a value.
    is_known = OmegaConf.select(defaults, key, default=defaults) is not defaults
    if is_known:
        OmegaConf.update(tree, key, OmegaConf.select(defaults, key), merge=False)


def _keep_one_budget(tree: DictConfig, parsed: overrides.ParsedOverrides) -> None:
    """Clear the budgets in `tree` that another one replaces: a typed one goes before a file's, and that before an experiment's.

    A run must have exactly one of steps, epochs and tokens. Two that were typed both stay, for validation to refuse.
    """
    from omegaconf import OmegaConf

    budgets = {"budget.steps", "budget.epochs", "budget.tokens"}
    keys_of_files = {value.key for value in parsed.values[: parsed.number_from_files]}
    typed_keys = {value.key for value in parsed.values[parsed.number_from_files :]}
    budgets_set = budgets & typed_keys or budgets & keys_of_files
    if budgets_set:
        for budget in budgets - budgets_set:
            OmegaConf.update(tree, budget, None)


def _is_of_another_choice(
    setting: overrides.Setting, key: str, value: Any, current_choices: dict[str, str], *, has_begun: bool
) -> bool:
    """Whether a setting has no meaning under the current choice of its group, such as `tuning.rank` under `tuning=full`.

    `has_begun`: the run has a directory with a configuration already.
    """
    group, _, name = key.partition(".")
    if not setting.available_under or current_choices[group] in setting.available_under:
        return False
    if group != "schedule":
        return True
    # All schedules share one class. A setting that means nothing here may still stand in a whole configuration with its
    # default, and whatever a run began with is kept.
    is_default = value == getattr(ScheduleConfig(), name)
    return not has_begun and not is_default


def _has_begun(parsed: overrides.ParsedOverrides) -> bool:
    """Whether the overrides name a run directory (`run.dir`) that holds a frozen configuration already."""
    for key, value, _ in parsed.values:
        if key == "run.dir" and value is not None and (Path(str(value)).expanduser() / "config.yaml").is_file():
            return True
    return False


def _set_value(tree: DictConfig, key: str, value: Any) -> None:
    """Set one value in the tree. An entry that a table lacks is first added with its defaults.

    Errors: those of OmegaConf, ValueError.
    """
    from omegaconf import OmegaConf

    add_table_entry(tree, key)
    if isinstance(value, dict):
        holder = OmegaConf.select(tree, key)
    else:
        holder = OmegaConf.select(tree, key.rpartition(".")[0]) if "." in key else None
    is_table = holder is not None and OmegaConf.get_type(holder) is dict
    # A table takes new names. `batch` is a table of fixed names, and a mistyped one must be refused.
    OmegaConf.update(tree, key, value, merge=True, force_add=is_table and not key.startswith("batch."))


def _to_config(tree: DictConfig, problems: list[str]) -> RunConfig | None:
    """The tree as a `RunConfig`; None if it cannot be made, with the reason appended to `problems`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

    try:
        # Only once: a second resolution would look up what `literal` has escaped.
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
    for group in settings_classes():
        settings = getattr(config, group)
        is_of_its_choice = isinstance(settings, settings_class_of(group, str(settings.name)))
        if problems and not is_of_its_choice:
            return None  # a file could not be composed, so the tree lacks the group's own settings
        assert is_of_its_choice, f"{group}: composed without its schema"
    return config


def _resolve_auto(config: RunConfig) -> None:
    """Replace `auto` for device, precision and processes by what this host has, with a note in `config.substitutions`.

    A note is such as {"run.device": "auto -> cuda"}. A host that only submits to SLURM leaves `auto` to the job.
    """
    if config.launcher.name is not LauncherName.local:
        return
    if config.launcher.nodes == 1:
        config.launcher.nodes = max(1, len(config.launcher.hosts))
    # Imported here: to submit a job needs no torch.
    import torch

    def note(key: str, value: Any) -> None:
        config.substitutions[key] = f"auto -> {getattr(value, 'value', value)}"

    if config.run.device is Device.auto:
        config.run.device = Device.cuda if torch.cuda.is_available() else Device.cpu
        note("run.device", config.run.device)
        if config.run.device is Device.cpu:
            config.substitutions["run.device"] += _note_on_idle_gpus()
    if config.precision is Precision.auto:
        config.precision = _best_precision(config.run.device)
        if config.precision is not Precision.auto:
            note("precision", config.precision)
    if config.launcher.processes is None:
        config.launcher.processes = _processes_here(config)
        note("launcher.processes", config.launcher.processes)


def _processes_here(config: RunConfig) -> int:
    """How many processes this host gets: as many as torchrun has started, else one for each GPU if the strategy uses several."""
    import torch

    torchrun_processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 0)
    if torchrun_processes:
        return torchrun_processes
    if config.strategy.name is StrategyName.single or config.run.device is not Device.cuda:
        return 1
    return max(1, torch.cuda.device_count())


def _note_on_idle_gpus() -> str:
    """The end of the note about a run on CPUs if the host has GPUs that torch cannot use; empty if it has none."""
    number = count_nvidia_gpus()
    if not number:
        return ""
    return f", beside {number} GPUs that their driver lists here: {missing_cuda()}"


def _device_problems(config: RunConfig) -> Iterator[str]:
    """Error messages if this host lacks the GPUs that the settings ask for. Nothing is checked where SLURM chooses the host."""
    if config.launcher.name is not LauncherName.local or config.run.device is not Device.cuda:
        return
    import torch

    reason = missing_cuda()
    if reason:
        yield f"run.device=cuda: {reason}; set run.device=cpu, or run where there is a GPU"
        return
    processes = config.launcher.processes or 1
    gpus = torch.cuda.device_count()
    # The ranks of a job that has started may each see their own device alone.
    if "WORLD_SIZE" not in os.environ and processes > gpus:
        yield f"launcher.processes={processes}: each needs a GPU of its own, and this host has {gpus}; set at most {gpus}"


def _best_precision(device: Device) -> Precision:
    """The best precision that all GPUs of this host support in hardware; `auto` if they differ, or cannot be asked.

    If `auto` remains, the ranks settle it, which hold the devices. With AMD's cards that is always so.
    """
    if device is Device.cpu:
        return Precision.fp32
    # The driver's tool is asked, since asking torch would claim GPU memory in this process for the whole run.
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        capabilities = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        precisions = {_precision_of(capability) for capability in capabilities}
    except (OSError, ValueError, subprocess.SubprocessError):
        return Precision.auto
    return precisions.pop() if len(precisions) == 1 else Precision.auto


def _precision_of(capability: str) -> Precision:
    """The best precision of a card by its compute capability, such as `9.0`. Errors: ValueError."""
    major, minor = capability.split(".")
    return best_precision(Gpu("", (int(major), int(minor))))
