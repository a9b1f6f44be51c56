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
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from strategies.errors import ConfigError, DataError
from strategies.settings import DESCRIBES, number, setting
from trainer.data.batches.collate import Collator
from trainer.data.batches.cutting import IGNORED_TARGET
from trainer.data.config import ControlTokens, DataConfig, DataFormat, Layout, LearnConfig, OverLength
from trainer.data.document import WRONG_KIND_REASON, Document, RefusedDocument, Tally
from trainer.data.objective_spec import keep_unless_undesirable
from trainer.data.store.sequences import Sample, TokenDataset
from trainer.data.tokens.encode import DOCUMENTS_PER_BATCH, Encoder
from trainer.data.tokens.template import RenderedText
from trainer.data.tokens.truncation import keep_learnable
from trainer.losses.next_token import computes_loss, logits_loss
from trainer.model.config import ModelKind
from trainer.objectives.base import (
    Objective,
    ObjectiveConfig,
    ObjectiveFamily,
    OtherSettings,
    UnlabelledDataSpec,
    formats_of,
)
from trainer.objectives.causal import NextTokenLosses, next_token_terms, row_weighting_of, unwrap_adapter
from trainer.objectives.pairs import OVER_LENGTH_POLICIES_FOR_ANSWERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(kw_only=True, slots=True)
class Seq2seqConfig(ObjectiveConfig):
    """Encoder-decoder models (T5, BART and their kin): the answer is learned by the decoder, the prompt read by the encoder."""

    name: str = "seq2seq"
    prefix: str = setting("", reach=DESCRIBES)
    """Text before every prompt, such as `summarize: ` (with its space), for T5 models that were trained with it."""
    max_target: int = number(256, least=2, advice="an answer and its end need two tokens; 128 to 256 suit summaries")
    """Greatest length of an answer in tokens. `data.max_length` limits the prompt, and `data.over_length` says what happens
    beyond either."""


def seq2seq_problems(config: Seq2seqConfig, other_settings: OtherSettings) -> Iterator[str]:
    """What is wrong with the settings of data, model, strategy and tuning for an encoder-decoder model, one line each.

    `other_settings`: the rest of the run's configuration.
    """
    data = other_settings.data
    model = other_settings.model
    if data.packing:
        yield "data.packing=true: prompts and answers are rows of their own, padded; set data.packing=false"
    if data.layout is Layout.padding_free:
        yield "data.layout=padding_free: encoder-decoder models are trained with padded rows; set data.layout=auto"
    if data.over_length not in OVER_LENGTH_POLICIES_FOR_ANSWERS:
        yield (
            f"data.over_length={data.over_length.value}: would separate a prompt from its answer; set "
            "data.over_length=truncate, drop or fail"
        )
    if data.learn != LearnConfig():
        yield "data.learn: objective=seq2seq learns the answer and nothing else; leave data.learn.turns and roles alone"
    for key, data_format in formats_of(data).items():
        if data_format in (DataFormat.text, DataFormat.preference):  # labelled rows: `UnlabelledDataSpec` refuses them
            yield (
                f"{key}.format={data_format}: objective=seq2seq reads a prompt and an answer; set "
                f"{key}.format=prompt_completion, pair or messages"
            )
    if other_settings.strategy.activation_checkpointing == "auto":
        yield (
            "strategy.activation_checkpointing=auto: what the two sides of an encoder-decoder model keep is not counted; set "
            "it to none, selective or full"
        )
    if model.chat_template is not None:
        yield f"model.chat_template={model.chat_template}: objective=seq2seq writes plain text; set model.chat_template=null"
    if model.add_tokens and other_settings.tuning.name != "full":
        yield (
            f"model.add_tokens={model.add_tokens}: encoder and decoder look tokens up separately, and an adapter would "
            "train one of them; set tuning=full with objective=seq2seq"
        )


class TwoSidedDataSpec(UnlabelledDataSpec):
    """A prompt for the encoder and its answer for the decoder, tokenised separately."""

    over_length = OVER_LENGTH_POLICIES_FOR_ANSWERS
    formats = (
        DataFormat.prompt_completion,
        DataFormat.pair,
        DataFormat.messages,
        DataFormat.sharegpt,
        DataFormat.alpaca,
    )

    def __init__(self, *, prefix: str, max_target: int) -> None:
        self.prefix = prefix
        self.max_target = max_target

    def identity(self) -> dict[str, Any]:
        return {"prefix": self.prefix, "max_target": self.max_target}

    def encoder(self, tokenizer: PreTrainedTokenizerFast, config: DataConfig) -> Encoder:
        return SourceTargetEncoder(tokenizer, self.prefix, self.max_target, config.control_tokens)

    def sequences(
        self, encoder: Encoder, documents: list[Document], config: DataConfig, tally: Tally
    ) -> Iterator[tuple[Document, list[Sample]]]:
        """Turn documents into samples of prompt and answer; a document has none if it is too long and the settings drop it."""
        assert isinstance(encoder, SourceTargetEncoder)
        for document, sample in encoder.encode([d for d in documents if keep_unless_undesirable(d, tally)]):
            fitted = encoder.truncate_or_drop(document, sample, config.max_length, config.over_length)
            yield document, keep_learnable(encoder, document, sample, fitted, tally)

    def longest_sequence(self, max_length: int) -> int:
        """A prompt of `data.max_length` tokens and an answer of `objective.max_target`."""
        return max_length + self.max_target

    def placeholder(self, tokens: int) -> Sample:
        """A prompt and the longest answer that leaves it a token: a token of an answer costs more, since it has logits."""
        answer_length = min(self.max_target, tokens - 1)
        return Sample(np.zeros(tokens, np.int32), np.arange(tokens) >= tokens - answer_length)

    def collator(self, layout: Layout, pad_token_id: int, decoder_start: int | None = None) -> Collator:
        assert decoder_start is not None, "a model with two sides has a first token of its decoder"
        return TwoSidedCollator(layout, pad_token_id, decoder_start)


class SourceTargetEncoder(Encoder):
    """Tokenises prompt and answer separately. A sample is the prompt, then the answer; only the answer is learned."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prefix: str,
        max_target: int,
        control_tokens: ControlTokens = ControlTokens.text,
    ) -> None:
        """`prefix`: text before every prompt. `max_target`: most tokens of an answer. Raises ConfigError without an end token."""
        super().__init__(tokenizer, control_tokens=control_tokens)
        self.prefix = prefix
        self.max_target = max_target
        self.template = None
        if self.eos_id is None:
            raise ConfigError("the tokenizer has no eos_token, so no answer would ever end; set one in its config")
        self.end_ids = {self.eos_id}
        if self.eos_id not in self.trailing_special_ids:
            self.trailing_special_ids = [*self.trailing_special_ids, self.eos_id]

    def encode(self, documents: Iterable[Document], *, fast: bool = True) -> Iterator[tuple[Document, Sample]]:
        """Encode prompt and answer of each document separately; yields (document, its sample) in order, untruncated.

        A sample is the prompt's tokens, then those of the answer, which are learned. Control tokens that a prompt spells out are
        escaped, if settings say so. `fast` has no effect: plain text is encoded in one way only. Raises RefusedDocument.
        """
        remaining = iter(documents)
        while batch := list(islice(remaining, DOCUMENTS_PER_BATCH)):
            pairs = [prompt_and_answer(document) for document in batch]
            rendered_prompts = []
            for document, pair in zip(batch, pairs, strict=True):
                escaped_prompt = self.escape_text(document, pair.prompt)
                is_escaped = escaped_prompt != pair.prompt
                # No spans: they mark what is learned in a rendered conversation, and here it is the whole answer.
                rendered_prompts.append(RenderedText(self.prefix + escaped_prompt, spans=[], escaped=is_escaped))
            prompt_ids = self._encode_texts(rendered_prompts)
            answer_ids = self._encode_texts([RenderedText(pair.answer, spans=[]) for pair in pairs])
            for document, pair, prompt, answer in zip(batch, pairs, prompt_ids, answer_ids, strict=True):
                yield document, _make_sample(prompt, answer, pair.answer_weight)

    def _encode_texts(self, texts: list[RenderedText]) -> Iterator[np.ndarray]:
        """The token ids of each text (int32), between the tokenizer's leading and trailing special tokens."""
        for encoded in self.tokenize(texts):
            yield np.array([*self.leading_special_ids, *encoded.ids, *self.trailing_special_ids], dtype=np.int32)

    def truncate_or_drop(self, document: Document, sample: Sample, max_source: int, policy: OverLength) -> list[Sample]:
        """Bring prompt and answer within their bounds: returns a list of one sample, or an empty list if `policy` drops it.

        `max_source`: bound of the prompt in tokens; that of the answer is `objective.max_target`. A cut prompt keeps the
        tokenizer's closing tokens. A cut answer has none: the model should not learn to end there. Raises DataError if the policy
        is `fail`.
        """
        prompt_length = sample.answer_begin()  # the sample is the prompt's tokens, then the answer's
        max_answer = self.max_target
        answer = sample.input_ids[prompt_length:]
        if prompt_length <= max_source and len(answer) <= max_answer:
            return [sample]
        if policy is OverLength.drop:
            return []
        if policy is OverLength.fail:
            raise DataError(
                f"{document.location}: {prompt_length} tokens of prompt and {len(answer)} of answer are more than "
                f"data.max_length={max_source} and objective.max_target={max_answer}; raise them, or set "
                "data.over_length to truncate or drop"
            )
        if policy is not OverLength.truncate:
            raise AssertionError(f"the config layer refuses data.over_length={policy.value} here")
        # Keep the start of the prompt, then its closing tokens (such as EOS), then the start of the answer.
        closing_length = 0
        if prompt_length > max_source:
            closing_length = min(len(self.trailing_special_ids), max_source - 1)
        prompt_start = slice(min(prompt_length, max_source) - closing_length)
        prompt_closing = slice(prompt_length - closing_length, prompt_length)
        answer_start = slice(prompt_length, prompt_length + max_answer)
        return [sample.keep_spans(prompt_start, prompt_closing, answer_start)]


class TwoSidedText(NamedTuple):
    """The two texts of a document, which encoder and decoder read."""

    prompt: str
    answer: str
    answer_weight: float
    """What each token of the answer counts for in the loss; with 0 it is not learned."""


def _make_sample(prompt_ids: np.ndarray, answer_ids: np.ndarray, answer_weight: float) -> Sample:
    """Join prompt and answer (ids int32) into a sample in which the answer is learned.

    `answer_weight`: what its tokens count for in the loss, 0 (not learned) to 1.
    """
    input_ids = np.concatenate([prompt_ids, answer_ids])
    is_in_answer = np.arange(len(input_ids)) >= len(prompt_ids)
    # Weights of 0 and 1 need no column: the mask says the same.
    weights = None
    if 0 < answer_weight < 1:
        weights = is_in_answer.astype(np.float32) * np.float32(answer_weight)
    return Sample(input_ids, is_in_answer & (answer_weight > 0), weights=weights)


def prompt_and_answer(document: Document) -> TwoSidedText:
    """Split a document into the prompt, which the encoder reads, and the answer, which the decoder learns.

    - A row of prompt and completion: both as they are, with the weight 1. Their separator is left out, since the two sides are
      separate sequences.
    - A conversation of an optional system turn, one user turn and one assistant turn: the prompt is the system turn, an empty
      line, and the user turn; the weight is that of the assistant turn.
    - Any other document, tool calls or thoughts in it, or a weight of an earlier turn: RefusedDocument is raised.
    """
    if document.prompt is not None:
        return TwoSidedText(document.prompt, document.completion or "", answer_weight=1.0)
    # Of a pair, `messages` ends before the two answers, and the chosen one is learned.
    turns = [*(document.messages or []), *(document.chosen or [])]
    if len(turns) > 1:
        *system, user, assistant = turns
    else:  # no conversation: turns of no role, which are refused below
        system = []
        user = assistant = {"role": ""}
    # Refuse what is no prompt with one answer.
    roles = [turn["role"] for turn in turns]
    if (user["role"], assistant["role"]) != ("user", "assistant") or roles[:-2] not in ([], ["system"]):
        kind = f"a conversation of {', '.join(roles)}" if turns else "a text without an answer"
        raise RefusedDocument(
            document.location,
            "not_two_sided" if turns else WRONG_KIND_REASON,
            f"{kind}; objective=seq2seq reads one prompt and one answer (prompt and response, source "
            "and target, or a user and an assistant turn); change the row, or use objective=sft with a causal model",
        )
    if document.tools or "tool_calls" in assistant or "reasoning_content" in assistant:
        raise RefusedDocument(
            document.location,
            "not_two_sided",
            "tools, calls and thoughts are written by chat templates, and objective=seq2seq has none; name them in "
            "data.ignore_columns to train without them, or use objective=sft with a causal model",
        )
    if any("weight" in turn for turn in turns[:-1]):
        problem = (
            "a turn before the answer has a weight, and objective=seq2seq learns the answer alone; leave the weight out"
        )
        raise RefusedDocument(document.location, "bad_weight", f"{problem}, or name weight in data.ignore_columns")
    # The two texts, and the weight of the answer. A turn may have a weight, or `train: false`, which is the weight 0.
    prompt = "\n\n".join([*(turn["content"] for turn in system), user["content"]])
    weight = float(assistant.get("weight", assistant.get("train", True)))
    return TwoSidedText(prompt, str(assistant["content"]), weight)


class TwoSidedCollator(Collator):
    """Micro-batches with padded rows for the encoder and for the decoder, similar lengths together."""

    def __init__(self, layout: Layout, pad_token_id: int, decoder_start: int) -> None:
        super().__init__(layout, pad_token_id)
        self.decoder_start = decoder_start

    def token_tensors(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return pad_two_sides(samples, pad_token_id=self.pad_token_id, start_token_id=self.decoder_start)

    def assign_to_slots(
        self, dataset: TokenDataset, units: np.ndarray, costs: np.ndarray, shape: tuple[int, int]
    ) -> list:
        return deal_documents_by_length(dataset, units, *shape)


def pad_two_sides(samples: Sequence[Sample], *, pad_token_id: int, start_token_id: int) -> dict[str, Any]:
    """Collate samples with one padded row a document on each side:

    - `input_ids` and `attention_mask [S, N]` for the encoder;
    - `decoder_input_ids` (the start token, then the answer without its last) and `targets` (the answer) `[S, M]`.

    Padded on the right. `start_token_id`: what the decoder begins an answer with.
    """
    prompt_lengths = [sample.answer_begin() for sample in samples]
    answers = [sample.input_ids[length:] for sample, length in zip(samples, prompt_lengths, strict=True)]
    prompt_ids = np.full((len(samples), max(prompt_lengths)), pad_token_id, dtype=np.int64)
    prompt_mask = np.zeros_like(prompt_ids)
    longest_answer = max(1, *map(len, answers))
    decoder_ids = np.full((len(samples), longest_answer), pad_token_id, dtype=np.int64)
    targets = np.full_like(decoder_ids, IGNORED_TARGET)
    # The decoder sees the answer shifted by one: position i predicts the answer's token i.
    decoder_ids[:, 0] = start_token_id
    for row, (sample, prompt_length, answer) in enumerate(zip(samples, prompt_lengths, answers, strict=True)):
        prompt_ids[row, :prompt_length] = sample.input_ids[:prompt_length]
        prompt_mask[row, :prompt_length] = 1
        decoder_ids[row, 1 : len(answer)] = answer[:-1]
        targets[row, : len(answer)] = answer
    return {
        "input_ids": torch.from_numpy(prompt_ids),
        "attention_mask": torch.from_numpy(prompt_mask),
        "decoder_input_ids": torch.from_numpy(decoder_ids),
        "targets": torch.from_numpy(targets),
    }


def deal_documents_by_length(
    dataset: TokenDataset, documents: np.ndarray, num_slots: int, capacity: int
) -> list[list[int]]:
    """Distribute a step's documents over micro-batches ("slots") of exactly `capacity`, similar lengths together, to pad little.

    `documents`: their indices in `dataset`. Returns positions in `documents`, by slot: [[0, 3], [1, 2]]. Documents are sorted by
    prompt, by answer and by both, and the order that pads least is taken. Deterministic. Slots come back costliest first.
    """
    answer_lengths = dataset.num_supervised[documents]
    prompt_lengths = dataset.lengths[documents] - answer_lengths
    best_slots: list[np.ndarray] = []
    least_cost = None
    # `lexsort` sorts by its last key first.
    for keys in (
        (answer_lengths, prompt_lengths),
        (prompt_lengths, answer_lengths),
        (prompt_lengths, prompt_lengths + answer_lengths),
    ):
        slots = list(np.lexsort(keys)[::-1].reshape(num_slots, capacity))
        # Of a slot: its tokens with padding, on both sides.
        costs = [capacity * int(prompt_lengths[slot].max() + answer_lengths[slot].max()) for slot in slots]
        total_cost = sum(costs)
        if least_cost is None or total_cost < least_cost:
            least_cost = total_cost
            by_cost = sorted(range(num_slots), key=lambda number: (-costs[number], number))
            best_slots = [slots[number] for number in by_cost]
    return [sorted(slot.tolist()) for slot in best_slots]


class Seq2seq(Objective):
    """Terms: `loss` (summed cross-entropy, carries the gradient) and `accuracy` (correct argmaxes, evaluation only)."""

    perplexity = True

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the loss of the answers and its accuracy, as terms by name.

        Runs the encoder on `input_ids [S, N]` (S documents, prompts of up to N tokens), the decoder on `decoder_input_ids [S,
        M]`, and the head on the positions `target_rows` of answers that are learned.
        """
        head, hidden, targets, bias = supervised_answer_rows(model, batch)
        weighting = row_weighting_of(batch)
        if computes_loss(head):
            results = head(hidden, targets=targets, weighting=weighting, added_bias=bias)
        else:  # an adapter on the head adds to logits, so the logits are needed
            logits = head(hidden)
            results = logits_loss(logits if bias is None else logits + bias, targets, weighting)
        return next_token_terms(batch, NextTokenLosses.of(results, weighting))


class AnswerRows(NamedTuple):
    """What the loss is made of, at the N positions of answers that are learned."""

    head: nn.Module
    """The output head, still to be called."""
    hidden: Tensor
    """`[N, H]` hidden states for the head."""
    targets: Tensor
    """int64 `[N]`: ids of the tokens to predict."""
    bias: Tensor | None
    """`[V]`: what the model adds to the head's output; None if nothing."""


def supervised_answer_rows(model: nn.Module, batch: dict[str, Any]) -> AnswerRows:
    """Run encoder and decoder up to the output head, for the positions of answers that are learned.

    The head is left to the caller, so that it can compute the loss without keeping the logits.
    """
    seq2seq_model: Any = unwrap_adapter(model)
    encoded = seq2seq_model.get_encoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    # Answers are padded on the right, and no token sees a later one: the decoder needs no mask of its own.
    hidden = seq2seq_model.get_decoder()(
        input_ids=batch["decoder_input_ids"],
        encoder_hidden_states=encoded.last_hidden_state,
        encoder_attention_mask=batch["attention_mask"],
        use_cache=False,
    ).last_hidden_state
    supervised_positions = batch["target_rows"]
    hidden = hidden.reshape(-1, hidden.shape[-1])[supervised_positions]
    targets = batch["targets"].view(-1)[supervised_positions]
    if getattr(seq2seq_model.config, "scale_decoder_outputs", False):  # T5 of 2019, whose head is its embedding
        hidden = hidden * seq2seq_model.config.d_model**-0.5
    bias = getattr(seq2seq_model, "final_logits_bias", None)  # BART's kin: a buffer [1, V] added to the head's output
    return AnswerRows(seq2seq_model.get_output_embeddings(), hidden, targets, None if bias is None else bias[0])


SEQ2SEQ = ObjectiveFamily(
    settings=Seq2seqConfig,
    data_spec=lambda config: TwoSidedDataSpec(prefix=config.prefix, max_target=config.max_target),
    build=lambda config, references: Seq2seq(),
    problems=seq2seq_problems,
    kind=ModelKind.encoder_decoder,
    max_positions=lambda config, data: {"data.max_length": data.max_length, "objective.max_target": config.max_target},
    generates_answers=True,
    better_when_larger=("accuracy",),
)
