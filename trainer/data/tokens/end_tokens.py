"""The tokens with which a chat template closes turns, found by rendering small conversations."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import takewhile
from typing import NamedTuple

from trainer.data.tokens.marking import CONTENT_BEGIN_MARK, CONTENT_END_MARK, leading_token_pattern

RenderOrNone = Callable[..., str | None]
"""Renders messages as the chat template writes them, or None if it refuses them; with `prompt=True`, with the header of the
assistant turn to come."""


class EndTokens(NamedTuple):
    """The tokens with which a chat template closes turns, as far as they could be found out."""

    of_assistant: set[str]
    """In the middle of a conversation and at its end, where they may differ."""
    of_user: set[str]


def find_end_tokens(render: RenderOrNone, added_tokens: list[str]) -> EndTokens:
    """Find out with which tokens a chat template closes turns, so that a model can learn to stop: in ChatML, `<|im_end|>`.

    Renders a conversation of four turns with marks around the contents, and looks at what the template writes behind each.

    `added_tokens`: the tokenizer's added tokens, among which the end tokens are looked for. Both sets are empty if the template
    refuses the conversation, or does not write each content once. `render`: renders messages by the template; None if the
    template refuses them.
    """
    roles = ("user", "assistant", "user", "assistant")
    text = render([{"role": role, "content": f"{CONTENT_BEGIN_MARK}{role}{CONTENT_END_MARK}"} for role in roles])
    if text is None:
        return EndTokens(set(), set())
    # The template's own text before, between and behind the four contents.
    around_contents = re.split(f"{CONTENT_BEGIN_MARK}[^{CONTENT_END_MARK}]*{CONTENT_END_MARK}", text)
    if len(around_contents) != 5:  # the template left a content out, or wrote one twice
        return EndTokens(set(), set())
    header, after_user, after_assistant, _, after_last = around_contents

    # In ChatML `header` is "<|im_start|>user\n", and `after_assistant` is "<|im_end|>\n<|im_start|>user\n": it closes an
    # assistant turn and opens a user turn. What both end with is the opening, and the rest closes the assistant turn.
    characters_from_end = zip(reversed(header), reversed(after_assistant), strict=False)
    opening_length = len(list(takewhile(lambda pair: pair[0] == pair[1], characters_from_end)))
    closing_in_middle = after_assistant[: len(after_assistant) - opening_length]
    any_token = leading_token_pattern(added_tokens)
    of_assistant: set[str] = set()
    # A template may close the last turn with another token than those in the middle.
    for closing in (closing_in_middle, after_last):
        match = any_token.match(closing)
        if match:
            of_assistant.add(match.group(1))
    opening = _assistant_turn_opening(render)
    if opening is None:
        return EndTokens(of_assistant, set())
    user_end = any_token.match(after_user.removesuffix(opening))
    return EndTokens(of_assistant, {user_end.group(1)} if user_end else set())


def _assistant_turn_opening(render: RenderOrNone) -> str | None:
    """Find what the template writes at the end of a prompt, where the assistant is to answer.

    In ChatML "<|im_start|>assistant\\n". Empty if the prompt does not begin with the same conversation without it; None if the
    template refuses a conversation of one user turn.
    """
    user_turn = [{"role": "user", "content": CONTENT_BEGIN_MARK}]
    text = render(user_turn)
    prompt = render(user_turn, prompt=True)
    if text is None or prompt is None:
        return None
    return prompt[len(text) :] if prompt.startswith(text) else ""
