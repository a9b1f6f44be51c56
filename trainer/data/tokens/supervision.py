"""Which tokens of a sample are supervised, and what each counts for in the loss: masks over tokens, from spans of characters."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from trainer.data.document import Document, Message, RefusedDocument
from trainer.data.store.sequences import Sample
from trainer.data.tokens.template import RenderedText

if TYPE_CHECKING:
    from tokenizers import Encoding


class SupervisedTokens(NamedTuple):
    """The tokens of a text, and which of them are training targets."""

    input_ids: np.ndarray
    """int32 [n]."""
    supervised: np.ndarray
    """bool [n]: True where a token is a training target."""
    weights: np.ndarray | None = None
    """float32 [n]: what a token counts for in the loss, 0 where it is no target; None if each target counts as 1."""

    def with_affixes(
        self, leading_ids: list[int], trailing_ids: list[int], *, learn_trailing: bool
    ) -> SupervisedTokens:
        """The tokens with special tokens around them, such as BOS before and EOS behind.

        The leading ones are never targets, the trailing ones are if `learn_trailing`. For tokens without weights.
        """
        assert self.weights is None, "only conversations have weights, and their template writes the special tokens"
        leading_mask = np.zeros(len(leading_ids), np.bool_)
        trailing_mask = np.full(len(trailing_ids), learn_trailing, np.bool_)
        return SupervisedTokens(
            np.concatenate([np.array(leading_ids, np.int32), self.input_ids, np.array(trailing_ids, np.int32)]),
            np.concatenate([leading_mask, self.supervised, trailing_mask]),
        )


def supervise_spans(encoding: Encoding, rendered: RenderedText) -> SupervisedTokens:
    """Turn the supervised characters of a text into a mask over its tokens, which training and evaluation use as targets.

    `encoding`: the tokens of `rendered.text`. `rendered.spans`: the supervised characters, as [begin, end). Its `loss_weights`
    are what each span counts for in the loss; None if all count as 1, and then the result has no weights.

    A token that straddles an edge of a span belongs to it, since the model must generate it. So do tokens without characters of
    their own between two that have some.
    """
    input_ids = np.array(encoding.ids, dtype=np.int32)
    supervised = np.zeros(len(input_ids), dtype=np.bool_)
    weights = None if rendered.loss_weights is None else np.zeros(len(input_ids), dtype=np.float32)
    if not len(input_ids):
        return SupervisedTokens(input_ids, supervised, weights)
    for number, (begin, end) in enumerate(rendered.spans):
        span_tokens = _tokens_of_span(encoding, begin, end)
        supervised[span_tokens] = True
        if weights is not None and rendered.loss_weights is not None:
            weights[span_tokens] = rendered.loss_weights[number]
    return SupervisedTokens(input_ids, supervised, weights)


def _tokens_of_span(encoding: Encoding, begin: int, end: int) -> slice:
    """Find the tokens that the characters [begin, end) of a text became, as a slice of its encoding; empty if they became none.

    A token that only overlaps the span is one of them.
    """
    # The usual case, which is fast: the first and the last character are each in a token.
    if begin < end:
        first = encoding.char_to_token(begin)
        last = encoding.char_to_token(end - 1)
        if first is not None and last is not None:
            # A character may be several tokens (its bytes): the span ends with the last of them.
            while (characters := encoding.token_to_chars(last + 1)) is not None:
                token_begin, token_end = characters
                if not token_begin < end <= token_end:
                    break
                last += 1
            return slice(first, last + 1)
    # The first or the last character is in no token (whitespace that the tokenizer drops): look at all offsets.
    token_begins, token_ends = np.array(encoding.offsets, dtype=np.int64).T
    overlapping = np.flatnonzero((token_begins < token_ends) & (token_ends > begin) & (token_begins < end))
    if not len(overlapping):
        return slice(0)
    return slice(overlapping[0], overlapping[-1] + 1)


def span_weights(
    supervised_indices: list[int], messages: list[Message], rendered: RenderedText, location: str
) -> list[float] | None:
    """What each supervised span of a rendered conversation counts for in the loss: the `weight` of its message, by default 1.

    `supervised_indices`: indices of the supervised messages, one for each of `rendered.spans`. None if each counts as 1.

    Raises RefusedDocument, with the row's `location` (`file:line`), if the chat template marks another number of spans than
    there are supervised messages: its `{% generation %}` blocks need not be one a message.
    """
    weights = [messages[index].get("weight", 1.0) for index in supervised_indices]
    if all(weight == 1 for weight in weights):
        return None
    if len(rendered.spans) != len(weights):
        message = (
            f"the chat template has {len(rendered.spans)} {{% generation %}} blocks for {len(weights)} turns with weights "
            "of their own; give another in model.chat_template, or leave the weights out with data.ignore_columns=[weight]"
        )
        raise RefusedDocument(location, "refused_by_template", message)
    return weights


def align_learned_answers(document: Document, chosen: Sample, rejected: Sample) -> None:
    """Let supervision begin at the same position in both answers of a preference pair, so that they can be compared.

    The loss compares the log-probabilities of the two answers to one prompt. The last characters of the prompt may be one token
    with the first of an answer, in one of the two only. Then the other one learns the token that it has there, too: the masks
    of the samples are changed in place.

    Raises RefusedDocument if an answer has no supervised token, or if the tokens before the answers differ.
    """
    for name, sample in (("chosen", chosen), ("rejected", rejected)):
        if not sample.supervised.any():
            message = f"nothing of the {name} answer is learned; see data.learn"
            raise RefusedDocument(document.location, "nothing_to_learn", message)
    chosen_begin = int(chosen.supervised.argmax())  # the first True
    rejected_begin = int(rejected.supervised.argmax())
    prompt_length = min(chosen_begin, rejected_begin)
    if not np.array_equal(chosen.input_ids[:prompt_length], rejected.input_ids[:prompt_length]):
        raise RefusedDocument(
            document.location,
            "differing_prompts",
            "the chat template writes the prompt differently before the chosen and the rejected answer, so that they "
            "cannot be compared; give another template in model.chat_template",
        )
    chosen.supervised[prompt_length:chosen_begin] = True
    rejected.supervised[prompt_length:rejected_begin] = True
