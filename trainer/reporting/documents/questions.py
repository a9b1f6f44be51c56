"""Questions that papers must answer and no run can: by name, answered in a file of the owner's."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any


class Paper(StrEnum):
    """A paper, by the name users type."""

    datasheet = "datasheet"
    annex_xi = "annex_xi"
    annex_xii = "annex_xii"
    training_summary = "training_summary"
    processing = "processing"


QUESTIONS = {
    "provider": "Who provides the model (name, address)?",
    "contact": "Who answers questions about it?",
    "intended_use": "Which tasks is it meant for, and in which kinds of systems?",
    "out_of_scope": "What must it not be used for?",
    "acceptable_use": "Which policy of acceptable use applies?",
    "release_date": "When was it, or will it be, released?",
    "distribution": "How is it distributed?",
    "licence": "Under which licence is the tuned model given?",
    "interaction": "With which hardware and software can it interact that is not part of it?",
    "base_flop": "How many floating-point operations did the training of the base take (a number)?",
    "base_training_data": "What was the base trained on, and where is its own summary?",
    "data_collection": "Who collected the data, how, when, and for what?",
    "data_subjects": "Whom is the data about, and were they asked?",
    "data_rights": "By what right is the data used, and how are reservations of rights (opt-outs) respected?",
    "illegal_content": "What was done so that no illegal content was learned?",
    "legal_basis": "On which legal basis is personal data processed, and for which purpose?",
    "recipients": "Who receives the data or the model, also outside the European Union?",
    "retention": "How long are data, checkpoints and exports kept, and who deletes them?",
    "security": "Which technical and organisational measures protect the data?",
    "controller": "Who is the controller, and who the data protection officer?",
    "known_risks": "Which risks are known, and what was done about them?",
    "device_watts": "How many watts did one device draw on average (a number)? Without it no energy is estimated.",
}
NUMERIC_QUESTIONS = ("base_flop", "device_watts")


def paper_problems(papers: list[str]) -> Iterator[str]:
    """An error message for each name in `export.papers` that is no paper."""
    for name in papers:
        if name not in [*Paper]:
            similar_names = difflib.get_close_matches(name, [*Paper], n=1)
            suggestion = f"did you mean {similar_names[0]}?" if similar_names else f"one of {', '.join(Paper)}"
            yield f"export.papers=[{name}]: there is no such paper; {suggestion}"


def read_answers(path: str | None) -> tuple[dict[str, Any], list[str]]:
    """Read what the model's owner answered for the documents, from a YAML file: returns (answers by question, error messages).

    Both are empty if `path` is None. The file {provider: Clinic of X, contact: } gives ({"provider": "Clinic of X"}, []): an
    answer that is null or empty leaves its question open. There is an error message if the file cannot be read or holds no
    pairs, for each unknown question, and for an answer that must be a number and is none.
    """
    import yaml

    if path is None:
        return {}, []
    try:
        answers = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return {}, [f"export.answers={path}: cannot be read ({' '.join(str(error).split())[:120]})"]
    if not isinstance(answers, dict):
        return {}, [f"export.answers={path}: must be pairs of a question and its answer, such as provider: Clinic of X"]
    problems = []
    for name, answer in answers.items():
        if name not in QUESTIONS:
            similar_names = difflib.get_close_matches(str(name), QUESTIONS, n=1)
            suggestion = f"did you mean {similar_names[0]}?" if similar_names else f"one of {', '.join(QUESTIONS)}"
            problems.append(f"export.answers={path}: {name}: there is no such question; {suggestion}")
        elif name in NUMERIC_QUESTIONS and positive_number_or_none(answer) is None:
            problems.append(f"export.answers={path}: {name}: {answer}: must be a number above 0, such as 1e21")
    given_answers = {name: answer for name, answer in answers.items() if answer not in (None, "")}
    return given_answers, problems


def positive_number_or_none(answer: Any) -> float | None:
    """An answer as a finite number above 0; None for any other. A text is parsed too, since YAML takes 1e21 for a text."""
    if isinstance(answer, bool):
        return None
    try:
        parsed = float(answer)
    except (TypeError, ValueError):
        return None
    return parsed if 0 < parsed < float("inf") else None
