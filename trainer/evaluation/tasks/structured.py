"""Answers for programs to read: tool calls, JSON that follows a schema, the final result of a calculation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

from strategies.errors import DataError
from trainer.data.document import Document
from trainer.data.fields import Refusal, show_value, text_of
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
    """Whether the answer makes the tool calls of the reference: the same tools, arguments and order, or no call at all."""

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

    def parse_case(self, case: Case) -> None:
        """Keep the calls of the reference answer. Raises Refusal for a row without tools or without an answer."""
        assert case.document is not None
        answer = last_answer(case.document)
        if answer is None or not case.document.tools:
            lacks = "no tools" if answer is not None else "no assistant turn"
            raise Refusal("no_tools", f"the row has {lacks}; it must have both")
        calls = []
        for call in answer.get("tool_calls", ()):
            function = call["function"]
            calls.append({"name": function["name"], "arguments": function["arguments"]})
        reference = json.dumps(calls, ensure_ascii=False) if calls else answer["content"]
        case.fields = {"calls": calls, "reference": reference}

    def run(self, cases: Sequence[Case], model: ModelInterface) -> list[TaskRow]:
        """Raises DataError if the chat template writes calls in a form that is not read here: every answer would be wrong."""
        case_with_call = next((case for case in cases if case.fields["calls"]), None)
        if case_with_call is not None and case_with_call.document is not None:
            (question,) = model.encode_questions([case_with_call.document])
            reference = model.writer.tokenizer.decode(question.answer, skip_special_tokens=True)
            if parse_tool_calls(reference) != case_with_call.fields["calls"]:
                raise DataError(
                    f"{case_with_call.location}: the chat template writes the calls as {reference!r}, which is not read here; "
                    "calls must be JSON objects with a name and arguments; give such a template in model.chat_template"
                )
        return super().run(cases, model)

    def reference(self, case: Case) -> str:
        return str(case.fields["reference"])

    def score(self, case: Case, text: str) -> dict[str, float]:
        """Compare the calls of an answer with those of the reference, in their order.

        `right`: tools and arguments are the same; `names`: the tools are the same; `called`: both make calls, or neither.
        """
        calls = parse_tool_calls(text)
        reference_calls = case.fields["calls"]
        same_names = [call["name"] for call in calls] == [call["name"] for call in reference_calls]
        arguments = [call["arguments"] for call in calls]
        same_arguments = same_names and arguments == [call["arguments"] for call in reference_calls]
        return {
            "right": float(same_arguments),
            "names": float(same_names),
            "called": float(bool(calls) == bool(reference_calls)),
        }

    def signatures(self) -> dict[str, str]:
        signature = 'calls:JSON objects with "name" and "arguments" or "parameters"|arguments:equal as JSON'
        return {metric.name: signature for metric in self.metrics}


def parse_tool_calls(text: str) -> list[dict[str, Any]]:
    """The calls in an answer: JSON objects with a name and arguments, anywhere in the text, alone, in lists or between tags."""
    decoder = json.JSONDecoder()
    calls = []
    position = text.find("{")
    while position >= 0:
        try:
            call, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            position = text.find("{", position + 1)  # no JSON begins here
            continue
        parsed = _parse_call(call)
        if parsed is not None:
            calls.append(parsed)
        position = text.find("{", position)
    return calls


def _parse_call(call: dict[str, Any]) -> dict[str, Any] | None:
    """The name and the arguments of a call; None if the object is no call."""
    if isinstance(call.get("function"), dict):
        call = call["function"]
    name = call.get("name")
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):  # JSON within JSON, as OpenAI writes it
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return {"name": name, "arguments": arguments}


class JsonSchema(Task):
    """Whether the answer is JSON that is valid under a schema."""

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

    def parse_case(self, case: Case) -> None:
        """Keep the schema, of the row or of `options.schema`, and make a document of the prompt. Raises Refusal."""
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for

        fields = case.fields
        file = self.option_values["schema"]
        schema = fields.get("schema")
        if file is not None:
            schema = Path(str(file)).expanduser().read_text(encoding="utf-8")
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError as error:
                raise Refusal("bad_schema", f"the schema is no JSON ({error})") from None
        if not isinstance(schema, dict):
            raise Refusal("bad_schema", f'"schema" is {show_value(schema)}; it must be a JSON schema')
        try:
            validator_for(schema).check_schema(schema)
        except SchemaError as error:
            raise Refusal("bad_schema", f'"schema" is no JSON schema: {error.message}') from None
        file_name, _, line = case.location.rpartition(":")
        # The answer is a stand-in: the format of a document needs one, and only the prompt is asked.
        case.document = Document(file_name, int(line))
        if "messages" in fields:
            turns = turns_of(fields["messages"], "messages", "a list of messages")
            if turns[-1]["role"] == "assistant":
                turns.pop()
            case.document.messages = [*turns, {"role": "assistant", "content": "{}"}]
        else:
            case.document.prompt = text_of(fields, "prompt")
            case.document.completion = "{}"
        case.fields = {"schema": schema}

    def run(self, cases: Sequence[Case], model: ModelInterface) -> list[TaskRow]:
        """Rows with whether each answer is JSON, and valid under the row's schema. All ranks must call."""
        questions = model.encode_questions([case.document for case in cases if case.document is not None])
        answers = texts_by_prompt(model.answers(questions, self.config.write, self.key), len(cases))
        rows = []
        for case, question, texts in zip(cases, questions, answers, strict=True):
            schema = case.fields["schema"]
            verdicts = [check_json(text, schema) for text in texts]
            scores = [{"valid": float(problem is None), "parsed": float(is_json)} for is_json, problem in verdicts]
            _, first_problem = verdicts[0]
            prompt = model.shown_prompt(question.context)
            reference = json.dumps(schema, ensure_ascii=False)
            row = TaskRow(case.location, prompt, "", reference, {}, note=first_problem or "")
            rows.append(row_of_draws(row, texts, scores))
        return rows

    def signatures(self) -> dict[str, str]:
        from importlib.metadata import version

        signature = f"jsonschema:{version('jsonschema')}|a code fence around the answer is taken off"
        return {metric.name: signature for metric in self.metrics}


def check_json(text: str, schema: dict[str, Any]) -> tuple[bool, str | None]:
    """(whether an answer is JSON, what is wrong with it). A schema at another address that it refers to is not fetched."""
    from jsonschema.exceptions import best_match
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    fenced = FENCE.match(text)
    try:
        answer = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError) as error:
        return False, f"no JSON: {error}"
    try:
        problem = best_match(validator_for(schema)(schema, registry=Registry()).iter_errors(answer))
    except Unresolvable as error:
        return True, f"the schema refers to {error.ref}, which is not in it"
    return True, None if problem is None else f"{problem.json_path}: {problem.message}"


class Maths(WrittenTask):
    """Whether the answer ends in the reference's result: the last `\\boxed{}`, else what follows ####, else the last number."""

    kind = "maths"
    right_or_wrong = True
    metrics = (Metric("accuracy", "share of answers with the right result, 0 to 1", ratio=("right", None)),)
    reads = "a problem and its solution in any format of data.path; the result is found in it as in an answer"

    def parse_case(self, case: Case) -> None:
        super().parse_case(case)
        case.fields["result"] = final_result(self.reference(case))
        if case.fields["result"] is None:
            raise Refusal("no_result", "the solution has no number, nothing after #### and nothing in \\boxed{}")

    def score(self, case: Case, text: str) -> dict[str, float]:
        return {"right": float(final_result(text) == case.fields["result"])}

    def signatures(self) -> dict[str, str]:
        return {"accuracy": "result:last \\boxed, else after ####, else last number|numbers compared as fractions"}


def final_result(text: str) -> Fraction | str | None:
    """The result that a solution ends in. Numbers are fractions, so that 0.50, 1/2 and \\frac{1}{2} are equal."""
    boxes = list(BOXED.finditer(text))
    if boxes:
        return _parse_result(_until_closing_brace(text, boxes[-1].end()))
    if "####" in text:
        return _parse_result(text.rpartition("####")[2].strip().partition("\n")[0])
    numbers = NUMBER.findall(text)
    return _parse_result(numbers[-1]) if numbers else None


def _until_closing_brace(text: str, begin: int) -> str:
    """The text from `begin` to the brace that closes one opened before it; the rest of the text if none does."""
    depth = 1
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position]
    return text[begin:]


def _parse_result(text: str) -> Fraction | str:
    """A number as a fraction, any other result as plain text without ornaments of LaTeX."""
    plain = FRACTION.sub(r"\1/\2", text)
    for ornament in ("\\$", "$", "\\%", "%", "\\!", "\\,", "{,}", ","):
        plain = plain.replace(ornament, "")
    plain = re.sub(r"\\text\s*\{[^}]*\}", "", plain)
    plain = re.sub(r"\s+", "", plain).rstrip(".")
    try:
        return Fraction(plain)
    except (ValueError, ZeroDivisionError):
        return plain
