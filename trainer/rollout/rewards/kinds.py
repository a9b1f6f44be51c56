"""Built-in rewards. Those that an evaluation has too are scored by its tasks, so that both always agree.

They run in worker processes, as functions do: a regular expression may take for ever.
"""

from __future__ import annotations

import difflib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from strategies.extras import install_command
from trainer.data.fields import RowError
from trainer.data.messages import parse_turns
from trainer.evaluation.base import TaskConfig
from trainer.evaluation.tasks.base import TaskCase
from trainer.evaluation.tasks.structured import Maths, ToolCalls, check_json, final_result, parse_tool_calls
from trainer.evaluation.tasks.written import F1, REFERENCES_COLUMN, ExactMatch
from trainer.objectives.reward_functions import REFERENCE_COLUMNS
from trainer.rollout.rewards.functions import AnswersOfGroup, BadScore, CallResult


class RewardKind(ABC):
    """One built-in reward with its options, such as `maths`.

    Most kinds compare with the right answer in the prompt's data row.
    """

    kind: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}
    """Names of its options with their defaults."""
    compares: ClassVar[bool] = True
    """Whether it compares with a right answer, and so has the option `reference`: the column that holds it."""
    required_package: ClassVar[str | None] = None
    pip_extra: ClassVar[str] = "evaluate"

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.option_values = {**self.known_options(), **options}

    @classmethod
    def known_options(cls) -> dict[str, Any]:
        """All options with their defaults."""
        return {"reference": None, **cls.options} if cls.compares else dict(cls.options)

    def problems(self, key: str) -> Iterator[str]:
        """What is wrong with the options, one line each. `key`: the setting `objective.rewards.NAME`."""
        yield from ()

    @abstractmethod
    def score(self, text: str, num_tokens: int, columns: Mapping[str, Any]) -> float:
        """The score of one answer. Raises BadScore for a row that the kind cannot judge."""

    def check_row(self, columns: Mapping[str, Any]) -> None:
        """Raise BadScore for a row that the kind cannot judge, whatever the answer. `score` raises the same."""
        if self.compares:
            self.reference_answers(columns)

    def needed_columns(self) -> list[str]:
        """Columns of which a row must have one; empty if it needs none."""
        if not self.compares:
            return []
        column = self.option_values["reference"]
        return [str(column)] if column else ["answer", *REFERENCE_COLUMNS]

    def reference_answers(self, columns: Mapping[str, Any]) -> list[str]:
        """The right answers of a row, from `options.reference` or the first of `REFERENCE_COLUMNS` that has any.

        {"answer": "4"} -> ["4"], {"answer": ["4", "four"]} -> ["4", "four"]. Raises BadScore if it has none.
        """
        column = self.option_values["reference"]
        names = [str(column)] if column else list(REFERENCE_COLUMNS)
        for name in names:
            value = columns.get(name)
            texts = value if isinstance(value, list) else [value]
            is_answer = value is not None and bool(texts)
            if is_answer and all(isinstance(text, str | int | float) for text in texts):
                return [str(text).strip() for text in texts]
        raise BadScore(
            f"needs the right answer, in one of the columns {', '.join(names)}; rename one with data.columns, or name it with "
            "options.reference"
        )


class ExactMatchReward(RewardKind):
    """1 if the answer equals a reference, as the task `exact_match` has it."""

    kind = "exact_match"
    options: ClassVar[dict[str, Any]] = ExactMatch.options
    task_class: ClassVar[type[ExactMatch | F1]] = ExactMatch
    score_name: ClassVar[str] = "match"

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        task_options = {name: value for name, value in options.items() if name in self.task_class.options}
        self.task = self.task_class(self.kind, TaskConfig(kind=self.kind, path="-", options=task_options))

    def problems(self, key: str) -> Iterator[str]:
        for problem in self.task.problems():
            yield f"{key}{problem.removeprefix(self.task.config_key)}"

    def score(self, text: str, num_tokens: int, columns: Mapping[str, Any]) -> float:
        case = TaskCase("", fields={REFERENCES_COLUMN: self.reference_answers(columns)})
        return self.task.score(case, text.strip())[self.score_name]


class F1Reward(ExactMatchReward):
    """F1 of the words of the answer and the best reference, as the task `f1` has it."""

    kind = "f1"
    options: ClassVar[dict[str, Any]] = F1.options
    task_class: ClassVar[type[ExactMatch | F1]] = F1
    score_name: ClassVar[str] = "f1"


class MathsReward(RewardKind):
    """1 if the answer ends in the result of the reference, as the task `maths` has it."""

    kind = Maths.kind

    def check_row(self, columns: Mapping[str, Any]) -> None:
        self._reference_result(columns)

    def score(self, text: str, num_tokens: int, columns: Mapping[str, Any]) -> float:
        return float(final_result(text.strip()) == self._reference_result(columns))

    def _reference_result(self, columns: Mapping[str, Any]) -> Any:
        """Read the result, such as a number, out of the right answer of a row. Raises BadScore if there is none in it."""
        reference = self.reference_answers(columns)[0]
        result = final_result(reference)
        if result is None:
            raise BadScore(
                f"the right answer {reference!r} has no number, nothing after #### and nothing in \\boxed{{}}"
            )
        return result


class MathVerifyReward(RewardKind):
    """1 if math-verify holds answer and reference for the same: LaTeX, sets, intervals and equations too."""

    kind = "math_verify"
    required_package = "math_verify"
    pip_extra = "maths"

    def score(self, text: str, num_tokens: int, columns: Mapping[str, Any]) -> float:
        from math_verify import parse, verify

        reference = self.reference_answers(columns)[0]
        # A bare number or formula is read only between dollar signs, which say that it is one.
        reference_result = parse(reference) or parse(f"${reference}$")
        if not reference_result:
            raise BadScore(f"math-verify reads no result in the right answer {reference!r}")
        return float(verify(reference_result, parse(text)))


class JsonSchemaReward(RewardKind):
    """1 if the answer is JSON that a schema allows, as the task `json_schema` has it: that of the row, or of a file."""

    kind = "json_schema"
    compares = False
    options: ClassVar[dict[str, Any]] = {"schema": None}
    required_package = "jsonschema"

    def problems(self, key: str) -> Iterator[str]:
        """What is wrong with the file in `options.schema`, if there is one, one line.

        `key`: the setting `objective.rewards.NAME`.
        """
        file = self.option_values["schema"]
        if file is None:
            return
        if not Path(str(file)).expanduser().is_file():
            yield f"{key}.options.schema={file}: no such file; give a file with a JSON schema"
            return
        try:
            self._schema_of_file()
        except (BadScore, OSError, ValueError) as error:
            yield f"{key}.options.schema={file}: {error}; give a file with a JSON schema"

    def needed_columns(self) -> list[str]:
        return [] if self.option_values["schema"] else ["schema"]

    def check_row(self, columns: Mapping[str, Any]) -> None:
        if self.option_values["schema"] is None:  # else `problems` has read the file
            self._schema_of_row(columns)

    def score(self, text: str, num_tokens: int, columns: Mapping[str, Any]) -> float:
        schema = self._schema_of_row(columns) if self.option_values["schema"] is None else self._schema_of_file()
        _, error = check_json(text.strip(), schema)
        return float(error is None)

    def _schema_of_file(self) -> dict[str, Any]:
        """The schema in the file that `options.schema` names. Raises BadScore, OSError, ValueError."""
        file = Path(str(self.option_values["schema"])).expanduser()
        schema = _parse_schema(file.read_text(encoding="utf-8"))
        if not isinstance(schema, dict):
            raise BadScore("the schema is no JSON object")
        return schema

    def _schema_of_row(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """The schema of a row, as JSON or parsed. Raises BadScore."""
        schema = columns.get("schema")
        if isinstance(schema, str):
            schema = _parse_schema(schema)
        if not isinstance(schema, dict):
            raise BadScore('needs the column "schema" with a JSON schema, or options.schema=FILE')
        return schema


def _parse_schema(text: str) -> Any:
    """The value of a JSON text, which should be a schema. Raises BadScore if it is no JSON."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadScore(f"the schema is no JSON ({error})") from None


class ToolCallsReward(RewardKind):
    """1 if the answer makes the calls of the reference, as the task `tool_calls` has it."""

    kind = ToolCalls.kind

    def check_row(self, columns: Mapping[str, Any]) -> None:
        self._reference_calls(columns)

    def needed_columns(self) -> list[str]:
        return [*super().needed_columns(), "messages"]

    def score(self, text: str, num_tokens: int, columns: Mapping[str, Any]) -> float:
        return float(parse_tool_calls(text) == self._reference_calls(columns))

    def _reference_calls(self, columns: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The tool calls that are right for a row, such as [{"name": "weather", "arguments": {"city": "Paris"}}]; [] for none.

        They are those of the row's last turn, if "messages" ends in one of the assistant; else those written in its right answer.
        Raises BadScore if the row has neither.
        """
        if isinstance(columns.get("messages"), list):
            try:
                # Name of the column and what it should hold, for the message of an error.
                last_turn = parse_turns(columns["messages"], "messages", "a list of messages")[-1]
            except RowError as refusal:
                raise BadScore(refusal.message) from None
            if last_turn["role"] == "assistant":
                functions = [call["function"] for call in last_turn.get("tool_calls", ())]
                return [{"name": function["name"], "arguments": function["arguments"]} for function in functions]
        return parse_tool_calls(self.reference_answers(columns)[0])


class LengthReward(RewardKind):
    """DAPO's soft punishment of long answers (Yu et al. 2025, arXiv:2503.14476).

    0 up to `limit - buffer` tokens, then evenly down to -1 at `limit`: with a limit of 100 and a buffer of 20, -0.5 at 90 tokens.
    """

    kind = "length"
    compares = False
    options: ClassVar[dict[str, Any]] = {"limit": None, "buffer": None}

    def problems(self, key: str) -> Iterator[str]:
        for name in self.options:
            value = self.option_values[name]
            is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if value is not None and not is_count:
                yield f"{key}.options.{name}={value}: must be a number of tokens above 0"

    def score(self, text: str, num_tokens: int, columns: Mapping[str, Any]) -> float:
        limit = self.option_values["limit"]
        buffer = self.option_values["buffer"] or max(1, limit // 5)
        return max(-1.0, min(0.0, (limit - buffer - num_tokens) / buffer))


class FormatReward(RewardKind):
    """1 if the whole answer, without white space around it, matches a regular expression. A dot matches line breaks too."""

    kind = "format"
    compares = False
    options: ClassVar[dict[str, Any]] = {"pattern": None}

    def problems(self, key: str) -> Iterator[str]:
        pattern = self.option_values["pattern"]
        if not isinstance(pattern, str):
            yield f"{key}.options.pattern: not set; give a regular expression such as '<think>.*</think>.*'"
            return
        try:
            re.compile(pattern, re.DOTALL)
        except re.error as error:
            yield f"{key}.options.pattern={pattern}: is no regular expression ({error})"

    def score(self, text: str, num_tokens: int, columns: Mapping[str, Any]) -> float:
        return float(re.fullmatch(self.option_values["pattern"], text.strip(), re.DOTALL) is not None)


class JudgeReward(RewardKind):
    """The grade of the judge of `evaluation.judge`, from 0 (worthless) to 1. It is asked by the trainer, not by workers."""

    kind = "judge"
    options: ClassVar[dict[str, Any]] = {
        "rubric": "A good answer is right, helpful, complete, and no longer than it must be."
    }

    def check_row(self, columns: Mapping[str, Any]) -> None:
        """A judge does without a right answer."""

    def needed_columns(self) -> list[str]:
        return []

    def problems(self, key: str) -> Iterator[str]:
        if not str(self.option_values["rubric"]).strip():
            yield f"{key}.options.rubric: is empty; say what a good answer is, or leave it out"

    def score(self, text: str, num_tokens: int, columns: Mapping[str, Any]) -> float:
        raise NotImplementedError  # `trainer/rollout/rewards/judged.py` asks the judge


BUILT_IN_REWARDS: dict[str, type[RewardKind]] = {
    kind.kind: kind
    for kind in (
        ExactMatchReward,
        F1Reward,
        MathsReward,
        MathVerifyReward,
        JsonSchemaReward,
        ToolCallsReward,
        LengthReward,
        FormatReward,
        JudgeReward,
    )
}
"""All built-in rewards by name, in the order in which users see them."""


class KindReward:
    """A built-in reward as worker processes call it: with several answers at once, as a `FunctionReward` is."""

    def __init__(self, kind: str, options: Mapping[str, Any]) -> None:
        self.kind = BUILT_IN_REWARDS[kind](options)

    def __call__(self, answers: AnswersOfGroup) -> CallResult:
        """Score the answers, each by itself. Raises BadScore."""
        result = CallResult([])
        for text, ids in zip(answers.texts, answers.ids, strict=True):
            result.scores.append(self.kind.score(text, len(ids), answers.columns))
        return result


def kind_problems(kind: str, options: Mapping[str, Any], key: str) -> Iterator[str]:
    """What is wrong with a built-in reward, one line each: its name, its options, or a package that it needs.

    `key`: the setting `objective.rewards.NAME`.
    """
    if kind not in BUILT_IN_REWARDS:
        hint = f"one of {', '.join(BUILT_IN_REWARDS)}, or a function: {key}.function=FILE.py:NAME"
        close_kinds = difflib.get_close_matches(kind, BUILT_IN_REWARDS, n=1)
        if close_kinds:
            hint = f"did you mean {close_kinds[0]}?"
        yield f"{key}.kind={kind}: there is no such reward; {hint}"
        return
    kind_class = BUILT_IN_REWARDS[kind]
    known_options = kind_class.known_options()
    unknown_options = [option for option in options if option not in known_options]
    for option in unknown_options:
        yield f"{key}.options.{option}: {kind} has no such option; it has {', '.join(known_options) or 'none'}"
    package = kind_class.required_package
    if package is not None and find_spec(package) is None:
        yield f"{key}.kind={kind}: needs {package}; {install_command(kind_class.pip_extra)}"
    if not unknown_options:  # else the class could not be made
        yield from kind_class(options).problems(key)
