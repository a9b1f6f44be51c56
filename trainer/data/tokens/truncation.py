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
from trainer.data.tokens.encode import Encoder, truncate


def keep_learnable(
    encoder: Encoder, document: Document, sample: Sample, pieces: list[Sample] | None, tally: Tally
) -> list[Sample]:
    """Of the pieces that a length policy made of a sample those that teach something; what became of it is counted."""
    if not pieces:
        tally.drop("tokenise", "too_long", document.where)
        return []
    changed = len(pieces) > 1 or len(pieces[0].input_ids) < len(sample.input_ids)
    pieces = [piece for piece in pieces if LABEL in piece.marks or piece.supervised.any()]
    if not pieces:
        tally.drop("tokenise", "nothing_to_learn", document.where)
    elif changed:
        tally.note("tokenise", "split" if len(pieces) > 1 else "truncated", document.where)
    if pieces:
        note_oddities(encoder, document, sample, tally, uncut=not changed)
    return pieces


def fit_answers(
    encoder: Encoder, document: Document, answers: list[Sample], config: DataConfig, tally: Tally
) -> list[Sample]:
    """The one or two answers of a document, cut to their first `data.max_length` tokens where the policy says so, or none.

    None, with a reason counted, where one of them has nothing left to learn, or both are the same. Raises DataError where
    the policy is `fail`.
    """
    max_length, policy = config.max_length, config.over_length
    if changed := (length := max(len(sample.input_ids) for sample in answers)) > max_length:
        if policy is OverLength.fail:
            raise _too_long(document, length, max_length, "truncate or drop")
        if policy is OverLength.drop:
            tally.drop("tokenise", "too_long", document.where)
            return []
        assert policy is OverLength.truncate, "others part an answer from its prompt: the config layer refuses them"
    fitted = [truncate(one, max_length, 0) if len(one.input_ids) > max_length else one for one in answers]
    if not all(sample.supervised.any() for sample in fitted):
        tally.drop("tokenise", "nothing_to_learn", document.where)
        return []
    if len(fitted) == 2 and np.array_equal(fitted[0].input_ids, fitted[1].input_ids):
        tally.drop("tokenise", "same_answers", document.where)
        return []
    if changed:
        tally.note("tokenise", "truncated", document.where)
    note_oddities(encoder, document, answers[0], tally, uncut=not changed)
    return fitted


def note_oddities(encoder: Encoder, document: Document, sample: Sample, tally: Tally, *, uncut: bool) -> None:
    """Count what is odd about a sample, see `oddities`; of one that was cut only what its texts spell."""
    for code in oddities(encoder, document, sample):
        if uncut or code.startswith("control_tokens"):
            tally.note("tokenise", code, document.where)


def last_learned_id(sample: Sample) -> int:
    """Id of the last token that is learned; -1 where none is."""
    at = int(sample.supervised[::-1].argmax()) if len(sample.supervised) else 0
    return int(sample.input_ids[~at]) if len(sample.supervised) and sample.supervised[~at] else -1


def oddities(encoder: Encoder, document: Document, sample: Sample) -> list[str]:
    """What is odd about a sample, as codes.

    `no_supervised`: nothing is learned; `missing_eos`: the last learned token closes no turn, so that a model would not learn
    to stop; `control_tokens_in_text`: the data spells control tokens; `control_tokens_as_text`: they became ordinary
    characters, but for those of answers.
    """
    codes, last, spelled = list[str](), last_learned_id(sample), encoder.escaper.spelled_in
    if LABEL not in sample.marks and last not in encoder.end_ids:
        codes.append("no_supervised" if last < 0 else "missing_eos")
    if any(map(spelled, document.texts())):
        codes.append("control_tokens_in_text")
        if encoder.control_tokens is ControlTokens.text and any(map(spelled, encoder.context_texts(document))):
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
    return [truncate(sample, max_length, encoder.num_closing_tokens(document))]


def _too_long(document: Document, length: int, max_length: int, other_policies: str) -> DataError:
    return DataError(
        f"{document.where}: {length} tokens are more than data.max_length={max_length}; raise it, or set "
        f"data.over_length to {other_policies}"
    )


def truncate_left(sample: Sample, max_length: int, head: int) -> Sample:
    """The last `max_length` tokens, of which the first `head` are the sample's own first ones, as far as they fit."""
    head = min(head, max_length - 1)
    begin = len(sample.input_ids) - (max_length - head)
    return sample.cut(slice(head), slice(begin, None))


def _keep_last_tokens(encoder: Encoder, document: Document, sample: Sample, max_length: int) -> Sample:
    opening = len(encoder.opening)
    if document.label is not None:
        return truncate_left(sample, max_length, min(opening, max_length - len(encoder.closing)))
    bos = _num_bos(encoder, sample)
    if document.turns():
        system, exchanges = _split_exchanges(encoder, document)
        shorter = _last_exchanges_that_fit(encoder, document, system, exchanges, max_length)
        if isinstance(shorter, Sample):
            return shorter
        document, sample = shorter
        if len(sample.input_ids) <= max_length:
            return sample
        head = encoder.num_tokens_before_first(document)
        if head is not None and head < max_length:
            return truncate_left(sample, max_length, head)
    return truncate_left(sample, max_length, bos)


def _last_exchanges_that_fit(
    encoder: Encoder, document: Document, system: list[Message], exchanges: list[list[Message]], max_length: int
) -> Sample | tuple[Document, Sample]:
    """The longest row of last exchanges that fits; else the last learned exchange alone, with its sample."""
    samples: dict[int, Sample] = {}

    def fits(left_out: int) -> bool:
        samples[left_out] = _encode_exchanges(encoder, document, system, exchanges[left_out:])[1]
        return len(samples[left_out].input_ids) <= max_length

    # by bisection: fewer exchanges never make it longer
    first = 1 + bisect_left(range(1, len(exchanges)), True, key=fits)
    return samples[first] if first < len(exchanges) else _encode_exchanges(encoder, document, system, exchanges[-1:])


def _exchange_windows(encoder: Encoder, document: Document, sample: Sample, max_length: int) -> list[Sample]:
    system, exchanges = _split_exchanges(encoder, document)
    samples: list[Sample] = []
    begin = 0
    while begin < len(exchanges):
        end, window = begin + 1, _encode_exchanges(encoder, document, system, exchanges[begin : begin + 1])[1]
        low, high = begin + 2, len(exchanges)
        if len(window.input_ids) > max_length:
            window, high = truncate(window, max_length, 0), begin
        step = 1
        while low <= high:  # doubling steps, then halving ones, find the last exchange that still fits
            probe = min(low + step - 1, high)
            longer = _encode_exchanges(encoder, document, system, exchanges[begin:probe])[1]
            if len(longer.input_ids) <= max_length:
                end, window, low, step = probe, longer, probe + 1, step * 2
            else:
                high, step = probe - 1, max(1, step // 2)
        if window.supervised.any():
            samples.append(window)
        begin = end
    return samples or [truncate(sample, max_length, 0)]


def _split_exchanges(encoder: Encoder, document: Document) -> tuple[list[Message], list[list[Message]]]:
    """The leading system turns, and the rest cut before every user turn; each turn says whether it is learned.

    What is learned goes by the whole conversation, and what comes after the last learned turn is left out.
    """
    if encoder.template is None:
        raise AssertionError("a conversation was encoded without a chat template")
    turns = (document.messages or []) + (document.chosen or [])
    learned = encoder.template.learned_turns(turns)
    last = learned[-1] if learned else len(turns) - 1
    turns = [{**turn, "train": number in learned} for number, turn in enumerate(turns[: last + 1])]
    first = next((number for number, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    exchanges: list[list[Message]] = []
    for number, turn in enumerate(turns[first:]):
        if not exchanges or (turn["role"] == "user" and turns[first + number - 1]["role"] != "user"):
            exchanges.append([])
        exchanges[-1].append(turn)
    return turns[:first], exchanges


def _encode_exchanges(
    encoder: Encoder, document: Document, system: list[Message], exchanges: list[list[Message]]
) -> tuple[Document, Sample]:
    turns = [*system, *(turn for exchange in exchanges for turn in exchange)]
    return next(encoder.encode([replace(document, messages=turns, chosen=None, rejected=None)]))


def _text_pieces(encoder: Encoder, sample: Sample, max_length: int) -> list[Sample]:
    bos = _num_bos(encoder, sample)
    room = max_length - bos
    if room < 2:
        return [truncate(sample, max_length, 0)]
    length = len(sample.input_ids)
    cuts = list(range(bos, length, room))
    if length - cuts[-1] == 1:  # EOS alone would teach that texts are empty
        cuts[-1] -= 1
    return [sample.cut(slice(bos), slice(begin, end)) for begin, end in zip(cuts, [*cuts[1:], length], strict=True)]


def _num_bos(encoder: Encoder, sample: Sample) -> int:
    """1 if the sample begins with BOS, else 0."""
    bos = encoder.bos_id
    return int(bos is not None and len(sample.input_ids) > 0 and int(sample.input_ids[0]) == bos)
