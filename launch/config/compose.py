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

from launch.config import hints, overrides
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
from trainer.tuning.initial_adapter import settle as settle_start

if TYPE_CHECKING:
    from omegaconf import DictConfig

TABLES = {"data.sources": SourceConfig, "optim.groups": GroupRule, "evaluation.tasks": TaskConfig}
"""Tables of settings: what stands behind a name that the user chooses."""

__all__ = ["Composed", "compose", "default_run_dir", "is_finished", "load_frozen"]


def compose(argv: list[str], *, check: bool = True) -> Composed:
    """Compose, validate (unless `check` is off) and hash. Errors: ConfigError with every problem found."""
    parsed = overrides.parse(argv)
    tree, problems = _base(parsed.choices)
    problems = parsed.problems + problems
    problems += _apply(tree, parsed)
    config = _to_config(tree, problems)
    if config is not None:
        _resolve(config)
        config.substitutions |= settle_start(config.tuning, {key for key, _, _ in parsed.values})
        config.substitutions |= settle_merge(config.export, config.tuning)
        if check:
            problems += [
                problem for problem in _problems_of_start(config, argv) if not _is_echo(problem, parsed.suspects)
            ]
    if problems or config is None:
        raise ConfigError(problems)
    return Composed(config, list(argv))


def _is_echo(problem: str, suspects: set[str]) -> bool:
    """Whether a problem only repeats that a word could not be used, which was meant for one of the keys `suspects`.

    A complaint about the key, about a setting below it, or about the whole group of the key (`budget`, for `budget.steps`).
    """
    key = key_of_problem(problem)
    groups = {suspect.rpartition(".")[0] for suspect in suspects if "." in suspect}
    return key in suspects | groups or any(key.startswith(f"{suspect}.") for suspect in suspects)


def recompose(config: RunConfig, argv: list[str], allowed: frozenset[str]) -> RunConfig:
    """A frozen configuration with words on top of it, started where this process is: another launcher, its own devices.

    Raises ConfigError with every problem: also for a word of another group than `allowed`, and where the result could not run.
    """
    parsed = overrides.parse(argv)
    fresh, problems = _base(parsed.choices)
    typed = {key: word for key, _, word in parsed.values} | {
        group: f"{group}={choice}" for group, choice in parsed.choices.items()
    }
    problems += [
        _not_beside_a_run(key, word, allowed) for key, word in typed.items() if not _is_in_sections(key, allowed)
    ]
    tree = _tree_of(config)
    for group in {"launcher", *parsed.choices} & {*variants()}:
        tree[group] = fresh[group]
    tree.run.device = Device.auto
    # The date that the chat template writes is the run's, whatever else this start chooses anew.
    tree.substitutions = {key: note for key, note in config.substitutions.items() if key == TEMPLATE_DATE}
    problems = parsed.problems + problems + ([] if problems else _apply(tree, parsed))
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
    """The settings that words set, by full key, and tables of which the whole was typed."""
    parsed = overrides.parse(argv)
    return {key for key, _, _ in parsed.values} | parsed.replaced | {key for key, _ in parsed.defaults}


def _is_in_sections(key: str, sections: frozenset[str]) -> bool:
    """Whether a key belongs to one of the sections, such as `launcher` or `evaluation`."""
    return key.split(".")[0] in sections


def _not_beside_a_run(key: str, word: str, allowed: frozenset[str]) -> str:
    """Why a word cannot stand beside a run: it is mistyped, or the run has its own value."""
    settings_by_key = overrides.settings()
    if overrides.setting_of(settings_by_key, key) is None and key not in variants():
        return hints.unknown_key(key, word, settings_by_key)[0]
    return f"{word}: is the run's, and stays as it was; beside a run one can set {', '.join(sorted(allowed))}"


def _problems_of_start(config: RunConfig, argv: list[str]) -> list[str]:
    """The refusals of a run of these words; one that an earlier version began with them goes on."""
    problems = refusals(config)
    if problems and (earlier := begun_with(argv, config.run.dir)) is not None:
        keep_budget(config, earlier)
        problems = refusals(config, written=earlier)
    return problems


def refusals(config: RunConfig, *, written: RunConfig | None = None) -> list[str]:
    """Why a run of this configuration would be refused before anything starts; empty where it would not.

    `written` is what the run's config.yaml holds already: of its values none is refused as a secret any more.
    """
    return [
        *problems_of(config, world_size=world_size_of(config)),
        *_device_problems(config),
        *_secret_problems(config, written),
    ]


def _secret_problems(config: RunConfig, written: RunConfig | None) -> Iterator[str]:
    """What is typed is written into config.yaml, the record and the model card, and sent to trackers."""
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
    """Ranks of the run as its launcher will start them; None where its settings say no number."""
    nodes, processes = config.launcher.nodes, config.launcher.per_node
    return nodes * processes if nodes > 0 and processes > 0 else None


def _base(choices: dict[str, str]) -> tuple[DictConfig, list[str]]:
    """The groups composed, nothing else applied; a broken experiment or local file becomes a problem."""
    # A directory of the user's may be a whole project: only where choices can lie is looked.
    files = [
        file
        for directory in (CONF_DIR, *OWN_DIRECTORIES)
        for pattern in ("*.yaml", "*/*.yaml")
        for file in directory.glob(pattern)
    ]
    modification_times = tuple((file, file.stat().st_mtime_ns) for file in files if file.exists())
    tree, problems = _composed(tuple(choices.items()), modification_times)
    return copy.deepcopy(tree), list(problems)


@lru_cache(maxsize=64)
def _composed(
    choices: tuple[tuple[str, str], ...], files: tuple[tuple[Path, int], ...]
) -> tuple[DictConfig, list[str]]:
    """As `_base` gives them, which copies it: Hydra takes a quarter of a second, a copy a twentieth of that.

    `files` are those it may read and when they were changed, so that what is kept is forgotten with any of them.
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
        except (HydraException, OmegaConfBaseException) as error:
            problem = f"{_suspected_files(dict(choices))}: {' '.join(str(error).split())}"
        tree = OmegaConf.structured(RunConfig)
        OmegaConf.set_struct(tree, True)
        return tree, [problem]


def _suspected_files(choices: dict[str, str]) -> str:
    files = [f"conf/{group}/{choices[group]}.yaml" for group in ("experiment", "debug") if choices.get(group)]
    own_directories = [f"a file below {directory}" for directory in OWN_DIRECTORIES]
    return " or ".join([*files, *own_directories, "conf/local/default.yaml"])


def hydra_words(choices: dict[str, str]) -> list[str]:
    """What Hydra is asked for: the choices, looked for in the user's directories too."""
    search_path = ",".join(f"'{directory}'" for directory in OWN_DIRECTORIES)
    return [f"{group}={choice}" for group, choice in choices.items()] + (
        [f"hydra.searchpath=[{search_path}]"] if search_path else []
    )


def _apply(tree: DictConfig, parsed: overrides.Parsed) -> list[str]:
    """Set the typed values one by one; returns a line for each that cannot be set."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    settings_by_key, problems = overrides.settings(), []
    current = {group: str(tree[group].name) for group in (*variants(), "schedule")}
    has_begun = _has_begun(parsed)
    for table in parsed.replaced:
        OmegaConf.update(tree, table, {}, merge=False)
    for key, _ in parsed.defaults:
        group = key.split(".")[0]
        default = OmegaConf.structured(RunConfig)
        if group in current:
            default[group] = OmegaConf.structured(settings_of(group, current[group]))
        if OmegaConf.select(default, key, default=default) is not default:
            OmegaConf.update(tree, key, OmegaConf.select(default, key), merge=False)
    for key, value, word in parsed.values:
        setting = overrides.setting_of(settings_by_key, key)
        if setting is None:
            problem, meant_key = hints.unknown_key(key, word, settings_by_key)
            problems.append(problem)
            parsed.suspects |= {meant_key} if meant_key else set()
        elif setting is not None and _is_of_another_choice(setting, key, value, current, has_begun=has_begun):
            problems.append(overrides.needs_other_choice(key, word, setting))
        elif setting is not None and key.endswith(".name") and key.split(".")[0] in variants():
            problems.append(hints.unknown_key(key, word, settings_by_key)[0])
        else:
            try:
                _set(tree, key, value)
            except (OmegaConfBaseException, ValueError) as error:
                reason = overrides.describe(setting.type) if setting else " ".join(str(error).split())
                problems.append(f"{word}: {key} must be {reason}")
                parsed.suspects.add(key)
    budgets = {"budget.steps", "budget.epochs", "budget.tokens"}
    from_files, typed = parsed.values[: parsed.from_files], parsed.values[parsed.from_files :]
    budgets_set = budgets & {key for key, _, _ in typed} or budgets & {key for key, _, _ in from_files}
    if budgets_set:  # a typed budget replaces that of a file, and this one that of an experiment or debug file
        for budget in budgets - budgets_set:
            OmegaConf.update(tree, budget, None)
    return problems


def _is_of_another_choice(
    setting: overrides.Setting, key: str, value: Any, current: dict[str, str], *, has_begun: bool
) -> bool:
    """Whether a setting means nothing under the choice of its group.

    The settings of a schedule exist under each of them. Their defaults pass, as a whole configuration has them, and so does
    whatever a run has begun with.
    """
    group, _, name = key.partition(".")
    if not setting.under or current[group] in setting.under:
        return False
    if group != "schedule":
        return True
    return not has_begun and value != getattr(ScheduleConfig(), name)


def _has_begun(parsed: overrides.Parsed) -> bool:
    """Whether the words name the directory of a run that has begun: it goes on, also with a setting that means nothing."""
    directories = [str(value) for key, value, _ in parsed.values if key == "run.dir" and value is not None]
    return any((Path(directory).expanduser() / "config.yaml").is_file() for directory in directories)


def _set(tree: DictConfig, key: str, value: Any) -> None:
    """Set one value; a table of settings (`TABLES`) grows by the name, with defaults."""
    from omegaconf import OmegaConf

    for table, entry in TABLES.items():
        entry_name, _, below = key.removeprefix(f"{table}.").partition(".")
        if below and key.startswith(f"{table}.") and entry_name not in OmegaConf.select(tree, table):
            OmegaConf.update(tree, f"{table}.{entry_name}", entry(), force_add=True)
    parent = OmegaConf.select(tree, key.rpartition(".")[0]) if "." in key else None
    holder = OmegaConf.select(tree, key) if isinstance(value, dict) else parent
    is_table = holder is not None and OmegaConf.get_type(holder) is dict
    OmegaConf.update(tree, key, value, merge=True, force_add=is_table and not key.startswith("batch."))


def _to_config(tree: DictConfig, problems: list[str]) -> RunConfig | None:
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

    try:
        # Once: what `literal` has escaped would be looked up by a second resolution.
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
        if problems and not isinstance(settings, settings_of(group, str(settings.name))):
            return None  # a file that could not be composed: the tree has no group's own settings then
        assert isinstance(settings, settings_of(group, str(settings.name))), f"{group}: composed without its schema"
    return config


def _resolve(config: RunConfig) -> None:
    """Settle what is `auto` and can be known here. On a host that only submits to SLURM, nothing can."""
    if config.launcher.name is not LauncherName.local:
        return
    if config.launcher.nodes == 1:
        config.launcher.nodes = max(1, len(config.launcher.hosts))
    import torch

    def settle(key: str, value: Any) -> None:
        config.substitutions[key] = f"auto -> {getattr(value, 'value', value)}"

    if config.run.device is Device.auto:
        config.run.device = Device.cuda if torch.cuda.is_available() else Device.cpu
        settle("run.device", config.run.device)
        config.substitutions["run.device"] += _idle_gpus() if config.run.device is Device.cpu else ""
    if config.precision is Precision.auto:
        config.precision = _best_precision(config.run.device)
        if config.precision is not Precision.auto:
            settle("precision", config.precision)
    if config.launcher.processes is None:
        spread = config.strategy.name is not StrategyName.single and config.run.device is Device.cuda
        local_world = os.environ.get("LOCAL_WORLD_SIZE")
        config.launcher.processes = int(local_world or 0) or (max(1, torch.cuda.device_count()) if spread else 1)
        settle("launcher.processes", config.launcher.processes)


def _idle_gpus() -> str:
    """What is said of a run on CPUs if the host has GPUs that torch cannot use; empty if it has none."""
    number = listed_gpus()
    return f", beside {number} GPUs that their driver lists here: {missing_cuda()}" if number else ""


def _device_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with the devices asked for; a host that only submits to SLURM cannot tell."""
    if config.launcher.name is not LauncherName.local or config.run.device is not Device.cuda:
        return
    import torch

    if reason := missing_cuda():
        yield f"run.device=cuda: {reason}; set run.device=cpu, or run where there is a GPU"
        return
    processes, devices = config.launcher.processes or 1, torch.cuda.device_count()
    # Ranks of a job that exists may each see their own device alone.
    if "WORLD_SIZE" not in os.environ and processes > devices:
        yield f"launcher.processes={processes}: each needs a GPU of its own, and this host has {devices}; set at most {devices}"


def _best_precision(device: Device) -> Precision:
    """What the GPUs of this host have in hardware. Asks the driver's tool: asking torch would claim GPU memory for the run."""
    if device is Device.cpu:
        return Precision.fp32
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        capabilities = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        best = {
            best_precision(Gpu("", (int(major), int(minor))))
            for major, minor in (line.split(".") for line in capabilities)
        }
    except (OSError, ValueError, subprocess.SubprocessError):
        best = set()
    # Where they differ, or the tool says nothing (AMD's cards), the workers settle it, which hold the devices.
    return best.pop() if len(best) == 1 else Precision.auto
