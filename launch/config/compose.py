"""Composes the words of the command line into one typed, validated and hashed configuration.

All problems are reported together. Freezing the configuration into a run directory is the task of
`launch.config.frozen`, whose functions are also offered here. Composing imports torch at most, never transformers,
peft, datasets, wandb or deepspeed.
"""

from __future__ import annotations

import copy
import os
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from launch.config import hints, overrides
from launch.config.broken_files import composition_problem, suspected_files
from launch.config.choices import CONF_DIR, OWN_DIRECTORIES, register_schemas, settings_of, variants
from launch.config.earlier_words import begun_with, keep_budget
from launch.config.frozen import Composed, default_run_dir, is_finished, load_frozen
from strategies.base import Precision, StrategyName
from strategies.errors import ConfigError, key_of_problem
from strategies.hardware import Gpu, best_precision, listed_gpus
from strategies.redaction import secret_in
from strategies.runtime import missing_cuda
from trainer.config.resuming import flat, plain
from trainer.config.run import TEMPLATE_DATE, Device, LauncherName, RunConfig
from trainer.config.validate import problems_of
from trainer.data.config import SourceConfig
from trainer.evaluation.base import TaskConfig
from trainer.export.config import settle_merge
from trainer.optim.config import GroupRule
from trainer.optim.schedule import ScheduleConfig
from trainer.reporting.settings_file import literal
from trainer.tuning.initial_adapter import adopt_adapter_settings as settle_start

if TYPE_CHECKING:
    from omegaconf import DictConfig

TABLES = {"data.sources": SourceConfig, "optim.groups": GroupRule, "evaluation.tasks": TaskConfig}
"""Tables whose entries the user names, with the settings class of an entry."""

__all__ = ["Composed", "compose", "default_run_dir", "is_finished", "load_frozen"]


def compose(argv: list[str], *, check: bool = True) -> Composed:
    """Compose, validate (unless `check` is off) and hash. Errors: ConfigError with every problem found."""
    # Every stage adds to the problems instead of raising: the user sees all of them at once.
    parsed = overrides.parse(argv)
    tree, problems = _base(parsed.choices)
    problems = parsed.problems + problems
    problems += _apply(tree, parsed)
    config = _to_config(tree, problems)
    if config is not None:
        _resolve(config)
        # Defaults that depend on other settings, and on what was typed.
        config.substitutions |= settle_start(config.tuning, {typed.key for typed in parsed.values})
        config.substitutions |= settle_merge(config.export, config.tuning)
        if check:
            problems += [p for p in _problems_of_start(config, argv) if not _is_echo(p, parsed.suspects)]
    if problems or config is None:
        raise ConfigError(problems)
    return Composed(config, list(argv))


def _is_echo(problem: str, suspects: set[str]) -> bool:
    """Whether a problem only repeats that a word could not be used.

    `suspects`: the keys that such words were meant for. A complaint about one of them, about a setting below it, or about its
    whole group (`budget`, for `budget.steps`) is an echo.
    """
    key = key_of_problem(problem)
    groups = {suspect.rpartition(".")[0] for suspect in suspects if "." in suspect}
    return key in suspects | groups or any(key.startswith(f"{suspect}.") for suspect in suspects)


def recompose(config: RunConfig, argv: list[str], allowed: frozenset[str]) -> RunConfig:
    """A frozen configuration with words on top of it, as this process would start it: its own launcher and devices.

    `allowed`: the groups that words may set. Errors: ConfigError with every problem, also for a word of another group, and for a
    result that could not run.
    """
    parsed = overrides.parse(argv)
    fresh, problems = _base(parsed.choices)
    word_by_key = {typed.key: typed.word for typed in parsed.values}
    word_by_key |= {group: f"{group}={choice}" for group, choice in parsed.choices.items()}
    for key, word in word_by_key.items():
        if not _is_in_sections(key, allowed):
            problems.append(_not_beside_a_run(key, word, allowed))
    tree = _tree_of(config)
    for group in {"launcher", *parsed.choices} & {*variants()}:
        tree[group] = fresh[group]
    # The run may have trained elsewhere: this process looks for its own device.
    tree.run.device = Device.auto
    # The date that the chat template writes is the run's, whatever else this start chooses anew.
    tree.substitutions = {key: note for key, note in config.substitutions.items() if key == TEMPLATE_DATE}
    if not problems:
        problems = _apply(tree, parsed)
    problems = parsed.problems + problems
    recomposed = _to_config(tree, problems)
    if recomposed is None or problems:
        raise ConfigError(problems)
    _resolve(recomposed)
    return recomposed


def with_words(config: RunConfig, argv: list[str]) -> RunConfig:
    """A frozen configuration with words on top of it; everything else stays. Errors: ConfigError with every problem."""
    parsed = overrides.parse(argv)
    tree = _tree_of(config)
    problems = parsed.problems or _apply(tree, parsed)
    changed = _to_config(tree, problems)
    if changed is None or problems:
        raise ConfigError(problems)
    return changed


def _tree_of(config: RunConfig) -> Any:
    """A frozen configuration as OmegaConf has it. `${...}` in it stays text, as somebody else may have written it."""
    from omegaconf import OmegaConf

    tree = OmegaConf.structured(RunConfig)
    for group in variants():
        tree[group] = OmegaConf.structured(type(getattr(config, group)))
    return OmegaConf.merge(tree, literal(plain(config)))


def typed_keys(argv: list[str]) -> set[str]:
    """The settings that words set, by full key, with the tables that were typed as a whole."""
    parsed = overrides.parse(argv)
    keys = {typed.key for typed in parsed.values}
    reset_keys = {key for key, _ in parsed.defaults}
    return keys | parsed.replaced | reset_keys


def _is_in_sections(key: str, sections: frozenset[str]) -> bool:
    """Whether a key belongs to one of the sections, such as `launcher` or `evaluation`."""
    return key.split(".")[0] in sections


def _not_beside_a_run(key: str, word: str, allowed: frozenset[str]) -> str:
    """Why a word cannot stand beside a run: it is mistyped, or the run has its own value."""
    settings_by_key = overrides.settings()
    if overrides.setting_of(settings_by_key, key) is None and key not in variants():
        return hints.unknown_key(key, word, settings_by_key).problem
    return f"{word}: is the run's, and stays as it was; beside a run one can set {', '.join(sorted(allowed))}"


def _problems_of_start(config: RunConfig, argv: list[str]) -> list[str]:
    """Why a run of these words would be refused.

    A run that an earlier version began with the same words is resumed, although this version would refuse to begin it.
    """
    problems = refusals(config)
    if not problems:
        return []
    earlier = begun_with(argv, config.run.dir)
    if earlier is None:
        return problems
    keep_budget(config, earlier)
    return refusals(config, written=earlier)


def refusals(config: RunConfig, *, written: RunConfig | None = None) -> list[str]:
    """Why a run of this configuration would be refused before anything starts; empty if it would start.

    `written` is what the run's config.yaml already holds: a secret among its values is not refused again.
    """
    return [
        *problems_of(config, world_size=world_size_of(config)),
        *_device_problems(config),
        *_secret_problems(config, written),
    ]


def _secret_problems(config: RunConfig, written: RunConfig | None) -> Iterator[str]:
    """A line for each value that looks like a secret, except for those that `written` holds already.

    Typed values are written into config.yaml, the run record and the model card, and are sent to trackers.
    """
    written_values = {} if written is None else flat(asdict(written))
    for key, value in flat(asdict(config)).items():
        if key in written_values and written_values[key] == value:
            continue
        for text in value if isinstance(value, list) else [value]:
            kind = secret_in(text) if isinstance(text, str) else None
            if kind is not None:
                yield (
                    f"{key}: holds {kind}, which would be written into config.yaml and the model card and sent to trackers; "
                    "leave it in the environment, or in a file that only you can read (as ~/.netrc for addresses)"
                )


def world_size_of(config: RunConfig) -> int | None:
    """Ranks of the run: those of the job this process is part of, else as the launcher will start; None if unknown."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return ranks_of(config)


def ranks_of(config: RunConfig) -> int | None:
    """Ranks of the run as its launcher will start them; None if the settings leave the number open."""
    nodes = config.launcher.nodes
    per_node = config.launcher.per_node
    return nodes * per_node if nodes > 0 and per_node > 0 else None


def _base(choices: dict[str, str]) -> tuple[DictConfig, list[str]]:
    """(the tree of the chosen groups, problems). Nothing else is applied yet.

    A broken experiment or local file is a problem, and the tree then has no group's own settings.
    """
    modification_times = []
    for directory in (CONF_DIR, *OWN_DIRECTORIES):
        # A directory of the user's may be a whole project. Choices lie at most one folder deep.
        for pattern in ("*.yaml", "*/*.yaml"):
            for file in directory.glob(pattern):
                if file.exists():
                    modification_times.append((file, file.stat().st_mtime_ns))
    tree, problems = _composed(tuple(choices.items()), tuple(modification_times))
    return copy.deepcopy(tree), list(problems)


@lru_cache(maxsize=64)
def _composed(
    choices: tuple[tuple[str, str], ...], modification_times: tuple[tuple[Path, int], ...]
) -> tuple[DictConfig, list[str]]:
    """What `_base` returns a copy of: composing takes Hydra a quarter of a second, a copy a twentieth of that.

    `modification_times` belongs to the key of the cache: a changed file is composed anew.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    register_schemas()
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        try:
            return hydra_compose("train", hydra_words(dict(choices))), []
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            problem = f"{suspected_files(dict(choices))}: {composition_problem(error)}"
        tree = OmegaConf.structured(RunConfig)
        OmegaConf.set_struct(tree, True)
        return tree, [problem]


def hydra_words(choices: dict[str, str]) -> list[str]:
    """The words that Hydra gets: the choices, and the user's directories to look for them."""
    words = [f"{group}={choice}" for group, choice in choices.items()]
    if OWN_DIRECTORIES:
        search_path = ",".join(f"'{directory}'" for directory in OWN_DIRECTORIES)
        words.append(f"hydra.searchpath=[{search_path}]")
    return words


def _apply(tree: DictConfig, parsed: overrides.Parsed) -> list[str]:
    """Set the typed values one by one. Returns a line for each that cannot be set."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    settings_by_key = overrides.settings()
    problems: list[str] = []
    current_choices = {group: str(tree[group].name) for group in (*variants(), "schedule")}
    has_begun = _has_begun(parsed)
    # Tables and defaults first, so that a typed entry of the same table is set after them.
    for table in parsed.replaced:
        OmegaConf.update(tree, table, {}, merge=False)
    for key, _ in parsed.defaults:
        _set_default(tree, key, current_choices)
    for key, value, word in parsed.values:
        setting = overrides.setting_of(settings_by_key, key)
        if setting is None:
            unknown = hints.unknown_key(key, word, settings_by_key)
            problems.append(unknown.problem)
            parsed.suspects |= unknown.suspects
        elif _is_of_another_choice(setting, key, value, current_choices, has_begun=has_begun):
            problems.append(overrides.needs_other_choice(key, word, setting))
        elif key.endswith(".name") and key.split(".")[0] in variants():
            # `tuning.name=lora` would keep the settings class of another choice; `tuning=lora` is what works.
            problems.append(hints.unknown_key(key, word, settings_by_key).problem)
        else:
            try:
                _set(tree, key, value)
            except (OmegaConfBaseException, ValueError):
                problems.append(f"{word}: {key} must be {overrides.describe(setting.type)}")
                parsed.suspects.add(key)
    _keep_one_budget(tree, parsed)
    return problems


def _set_default(tree: DictConfig, key: str, current_choices: dict[str, str]) -> None:
    """Set a setting or table back to the default of the code, under the current choice of its group."""
    from omegaconf import OmegaConf

    group = key.split(".")[0]
    defaults = OmegaConf.structured(RunConfig)
    if group in current_choices:
        defaults[group] = OmegaConf.structured(settings_of(group, current_choices[group]))
    # `defaults` itself stands for "no such key", since null is a value.
    is_known = OmegaConf.select(defaults, key, default=defaults) is not defaults
    if is_known:
        OmegaConf.update(tree, key, OmegaConf.select(defaults, key), merge=False)


def _keep_one_budget(tree: DictConfig, parsed: overrides.Parsed) -> None:
    """Let a typed budget replace that of a file, and either of them that of an experiment or debug file."""
    from omegaconf import OmegaConf

    budgets = {"budget.steps", "budget.epochs", "budget.tokens"}
    keys_of_files = {value.key for value in parsed.values[: parsed.from_files]}
    typed_keys = {value.key for value in parsed.values[parsed.from_files :]}
    budgets_set = budgets & typed_keys or budgets & keys_of_files
    if budgets_set:
        for budget in budgets - budgets_set:
            OmegaConf.update(tree, budget, None)


def _is_of_another_choice(
    setting: overrides.Setting, key: str, value: Any, current_choices: dict[str, str], *, has_begun: bool
) -> bool:
    """Whether a setting means nothing under the choice of its group.

    The settings of a schedule exist under each schedule. One that means nothing passes if it has its default, as in a whole
    configuration, or if the run has begun (`has_begun`): whatever a run began with is kept.
    """
    group, _, name = key.partition(".")
    if not setting.under or current_choices[group] in setting.under:
        return False
    if group != "schedule":
        return True
    return not has_begun and value != getattr(ScheduleConfig(), name)


def _has_begun(parsed: overrides.Parsed) -> bool:
    """Whether the words name the directory of a run that has begun."""
    for key, value, _ in parsed.values:
        if key == "run.dir" and value is not None and (Path(str(value)).expanduser() / "config.yaml").is_file():
            return True
    return False


def _set(tree: DictConfig, key: str, value: Any) -> None:
    """Set one value. An entry that a table of settings (`TABLES`) lacks is added with its defaults first."""
    from omegaconf import OmegaConf

    for table, entry_type in TABLES.items():
        entry_name, _, below = key.removeprefix(f"{table}.").partition(".")
        if below and key.startswith(f"{table}.") and entry_name not in OmegaConf.select(tree, table):
            OmegaConf.update(tree, f"{table}.{entry_name}", entry_type(), force_add=True)
    parent = OmegaConf.select(tree, key.rpartition(".")[0]) if "." in key else None
    holder = OmegaConf.select(tree, key) if isinstance(value, dict) else parent
    is_table = holder is not None and OmegaConf.get_type(holder) is dict
    # A table takes new names. `batch` is a table of fixed names, and a mistyped one must be refused.
    OmegaConf.update(tree, key, value, merge=True, force_add=is_table and not key.startswith("batch."))


def _to_config(tree: DictConfig, problems: list[str]) -> RunConfig | None:
    """The typed configuration; None if it cannot be made, with a line added to `problems`."""
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
    for group in variants():
        settings = getattr(config, group)
        is_of_its_choice = isinstance(settings, settings_of(group, str(settings.name)))
        if problems and not is_of_its_choice:
            return None  # a file could not be composed, so the tree lacks the group's own settings
        assert is_of_its_choice, f"{group}: composed without its schema"
    return config


def _resolve(config: RunConfig) -> None:
    """Replace `auto` by what this host has. A host that only submits to SLURM leaves it to the job."""
    if config.launcher.name is not LauncherName.local:
        return
    if config.launcher.nodes == 1:
        config.launcher.nodes = max(1, len(config.launcher.hosts))
    import torch

    def note(key: str, value: Any) -> None:
        config.substitutions[key] = f"auto -> {getattr(value, 'value', value)}"

    if config.run.device is Device.auto:
        config.run.device = Device.cuda if torch.cuda.is_available() else Device.cpu
        note("run.device", config.run.device)
        if config.run.device is Device.cpu:
            config.substitutions["run.device"] += _idle_gpus()
    if config.precision is Precision.auto:
        config.precision = _best_precision(config.run.device)
        if config.precision is not Precision.auto:
            note("precision", config.precision)
    if config.launcher.processes is None:
        config.launcher.processes = _processes_here(config)
        note("launcher.processes", config.launcher.processes)


def _processes_here(config: RunConfig) -> int:
    """Processes on this host: as torchrun has started them, else one for each GPU if the strategy uses several."""
    import torch

    started_here = int(os.environ.get("LOCAL_WORLD_SIZE") or 0)
    if started_here:
        return started_here
    if config.strategy.name is StrategyName.single or config.run.device is not Device.cuda:
        return 1
    return max(1, torch.cuda.device_count())


def _idle_gpus() -> str:
    """What to add about a run on CPUs if the host has GPUs that torch cannot use; empty if it has none."""
    number = listed_gpus()
    return f", beside {number} GPUs that their driver lists here: {missing_cuda()}" if number else ""


def _device_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with the devices of the settings. A host that only submits to SLURM cannot tell."""
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
    """The best precision that the GPUs of this host have in hardware; auto if they differ, or cannot be asked.

    Asks the driver's tool, since asking torch would claim GPU memory for the run. If auto remains, the workers settle it, which
    hold the devices; AMD's cards always get there.
    """
    if device is Device.cpu:
        return Precision.fp32
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
