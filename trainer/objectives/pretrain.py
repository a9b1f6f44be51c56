"""Continued pre-training: the next-token loss on every token of plain texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from trainer.data.config import DataFormat, LearnConfig
from trainer.data.document import WRONG_KIND, Document
from trainer.objectives import sft
from trainer.objectives.base import Around, formats_of


@dataclass(kw_only=True, slots=True)
class PretrainConfig(sft.SftConfig):
    """Continued pre-training: next-token loss on every token of plain texts."""

    name: str = "pretrain"


class TextReading(sft.SftReading):
    """Plain texts and nothing else."""

    formats = (DataFormat.text,)

    def refuses(self, document: Document) -> tuple[str, str] | None:
        if document.text is not None:
            return super().refuses(document)
        said = (
            "is no plain text, which objective=pretrain learns; give rows of text or text files, or use objective=sft"
        )
        return WRONG_KIND, said


def problems(config: PretrainConfig, around: Around) -> Iterator[str]:
    """What continued pre-training leaves no room for."""
    for key, chosen in formats_of(around.data).items():
        if chosen not in (DataFormat.auto, DataFormat.text):
            yield f"{key}.format={chosen}: objective=pretrain learns plain texts; set {key}.format=text, or objective=sft"
    if around.data.learn != LearnConfig():
        yield "data.learn: says which turns of a conversation are learned, and objective=pretrain reads none; leave it out"
    if around.model.chat_template is not None:
        yield "model.chat_template: objective=pretrain learns plain texts, which need none; leave it out"
    yield from sft.problems(config, around)


PRETRAIN = replace(
    sft.SFT,
    settings=PretrainConfig,
    reading=lambda config: TextReading(held=sft.holds(config)),
    problems=problems,
    writes_answers=False,
)
