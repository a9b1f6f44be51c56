"""Answers that programs read: tool calls, JSON by a schema, the final number of a calculation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

from strategies.errors import DataError
from trainer.data.document import Document
from trainer.data.fields import Refusal, shown, text_of
from trainer.data.messages import turns_of
from trainer.evaluation.tasks.base import Case, Metric, Task, TaskRow
from trainer.evaluation.tasks.model_interface import ModelInterface, last_answer
from trainer.evaluation.tasks.pass_at_k import row_of_draws, texts_by_prompt
from trainer.evaluation.tasks.written import WrittenTask

FENCE = re.compile(r"\A```\w*\s*\n(.*?)\n?```\s*\Z", re.DOTALL)
BOXED = re.compile(r"\\boxed\s*\{")
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?|[-+]?\.\d+")
FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")


class ToolCalls(WrittenTask):
    """Whether the answer calls the tools that the reference calls, with its arguments, in its order; or none, as it does."""

    kind = "tool_calls"
    right_or_wrong = True
    metrics = (
        Metric(
            "accuracy",
            "share of answers with the right calls and arguments (or rightly none), 0 to 1",
            ratio=("right", None),
        ),
        Metric("name_accuracy", "share of answers that call the right tools in order, 0 to 1", ratio=("names", None)),
        Metric(
            "called",
            "share of answers that call a tool where one is called, and none where none is",
            ratio=("called", None),
        ),
    )
    reads = 'conversations ("messages") with "tools", whose last assistant turn has the right "tool_calls", or none'

    def read(self, case: Case) -> None:
        assert case.document is not None
        answer = last_answer(case.document)
        if answer is None or not case.document.tools:
            lacks = "no tools" if answer is not None else "no assistant turn"
            raise Refusal("no_tools", f"the row has {lacks}; it must have both")
        calls = [call["function"] for call in answer.get("tool_calls", ())]
        case.fields = {"calls": [{"name": call["name"], "arguments": call["arguments"]} for call in calls]}
        case.fields["reference"] = json.dumps(case.fields["calls"], ensure_ascii=False) if calls else answer["content"]

    def run(self, cases: Sequence[Case], model: ModelInterface) -> list[TaskRow]:
        """Raises DataError where the model's own way to write calls is one that is not read: every answer would be wrong."""
        called = next((case for case in cases if case.fields["calls"]), None)
        if called is not None and called.document is not None:
            (question,) = model.encode_questions([called.document])
            written = model.writer.tokenizer.decode(question.answer, skip_special_tokens=True)
            if parse_tool_calls(written) != called.fields["calls"]:
                raise DataError(
                    f"{called.where}: the chat template writes the calls as {written!r}, which is not read here; calls must be "
                    "JSON objects with a name and arguments; give such a template in model.chat_template"
                )
        return super().run(cases, model)

    def reference(self, case: Case) -> str:
        return str(case.fields["reference"])

    def score(self, case: Case, text: str) -> dict[str, float]:
        found, wanted = parse_tool_calls(text), case.fields["calls"]
        names = [call["name"] for call in found] == [call["name"] for call in wanted]
        return {
            "right": float(names and all(a["arguments"] == b["arguments"] for a, b in zip(found, wanted, strict=True))),
            "names": float(names),
            "called": float(bool(found) == bool(wanted)),
        }

    def signatures(self) -> dict[str, str]:
        said = 'calls:JSON objects with "name" and "arguments" or "parameters"|arguments:equal as JSON'
        return {metric.name: said for metric in self.metrics}


def parse_tool_calls(text: str) -> list[dict[str, Any]]:
    """Calls in an answer, wherever they stand: JSON objects with a name and arguments, alone, in lists or between tags."""
    decoder, found, place = json.JSONDecoder(), [], 0
    while (place := text.find("{", place)) >= 0:
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            place += 1
            continue
        value = value.get("function", value) if isinstance(value.get("function"), dict) else value
        arguments = value.get("arguments", value.get("parameters"))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                continue
        if isinstance(value.get("name"), str) and isinstance(arguments, dict):
            found.append({"name": value["name"], "arguments": arguments})
    return found


class JsonSchema(Task):
    """Whether the answer is JSON that a schema allows."""

    kind = "json_schema"
    metrics = (
        Metric("valid", "share of answers that the schema allows, 0 to 1 (jsonschema)", ratio=("valid", None)),
        Metric("parsed", "share of answers that are JSON, 0 to 1", ratio=("parsed", None)),
    )
    reads = (
        '"prompt" (a text) or "messages", and "schema": a JSON schema (or one for all rows in options.schema, a file)'
    )
    options: ClassVar[dict[str, Any]] = {"schema": None}
    file_options = ("schema",)
    needs_path = True
    supports_draws = True
    required_package = "jsonschema"

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.config.write.problems(f"{self.key}.write")
        file = self.option_values["schema"]
        if file is not None and not Path(str(file)).expanduser().is_file():
            yield f"{self.key}.options.schema={file}: no such file; give a file with a JSON schema"

    def read(self, case: Case) -> None:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for

        fields, file = case.fields, self.option_values["schema"]
        schema = fields.get("schema") if file is None else Path(str(file)).expanduser().read_text(encoding="utf-8")
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError as error:
                raise Refusal("bad_schema", f"the schema is no JSON ({error})") from None
        if not isinstance(schema, dict):
            raise Refusal("bad_schema", f'"schema" is {shown(schema)}; it must be a JSON schema')
        try:
            validator_for(schema).check_schema(schema)
        except SchemaError as error:
            raise Refusal("bad_schema", f'"schema" is no JSON schema: {error.message}') from None
        file_name, _, line = case.where.rpartition(":")
        case.document = Document(file_name, int(line))
        if "messages" in fields:
            turns = turns_of(fields["messages"], "messages", "a list of messages")
            if turns[-1]["role"] == "assistant":
                turns.pop()
            case.document.messages = [*turns, {"role": "assistant", "content": "{}"}]
        else:
            case.document.prompt, case.document.completion = text_of(fields, "prompt"), "{}"
        case.fields = {"schema": schema}

    def run(self, cases: Sequence[Case], model: ModelInterface) -> list[TaskRow]:
        questions = model.encode_questions([case.document for case in cases if case.document is not None])
        written = texts_by_prompt(model.answers(questions, self.config.write, self.key), len(cases))
        rows = []
        for case, question, texts in zip(cases, questions, written, strict=True):
            schema = case.fields["schema"]
            found = [check_json(text, schema) for text in texts]
            scores = [{"valid": float(problem is None), "parsed": float(parsed)} for parsed, problem in found]
            told, allowed = model.shown_prompt(question.context), json.dumps(schema, ensure_ascii=False)
            rows.append(row_of_draws(TaskRow(case.where, told, "", allowed, {}, note=found[0][1] or ""), texts, scores))
        return rows

    def signatures(self) -> dict[str, str]:
        from importlib.metadata import version

        said = f"jsonschema:{version('jsonschema')}|a code fence around the answer is taken off"
        return {metric.name: said for metric in self.metrics}


def check_json(text: str, schema: dict[str, Any]) -> tuple[bool, str | None]:
    """(whether an answer is JSON, what is wrong with it). What a schema refers to elsewhere is not fetched."""
    from jsonschema.exceptions import best_match
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    fenced = FENCE.match(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError) as error:
        return False, f"no JSON: {error}"
    try:
        problem = best_match(validator_for(schema)(schema, registry=Registry()).iter_errors(value))
    except Unresolvable as error:
        return True, f"the schema refers to {error.ref}, which is not in it"
    return True, None if problem is None else f"{problem.json_path}: {problem.message}"


class Maths(WrittenTask):
    """Whether the answer ends in the reference's result: the last boxed one, after ####, or the last number."""

    kind = "maths"
    right_or_wrong = True
    metrics = (Metric("accuracy", "share of answers with the right result, 0 to 1", ratio=("right", None)),)
    reads = "a problem and its solution in any format of data.path; the result is found in it as in an answer"

    def read(self, case: Case) -> None:
        super().read(case)
        case.fields["result"] = final_result(self.reference(case))
        if case.fields["result"] is None:
            raise Refusal("no_result", "the solution has no number, nothing after #### and nothing in \\boxed{}")

    def score(self, case: Case, text: str) -> dict[str, float]:
        return {"right": float(final_result(text) == case.fields["result"])}

    def signatures(self) -> dict[str, str]:
        return {"accuracy": "result:last \\boxed, else after ####, else last number|numbers compared as fractions"}


def final_result(text: str) -> Fraction | str | None:
    """The result that a solution ends in; numbers as fractions, so that 0.50, 1/2 and \\frac{1}{2} are one."""
    if boxes := list(BOXED.finditer(text)):
        return _parse_result(_until_closing_brace(text, boxes[-1].end()))
    if "####" in text:
        return _parse_result(text.rpartition("####")[2].strip().partition("\n")[0])
    numbers = NUMBER.findall(text)
    return _parse_result(numbers[-1]) if numbers else None


def _until_closing_brace(text: str, begin: int) -> str:
    depth = 1
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return text[begin:]


def _parse_result(text: str) -> Fraction | str:
    plain = FRACTION.sub(r"\1/\2", text)
    for ornament in ("\\$", "$", "\\%", "%", "\\!", "\\,", "{,}", ","):
        plain = plain.replace(ornament, "")
    plain = re.sub(r"\\text\s*\{[^}]*\}", "", plain)
    plain = re.sub(r"\s+", "", plain).rstrip(".")
    try:
        return Fraction(plain)
    except (ValueError, ZeroDivisionError):
        return plain
