"""Reward functions of a Python file, read from its syntax: nothing of the file is run here.

People have reward functions in three conventions, which the names of their parameters tell apart:

- TRL's `f(prompts, completions, completion_ids, **columns) -> list[float | None]` is called with all answers of a group;
- verifiers' `f(completion, answer, prompt, info, ...) -> float` is called with one answer;
- verl's `f(data_source, solution_str, ground_truth, extra_info) -> float | {"score": ...}` too.

Every other parameter is the name of a column of the data, and so the columns that a file needs are known before it runs.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from strategies.errors import ConfigError
from trainer.data.fields import KeptColumns

if TYPE_CHECKING:
    from trainer.objectives.answers import PromptDataSpec
    from trainer.objectives.rollouts import RewardEntry, RoundsConfig


class Convention(StrEnum):
    """How a reward function wants to be called, by the parameter that tells."""

    trl = "completions"
    verifiers = "completion"
    verl = "solution_str"


REWARD_DEFINITION_TEXT = "one has a parameter `completions` (TRL), `completion` (verifiers) or `solution_str` (verl)"
GIVEN_PARAMETERS = {
    Convention.trl: ("prompts", "completions", "completion_ids", "truncated", "step", "log_metric", "log_extra"),
    Convention.verifiers: ("prompt", "completion", "completion_ids", "truncated", "step", "log_metric", "log_extra"),
    Convention.verl: ("solution_str", "completion_ids", "truncated", "step", "log_metric", "log_extra"),
}
"""Parameters that a function is given by their names; every other one is a column."""
REASON_BY_MISSING_PARAMETER = {
    "trainer_state": "TRL's trainer is not there; `step` is the number of optimizer steps",
    "environments": "answers have one turn here",
    "state": "answers have one turn here, and `completion` is all that there is",
    "parser": "read the answer in the function itself",
}
"""Parameters of the original libraries that nothing here stands for, each with why."""


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """What is known of a user's reward function from its signature, without running its file: how it is called, and with what."""

    name: str
    convention: Convention
    parameters: tuple[str, ...]
    """Names of its parameters, without `*` and `**` ones."""
    required: tuple[str, ...]
    """Those of them that have no default."""
    takes_all: bool
    """Whether it has `**kwargs`, and so is given every column."""

    @property
    def columns(self) -> dict[str, bool]:
        """The columns that it names, each with whether it cannot be called without it."""
        no_columns = {*GIVEN_PARAMETERS[self.convention], *REASON_BY_MISSING_PARAMETER}
        return {name: name in self.required for name in self.parameters if name not in no_columns}


def parse_function_path(text: str) -> tuple[Path, str]:
    """The file and the name of `FILE.py:NAME`; the name is empty if there is none."""
    path, colon, name = text.rpartition(":")
    if not colon or name.endswith(".py"):
        return Path(text).expanduser(), ""
    return Path(path).expanduser(), name


_STAND_INS: dict[Path, Path] = {}
"""Copies of reward files in the directory of the run, by the path of the file. Filled by `use_stand_ins`, once a process."""


def use_stand_ins(copies: Mapping[Path, Path]) -> None:
    """From now on, read reward functions from a file's copy if the file is missing. `copies`: the copy by the file's path."""
    for path, copy in copies.items():
        _STAND_INS[path.resolve()] = copy


def file_or_its_copy(path: Path) -> Path:
    """The file itself if it is there, else its copy in the directory of the run, if that is known; else the file's path."""
    return path if path.exists() else _STAND_INS.get(path.resolve(), path)


def reward_functions_in_file(path: Path) -> dict[str, RewardFunction]:
    """Find the public reward functions of a Python file without running it: their signatures by name, in the file's order.

    A reward function has a parameter of one of the conventions: `completions` (TRL), `completion` (verifiers) or `solution_str`
    (verl). Raises ConfigError for a file that cannot be read, or is no Python.
    """
    path = file_or_its_copy(path)
    try:
        modified_ns = path.stat().st_mtime_ns
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give a Python file with reward functions"
        ) from None
    return _parse_reward_functions(path, modified_ns)


@lru_cache(maxsize=32)
def _parse_reward_functions(path: Path, modified_ns: int) -> dict[str, RewardFunction]:
    """The public reward functions of a file by name, found in its syntax tree: nothing of the file is run.

    `modified_ns`: when the file was changed, so that the cache (`lru_cache`, keyed by the arguments) reads a changed file again.
    Raises ConfigError if it is no Python file.
    """
    try:
        module = ast.parse(path.read_bytes(), str(path))
    except (OSError, SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        location = f"{path}:{line}" if line else str(path)
        raise ConfigError(f"{location}: is no Python file that can be read ({error}); mend it") from None
    functions = {}
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            function = _reward_function_or_none(node)
            if function is not None:
                functions[node.name] = function
    return functions


def _reward_function_or_none(node: ast.FunctionDef | ast.AsyncFunctionDef) -> RewardFunction | None:
    """Read the signature of a function; None if it is no reward function: none of its parameters is that of a `Convention`.

    `def f(completions, answer, **kwargs)` is one of TRL's, with the required column `answer`; it takes all columns.
    """
    arguments = node.args
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    keyword_only = [argument.arg for argument in arguments.kwonlyargs]
    parameters = (*positional, *keyword_only)
    convention = next((convention for convention in Convention if convention.value in parameters), None)
    if convention is None:
        return None
    # Defaults belong to the last positional parameters; of keyword-only ones each has its own, or None.
    num_required = len(positional) - len(arguments.defaults)
    required = positional[:num_required]
    for name, default in zip(keyword_only, arguments.kw_defaults, strict=True):
        if default is None:
            required.append(name)
    return RewardFunction(node.name, convention, parameters, tuple(required), takes_all=arguments.kwarg is not None)


def find_reward_function(setting: str, key: str) -> RewardFunction:
    """Find the reward function that a setting names as FILE.py:NAME.

    Raises ConfigError, which lists those there are, if there is none.

    `key`: the key of the setting, for messages.
    """
    path, name = parse_function_path(setting)
    functions = reward_functions_in_file(path)
    if name in functions:
        return functions[name]
    known_names = ", ".join(functions) or "none"
    if not name:
        raise ConfigError(f"{key}={setting}: must be FILE.py:NAME; {path.name} has the reward functions {known_names}")
    raise ConfigError(
        f"{key}={setting}: {path.name} has no such reward function, but {known_names}; {REWARD_DEFINITION_TEXT}, and is "
        "defined in the file itself"
    )


def columns_read_by_rewards(rewards: Mapping[str, RewardEntry]) -> KeptColumns:
    """Collect which columns of the data the rewards read, so that prepared data keeps them: required, optional, and whether all.

    A column that one reward requires is no optional one of another. Raises ConfigError for a reward function that cannot be
    found.
    """
    required: set[str] = set()
    optional: set[str] = set()
    takes_all = False
    for name, reward in rewards.items():
        if reward.function is None:
            optional.update(columns_of_built_in_reward(reward))
            continue
        function = find_reward_function(reward.function, f"objective.rewards.{name}.function")
        takes_all |= function.takes_all
        for column, is_required in function.columns.items():
            if column in reward.options:  # the settings give this parameter its value
                continue
            if is_required:
                required.add(column)
            else:
                optional.add(column)
    return KeptColumns(tuple(sorted(required)), tuple(sorted(optional - required)), takes_all)


def prompt_spec(config: RoundsConfig) -> PromptDataSpec:
    """How prompts are read for these rewards. Of rewards that cannot be read nothing is kept: rules say what is wrong."""
    # Imported here: worker processes and the command line read this module, and do without torch.
    from trainer.objectives.answers import PromptDataSpec

    try:
        return PromptDataSpec(columns_read_by_rewards(config.rewards))
    except ConfigError:
        return PromptDataSpec()


REFERENCE_COLUMNS = ("references", "answer", "solution", "ground_truth", "completion", "response", "output", "target")
"""Columns that may hold the right answer, for built-in rewards that compare with one: the first one that a row has."""
KIND_COLUMNS = {
    "exact_match": REFERENCE_COLUMNS,
    "f1": REFERENCE_COLUMNS,
    "maths": REFERENCE_COLUMNS,
    "math_verify": REFERENCE_COLUMNS,
    "judge": REFERENCE_COLUMNS,
    "json_schema": ("schema",),
    "tool_calls": ("tools", "answer", "completion", "messages"),
}
"""Columns that a built-in kind may read."""


def columns_of_built_in_reward(reward: RewardEntry) -> tuple[str, ...]:
    """The columns that a built-in reward may read: the one that `options.reference` names, else those of its kind."""
    column = reward.options.get("reference")
    return (str(column),) if column else KIND_COLUMNS.get(reward.kind, ())


def reward_function_problems(name: str, reward: RewardEntry) -> Iterator[str]:
    """What is wrong with a reward function as its file defines it, one line each: parameters not given, unknown options."""
    key = f"objective.rewards.{name}"
    assert reward.function is not None
    try:
        function = find_reward_function(reward.function, f"{key}.function")
    except ConfigError as error:
        yield from error.problems
        return
    for parameter in function.required:
        reason = REASON_BY_MISSING_PARAMETER.get(parameter)
        if reason is not None:
            yield f"{key}.function={reward.function}: needs the parameter {parameter}, which is not given: {reason}"
    for option in reward.options:
        if option not in function.parameters:
            yield f"{key}.options.{option}: {function.name} has no such parameter; it has {', '.join(function.parameters)}"
