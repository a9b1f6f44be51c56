"""Rules between rewards, data and evaluation: a function that there is, options that its kind has, columns that the data has."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from strategies.errors import ConfigError, ShardtuneError
from trainer.config.evaluation import FORGETTING_METRIC_NAMES, REWARD_METRIC_PREFIXES, tasks_to_run
from trainer.config.run import RunConfig
from trainer.data.config import DataFormat
from trainer.data.document import SourceRow
from trainer.data.read.paths import is_hub_path, is_remote_address
from trainer.data.sources import SourceInput, find_inputs
from trainer.evaluation.tasks.registry import metric_directions
from trainer.objectives.base import formats_of
from trainer.objectives.reward_functions import find_reward_function, reward_function_problems
from trainer.objectives.rollouts import RewardEntry, RoundsConfig
from trainer.rollout.rewards.kinds import BUILT_IN_REWARDS, JudgeReward, kind_problems
from trainer.rollout.rewards.model_files import reward_model_problems


def reward_problems(config: RunConfig) -> Iterator[str]:
    """Check the rewards of a run that learns from them (`objective.rewards`) before it starts; yields error messages.

    Reads the syntax of reward files, and first rows of the data. Columns are only compared with the data if the rewards have
    no other problem.
    """
    objective = config.objective
    yield from _watch_problems(config)  # for other objectives too: they have no metrics of rewards
    if not isinstance(objective, RoundsConfig):  # the settings of objectives that learn from rewards
        return
    if not objective.rewards:
        yield (
            f"objective.rewards: not set, and objective={objective.name} learns from nothing else; give a file of functions "
            f"(objective.rewards=rewards.py), or built-in ones of {', '.join(BUILT_IN_REWARDS)} (objective.rewards=[maths])"
        )
        return
    yield from _format_problems(config)
    single_problems: list[str] = []
    for name, reward in objective.rewards.items():
        single_problems += _single_reward_problems(name, reward)
        if reward.kind == JudgeReward.kind and config.evaluation.judge.url is None:
            single_problems.append(
                f"objective.rewards.{name}.kind=judge: asks a judge, and there is none; give "
                "evaluation.judge.url=http://host:port/v1 of an OpenAI-compatible server"
            )
    yield from single_problems
    if all(reward.weight == 0 for reward in objective.rewards.values()):
        yield "objective.rewards: every weight is 0, so that nothing is learned from; leave the weight of one out"
    if not single_problems:
        yield from _column_problems(config, objective)


def _format_problems(config: RunConfig) -> Iterator[str]:
    """Check that each source of data gives prompts (`data.format`, `data.sources.NAME.format`); yields a message for each other.

    The model answers prompts in such a run; formats of other objectives, such as pairs of answers, do not fit.
    """
    for key, data_format in formats_of(config.data).items():
        if data_format not in (DataFormat.auto, DataFormat.prompt):
            yield (
                f"{key}.format={data_format}: objective={config.objective.name} reads prompts; set {key}.format=prompt, which "
                "takes what stands before the answer"
            )


def _watch_problems(config: RunConfig) -> Iterator[str]:
    """Check that the objective has the watched metric (`evaluation.watch`): yields a message if not.

    Objectives that learn from rewards have metrics such as `eval/reward`, and no `eval/loss`; others the other way round.
    """
    watch = config.evaluation.watched  # `evaluation.watch`, or the default of the objective
    if watch in metric_directions(tasks_to_run(config)) or watch in FORGETTING_METRIC_NAMES:
        return
    is_of_rewards = watch.startswith((*REWARD_METRIC_PREFIXES, "eval/completions/"))
    name = config.objective.name
    if isinstance(config.objective, RoundsConfig):
        if not is_of_rewards:
            yield f"evaluation.watch={watch}: objective={name} has no such metric; leave it out, or watch eval/reward"
    elif is_of_rewards:
        yield f"evaluation.watch={watch}: objective={name} has no rewards; leave it out, or set evaluation.watch=eval/loss"


def _single_reward_problems(name: str, reward: RewardEntry) -> Iterator[str]:
    """Check one entry of `objective.rewards` by itself; yields error messages.

    `name`: the user's, such as "maths". It must have exactly one of `kind` (built in), `function` (of a Python file) and `path`
    (a reward model), which is then checked further.
    """
    key = f"objective.rewards.{name}"
    if not name.replace("-", "_").isidentifier():
        yield f"{key}: the name stands in metrics (rewards/{name}/mean); use letters, digits, - and _"
    set_fields = [field for field in ("kind", "function", "path") if getattr(reward, field)]
    if len(set_fields) != 1:
        set_keys = " and ".join(f"{key}.{field}" for field in set_fields) or key
        yield f"{set_keys}: give one of kind ({', '.join(BUILT_IN_REWARDS)}), function (FILE.py:NAME) and path"
    elif reward.path is not None:
        yield from reward_model_problems(reward, key)
    elif reward.function is not None:
        yield from reward_function_problems(name, reward)
    else:
        yield from kind_problems(reward.kind, reward.options, key)


def _column_problems(config: RunConfig, objective: RoundsConfig) -> Iterator[str]:
    """Check that the data has the columns which the rewards need, such as `solution`; yields a message for each that lacks one.

    Reads the first row of each input that is on this machine. Inputs that are elsewhere, or cannot be read, are not checked
    here: preparing the data looks at them.
    """
    if config.data.remote:
        return
    try:
        inputs = find_inputs(config.data)
    except ShardtuneError:
        return
    for data_input in inputs:
        columns = _columns_of_first_row(data_input)
        if columns is None:
            continue
        for name, reward in objective.rewards.items():
            missing = _missing_columns(name, reward, columns)
            if not missing:
                continue
            known_columns = ", ".join(sorted(columns))
            missing_columns = ", ".join(f'"{column}"' for column in missing)
            setting = "data.columns" if data_input.source == "data" else f"data.sources.{data_input.source}.columns"
            yield (
                f"objective.rewards.{name}: needs the column {missing_columns}; {data_input.key} has {known_columns}; "
                f"rename one with {setting}.{missing[0]}=NAME"
            )


def _columns_of_first_row(data_input: SourceInput) -> set[str] | None:
    """The columns of an input, by the names under which rewards get them; None if its first row cannot be read here.

    Inputs on the hub or at a remote address are not read.
    """
    if any(is_hub_path(str(path)) or is_remote_address(str(path)) for path in data_input.origin.paths):
        return None
    try:
        (row,) = islice(data_input.origin.rows(), 1)
    except (ShardtuneError, ValueError, OSError):
        return None
    parsed = row.parse()
    if not isinstance(parsed, SourceRow) or not parsed.fields:
        return None
    # `data.columns` gives columns other names, by which rewards know them: {"answer": "solution_text"}.
    columns = {*parsed.fields, *parsed.unread_columns} | data_input.columns.keys()
    # In verl's files the keys of the column `reward_model` count as columns.
    verl_model = parsed.fields.get("reward_model")
    if isinstance(verl_model, dict):
        columns.update(verl_model)
    return columns


def _missing_columns(name: str, reward: RewardEntry, columns: set[str]) -> list[str]:
    """Which columns a reward needs and the data lacks; [] if it can be computed. `columns`: those of the data.

    - A function: its required arguments that are neither columns nor options of the reward. Loads the function's file.
    - A reward model: none.
    - A built-in kind: the first of its alternatives, such as `solution` or `answer`, if there is none of them.
    """
    if reward.function is not None:
        try:
            function = find_reward_function(reward.function, f"objective.rewards.{name}.function")
        except ConfigError:
            return []
        needed = [column for column, is_required in function.columns.items() if is_required]
        return [column for column in needed if column not in columns and column not in reward.options]
    if reward.path is not None:  # reads the prompt and the answer alone
        return []
    alternatives = BUILT_IN_REWARDS[reward.kind](reward.options).needed_columns()
    # A conversation has no column `completion`, but the answer at its end is one.
    has_answer = not columns.isdisjoint({"messages", "conversation", "conversations"})
    if not alternatives or not columns.isdisjoint(alternatives) or ("completion" in alternatives and has_answer):
        return []
    return alternatives[:1]
