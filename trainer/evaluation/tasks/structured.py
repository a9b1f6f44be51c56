"""Answers for programs to read: tool calls, JSON that follows a schema, the final result of a calculation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from strategies.errors import DataError
from trainer.data.document import Document
from trainer.data.fields import RowError, parse_text, show_value
from trainer.data.messages import parse_turns
from trainer.evaluation.tasks.base import RatioOfSums, Task, TaskCase, TaskMetric, TaskRow, documents_of
from trainer.evaluation.tasks.model_interface import ModelInterface, last_answer
from trainer.evaluation.tasks.pass_at_k import set_samples_of_row, texts_by_prompt
from trainer.evaluation.tasks.texts import split_location
from trainer.evaluation.tasks.written import GenerationTask

CODE_FENCE_REGEX = re.compile(r"\A```\w*\s*\n(.*?)\n?```\s*\Z", re.DOTALL)
BOXED_REGEX = re.compile(r"\\boxed\s*\{")
NUMBER_REGEX = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?|[-+]?\.\d+")
LATEX_FRACTION_REGEX = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")


class ToolCalls(GenerationTask):
    """Whether the answer makes the tool calls of the reference: the same tools, arguments and order, or no call at all."""

    kind = "tool_calls"
    right_or_wrong = True
    metrics = (
        TaskMetric(
            "accuracy",
            "share of answers with the right calls and arguments (or rightly none), 0 to 1",
            ratio_of_sums=RatioOfSums("right"),
        ),
        TaskMetric(
            "name_accuracy",
            "share of answers that call the right tools in order, 0 to 1",
            ratio_of_sums=RatioOfSums("names"),
        ),
        TaskMetric(
            "called",
            "share of answers that call a tool where one is called, and none where none is",
            ratio_of_sums=RatioOfSums("called"),
        ),
    )
    rows_description = (
        'rows with a conversation ("messages") and its "tools"; the last assistant turn holds the right "tool_calls", or '
        "none if no tool should be called"
    )

    def prepare_case(self, case: TaskCase) -> None:
        """Replace the columns of a row by what its answer is compared with: the right tool calls, and the reference text.

        {"calls": [{"name": "weather", "arguments": {"city": "Paris"}}], "reference": "[...]"}: the reference is the calls as
        JSON, or the text of an answer without calls. Raises RowError for a row without tools or without an answer.
        """
        assert case.document is not None
        answer = last_answer(case.document)
        if answer is None or not case.document.tools:
            missing = "no tools" if answer is not None else "no assistant turn"
            raise RowError("no_tools", f"the row has {missing}; it must have both")
        calls = []
        for call in answer.get("tool_calls", ()):
            function = call["function"]
            calls.append({"name": function["name"], "arguments": function["arguments"]})
        reference = json.dumps(calls, ensure_ascii=False) if calls else answer["content"]
        case.fields = {"calls": calls, "reference": reference}

    def score_cases(self, cases: Sequence[TaskCase], model: ModelInterface) -> list[TaskRow]:
        """A row for each conversation, with whether the answer makes the reference's tool calls. All ranks must call.

        Raises DataError if the chat template writes calls in a form that is not read here: every answer would be wrong.
        """
        self._check_template_writes_readable_calls(cases, model)
        return super().score_cases(cases, model)

    def _check_template_writes_readable_calls(self, cases: Sequence[TaskCase], model: ModelInterface) -> None:
        """Check once that tool calls can be read at all from what this model's chat template writes.

        The first reference answer with calls is rendered by the template, and must be read as the same calls again. Raises
        DataError if not.
        """
        case_with_call = next((case for case in cases if case.fields["calls"]), None)
        if case_with_call is None or case_with_call.document is None:
            return
        (question,) = model.encode_questions([case_with_call.document])
        reference = model.answer_generator.tokenizer.decode(question.answer, skip_special_tokens=True)
        if parse_tool_calls(reference) != case_with_call.fields["calls"]:
            raise DataError(
                f"{case_with_call.location}: the chat template writes the calls as {reference!r}, which is not read here; "
                "calls must be JSON objects with a name and arguments; give such a template in model.chat_template"
            )

    def reference(self, case: TaskCase) -> str:
        return str(case.fields["reference"])

    def score(self, case: TaskCase, answer: str) -> dict[str, float]:
        """Compare the tool calls of an answer with those of the reference, in their order.

        Scores: `right`, tools and arguments are the same; `names`, the tools are the same; `called`, both make calls, or
        neither.
        """
        calls = parse_tool_calls(answer)
        reference_calls = case.fields["calls"]
        names = [call["name"] for call in calls]
        reference_names = [call["name"] for call in reference_calls]
        is_exact_match = calls == reference_calls  # a call is its name and its arguments
        has_same_names = names == reference_names
        agrees_on_calling = bool(calls) == bool(reference_calls)
        return {"right": float(is_exact_match), "names": float(has_same_names), "called": float(agrees_on_calling)}

    def signatures(self) -> dict[str, str]:
        signature = 'calls:JSON objects with "name" and "arguments" or "parameters"|arguments:equal as JSON'
        return self.signature_of_all(signature)


def parse_tool_calls(text: str) -> list[dict[str, Any]]:
    """Find the tool calls in a generated answer, in their order: [{"name": "weather", "arguments": {"city": "Paris"}}].

    They are JSON objects with a name and arguments, anywhere in the text: alone, in lists or between tags. Other JSON is
    ignored.
    """
    decoder = json.JSONDecoder()
    calls = []
    position = text.find("{")
    while position >= 0:
        try:
            # `position` is now behind the object.
            json_object, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            position = text.find("{", position + 1)  # no JSON begins here
            continue
        call = _parse_call(json_object)
        if call is not None:
            calls.append(call)
        position = text.find("{", position)
    return calls


def _parse_call(json_object: dict[str, Any]) -> dict[str, Any] | None:
    """Read one JSON object of an answer as a tool call, as {"name": ..., "arguments": {...}}; None if it is no call.

    Models write calls differently. In OpenAI's form both stand under "function", and arguments may be JSON text; Llama 3
    writes "parameters": {"name": "weather", "parameters": {"city": "Paris"}}.
    """
    if isinstance(json_object.get("function"), dict):  # OpenAI's form
        json_object = json_object["function"]
    name = json_object.get("name")
    arguments = json_object.get("arguments", json_object.get("parameters"))  # Llama 3 writes "parameters"
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
        TaskMetric(
            "valid", "share of answers that the schema allows, 0 to 1 (jsonschema)", ratio_of_sums=RatioOfSums("valid")
        ),
        TaskMetric("parsed", "share of answers that are JSON, 0 to 1", ratio_of_sums=RatioOfSums("parsed")),
    )
    rows_description = (
        'rows with a "prompt" or a conversation ("messages"), and "schema": the JSON schema that the answer must fit; '
        "options.schema names a file with one schema for all rows"
    )
    options: ClassVar[dict[str, Any]] = {"schema": None}
    file_options = ("schema",)
    needs_path = True
    supports_draws = True
    required_package = "jsonschema"

    def problems(self) -> Iterator[str]:
        """Yield an error message for each invalid setting of the task, also of how answers are generated."""
        yield from super().problems()
        yield from self.decoding.problems(f"{self.config_key}.write")
        file = self.option_values["schema"]
        if file is not None and not Path(str(file)).expanduser().is_file():
            yield f"{self.config_key}.options.schema={file}: no such file; give a file with a JSON schema"

    def prepare_case(self, case: TaskCase) -> None:
        """Set the JSON schema that the row's answer must fit (`case.fields`), and the prompt (`case.document`).

        The schema is that of `options.schema`, or else of the row, as an object or as JSON text. The prompt is the row's
        "messages" without an answer at their end, or else its "prompt". Raises RowError if either is not valid.
        """
        schema = self._schema_of_row(case.fields)
        case.document = _prompt_document_of_row(case)
        case.fields = {"schema": schema}

    def _schema_of_row(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The JSON schema that the answer to a row must fit, checked: that of `options.schema`, else the row's.

        `fields`: the columns of the row. Raises RowError if there is no schema, or it is none.
        """
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for

        schema = fields.get("schema")
        file = self.option_values["schema"]
        if file is not None:
            schema = Path(str(file)).expanduser().read_text(encoding="utf-8")
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError as error:
                raise RowError("bad_schema", f"the schema is no JSON ({error})") from None
        if not isinstance(schema, dict):
            raise RowError("bad_schema", f'"schema" is {show_value(schema)}; it must be a JSON schema')
        try:
            # The version of the JSON schema language that the schema names decides the rules.
            validator_for(schema).check_schema(schema)
        except SchemaError as error:
            raise RowError("bad_schema", f'"schema" is no JSON schema: {error.message}') from None
        return schema

    def score_cases(self, cases: Sequence[TaskCase], model: ModelInterface) -> list[TaskRow]:
        """Let the model answer each prompt, and report whether the answer is JSON, and valid under the schema.

        All ranks must call. With several answers to a prompt (`write.draws`), the row's scores are means over them.
        """
        questions = model.encode_questions(documents_of(cases))
        answers = texts_by_prompt(model.generate_answers(questions, self.decoding, self.config_key), len(cases))
        rows = []
        for case, question, texts in zip(cases, questions, answers, strict=True):
            schema = case.fields["schema"]
            scores = []
            violations = []  # what is wrong with each answer; None if nothing is
            for text in texts:
                is_json, violation = check_json(text, schema)
                scores.append({"valid": float(violation is None), "parsed": float(is_json)})
                violations.append(violation)
            prompt = model.decode_prompt_end(question.context)
            reference = json.dumps(schema, ensure_ascii=False)
            # The report shows the first answer, and so what is wrong with that one.
            row = TaskRow(
                where=case.location, prompt=prompt, answer="", reference=reference, scores={}, note=violations[0] or ""
            )
            set_samples_of_row(row, texts, scores)  # sets answer and scores
            rows.append(row)
        return rows

    def signatures(self) -> dict[str, str]:
        from importlib.metadata import version

        signature = f"jsonschema:{version('jsonschema')}|a code fence around the answer is taken off"
        return self.signature_of_all(signature)


def _prompt_document_of_row(case: TaskCase) -> Document:
    """Build a document from the prompt of a row: its "messages" without an answer at their end, or else its "prompt".

    The answer "{}" is a stand-in: the format of a document needs one, and the model sees only the prompt. Raises RowError.
    """
    document = Document(*split_location(case.location))
    if "messages" in case.fields:
        turns = parse_turns(case.fields["messages"], "messages", "a list of messages")
        if turns[-1]["role"] == "assistant":
            turns.pop()
        document.messages = [*turns, {"role": "assistant", "content": "{}"}]
    else:
        document.prompt = parse_text(case.fields, "prompt")
        document.completion = "{}"
    return document


class JsonVerdict(NamedTuple):
    """What is found of an answer that should be JSON by a schema."""

    is_json: bool
    violation: str | None
    """What is wrong with it, such as "$.age: -1 is less than the minimum of 0"; None if the schema allows it."""


def check_json(answer: str, schema: dict[str, Any]) -> JsonVerdict:
    """Check whether a generated answer is JSON that a schema allows, and say what is wrong if not.

    A code fence around the JSON is taken off. Nothing is fetched: a schema that refers to one at another address allows
    nothing.
    """
    from jsonschema.exceptions import best_match
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    fenced = CODE_FENCE_REGEX.match(answer)
    json_text = fenced[1] if fenced else answer
    try:
        content = json.loads(json_text)
    except (ValueError, RecursionError) as error:
        return JsonVerdict(is_json=False, violation=f"no JSON: {error}")
    validator = validator_for(schema)(schema, registry=Registry())  # an empty registry resolves no other address
    try:
        violation = best_match(validator.iter_errors(content))
    except Unresolvable as error:
        return JsonVerdict(is_json=True, violation=f"the schema refers to {error.ref}, which is not in it")
    if violation is None:
        return JsonVerdict(is_json=True, violation=None)
    return JsonVerdict(is_json=True, violation=f"{violation.json_path}: {violation.message}")


class Maths(GenerationTask):
    """Whether the answer ends in the reference's result: the last `\\boxed{}`, else what follows ####, else the last number."""

    kind = "maths"
    right_or_wrong = True
    metrics = (
        TaskMetric("accuracy", "share of answers with the right result, 0 to 1", ratio_of_sums=RatioOfSums("right")),
    )
    rows_description = (
        "rows with a problem and its solution, in any format that data.path takes; the last number of the solution, or "
        "what stands in \\boxed{} or behind ####, is the right result"
    )

    def prepare_case(self, case: TaskCase) -> None:
        """Keep the reference answer and the result that it ends in, with which results of answers are compared.

        Raises RowError.
        """
        super().prepare_case(case)
        case.fields["result"] = final_result(self.reference(case))
        if case.fields["result"] is None:
            raise RowError("no_result", "the solution has no number, nothing after #### and nothing in \\boxed{}")

    def score(self, case: TaskCase, answer: str) -> dict[str, float]:
        return {"right": float(final_result(answer) == case.fields["result"])}

    def signatures(self) -> dict[str, str]:
        return {"accuracy": "result:last \\boxed, else after ####, else last number|numbers compared as fractions"}


def final_result(text: str) -> Fraction | str | None:
    """The result that a solution of a maths problem ends in, of an answer or of a reference; None if it has none.

    The content of the last `\\boxed{}`, else the line after the last #### (the form of GSM8K), else the last number. Numbers
    are returned as fractions, so that 0.50, 1/2 and \\frac{1}{2} are equal.
    """
    boxes = list(BOXED_REGEX.finditer(text))
    if boxes:
        return _parse_result(_until_closing_brace(text, boxes[-1].end()))
    if "####" in text:  # the form of GSM8K
        after_last_mark = text.rpartition("####")[2].strip()
        return _parse_result(after_last_mark.partition("\n")[0])
    numbers = NUMBER_REGEX.findall(text)
    return _parse_result(numbers[-1]) if numbers else None


def _until_closing_brace(text: str, begin: int) -> str:
    """The content of a LaTeX group, from `begin`, right behind its opening brace, up to its own closing brace.

    "\\\\boxed{a{b}c} d" from behind the first brace -> "a{b}c". The rest of the text if no brace closes the group.
    """
    depth = 1
    for position in range(begin, len(text)):
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
        if depth == 0:
            return text[begin:position]
    return text[begin:]


def _parse_result(text: str) -> Fraction | str:
    """Bring the result of a maths problem into a form in which equal results are equal: a fraction, else a bare text.

    "\\$1,200" -> 1200, "50\\%" -> 50, "\\frac{1}{2}" -> 1/2, "x + 1" -> "x+1". $, %, commas, `\\text{}` and white space are
    dropped.
    """
    result = LATEX_FRACTION_REGEX.sub(r"\1/\2", text)
    for ignored in ("\\$", "$", "\\%", "%", "\\!", "\\,", "{,}", ","):
        result = result.replace(ignored, "")
    result = re.sub(r"\\text\s*\{[^}]*\}", "", result)
    result = re.sub(r"\s+", "", result).rstrip(".")
    try:
        return Fraction(result)
    except (ValueError, ZeroDivisionError):
        return result
