"""What happens to a sample longer than `data.max_length`: dropped, cut at the end or the beginning, split, or an error.

Cuts keep what the rest needs to make sense: BOS, the system turn, the closing tokens of labelled texts.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

import numpy as np

from strategies.errors import DataError
from trainer.data.config import ControlTokens, DataConfig, OverLength
from trainer.data.document import Document, Message, Tally
from trainer.data.store.sequences import LABEL, Sample
from trainer.data.tokens.encode import Encoder, truncate_sample


def keep_learnable(
    encoder: Encoder, document: Document, sample: Sample, pieces: list[Sample] | None, tally: Tally
) -> list[Sample]:
    """The pieces of a sample that have at least one supervised token or a label; empty if the document is to be dropped.

    `pieces`: the shorter samples that `data.over_length` made of `sample` (see `fit_length`); None or empty if it dropped it.
    Counts in `tally`, for the report, what was dropped, cut or odd (see `oddity_codes`), with the row's location.
    """
    if not pieces:
        tally.drop("tokenise", "too_long", document.location)
        return []
    was_cut = len(pieces) > 1 or len(pieces[0].input_ids) < len(sample.input_ids)
    learnable = [piece for piece in pieces if LABEL in piece.marks or piece.supervised.any()]
    if not learnable:
        tally.drop("tokenise", "nothing_to_learn", document.location)
        return []
    if was_cut:
        tally.note("tokenise", "split" if len(learnable) > 1 else "truncated", document.location)
    note_oddities(encoder, document, sample, tally, was_cut=was_cut)
    return learnable


def fit_answers(
    encoder: Encoder, document: Document, answers: list[Sample], config: DataConfig, tally: Tally
) -> list[Sample]:
    """The answers of a document (one, or a preference pair), cut to `data.max_length` tokens as `data.over_length` says.

    Empty, with the reason counted in `tally`, if an answer has no supervised token left, if both are the same, or if the policy
    is `drop`. Raises DataError if the policy is `fail`.
    """
    max_length = config.max_length
    length = max(len(sample.input_ids) for sample in answers)
    is_too_long = length > max_length
    if is_too_long:
        if config.over_length is OverLength.fail:
            raise _too_long(document, length, max_length, "truncate or drop")
        if config.over_length is OverLength.drop:
            tally.drop("tokenise", "too_long", document.location)
            return []
        assert config.over_length is OverLength.truncate, (
            "the other policies separate an answer from its prompt: the config layer refuses them"
        )
    # Cut each answer, then see whether what is left still teaches something.
    fitted = []
    for answer in answers:
        is_longer = len(answer.input_ids) > max_length
        fitted.append(truncate_sample(answer, max_length, tail=0) if is_longer else answer)
    if not all(sample.supervised.any() for sample in fitted):
        tally.drop("tokenise", "nothing_to_learn", document.location)
        return []
    if len(fitted) == 2 and np.array_equal(fitted[0].input_ids, fitted[1].input_ids):
        tally.drop("tokenise", "same_answers", document.location)
        return []
    if is_too_long:
        tally.note("tokenise", "truncated", document.location)
    # Of a pair, the preferred answer stands for both.
    note_oddities(encoder, document, answers[0], tally, was_cut=is_too_long)
    return fitted


def note_oddities(encoder: Encoder, document: Document, sample: Sample, tally: Tally, *, was_cut: bool) -> None:
    """Count in `tally` what is odd about a sample, see `oddity_codes`; of one that was cut, only control tokens in its texts."""
    for code in oddity_codes(encoder, document, sample):
        if not was_cut or code.startswith("control_tokens"):
            tally.note("tokenise", code, document.location)


def last_learned_id(sample: Sample) -> int:
    """Id of the last token of a sample that is learned; -1 if none is."""
    if not len(sample.supervised):
        return -1
    from_the_end = sample.supervised[::-1]
    last_learned = int(from_the_end.argmax())
    if not from_the_end[last_learned]:
        return -1
    return int(sample.input_ids[-1 - last_learned])


def oddity_codes(encoder: Encoder, document: Document, sample: Sample) -> list[str]:
    """What a user should look at in a sample, as codes that the data report counts.

    `no_supervised`: no token has a target; `missing_eos`: the last learned token closes no turn, so that a model would not learn
    to stop; `control_tokens_in_text`: the data spells control tokens; `control_tokens_as_text`: they became ordinary
    characters, but for those of answers.
    """
    codes: list[str] = []
    spelled_in = encoder.escaper.spelled_in
    last_id = last_learned_id(sample)
    if LABEL not in sample.marks and last_id not in encoder.end_ids:
        codes.append("no_supervised" if last_id < 0 else "missing_eos")
    if any(map(spelled_in, document.texts())):
        codes.append("control_tokens_in_text")
        if encoder.control_tokens is ControlTokens.text and any(map(spelled_in, encoder.context_texts(document))):
            codes.append("control_tokens_as_text")
    return codes


def fit_length(
    encoder: Encoder, document: Document, sample: Sample, max_length: int, policy: OverLength
) -> list[Sample] | None:
    """Samples of at most `max_length` tokens that stand for `sample`, which `encoder` made of `document`; None: drop it.

    truncate       the first tokens
    truncate_left  text: BOS and the last tokens. Conversations: the last whole exchanges (a user turn up to the next)
                   that fit, after the system turn; if one is too long, its first turn loses its beginning
    split          text: consecutive pieces, each with BOS, EOS only at the last. Conversations: consecutive windows of
                   whole exchanges, each after the system turn, without those of which nothing is learned; an exchange
                   that is too long alone is truncated. Labelled texts, and prompts with completions, are truncated

    No token is learned twice. Labelled texts keep their closing tokens. Raises DataError where the policy is `fail`.
    """
    length = len(sample.input_ids)
    if length <= max_length:
        return [sample]
    if policy is OverLength.drop:
        return None
    if policy is OverLength.fail:
        raise _too_long(document, length, max_length, "truncate, truncate_left, split or drop")
    if policy is OverLength.truncate_left:
        return [_keep_last_tokens(encoder, document, sample, max_length)]
    if policy is OverLength.split and document.turns():
        return _exchange_windows(encoder, document, sample, max_length)
    if policy is OverLength.split and document.text is not None and document.label is None:
        return _text_pieces(encoder, sample, max_length)
    return [truncate_sample(sample, max_length, tail=encoder.num_closing_tokens(document))]


def _too_long(document: Document, length: int, max_length: int, other_policies: str) -> DataError:
    """The error of the policy `fail`. `other_policies`: what `data.over_length` may be instead."""
    return DataError(
        f"{document.location}: {length} tokens are more than data.max_length={max_length}; raise it, or set "
        f"data.over_length to {other_policies}"
    )


def truncate_left(sample: Sample, max_length: int, head: int) -> Sample:
    """The first `head` tokens of a sample, as far as they fit, followed by its last ones: `max_length` together."""
    head = min(head, max_length - 1)
    tail = max_length - head
    tail_begin = len(sample.input_ids) - tail
    return sample.keep_spans(slice(head), slice(tail_begin, None))


def _keep_last_tokens(encoder: Encoder, document: Document, sample: Sample, max_length: int) -> Sample:
    """The policy `truncate_left` (see `fit_length`): the last `max_length` tokens, with BOS or the system turn before them."""
    if document.label is not None:
        head = min(len(encoder.opening), max_length - len(encoder.closing))
        return truncate_left(sample, max_length, head)
    num_bos = _num_bos(encoder, sample)
    if document.turns():
        document, sample = _last_exchanges_that_fit(encoder, document, max_length)
        if len(sample.input_ids) <= max_length:
            return sample
        # The last exchange alone is too long: its first turn loses its beginning, what stands before it stays.
        head_tokens = encoder.num_tokens_before_first(document)
        if head_tokens is not None and head_tokens < max_length:
            return truncate_left(sample, max_length, head_tokens)
    return truncate_left(sample, max_length, num_bos)


def _last_exchanges_that_fit(encoder: Encoder, document: Document, max_length: int) -> tuple[Document, Sample]:
    """(the document with its system turn and as many of its last exchanges as fit, its sample).

    If none fits, the last exchange alone, which is too long. Call it for a document that is too long with all its exchanges.
    """
    system, exchanges = _split_exchanges(encoder, document)
    # What was tried, by the number of exchanges that are left out at the beginning.
    candidates: dict[int, tuple[Document, Sample]] = {}

    def fits(left_out: int) -> bool:
        """Whether the rest fits; keeps what it encoded in `candidates`."""
        candidates[left_out] = _encode_exchanges(encoder, document, system, exchanges[left_out:])
        _, sample = candidates[left_out]
        return len(sample.input_ids) <= max_length

    # by bisection: fewer exchanges never make it longer
    left_out = 1 + bisect_left(range(1, len(exchanges)), True, key=fits)
    if left_out < len(exchanges):
        return candidates[left_out]
    return _encode_exchanges(encoder, document, system, exchanges[-1:])


def _exchange_windows(encoder: Encoder, document: Document, sample: Sample, max_length: int) -> list[Sample]:
    """The policy `split` for conversations, see `fit_length`: windows of whole exchanges, as many in each as fit.

    Each window has the system turns before it. Windows that teach nothing are left out; if all are, the sample is truncated.
    """
    system, exchanges = _split_exchanges(encoder, document)
    samples: list[Sample] = []
    begin = 0
    while begin < len(exchanges):
        # The window is exchanges[begin:end], encoded.
        end = begin + 1
        _, window = _encode_exchanges(encoder, document, system, exchanges[begin:end])
        shortest_end = begin + 2
        longest_end = len(exchanges)
        if len(window.input_ids) > max_length:
            window = truncate_sample(window, max_length, tail=0)
            longest_end = begin  # nothing more fits: skip the search
        # Doubling steps, then halving ones, find the last exchange that still fits.
        step = 1
        while shortest_end <= longest_end:
            tried_end = min(shortest_end + step - 1, longest_end)
            _, longer_window = _encode_exchanges(encoder, document, system, exchanges[begin:tried_end])
            if len(longer_window.input_ids) <= max_length:
                end = tried_end
                window = longer_window
                shortest_end = tried_end + 1
                step *= 2
            else:
                longest_end = tried_end - 1
                step = max(1, step // 2)
        if window.supervised.any():
            samples.append(window)
        begin = end
    return samples or [truncate_sample(sample, max_length, tail=0)]


def _split_exchanges(encoder: Encoder, document: Document) -> tuple[list[Message], list[list[Message]]]:
    """(leading system turns, exchanges) of a conversation; an exchange reaches from one user turn up to the next.

    Which turns are supervised is decided by the whole conversation and written into each turn (`train`), because a window of
    exchanges would decide otherwise: with `data.learn.turns=last`, each window has a last turn. Turns after the last supervised
    one are left out.
    """
    if encoder.template is None:
        raise AssertionError("a conversation was encoded without a chat template")
    turns = (document.messages or []) + (document.chosen or [])
    learned = encoder.template.learned_turns(turns)
    if learned:
        turns = turns[: learned[-1] + 1]
    turns = [{**turn, "train": index in learned} for index, turn in enumerate(turns)]
    num_system = next((index for index, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    exchanges: list[list[Message]] = []
    previous_role = None
    for turn in turns[num_system:]:
        if not exchanges or (turn["role"] == "user" and previous_role != "user"):
            exchanges.append([])
        exchanges[-1].append(turn)
        previous_role = turn["role"]
    return turns[:num_system], exchanges


def _encode_exchanges(
    encoder: Encoder, document: Document, system: list[Message], exchanges: list[list[Message]]
) -> tuple[Document, Sample]:
    """(the document with only these system turns and exchanges, its sample)."""
    turns = list(system)
    for exchange in exchanges:
        turns += exchange
    window = replace(document, messages=turns, chosen=None, rejected=None)
    return next(encoder.encode([window]))


def _text_pieces(encoder: Encoder, sample: Sample, max_length: int) -> list[Sample]:
    """The policy `split` for texts, see `fit_length`: consecutive pieces of a sample, each with BOS if the sample has it."""
    num_bos = _num_bos(encoder, sample)
    piece_length = max_length - num_bos
    if piece_length < 2:
        return [truncate_sample(sample, max_length, tail=0)]
    length = len(sample.input_ids)
    begins = list(range(num_bos, length, piece_length))
    if length - begins[-1] == 1:  # EOS alone would teach that texts are empty
        begins[-1] -= 1
    ends = [*begins[1:], length]
    bos = slice(num_bos)
    return [sample.keep_spans(bos, slice(begin, end)) for begin, end in zip(begins, ends, strict=True)]


def _num_bos(encoder: Encoder, sample: Sample) -> int:
    """How many BOS tokens a sample begins with: 1 or 0."""
    begins_with_bos = encoder.bos_id is not None and sample.input_ids[:1].tolist() == [encoder.bos_id]
    return int(begins_with_bos)
