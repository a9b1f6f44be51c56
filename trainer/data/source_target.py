"""Documents for encoder-decoder models: a prompt, then its answer, each written as the tokenizer writes a text by itself.

No chat template takes part. Both sides get the affixes of the tokenizer (`</s>` at the end of T5's, `<s>` and `</s>`
around BART's), and the end token where it puts none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from strategies.errors import ConfigError, DataError
from trainer.data.config import OverLength
from trainer.data.document import Document
from trainer.data.store.sequences import Sample
from trainer.data.tokens.encode import BATCH, Encoder
from trainer.data.two_sides import boundary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class SourceTarget:
    """How prompts and answers are written; part of the identity of the prepared data."""

    prefix: str = ""
    """Text before every prompt."""
    max_target: int = 256
    """Longest answer in tokens, its special tokens included."""


class SourceTargetEncoder(Encoder):
    """Tokenises prompt and answer apart; a sample is the one and then the other, which alone is learned."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, settings: SourceTarget) -> None:
        super().__init__(tokenizer)
        self.settings = settings
        self.template = None
        if self.eos_id is None:
            raise ConfigError("the tokenizer has no eos_token, so no answer would ever end; set one in its config")
        self.end_ids = {self.eos_id}
        if self.eos_id not in self.closing:
            self.closing = [*self.closing, self.eos_id]

    def encode(self, documents: Iterable[Document], *, fast: bool = True) -> Iterator[tuple[Document, Sample]]:
        """Samples in the order of the documents, untruncated. Raises DataError with file and line."""
        source = iter(documents)
        while batch := list(islice(source, BATCH)):
            sides = [source_and_target(document) for document in batch]
            prompts = self._texts([self.settings.prefix + prompt for prompt, _, _ in sides])
            answers = self._texts([answer for _, answer, _ in sides])
            for document, prompt, answer, (_, _, learned) in zip(batch, prompts, answers, sides, strict=True):
                supervised = np.arange(len(prompt) + len(answer)) >= len(prompt)
                yield document, Sample(np.concatenate([prompt, answer]), supervised & learned)

    def _texts(self, texts: list[str]) -> Iterator[np.ndarray]:
        for encoding in self._backend.encode_batch(texts, add_special_tokens=False):
            yield np.array([*self.opening, *encoding.ids, *self.closing], dtype=np.int32)

    def fit(self, document: Document, sample: Sample, max_source: int, policy: OverLength) -> list[Sample]:
        """The sample with both sides within their bounds; none where `policy` drops it.

        A cut prompt keeps the tokenizer's closing tokens; a cut answer does not, since it does not end there. Raises
        DataError where the policy is `fail`.
        """
        cut, most = boundary(sample), self.settings.max_target
        answer = sample.input_ids[cut:]
        if cut <= max_source and len(answer) <= most:
            return [sample]
        if policy is OverLength.drop:
            return []
        if policy is OverLength.fail:
            raise DataError(
                f"{document.where}: {cut} tokens of prompt and {len(answer)} of answer are more than data.max_length="
                f"{max_source} and objective.max_target={most}; raise them, or set data.over_length to truncate or drop"
            )
        if policy is not OverLength.truncate:
            raise AssertionError(f"the config layer refuses data.over_length={policy.value} here")
        prompt = sample.input_ids[:cut]
        if cut > max_source:
            tail = min(len(self.closing), max_source - 1)
            prompt = np.concatenate([prompt[: max_source - tail], prompt[cut - tail :]])
        ids = np.concatenate([prompt, answer[:most]])
        return [Sample(ids, (np.arange(len(ids)) >= len(prompt)) & sample.supervised.any())]


def source_and_target(document: Document) -> tuple[str, str, bool]:
    """The prompt, the answer, and whether it is learned. Raises DataError for what has none, with file and line.

    Of a conversation: an optional system turn, one user turn and one assistant turn; the prompt is the system turn, an
    empty line, and the user turn. The separator of prompt/completion rows is left out: the two sides stand apart.
    """
    if document.prompt is not None:
        return document.prompt, document.completion or "", True
    turns = [*(document.messages or []), *(document.chosen or [])]
    *system, user, assistant = turns if len(turns) > 1 else [{"role": ""}, {"role": ""}]
    roles = [turn["role"] for turn in turns]
    if (user["role"], assistant["role"]) != ("user", "assistant") or roles[:-2] not in ([], ["system"]):
        what = f"a conversation of {', '.join(roles)}" if turns else "a text without an answer"
        raise DataError(
            f"{document.where}: {what}; objective=seq2seq reads one prompt and one answer (prompt and response, source "
            "and target, or a user and an assistant turn); change the row, or use objective=sft with a causal model"
        )
    prompt = "\n\n".join([*(turn["content"] for turn in system), user["content"]])
    return prompt, assistant["content"], bool(assistant.get("train", True))
