"""Encoder-decoder models: the next-token loss on the answer, which the decoder writes after the encoder read the prompt.

A document is a prompt, then its answer, each written as the tokenizer writes a text by itself: no chat template takes part.
Both sides get the affixes of the tokenizer (`</s>` at the end of T5's, `<s>` and `</s>` around BART's), and the end token
where it puts none. Prepared, they are one sequence, parted where the first token is learned. Both sides of a micro-batch are
padded rows, so a step's documents are grouped by length before they are dealt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from strategies.errors import ConfigError, DataError
from strategies.settings import DESCRIBES, number, setting
from trainer.data.batches.collate import IGNORED, Collator
from trainer.data.config import ControlTokens, DataConfig, DataFormat, Layout, LearnConfig, OverLength
from trainer.data.document import WRONG_KIND, Document, RefusedDocument, Tally
from trainer.data.objective_spec import imitable
from trainer.data.store.sequences import Sample, TokenDataset
from trainer.data.tokens.encode import BATCH, Encoder
from trainer.data.tokens.template import Rendered
from trainer.data.tokens.truncation import kept
from trainer.losses.next_token import computes_loss, logits_loss
from trainer.model.config import ModelKind
from trainer.objectives.base import Around, Family, Objective, ObjectiveConfig, UnlabelledReading, formats_of
from trainer.objectives.causal import counted, counting_of, plain_model
from trainer.objectives.pairs import WHOLE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(kw_only=True, slots=True)
class Seq2seqConfig(ObjectiveConfig):
    """Encoder-decoder models (T5, BART and their kin): the answer is learned by the decoder, the prompt read by the encoder."""

    name: str = "seq2seq"
    prefix: str = setting("", reach=DESCRIBES)
    """Text put before every prompt, such as `summarize: ` (its space included) for T5 models that were trained with it."""
    max_target: int = number(256, least=2, advice="an answer and its end need two tokens; 128 to 256 suit summaries")
    """Longest answer in tokens; `data.max_length` bounds the prompt, and `data.over_length` says what happens beyond either."""


def problems(config: Seq2seqConfig, around: Around) -> Iterator[str]:
    """What encoder-decoder models ask of the data, the model and what is done to it."""
    data, model = around.data, around.model
    if data.packing:
        yield "data.packing=true: prompts and answers are rows of their own, padded; set data.packing=false"
    if data.layout is Layout.padding_free:
        yield "data.layout=padding_free: encoder-decoder models are trained with padded rows; set data.layout=auto"
    if data.over_length not in WHOLE:
        yield (
            f"data.over_length={data.over_length.value}: would part a prompt from its answer; set data.over_length=truncate, "
            "drop or fail"
        )
    if data.learn != LearnConfig():
        yield "data.learn: objective=seq2seq learns the answer and nothing else; leave data.learn.turns and roles alone"
    for key, chosen in formats_of(data).items():
        if chosen in (DataFormat.text, DataFormat.preference):  # labelled rows are refused above
            yield (
                f"{key}.format={chosen}: objective=seq2seq reads a prompt and an answer; set {key}.format=prompt_completion, "
                "pair or messages"
            )
    if around.strategy.activation_checkpointing == "auto":
        yield (
            "strategy.activation_checkpointing=auto: what the two sides of an encoder-decoder model keep is not counted; set "
            "it to none, selective or full"
        )
    if model.chat_template is not None:
        yield f"model.chat_template={model.chat_template}: objective=seq2seq writes plain text; set model.chat_template=null"
    if model.add_tokens and around.tuning.name != "full":
        yield (
            f"model.add_tokens={model.add_tokens}: encoder and decoder look tokens up separately, and an adapter would "
            "train one of them; set tuning=full with objective=seq2seq"
        )


class TwoSidedReading(UnlabelledReading):
    """A prompt and its answer, tokenised apart."""

    over_length = WHOLE
    formats = (
        DataFormat.prompt_completion,
        DataFormat.pair,
        DataFormat.messages,
        DataFormat.sharegpt,
        DataFormat.alpaca,
    )

    def __init__(self, *, prefix: str, max_target: int) -> None:
        self.prefix, self.max_target = prefix, max_target

    def identity(self) -> dict[str, Any]:
        return {"prefix": self.prefix, "max_target": self.max_target}

    def encoder(self, tokenizer: PreTrainedTokenizerFast, config: DataConfig) -> Encoder:
        return SourceTargetEncoder(tokenizer, self.prefix, self.max_target, config.control_tokens)

    def sequences(
        self, encoder: Encoder, documents: list[Document], config: DataConfig, tally: Tally
    ) -> Iterator[tuple[Document, list[Sample]]]:
        assert isinstance(encoder, SourceTargetEncoder)
        for document, sample in encoder.encode([d for d in documents if imitable(d, tally)]):
            made = encoder.fit(document, sample, config.max_length, config.over_length)
            yield document, kept(encoder, document, sample, made, tally)

    def collator(self, layout: Layout, pad_token_id: int, decoder_start: int | None = None) -> Collator:
        assert decoder_start is not None, "a model with two sides has a first token of its decoder"
        return TwoSidedCollator(layout, pad_token_id, decoder_start)


class SourceTargetEncoder(Encoder):
    """Tokenises prompt and answer apart; a sample is the one and then the other, which alone is learned."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prefix: str,
        max_target: int,
        control_tokens: ControlTokens = ControlTokens.text,
    ) -> None:
        super().__init__(tokenizer, control_tokens=control_tokens)
        self.prefix, self.max_target = prefix, max_target
        self.template = None
        if self.eos_id is None:
            raise ConfigError("the tokenizer has no eos_token, so no answer would ever end; set one in its config")
        self.end_ids = {self.eos_id}
        if self.eos_id not in self.closing:
            self.closing = [*self.closing, self.eos_id]

    def encode(self, documents: Iterable[Document], *, fast: bool = True) -> Iterator[tuple[Document, Sample]]:
        """Samples in the order of the documents, untruncated. Raises RefusedDocument."""
        source = iter(documents)
        while batch := list(islice(source, BATCH)):
            sides = [source_and_target(document) for document in batch]
            asked = [self.told(document, prompt) for document, (prompt, _, _) in zip(batch, sides, strict=True)]
            prompts = self._texts(
                [Rendered(self.prefix + told, [], told != side[0]) for told, side in zip(asked, sides, strict=True)]
            )
            answers = self._texts([Rendered(answer, []) for _, answer, _ in sides])
            for document, prompt, answer, (_, _, weight) in zip(batch, prompts, answers, sides, strict=True):
                supervised = np.arange(len(prompt) + len(answer)) >= len(prompt)
                weights = supervised.astype(np.float32) * np.float32(weight) if 0 < weight < 1 else None
                sample = Sample(np.concatenate([prompt, answer]), supervised & (weight > 0), weights=weights)
                yield document, sample

    def _texts(self, texts: list[Rendered]) -> Iterator[np.ndarray]:
        for encoding in self.encodings(texts)[0]:
            yield np.array([*self.opening, *encoding.ids, *self.closing], dtype=np.int32)

    def fit(self, document: Document, sample: Sample, max_source: int, policy: OverLength) -> list[Sample]:
        """The sample with both sides within their bounds; none where `policy` drops it.

        A cut prompt keeps the tokenizer's closing tokens; a cut answer does not, since it does not end there. Raises
        DataError where the policy is `fail`.
        """
        cut, most = sample.answer_begin(), self.max_target
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
        tail = min(len(self.closing), max_source - 1) if cut > max_source else 0
        return [sample.cut(slice(min(cut, max_source) - tail), slice(cut - tail, cut), slice(cut, cut + most))]


def source_and_target(document: Document) -> tuple[str, str, float]:
    """The prompt, the answer, and its weight, 0 where it is not learned. Raises RefusedDocument for what has none.

    Of a conversation: an optional system turn, one user turn and one assistant turn; the prompt is the system turn, an
    empty line, and the user turn. The separator of prompt/completion rows is left out: the two sides stand apart.
    """
    if document.prompt is not None:
        return document.prompt, document.completion or "", 1.0
    turns = [*(document.messages or []), *(document.chosen or [])]
    *system, user, assistant = turns if len(turns) > 1 else [{"role": ""}, {"role": ""}]
    roles = [turn["role"] for turn in turns]
    if (user["role"], assistant["role"]) != ("user", "assistant") or roles[:-2] not in ([], ["system"]):
        what = f"a conversation of {', '.join(roles)}" if turns else "a text without an answer"
        raise RefusedDocument(
            document.where,
            "not_two_sided" if turns else WRONG_KIND,
            f"{what}; objective=seq2seq reads one prompt and one answer (prompt and response, source "
            "and target, or a user and an assistant turn); change the row, or use objective=sft with a causal model",
        )
    if document.tools or "tool_calls" in assistant or "reasoning_content" in assistant:
        raise RefusedDocument(
            document.where,
            "not_two_sided",
            "tools, calls and thoughts are written by chat templates, and objective=seq2seq has none; name them in "
            "data.ignore_columns to train without them, or use objective=sft with a causal model",
        )
    prompt = "\n\n".join([*(turn["content"] for turn in system), user["content"]])
    if any("weight" in turn for turn in turns[:-1]):
        said = (
            "a turn before the answer has a weight, and objective=seq2seq learns the answer alone; leave the weight out"
        )
        raise RefusedDocument(document.where, "bad_weight", f"{said}, or name weight in data.ignore_columns")
    weight = float(assistant.get("weight", assistant.get("train", True)))
    return prompt, str(assistant["content"]), weight


class TwoSidedCollator(Collator):
    """Micro-batches of two sides of padded rows, similar lengths together."""

    def __init__(self, layout: Layout, pad_token_id: int, decoder_start: int) -> None:
        super().__init__(layout, pad_token_id)
        self.decoder_start = decoder_start

    def rows(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return pad_two_sides(samples, pad_token_id=self.pad_token_id, start_token_id=self.decoder_start)

    def deal(self, dataset: TokenDataset, units: np.ndarray, tokens: np.ndarray, shape: tuple[int, int]) -> list:
        return deal_two_sides(dataset, units, *shape)


def pad_two_sides(samples: Sequence[Sample], *, pad_token_id: int, start_token_id: int) -> dict[str, Any]:
    """One row a document on each side, padded on the right: `input_ids` and `attention_mask [S, N]` for the encoder;
    `decoder_input_ids` (the start token, then the answer without its last) and `targets` (the answer) `[S, M]`."""
    cuts = [sample.answer_begin() for sample in samples]
    answers = [sample.input_ids[cut:] for sample, cut in zip(samples, cuts, strict=True)]
    ids = np.full((len(samples), max(cuts)), pad_token_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    decoder = np.full((len(samples), max(1, *map(len, answers), 1)), pad_token_id, dtype=np.int64)
    targets = np.full_like(decoder, IGNORED)
    decoder[:, 0] = start_token_id
    for row, (sample, cut, answer) in enumerate(zip(samples, cuts, answers, strict=True)):
        ids[row, :cut], mask[row, :cut] = sample.input_ids[:cut], 1
        decoder[row, 1 : len(answer)] = answer[:-1]
        targets[row, : len(answer)] = answer
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "decoder_input_ids": torch.from_numpy(decoder),
        "targets": torch.from_numpy(targets),
    }


def deal_two_sides(data: TokenDataset, documents: np.ndarray, num_slots: int, capacity: int) -> list[list[int]]:
    """Deal positions in `documents` into `num_slots` slots of exactly `capacity`, similar lengths together.

    Sorted by prompt, by answer or by both, whichever pads least. Deterministic. Slots come back costliest first.
    """
    answers = data.num_supervised[documents]
    prompts = data.lengths[documents] - answers
    best: list[np.ndarray] = []
    least = None
    for keys in ((answers, prompts), (prompts, answers), (prompts, prompts + answers)):
        slots = list(np.lexsort(keys)[::-1].reshape(num_slots, capacity))
        costs = [capacity * int(prompts[slot].max() + answers[slot].max()) for slot in slots]
        if least is None or sum(costs) < least:
            least = sum(costs)
            best = [slots[number] for number in sorted(range(num_slots), key=lambda n: (-costs[n], n))]
    return [sorted(slot.tolist()) for slot in best]


class Seq2seq(Objective):
    """Terms: `loss` (summed cross-entropy, carries the gradient) and `accuracy` (correct argmaxes, evaluation only)."""

    perplexity = True

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Run the encoder on `input_ids [S, N]`, the decoder on `decoder_input_ids [S, M]`, the head on `target_rows`."""
        head, hidden, targets, bias = answer_rows(model, batch)
        counting = counting_of(batch)
        if computes_loss(head):
            found = head(hidden, targets=targets, counting=counting, added_bias=bias)
        else:  # an adapter on the head adds to logits, so the logits are needed
            logits = head(hidden)
            found = logits_loss(logits if bias is None else logits + bias, targets, counting)
        return counted(batch, *found)


def answer_rows(model: nn.Module, batch: dict[str, Any]) -> tuple[nn.Module, Tensor, Tensor, Tensor | None]:
    """The output head, the hidden states `[N, H]` that it is given, their targets `[N]`, and what the model adds to the
    head's output, `[V]`."""
    whole: Any = plain_model(model)
    read = whole.get_encoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    # Answers are padded on the right, and no token sees a later one: the decoder needs no mask of its own.
    hidden = whole.get_decoder()(
        input_ids=batch["decoder_input_ids"],
        encoder_hidden_states=read.last_hidden_state,
        encoder_attention_mask=batch["attention_mask"],
        use_cache=False,
    ).last_hidden_state
    rows = batch["target_rows"]
    hidden, targets = hidden.reshape(-1, hidden.shape[-1])[rows], batch["targets"].view(-1)[rows]
    if getattr(whole.config, "scale_decoder_outputs", False):  # T5 of 2019, whose head is its embedding
        hidden = hidden * whole.config.d_model**-0.5
    bias = getattr(whole, "final_logits_bias", None)  # BART's kin: a buffer [1, V] added to the head's output
    return whole.get_output_embeddings(), hidden, targets, None if bias is None else bias[0]


SEQ2SEQ = Family(
    settings=Seq2seqConfig,
    reading=lambda config: TwoSidedReading(prefix=config.prefix, max_target=config.max_target),
    build=lambda config, beside: Seq2seq(),
    problems=problems,
    kind=ModelKind.encoder_decoder,
    longest=lambda config, data: {"data.max_length": data.max_length, "objective.max_target": config.max_target},
    writes_answers=True,
    better_when_larger=("accuracy",),
)
