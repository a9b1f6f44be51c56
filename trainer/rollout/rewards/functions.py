"""Calls reward functions in the conventions of TRL, verifiers and verl. Runs in worker processes.

`trainer/objectives/reward_functions.py` tells the conventions apart from the file's syntax, before anything runs.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

from trainer.objectives.reward_functions import Convention, RewardFunction, reward_functions_in_file


class BadScore(Exception):
    """A reward has returned something that is no score. The message says what, and what is allowed."""


@dataclass(slots=True)
class AnswersOfGroup:
    """Answers to one prompt, as rewards see them."""

    prompt: str | list[dict[str, Any]]
    columns: dict[str, Any]
    texts: list[str]
    ids: list[list[int]]
    truncated: list[bool]
    step: int

    def completions(self) -> list[Any]:
        """The answers in the form of the prompt: texts, or lists of one message."""
        if isinstance(self.prompt, str):
            return list(self.texts)
        return [[{"role": "assistant", "content": text}] for text in self.texts]


@dataclass(slots=True)
class CallResult:
    """What one call of a reward gave."""

    scores: list[float | None]
    """One for each answer; None: the reward does not apply to it."""
    logged: dict[str, list[float]] = field(default_factory=dict)
    """Numbers that the function logged itself, by name."""
    extra: dict[str, list[Any]] = field(default_factory=dict)
    """Further columns of the record that the function gave, by name: a JSON value for each answer; None: none for it."""


def load_function(file: Path, name: str) -> Callable[..., Any]:
    """The function `name` of a Python file, which is run for it. Modules beside the file can be imported.

    Raises what the file raises.
    """
    directory = str(file.parent)
    if directory not in sys.path:
        sys.path.insert(0, directory)
    module = sys.modules.get(file.stem)
    if module is None or getattr(module, "__file__", None) != str(file):
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None, f"{file} is a Python file"
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module
        spec.loader.exec_module(module)
    function: Callable[..., Any] = getattr(module, name)
    return function


@dataclass(slots=True)
class FunctionReward:
    """A reward function of the user's."""

    function: Callable[..., Any]
    signature: RewardFunction
    options: Mapping[str, Any]

    @classmethod
    def load(cls, file: Path, name: str, options: Mapping[str, Any]) -> FunctionReward:
        """Run the file, and take the function from it. Raises what the file raises."""
        return cls(load_function(file, name), reward_functions_in_file(file)[name], options)

    def __call__(self, answers: AnswersOfGroup) -> CallResult:
        """The scores of the answers. Raises BadScore, and what the function raises.

        How the function is called depends on the library whose convention it follows:
        - TRL: once, with lists that have a value for each answer; it returns a list of scores.
        - verl: for each answer, with `solution_str`; it returns a score, or {"score": 1.0, ...}.
        - verifiers: for each answer, with `prompt` and `completion`; it returns the same.
        """
        result = CallResult([])
        call = partial(self._call, answers, result)
        if self.signature.convention is Convention.trl:
            columns = {name: [value] * len(answers.texts) for name, value in answers.columns.items()}
            given: dict[str, Any] = {
                "prompts": [answers.prompt] * len(answers.texts),
                "completions": answers.completions(),
                "completion_ids": answers.ids,
                "truncated": answers.truncated,
            }
            every_answer = range(len(answers.texts))
            result.scores = _parse_score_list(call(columns, given, every_answer), len(answers.texts))
            return result
        for number, completion in enumerate(answers.completions()):
            given = {"completion_ids": answers.ids[number], "truncated": answers.truncated[number]}
            if self.signature.convention is Convention.verl:
                given["solution_str"] = answers.texts[number]
            else:
                given |= {"prompt": answers.prompt, "completion": completion}
            returned = call(answers.columns, given, range(number, number + 1))
            result.scores.append(_parse_answer_score(returned, result, number, len(answers.texts)))
        return result

    def _call(
        self,
        answers: AnswersOfGroup,
        result: CallResult,
        columns: dict[str, Any],
        given: dict[str, Any],
        numbers: range,
    ) -> Any:
        """Call the function with those of the arguments that it names, and return its result. What it logs goes into `result`.

        Arguments, of which a later one wins over an earlier one of the same name: `columns` of the row, such as {"answer": "4"};
        `given`, such as {"completion": "It is 4."}, with `step`, `log_metric` and `log_extra`; and the reward's options.
        `numbers`: of the answers that it scores. Raises BadScore if it calls `log_extra` without a value for each of them.
        """

        def log_metric(name: str, value: float) -> None:
            """For the function to call: keep a number, whose mean over the round is logged."""
            result.logged.setdefault(str(name), []).append(float(value))

        def log_extra(column: str, values: Any) -> None:
            """For the function to call: keep a value for each answer, as a further column of the round's record."""
            is_list = hasattr(values, "__len__") and not isinstance(values, str | bytes | dict)
            if not is_list or len(values) != len(numbers):
                raise BadScore(
                    f"called log_extra({str(column)!r}, {_short_repr(values)}); it takes a list with a value for each of "
                    f"{len(numbers)} answers"
                )
            for number, value in zip(numbers, values, strict=True):
                _set_extra_value(result, column, number, len(answers.texts), value)

        given |= {"step": answers.step, "log_metric": log_metric, "log_extra": log_extra}
        available = {**columns, **given, **self.options}
        if self.signature.takes_all:
            arguments = available
        else:
            arguments = {name: available[name] for name in self.signature.parameters if name in available}
        returned = self.function(**arguments)
        if inspect.isawaitable(returned):
            returned = asyncio.run(_wait_for(returned))
        return returned


async def _wait_for(awaitable: Any) -> Any:
    """What an awaitable gives: `asyncio.run` takes coroutines alone."""
    return await awaitable


def _parse_score_list(returned: Any, num_answers: int) -> list[float | None]:
    """The scores that a function returned which scores all answers at once; None where the reward does not apply.

    Raises BadScore if it did not return a list with a number or None for each answer.
    """
    if isinstance(returned, str | bytes | dict) or not hasattr(returned, "__len__"):
        raise BadScore(
            f"returned {_short_repr(returned)}; it must be a list with a number or None for each of {num_answers} answers"
        )
    if len(returned) != num_answers:
        raise BadScore(f"returned {len(returned)} scores for {num_answers} answers")
    return [parse_score(score) for score in returned]


def _set_extra_value(result: CallResult, column: Any, number: int, num_answers: int, value: Any) -> None:
    """Set the value of answer `number` in a further column of the record, `result.extra`; as a text if JSON has no such type.

    Creates the column, with None for each of the `num_answers` answers, if it is new.
    """
    if hasattr(value, "item") and getattr(value, "size", None) == 1:  # of numpy and torch
        value = value.item()
    is_plain = value is None or isinstance(value, str | bool | int | float)
    values = result.extra.setdefault(str(column), [None] * num_answers)
    values[number] = value if is_plain else str(value)


def _parse_answer_score(returned: Any, result: CallResult, number: int, num_answers: int) -> float | None:
    """The score of answer `number` that a function returned which scores one answer at a time.

    It is a score, or a dictionary as of verl, {"score": 1.0, "steps": 3}: then the other values are added to `extra` of
    `result`, and the numbers among them to `logged`. Raises BadScore if there is no score.
    """
    if not isinstance(returned, dict):
        return parse_score(returned)
    if "score" not in returned:
        raise BadScore(f'returned {_short_repr(returned)}; a dictionary must have "score"')
    for name, value in returned.items():
        if name == "score":
            continue
        _set_extra_value(result, name, number, num_answers, value)
        if isinstance(value, Real):
            result.logged.setdefault(str(name), []).append(float(value))
    return parse_score(returned["score"])


def parse_score(returned: Any) -> float | None:
    """A score as a float; None where the reward does not apply. Raises BadScore for a text, and for NaN and infinities."""
    if returned is None:
        return None
    is_number = hasattr(returned, "__float__") and not isinstance(returned, str | bytes)
    try:
        score = float(returned) if is_number else math.nan
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise BadScore(
            f"returned {_short_repr(returned)} as a score; it must be a finite number, or None if it does not apply"
        )
    return score


def _short_repr(returned: Any) -> str:
    """The representation of a returned value for a message, at most 80 characters of it."""
    text = repr(returned)
    return text if len(text) <= 80 else f"{text[:80]}..."
