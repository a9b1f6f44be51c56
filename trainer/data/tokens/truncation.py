"""What happens to a sample longer than `data.max_length`: dropped, cut at the end or the beginning, split, or an error.

Cuts keep what the rest needs to make sense: BOS, the system turn, the closing tokens of labelled texts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

from strategies.errors import DataError
from trainer.data.config import ControlTokens, DataConfig, OverLength
from trainer.data.document import Document, Message, Tally
from trainer.data.store.sequences import LABEL, Sample
from trainer.data.tokens.encode import Encoder


class _DividedConversation(NamedTuple):
    """A conversation in parts that are kept or left out whole."""

    system_turns: list[Message]
    """Those at its beginning."""
    exchanges: list[list[Message]]
    """Each reaches from one user turn up to the next."""


class _EncodedDocument(NamedTuple):
    """A document, and its tokens."""

    document: Document
    sample: Sample


def keep_learnable(
    encoder: Encoder, document: Document, sample: Sample, pieces: list[Sample] | None, tally: Tally
) -> list[Sample]:
    """Keep the pieces of a tokenised document from which something is learned: those with a supervised token or a label.

    `sample`: the whole document. `pieces`: the shorter samples that `data.over_length` made of it; None or empty if it was too
    long and dropped. Returns an empty list if the document is to be dropped.

    Counts in `tally`, for the report, what was dropped, cut or odd (such as a missing end-of-turn token, see `oddity_codes`),
    with the row's location.
    """
    if not pieces:
        tally.drop("tokenise", "too_long", document.location)
        return []
    was_cut = len(pieces) > 1 or len(pieces[0].input_ids) < len(sample.input_ids)
    learnable_pieces = [piece for piece in pieces if LABEL in piece.marks or piece.supervised.any()]
    if not learnable_pieces:
        tally.drop("tokenise", "nothing_to_learn", document.location)
        return []
    if was_cut:
        tally.note("tokenise", "split" if len(learnable_pieces) > 1 else "truncated", document.location)
    note_oddities(encoder, document, sample, tally, was_cut=was_cut)
    return learnable_pieces


def fit_answers(
    encoder: Encoder, document: Document, answers: list[Sample], config: DataConfig, tally: Tally
) -> list[Sample]:
    """Cut the answers to a prompt to `data.max_length` tokens as `data.over_length` says, each answer with its prompt.

    `answers`: the samples of one answer, or of the two of a preference pair. Empty, with the reason counted in `tally`, if the
    document is dropped: an answer has no supervised token left, both are the same, or one is too long and the policy is `drop`.
    Raises DataError if one is too long and the policy is `fail`.
    """
    max_length = config.max_length
    longest = max(len(answer.input_ids) for answer in answers)
    is_too_long = longest > max_length
    if is_too_long:
        if config.over_length is OverLength.fail:
            raise _too_long_error(document, longest, max_length, "truncate or drop")
        if config.over_length is OverLength.drop:
            tally.drop("tokenise", "too_long", document.location)
            return []
        assert config.over_length is OverLength.truncate, (
            "the other policies separate an answer from its prompt: the config layer refuses them"
        )
    fitted_answers = []
    for answer in answers:
        is_longer = len(answer.input_ids) > max_length
        # No tail is kept: an answer that was cut must not end as if it were complete.
        fitted_answers.append(truncate_sample(answer, max_length, num_tail_tokens=0) if is_longer else answer)
    if not all(answer.supervised.any() for answer in fitted_answers):
        tally.drop("tokenise", "nothing_to_learn", document.location)
        return []
    is_pair = len(fitted_answers) == 2
    if is_pair and np.array_equal(fitted_answers[0].input_ids, fitted_answers[1].input_ids):
        tally.drop("tokenise", "same_answers", document.location)
        return []
    if is_too_long:
        tally.note("tokenise", "truncated", document.location)
    # Of a pair, the preferred answer stands for both.
    note_oddities(encoder, document, answers[0], tally, was_cut=is_too_long)
    return fitted_answers


def note_oddities(encoder: Encoder, document: Document, sample: Sample, tally: Tally, *, was_cut: bool) -> None:
    """Count in `tally` what is odd about a sample, for the report: a missing end-of-turn token, control tokens in texts.

    See `oddity_codes`. A sample that was cut (`was_cut`) lacks its end for that reason: only control tokens count then.
    """
    for code in oddity_codes(encoder, document, sample):
        if not was_cut or code.startswith("control_tokens"):
            tally.note("tokenise", code, document.location)


def last_supervised_id(sample: Sample) -> int:
    """Id of the last supervised token of a sample, which should close a turn; -1 if no token is supervised."""
    supervised_positions = np.flatnonzero(sample.supervised)
    return int(sample.input_ids[supervised_positions[-1]]) if len(supervised_positions) else -1


def oddity_codes(encoder: Encoder, document: Document, sample: Sample) -> list[str]:
    """What a user should look at in a sample of training data, as codes that the data report counts:

    - `no_supervised`: no token is a training target;
    - `missing_eos`: the last supervised token closes no turn, so that a model would not learn to stop;
    - `control_tokens_in_text`: the data spells control tokens, such as `<|im_end|>`;
    - `control_tokens_as_text`: outside answers, they became ordinary characters.
    """
    codes: list[str] = []
    spells_control_tokens = encoder.escaper.is_spelled_in
    last_id = last_supervised_id(sample)
    is_labelled_text = LABEL in sample.marks  # of which the label is learned, and no token
    if not is_labelled_text and last_id not in encoder.end_ids:
        codes.append("no_supervised" if last_id < 0 else "missing_eos")
    if any(map(spells_control_tokens, document.texts())):
        codes.append("control_tokens_in_text")
        # Answers keep theirs, since the model is to learn them; elsewhere they are escaped.
        becomes_text = encoder.control_tokens is ControlTokens.text
        if becomes_text and any(map(spells_control_tokens, encoder.context_texts(document))):
            codes.append("control_tokens_as_text")
    return codes


def fit_length(
    encoder: Encoder, document: Document, sample: Sample, max_length: int, policy: OverLength
) -> list[Sample] | None:
    """Make samples of at most `max_length` tokens of a tokenised document (`sample`), by the policy `data.over_length`:

    - drop: None (the other policies give at least one sample).
    - fail: raises DataError.
    - truncate_left: the last tokens, after BOS. Of a conversation, the last whole exchanges (a user turn up to the next) that
      fit, after the system turn; if one is too long, its first turn loses its beginning.
    - split, of a conversation: windows of whole exchanges, one after another, each after the system turn, without those of which
      nothing is learned; an exchange that is too long alone is truncated.
    - split, of a text: consecutive pieces, each with BOS, EOS only at the last.
    - truncate, and split of labelled texts and of prompts with completions: the first tokens, and the closing tokens of a
      labelled text, which come behind it ([SEP]).

    A sample that is short enough stays as it is. No token is learned twice.
    """
    length = len(sample.input_ids)
    if length <= max_length:
        return [sample]
    if policy is OverLength.drop:
        return None
    if policy is OverLength.fail:
        raise _too_long_error(document, length, max_length, "truncate, truncate_left, split or drop")
    if policy is OverLength.truncate_left:
        return [_keep_last_tokens(encoder, document, sample, max_length)]
    is_conversation = bool(document.turns())
    is_unlabelled_text = document.text is not None and document.label is None
    if policy is OverLength.split and is_conversation:
        return _split_into_exchange_windows(encoder, document, sample, max_length)
    if policy is OverLength.split and is_unlabelled_text:
        return _split_into_text_pieces(encoder, sample, max_length)
    return [truncate_sample(sample, max_length, num_tail_tokens=encoder.num_closing_tokens(document))]


def _too_long_error(document: Document, length: int, max_length: int, other_policies: str) -> DataError:
    """Make the error for a document that is too long if `data.over_length` is `fail`. `other_policies`: what it may be."""
    return DataError(
        f"{document.location}: {length} tokens are more than data.max_length={max_length}; raise it, or set "
        f"data.over_length to {other_policies}"
    )


def truncate_sample(sample: Sample, max_length: int, num_tail_tokens: int) -> Sample:
    """Shorten a sample to `max_length` tokens: its first ones, then its last `num_tail_tokens`, such as a closing [SEP]."""
    head = slice(max_length - num_tail_tokens)
    tail = slice(len(sample.input_ids) - num_tail_tokens, None)
    return sample.keep_spans(head, tail)


def truncate_left(sample: Sample, max_length: int, num_head_tokens: int) -> Sample:
    """Shorten a sample to `max_length` tokens: its first `num_head_tokens`, such as BOS or a system turn, and then its last ones.

    Of the first ones at most `max_length` - 1, so that one token of the end stays.
    """
    num_head_tokens = min(num_head_tokens, max_length - 1)
    num_tail_tokens = max_length - num_head_tokens
    tail_begin = len(sample.input_ids) - num_tail_tokens
    return sample.keep_spans(slice(num_head_tokens), slice(tail_begin, None))


def _keep_last_tokens(encoder: Encoder, document: Document, sample: Sample, max_length: int) -> Sample:
    """Shorten a sample to its last `max_length` tokens, with what they need before them (`data.over_length=truncate_left`).

    - A labelled text: the tokenizer's opening tokens.
    - A conversation: as many of its last exchanges (a user turn up to the next) as fit, behind the system turn. If the last one
      alone is too long, its first turn loses its beginning, and what stands before that turn stays.
    - Anything else: BOS, if there is one.
    """
    if document.label is not None:
        # The closing tokens are the sample's last ones, and so stay too.
        num_head_tokens = min(len(encoder.leading_special_ids), max_length - len(encoder.trailing_special_ids))
        return truncate_left(sample, max_length, num_head_tokens)
    num_bos = _num_bos(encoder, sample)
    if document.turns():
        document, sample = _last_exchanges_that_fit(encoder, document, max_length)
        if len(sample.input_ids) <= max_length:
            return sample
        # One exchange that is too long alone is left.
        num_tokens_before_first_turn = encoder.num_tokens_before_first_turn(document)
        if num_tokens_before_first_turn is not None and num_tokens_before_first_turn < max_length:
            return truncate_left(sample, max_length, num_tokens_before_first_turn)
    return truncate_left(sample, max_length, num_bos)


def _last_exchanges_that_fit(encoder: Encoder, document: Document, max_length: int) -> _EncodedDocument:
    """Leave out the first exchanges of a conversation until it fits.

    An exchange reaches from one user turn up to the next. If none fits, or if there is only one, the last exchange stays alone,
    although it is too long. Call it for a document that is too long with all its exchanges.
    """
    system_turns, exchanges = _divide_conversation(encoder, document)

    @cache
    def encode_without(num_left_out: int) -> _EncodedDocument:
        """The document without its first exchanges."""
        return _encode_exchanges(encoder, document, system_turns, exchanges[num_left_out:])

    def fits(num_left_out: int) -> bool:
        return len(encode_without(num_left_out).sample.input_ids) <= max_length

    # By bisection: fewer exchanges never make it longer. At least one is left out, since all are too long together.
    fewest_left_out = 1 + bisect_left(range(1, len(exchanges)), True, key=fits)
    most_left_out = len(exchanges) - 1
    return encode_without(min(fewest_left_out, most_left_out))


def _split_into_exchange_windows(encoder: Encoder, document: Document, sample: Sample, max_length: int) -> list[Sample]:
    """Split a conversation that is too long into samples of whole exchanges, as many in each as fit (`data.over_length=split`).

    An exchange reaches from one user turn up to the next. Each sample has the system turns before it. Samples without a
    supervised token are left out; if all are, the whole conversation is truncated instead.
    """
    system_turns, exchanges = _divide_conversation(encoder, document)

    # Encoding decides the length: the template writes something around each turn.
    def encode_window(begin: int, end: int) -> Sample:
        return _encode_exchanges(encoder, document, system_turns, exchanges[begin:end]).sample

    windows: list[Sample] = []
    begin = 0
    while begin < len(exchanges):
        window, begin = _longest_window(encode_window, begin, len(exchanges), max_length)
        if window.supervised.any():
            windows.append(window)
    return windows or [truncate_sample(sample, max_length, num_tail_tokens=0)]


def _longest_window(
    encode_window: Callable[[int, int], Sample], begin: int, num_exchanges: int, max_length: int
) -> tuple[Sample, int]:
    """Find the most exchanges from `begin` on that fit in `max_length` tokens: (their sample, the number of the next exchange).

    An exchange (a user turn up to the next) that is too long alone is truncated. `encode_window(begin, end)` encodes exchanges:
    the more, the longer. Encoding is slow, so doubling steps, then halving ones, find the last exchange that still fits.
    """
    end = begin + 1
    window = encode_window(begin, end)
    if len(window.input_ids) > max_length:
        return truncate_sample(window, max_length, num_tail_tokens=0), end
    # The end that is looked for is `end`, or one from `shortest_end` to `longest_end`.
    shortest_end = begin + 2
    longest_end = num_exchanges
    step = 1
    while shortest_end <= longest_end:
        tried_end = min(shortest_end + step - 1, longest_end)
        longer_window = encode_window(begin, tried_end)
        if len(longer_window.input_ids) <= max_length:
            end = tried_end
            window = longer_window
            shortest_end = tried_end + 1
            step *= 2
        else:
            longest_end = tried_end - 1
            step = max(1, step // 2)
    return window, end


def _divide_conversation(encoder: Encoder, document: Document) -> _DividedConversation:
    """Divide a conversation into its leading system turns and exchanges, which are kept or left out whole.

    An exchange reaches from one user turn up to the next: turns S U A A U A -> ([S], [[U, A, A], [U, A]]).

    Which turns are supervised is decided by the whole conversation and written into each turn (`train`), because a window of
    exchanges would decide otherwise: with `data.learn.turns=last`, each window has a last turn. Turns after the last supervised
    one are left out.
    """
    if encoder.template is None:
        raise AssertionError("a conversation was encoded without a chat template")
    turns = (document.messages or []) + (document.chosen or [])  # of a pair, the preferred answer stands for both
    supervised_indices = encoder.template.supervised_turn_indices(turns)
    if supervised_indices:
        turns = turns[: supervised_indices[-1] + 1]
    turns = [{**turn, "train": index in supervised_indices} for index, turn in enumerate(turns)]
    num_system_turns = next((index for index, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    exchanges: list[list[Message]] = []
    previous_role = None
    for turn in turns[num_system_turns:]:
        begins_exchange = turn["role"] == "user" and previous_role != "user"
        if begins_exchange or not exchanges:
            exchanges.append([])
        exchanges[-1].append(turn)
        previous_role = turn["role"]
    return _DividedConversation(turns[:num_system_turns], exchanges)


def _encode_exchanges(
    encoder: Encoder, document: Document, system_turns: list[Message], exchanges: list[list[Message]]
) -> _EncodedDocument:
    """Tokenise a part of a conversation: the document with only these system turns and exchanges.

    `exchanges`: lists of turns, each from one user turn up to the next.
    """
    turns = list(system_turns)
    for exchange in exchanges:
        turns += exchange
    window = replace(document, messages=turns, chosen=None, rejected=None)
    return _EncodedDocument(*next(encoder.encode([window])))


def _split_into_text_pieces(encoder: Encoder, sample: Sample, max_length: int) -> list[Sample]:
    """Split a text that is too long into consecutive samples, each with BOS if the text has it (`data.over_length=split`).

    EOS is at the end of the last one only, so that no piece teaches that a text ends where it was cut.
    """
    num_bos = _num_bos(encoder, sample)
    piece_length = max_length - num_bos
    if piece_length < 2:  # the last piece could not hold EOS and a token before it
        return [truncate_sample(sample, max_length, num_tail_tokens=0)]
    length = len(sample.input_ids)
    begins = list(range(num_bos, length, piece_length))
    # A last piece of EOS alone would teach that texts are empty: it gets the last token of the piece before.
    if length - begins[-1] == 1:
        begins[-1] -= 1
    ends = [*begins[1:], length]
    bos_span = slice(num_bos)
    return [sample.keep_spans(bos_span, slice(begin, end)) for begin, end in zip(begins, ends, strict=True)]


def _num_bos(encoder: Encoder, sample: Sample) -> int:
    """How many BOS tokens a sample begins with: 1 or 0."""
    begins_with_bos = encoder.bos_id is not None and sample.input_ids[:1].tolist() == [encoder.bos_id]
    return int(begins_with_bos)
