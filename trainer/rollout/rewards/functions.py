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
from numbers import Real
from pathlib import Path
from typing import Any

from trainer.objectives.reward_functions import Convention, RewardFunction, reward_functions_in_file


class BadScore(Exception):
    """A reward has returned something that is no score. The message says what, and what is allowed."""


@dataclass(slots=True)
class AnswersOfGroup:
    """All or some answers to one prompt, with what a reward may know of the prompt: what a call of a reward scores."""

    prompt: str | list[dict[str, Any]]
    """A text, or the messages of a conversation."""
    columns: dict[str, Any]
    """Of the prompt's data row, such as {"answer": "4"}."""
    texts: list[str]
    """One for each answer, as are `ids` and `truncated`."""
    ids: list[list[int]]
    """Token ids."""
    truncated: list[bool]
    """Whether the answer reached the longest length instead of ending by itself."""
    step: int
    """Optimizer steps taken so far."""

    def completions(self) -> list[Any]:
        """The answers in the form of the prompt: texts, or lists of one message."""
        if isinstance(self.prompt, str):
            return list(self.texts)
        return [[{"role": "assistant", "content": text}] for text in self.texts]


@dataclass(slots=True)
class CallResult:
    """What one call of a reward gave for its answers: scores, and what a user's function logged beside them."""

    scores: list[float | None]
    """One for each answer; None: the reward does not apply to it."""
    logged_numbers: dict[str, list[float]] = field(default_factory=dict)
    """Numbers that the function logged itself, by name."""
    extra_columns: dict[str, list[Any]] = field(default_factory=dict)
    """Further columns of the record that the function gave, by name: a JSON value for each answer; None: none for it."""


def load_function(file: Path, name: str) -> Callable[..., Any]:
    """Run a Python file and take the function `name` from it. Modules beside the file can be imported, now and later.

    So its directory stays on `sys.path`: a function may import a module only when it is called. The file becomes the module of
    its stem, in place of another one of that name. Raises what the file raises.
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
    """A reward function of the user's, loaded in a worker process; an instance is called with answers, as a `KindReward` is."""

    function: Callable[..., Any]
    signature: RewardFunction
    options: Mapping[str, Any]

    @classmethod
    def load(cls, file: Path, name: str, options: Mapping[str, Any]) -> FunctionReward:
        """Run the file, and take the function from it. Raises what the file raises."""
        return cls(load_function(file, name), reward_functions_in_file(file)[name], options)

    def __call__(self, answers: AnswersOfGroup) -> CallResult:
        """Score answers to one prompt by the user's function. Raises BadScore, and what the function raises.

        How the function is called depends on the library whose convention it follows:
        - TRL: once, with lists that have a value for each answer; it returns a list of scores.
        - verl: for each answer, with `solution_str`; it returns a score, or {"score": 1.0, ...}.
        - verifiers: for each answer, with `prompt` and `completion`; it returns the same.
        """
        result = CallResult([])
        num_answers = len(answers.texts)
        if self.signature.convention is Convention.trl:
            logging_functions = _logging_functions(result, range(num_answers), num_answers)
            available: dict[str, Any] = {name: [value] * num_answers for name, value in answers.columns.items()}
            available |= {
                "prompts": [answers.prompt] * num_answers,
                "completions": answers.completions(),
                "completion_ids": answers.ids,
                "truncated": answers.truncated,
                "step": answers.step,
            }
            returned = self._call_function({**available, **logging_functions, **self.options})
            result.scores = _parse_score_list(returned, num_answers)
            return result
        for index, completion in enumerate(answers.completions()):
            # Here the function scores one answer, so what it logs belongs to that one.
            logging_functions = _logging_functions(result, range(index, index + 1), num_answers)
            available = {**answers.columns, "completion_ids": answers.ids[index], "truncated": answers.truncated[index]}
            if self.signature.convention is Convention.verl:
                available["solution_str"] = answers.texts[index]
            else:
                available |= {"prompt": answers.prompt, "completion": completion}
            available["step"] = answers.step
            returned = self._call_function({**available, **logging_functions, **self.options})
            result.scores.append(_parse_answer_score(returned, result, index, num_answers))
        return result

    def _call_function(self, available: dict[str, Any]) -> Any:
        """Call the user's function with those of the available arguments that it names; returns what it returns.

        `available`: by name, such as {"completion": "It is 4.", "answer": "4", "step": 12}.
        """
        if self.signature.takes_all:
            arguments = available
        else:
            arguments = {name: available[name] for name in self.signature.parameters if name in available}
        returned = self.function(**arguments)
        if inspect.isawaitable(returned):
            returned = asyncio.run(_wait_for(returned))
        return returned


def _logging_functions(result: CallResult, answer_indices: range, num_answers: int) -> dict[str, Callable[..., None]]:
    """Make the functions `log_metric` and `log_extra`, which a reward function may call; they write into `result`.

    Returned by name. `answer_indices`: of the answers that the call scores, of the `num_answers` in the group.
    """

    def log_metric(name: str, value: float) -> None:
        """Keep a number, whose mean over the round is logged."""
        result.logged_numbers.setdefault(str(name), []).append(float(value))

    def log_extra(column: str, values: Any) -> None:
        """Keep a value for each answer, as a further column of the round's record.

        `values`: a list with one for each answer that the call scores. Raises BadScore for anything else.
        """
        is_list = hasattr(values, "__len__") and not isinstance(values, str | bytes | dict)
        if not is_list or len(values) != len(answer_indices):
            raise BadScore(
                f"called log_extra({str(column)!r}, {_short_repr(values)}); it takes a list with a value for each of "
                f"{len(answer_indices)} answers"
            )
        for index, value in zip(answer_indices, values, strict=True):
            _set_value_in_extra_column(result, column, index, num_answers, value)

    return {"log_metric": log_metric, "log_extra": log_extra}


async def _wait_for(awaitable: Any) -> Any:
    """What an awaitable gives: `asyncio.run` takes coroutines alone."""
    return await awaitable


def _parse_score_list(returned: Any, num_answers: int) -> list[float | None]:
    """Check and convert the scores of a function that scores all answers at once; None where the reward does not apply.

    Raises BadScore if it did not return a list with a number or None for each answer.
    """
    if isinstance(returned, str | bytes | dict) or not hasattr(returned, "__len__"):
        raise BadScore(
            f"returned {_short_repr(returned)}; it must be a list with a number or None for each of {num_answers} answers"
        )
    if len(returned) != num_answers:
        raise BadScore(f"returned {len(returned)} scores for {num_answers} answers")
    return [parse_score(score) for score in returned]


def _set_value_in_extra_column(
    result: CallResult, column: Any, answer_index: int, num_answers: int, value: Any
) -> None:
    """Set the value of an answer in a further column of the record, `result.extra_columns`; as a text if JSON has no such type.

    Creates the column, with None for each of the `num_answers` answers, if it is new.
    """
    if hasattr(value, "item") and getattr(value, "size", None) == 1:  # of numpy and torch
        value = value.item()
    is_plain = value is None or isinstance(value, str | bool | int | float)
    values = result.extra_columns.setdefault(str(column), [None] * num_answers)
    values[answer_index] = value if is_plain else str(value)


def _parse_answer_score(returned: Any, result: CallResult, answer_index: int, num_answers: int) -> float | None:
    """Take the score of one answer from what a function returned that scores one answer at a time.

    It is a score, or a dictionary as of verl, {"score": 1.0, "steps": 3}: then the other values go into the record of the answer
    (`extra_columns` of `result`), and the numbers among them into the metrics (`logged_numbers`). `answer_index`: of the answer
    in its group, from 0. Raises BadScore if there is no score.
    """
    if not isinstance(returned, dict):
        return parse_score(returned)
    if "score" not in returned:
        raise BadScore(f'returned {_short_repr(returned)}; a dictionary must have "score"')
    for name, value in returned.items():
        if name == "score":
            continue
        _set_value_in_extra_column(result, name, answer_index, num_answers, value)
        if isinstance(value, Real):
            result.logged_numbers.setdefault(str(name), []).append(float(value))
    return parse_score(returned["score"])


def parse_score(returned: Any) -> float | None:
    """Convert what a reward function returned as a score: a float, or None where the reward does not apply.

    Raises BadScore for a text, and for NaN and infinities.
    """
    if returned is None:
        return None
    # Numbers of numpy and torch too; a text such as "nan" would be taken by `float`.
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
