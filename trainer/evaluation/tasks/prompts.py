"""Tasks whose rows are prompts alone: the generated text is judged without a reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from strategies.errors import ConfigError
from trainer.data.document import Document
from trainer.data.fields import RowError, parse_text
from trainer.evaluation.tasks.base import Task, TaskCase
from trainer.evaluation.tasks.model_interface import ModelInterface, Question
from trainer.evaluation.tasks.texts import prompt_document, split_location

if TYPE_CHECKING:
    from trainer.evaluation.generate import GeneratedAnswer

PROMPT_COLUMNS = ("prompt", "goal", "behavior", "question", "instruction", "text")
"""Columns that may hold the prompt, the first one that is there, in large or small letters."""


@dataclass(slots=True)
class PromptSamples:
    """The prompt of a case as tokens, with the answers that the model generated."""

    question: Question
    answers: list[GeneratedAnswer] = field(default_factory=list)


class PromptTask(Task):
    """Puts the prompt of each row into a template, if one is set, and lets the model answer."""

    needs_path = True
    options: ClassVar[dict[str, Any]] = {"template": None, "continue": False}

    def problems(self) -> Iterator[str]:
        """Yield an error message for each invalid setting, including a template whose file cannot be read."""
        yield from super().problems()
        yield from self.decoding.problems(f"{self.config_key}.write")
        if not isinstance(self.option_values["continue"], bool):
            yield f"{self.config_key}.options.continue={self.option_values['continue']}: must be true or false"
        try:
            if "{prompt}" not in self.prompt_template:
                yield (
                    f"{self.config_key}.options.template={self.option_values['template']}: must have "
                    f"{{prompt}} where the prompt goes"
                )
        except (OSError, UnicodeDecodeError) as error:
            yield f"{self.config_key}.options.template={self.option_values['template']}: cannot be read ({error})"

    @cached_property
    def prompt_template(self) -> str:
        """The text around each prompt, with {prompt} in its place: `options.template`, or the file that it names."""
        option = self.option_values["template"]
        if option is None:
            return "{prompt}"
        text = str(option)
        if "{prompt}" in text or "\n" in text:
            return text
        # A text without {prompt} can only be the path of a file. If there is no such file, the text is returned as it is, and
        # `problems`, which is called before any row is read, refuses it because it lacks {prompt}.
        template_path = Path(text).expanduser()
        return template_path.read_text(encoding="utf-8") if template_path.is_file() else text

    def prepare_case(self, case: TaskCase) -> None:
        """Replace the columns of a row by its prompt, put into the template. Raises RowError if there is no prompt."""
        case.fields = {"prompt": self.prompt_template.replace("{prompt}", parse_prompt(case.fields))}

    def generate_samples(self, cases: Sequence[TaskCase], model: ModelInterface) -> list[PromptSamples]:
        """Let the model answer the prompt of each case, `write.draws` times. All ranks must call.

        If `options.continue` is set, the model continues the prompt as plain text; else the prompt is a turn of a
        conversation. Raises DataError for a prompt that leaves too few positions for an answer.
        """
        is_continued = self.option_values["continue"]
        documents = []
        for case in cases:
            file, line = split_location(case.location)
            prompt = case.fields["prompt"]
            if is_continued:
                documents.append(Document(file, line, text=prompt))
            else:
                documents.append(prompt_document(case.location, prompt))
        questions = model.encode_questions(documents)
        if is_continued:
            # All tokens of a plain text are supervised, so they are the answer of the question; here they are the prompt.
            questions = [
                Question(where=question.where, context=[*question.context, *question.answer], answer=[])
                for question in questions
            ]

        samples = [PromptSamples(question) for question in questions]
        for answer in model.generate_answers(questions, self.decoding, self.config_key):
            samples[answer.prompt_index].answers.append(answer)
        return samples

    def signatures(self) -> dict[str, str]:
        shape = "continued as plain text" if self.option_values["continue"] else "asked as a turn"
        return {
            metric.name: f"{shape}|template:{self.prompt_template!r}|{self.verdict_signature}"
            for metric in self.metrics
        }

    @property
    def verdict_signature(self) -> str:
        """What decides the verdict on an answer, as a part of the signature."""
        raise NotImplementedError


def parse_prompt(fields: dict[str, Any]) -> str:
    """Find the prompt of a row in the column that its data set uses: the first of `PROMPT_COLUMNS`, in large or small letters.

    - {"Goal": "Write a poem"} -> "Write a poem".
    - {"prompt": {"text": "So if you"}}, a row of RealToxicityPrompts -> "So if you".
    - {"behavior": "Summarise it", "contextstring": "A text."}, a row of HarmBench -> the context, a line "---", the prompt.

    Raises RowError if the row has none of these columns, or no text in it.
    """
    # Published files write the same columns differently: "Goal" in one, "goal" in the next.
    column_by_lower_name = {name.lower(): name for name in fields}
    known_columns = [name for name in PROMPT_COLUMNS if name in column_by_lower_name]
    column = column_by_lower_name[known_columns[0]] if known_columns else "prompt"
    prompt = fields.get(column)
    if isinstance(prompt, dict) and "text" in prompt:  # RealToxicityPrompts
        return parse_text(prompt, "text")
    if column not in fields:
        raise RowError(
            "no_prompt", f"none of the columns {', '.join(PROMPT_COLUMNS)} is there; the row has {sorted(fields)}"
        )
    text = parse_text(fields, column)
    context_column = column_by_lower_name.get("contextstring", "")
    context = str(fields.get(context_column, "") or "").strip()
    return f"{context}\n\n---\n\n{text}" if context else text


def model_directory(path_setting: Any, setting_key: str) -> Path:
    """The directory of a model that a setting names, with `~` expanded. Raises ConfigError if it does not exist.

    `setting_key`: the setting, for the error.
    """
    path = Path(str(path_setting)).expanduser()
    if not path.is_dir():
        raise ConfigError(
            f"{setting_key}={path_setting}: is no directory here; nothing is fetched: download the model and give its path"
        )
    return path
