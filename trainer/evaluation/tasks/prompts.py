"""Tasks whose rows are prompts alone: the generated text is judged without a reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from strategies.errors import ConfigError
from trainer.data.document import Document
from trainer.data.fields import Refusal, text_of
from trainer.evaluation.tasks.base import Case, Task
from trainer.evaluation.tasks.model_interface import ModelInterface, Question
from trainer.evaluation.tasks.texts import split_location

if TYPE_CHECKING:
    from trainer.evaluation.generate import WrittenAnswer

PROMPT_COLUMNS = ("prompt", "goal", "behavior", "question", "instruction", "text")
"""Columns that may hold the prompt, the first one that is there, in large or small letters."""


class PromptTask(Task):
    """Reads a prompt of each row, perhaps inside a template, and has it answered."""

    needs_path = True
    options: ClassVar[dict[str, Any]] = {"template": None, "continue": False}

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.config.write.problems(f"{self.key}.write")
        if not isinstance(self.option_values["continue"], bool):
            yield f"{self.key}.options.continue={self.option_values['continue']}: must be true or false"
        try:
            if "{prompt}" not in self.template:
                yield f"{self.key}.options.template={self.option_values['template']}: must have {{prompt}} where the prompt goes"
        except (OSError, UnicodeDecodeError) as error:
            yield f"{self.key}.options.template={self.option_values['template']}: cannot be read ({error})"

    @cached_property
    def template(self) -> str:
        """What is put around each prompt: the option itself, or what stands in the file that it names."""
        given = self.option_values["template"]
        if given is None:
            return "{prompt}"
        if "{prompt}" in str(given) or "\n" in str(given) or not Path(str(given)).expanduser().is_file():
            return str(given)
        return Path(str(given)).expanduser().read_text(encoding="utf-8")

    def read(self, case: Case) -> None:
        case.fields = {"prompt": self.template.replace("{prompt}", prompt_of(case.fields))}

    def write_draws(self, cases: Sequence[Case], model: ModelInterface) -> list[tuple[Question, list[WrittenAnswer]]]:
        """Each prompt as it was told, and its draws. All ranks must call. Raises DataError for a prompt that leaves no room."""
        documents = [
            Document(*split_location(case.where), text=case.fields["prompt"])
            if self.option_values["continue"]
            else Document(*split_location(case.where), prompt=case.fields["prompt"], completion="-", separator="\n")
            for case in cases
        ]
        questions = model.encode_questions(documents)
        if self.option_values["continue"]:
            questions = [Question(each.where, [*each.context, *each.answer], []) for each in questions]
        found: list[tuple[Question, list[WrittenAnswer]]] = [(question, []) for question in questions]
        for one in model.answers(questions, self.config.write, self.key):
            found[one.prompt][1].append(one)
        return found

    def signatures(self) -> dict[str, str]:
        shape = "continued as plain text" if self.option_values["continue"] else "asked as a turn"
        return {metric.name: f"{shape}|template:{self.template!r}|{self.verdict_signature}" for metric in self.metrics}

    @property
    def verdict_signature(self) -> str:
        """What decides a verdict, for the signature."""
        raise NotImplementedError


def prompt_of(fields: dict[str, Any]) -> str:
    """The prompt of a row; of HarmBench's with the text that it is about before it. Raises Refusal."""
    by = {name.lower(): name for name in fields}
    name = next((by[name] for name in PROMPT_COLUMNS if name in by), "prompt")
    value = fields.get(name)
    if isinstance(value, dict) and "text" in value:  # RealToxicityPrompts
        return text_of(value, "text")
    if name not in fields:
        raise Refusal(
            "no_prompt", f"none of the columns {', '.join(PROMPT_COLUMNS)} is there; the row has {sorted(fields)}"
        )
    text, context = text_of(fields, name), str(fields.get(by.get("contextstring", ""), "") or "").strip()
    return f"{context}\n\n---\n\n{text}" if context else text


def directory_of(value: Any, key: str) -> Path:
    """A directory that a setting names. Raises ConfigError."""
    path = Path(str(value)).expanduser()
    if not path.is_dir():
        raise ConfigError(
            f"{key}={value}: is no directory here; nothing is fetched: download the model and give its path"
        )
    return path
