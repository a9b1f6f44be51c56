"""What the project uses of transformers' chat templates beside its public interface.

Read in transformers 5.24; tests/compat/test_transformers.py calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def render_conversations(
    conversations: Sequence[Any], template: str, **options: Any
) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """Render conversations with a chat template: (the texts, the spans of its `{% generation %}` blocks in each text).

    Spans are (begin, end) in characters; without `return_assistant_tokens_mask=True` there are none. `options`: what the template
    may use, such as `tools`, `add_generation_prompt` and special tokens.

    Calls `transformers.utils.chat_template_utils.render_jinja_template`. The public `apply_chat_template` gives a mask over
    tokens in place of the spans, which says nothing of a token that crosses an edge.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    # It is declared to return one text. It returns both lists, and takes any sequence.
    render: Callable[..., Any] = render_jinja_template
    texts, blocks = render(conversations, chat_template=template, **options)
    return texts, blocks or [[] for _ in texts]
