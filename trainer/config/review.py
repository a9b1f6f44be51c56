"""Settings of a review by people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from strategies.settings import DESCRIBES, group, number, setting
from trainer.evaluation.base import DecodingConfig

OVERALL_QUESTION = "overall"
"""The question that every item has."""
OTHER_COLUMNS = ("item", "comment")
"""Columns of a reviewer's sheet beside those of the questions."""
EXAMPLE_QUESTION = "Which one is easier to understand?"


@dataclass(kw_only=True, slots=True)
class ReviewConfig:
    """What people are asked by `shardtune review` (docs/review.md); changes nothing of a training."""

    rubric: dict[str, str] = setting(default_factory=dict, reach=DESCRIBES)
    """Questions about each pair of answers, in addition to which is better overall, by names of your choice: {clear: Which is
    clearer?}."""
    n: int = number(50, least=1, advice="50 to 200 as a rule")
    """Number of prompts drawn from the file. If the file has fewer, all are used."""
    seed: int = number(0, least=0, advice="the default is 0")
    """Seed for drawing the prompts, for their order, and for the side on which each answer is shown."""
    repeats: float = number(0.1, least=0, most=1, advice="0.1 as a rule; 0 shows nothing twice")
    """Share of the items that are shown a second time with sides exchanged, to check whether a reviewer answers consistently.
    0: none."""
    write: DecodingConfig = group(
        lambda: DecodingConfig(max_new_tokens=256),
        advice={
            "max_new_tokens": "as much as people can be asked to read: 64 to 512",
            "beams": "1 is greedy",
            "draws": "1: one answer of each model is judged",
        },
    )
    """How the answers are generated."""

    def problems(self) -> Iterator[str]:
        """Check the settings of a review by people: the rubric's names and questions, and how answers are written.

        Yields error messages. The name of a question becomes a column of the reviewers' sheet.
        """
        for name, question in self.rubric.items():
            if not name.replace("-", "_").isidentifier() or name in (OVERALL_QUESTION, *OTHER_COLUMNS):
                yield (
                    f"review.rubric.{name}: the name is one of a column; use letters, digits, - and _, and not "
                    f"{OVERALL_QUESTION}"
                )
            if not str(question).strip():
                yield f"review.rubric.{name}: is empty; write the question, as in {EXAMPLE_QUESTION!r}"
        yield from self.write.problems("review.write")
        if self.write.draws > 1:
            yield f"review.write.draws={self.write.draws}: one answer of each model is judged; set it to 1"
