"""Tasks whose rows are prompts alone: the generated text is judged without a reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from strategies.errors import ConfigError
from trainer.data.document import Document
from trainer.data.fields import Refusal, parse_text
from trainer.evaluation.tasks.base import Case, Task
from trainer.evaluation.tasks.model_interface import ModelInterface, Question
from trainer.evaluation.tasks.texts import split_location

if TYPE_CHECKING:
    from trainer.evaluation.generate import GeneratedAnswer

PROMPT_COLUMNS = ("prompt", "goal", "behavior", "question", "instruction", "text")
"""Columns that may hold the prompt, the first one that is there, in large or small letters."""


class PromptTask(Task):
    """Puts the prompt of each row into a template, if one is set, and lets the model answer."""

    needs_path = True
    options: ClassVar[dict[str, Any]] = {"template": None, "continue": False}

    def problems(self) -> Iterator[str]:
        """An error message for each invalid setting, including the template and the file that it may name."""
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
        """The text around each prompt: the option itself, or the content of the file that it names."""
        option = self.option_values["template"]
        if option is None:
            return "{prompt}"
        text = str(option)
        if "{prompt}" in text or "\n" in text:
            return text
        # A text without a place for the prompt can only be the name of a file; `problems` refuses it if it is none.
        file = Path(text).expanduser()
        return file.read_text(encoding="utf-8") if file.is_file() else text

    def parse_case(self, case: Case) -> None:
        """Keep the row's prompt, put into the template. Raises Refusal if there is no prompt."""
        case.fields = {"prompt": self.template.replace("{prompt}", prompt_of(case.fields))}

    def write_draws(self, cases: Sequence[Case], model: ModelInterface) -> list[tuple[Question, list[GeneratedAnswer]]]:
        """Let the model answer the prompts: (question, its `write.draws` answers) for each case. All ranks must call.

        With `options.continue` the model continues the prompt as plain text, else the prompt is a turn of a conversation. Raises
        DataError for a prompt that leaves no room for an answer.
        """
        is_continued = self.option_values["continue"]
        documents = []
        for case in cases:
            file, line = split_location(case.location)
            prompt = case.fields["prompt"]
            if is_continued:
                documents.append(Document(file, line, text=prompt))
            else:
                # A document needs a completion; only the prompt is asked.
                documents.append(Document(file, line, prompt=prompt, completion="-", separator="\n"))
        questions = model.encode_questions(documents)
        if is_continued:
            # All of a plain text is learned, so it counts as the answer; here it is the prompt.
            questions = [Question(question.where, [*question.context, *question.answer], []) for question in questions]

        answers: list[list[GeneratedAnswer]] = [[] for _ in questions]
        for answer in model.generate_answers(questions, self.config.write, self.key):
            answers[answer.prompt_index].append(answer)
        return list(zip(questions, answers, strict=True))

    def signatures(self) -> dict[str, str]:
        shape = "continued as plain text" if self.option_values["continue"] else "asked as a turn"
        return {metric.name: f"{shape}|template:{self.template!r}|{self.verdict_signature}" for metric in self.metrics}

    @property
    def verdict_signature(self) -> str:
        """What decides the verdict on an answer, as a part of the signature."""
        raise NotImplementedError


def prompt_of(fields: dict[str, Any]) -> str:
    """The prompt of a row, from the first of `PROMPT_COLUMNS` that it has. Raises Refusal if there is none, or no text in it.

    {"Goal": "Write a poem"} -> "Write a poem". In HarmBench's rows, the text that the prompt is about (`contextstring`) comes
    before it.
    """
    # Published files write the same columns differently: "Goal" in one, "goal" in the next.
    column_by_lower_name = {name.lower(): name for name in fields}
    known_columns = [name for name in PROMPT_COLUMNS if name in column_by_lower_name]
    column = column_by_lower_name[known_columns[0]] if known_columns else "prompt"
    prompt = fields.get(column)
    if isinstance(prompt, dict) and "text" in prompt:  # RealToxicityPrompts
        return parse_text(prompt, "text")
    if column not in fields:
        raise Refusal(
            "no_prompt", f"none of the columns {', '.join(PROMPT_COLUMNS)} is there; the row has {sorted(fields)}"
        )
    text = parse_text(fields, column)
    context_column = column_by_lower_name.get("contextstring", "")
    context = str(fields.get(context_column, "") or "").strip()
    return f"{context}\n\n---\n\n{text}" if context else text


def directory_of(setting: Any, key: str) -> Path:
    """The directory that the setting `key` names. Raises ConfigError if it does not exist."""
    path = Path(str(setting)).expanduser()
    if not path.is_dir():
        raise ConfigError(
            f"{key}={setting}: is no directory here; nothing is fetched: download the model and give its path"
        )
    return path
