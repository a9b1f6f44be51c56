"""Continued pre-training: the next-token loss on every token of plain texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from trainer.data.config import DataFormat, LearnConfig
from trainer.data.document import WRONG_KIND_REASON, Document
from trainer.objectives import sft
from trainer.objectives.base import OtherSettings, formats_of


@dataclass(kw_only=True, slots=True)
class PretrainConfig(sft.SftConfig):
    """Continued pre-training: next-token loss on every token of plain texts."""

    name: str = "pretrain"


class TextDataSpec(sft.SftDataSpec):
    """Plain texts and nothing else."""

    formats = (DataFormat.text,)

    def reason_to_reject(self, document: Document) -> tuple[str, str] | None:
        if document.text is not None:
            return super().reason_to_reject(document)
        problem = (
            "is no plain text, which objective=pretrain learns; give rows of text or text files, or use objective=sft"
        )
        return WRONG_KIND_REASON, problem


def pretrain_problems(config: PretrainConfig, other_settings: OtherSettings) -> Iterator[str]:
    """What is wrong with settings that plain texts cannot use (formats, turns to learn, chat templates), one line each.

    Then what is wrong with those that it shares with sft (replay, forgetting, label smoothing). `other_settings`: the rest of the
    run's configuration.
    """
    for key, data_format in formats_of(other_settings.data).items():
        if data_format not in (DataFormat.auto, DataFormat.text):
            yield f"{key}.format={data_format}: objective=pretrain learns plain texts; set {key}.format=text, or objective=sft"
    if other_settings.data.learn != LearnConfig():
        yield "data.learn: says which turns of a conversation are learned, and objective=pretrain reads none; leave it out"
    if other_settings.model.chat_template is not None:
        yield "model.chat_template: objective=pretrain learns plain texts, which need none; leave it out"
    yield from sft.sft_problems(config, other_settings)


PRETRAIN = replace(
    sft.SFT,
    settings=PretrainConfig,
    data_spec=lambda config: TextDataSpec(separate_replayed=sft.uses_replay_kl(config)),
    problems=pretrain_problems,
    generates_answers=False,
)
