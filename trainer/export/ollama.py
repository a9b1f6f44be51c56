"""An Ollama Modelfile beside a GGUF file: the chat template in Ollama's language, and the tokens that end an answer.

Ollama's templates are Go's, so the model's own is taken apart by rendering it. The template that is put together from
the parts must render other conversations to the same text. A template that is not a row of turns, each alike, gives
no Modelfile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from trainer.export.end_tokens import end_token_ids

_PROBE_CONTENTS = ("SystemText", "UserText", "AnswerText", "SecondUserText")
"""Contents of the messages that a chat template is rendered with; each is found again in the rendered text."""
SAMPLING_PARAMETERS = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty")
"""Ollama's parameters that the generation settings may state."""


@dataclass(frozen=True, slots=True)
class TurnTexts:
    """What a chat template writes around the content of a message: (text before, text after) by role."""

    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | None
    """None if the template takes no system message."""
    answer_opening: str
    """The text that opens the answer."""
    default_system: str | None = None
    """The system message that the template writes if there is none."""

    def render(self, messages: list[dict[str, str]]) -> str:
        """Write a conversation, and what opens its answer, as Ollama would, to compare with the model's own template."""
        around_role = {"user": self.user, "assistant": self.assistant, "system": self.system or ("", "")}
        if self.default_system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        turns = []
        for message in messages:
            text_before, text_after = around_role[message["role"]]
            turns.append(f"{text_before}{message['content']}{text_after}")
        return "".join(turns) + self.answer_opening

    def template(self) -> str:
        """Write the chat template in Go's language, for Ollama: a case for each role, with the text around its turn."""
        roles = [("user", self.user), ("assistant", self.assistant)]
        if self.system:
            roles.append(("system", self.system))
        cases = []
        for role, (before, after) in roles:
            cases.append(f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}')
        return "{{- range .Messages }}{{ " + "{{ else ".join(cases) + "{{ end }}{{ end }}" + self.answer_opening


def turn_texts_of_template(tokenizer: Any) -> TurnTexts | None:
    """Find out what a chat template writes around the turns of each role, since Ollama needs it in another language.

    Short conversations are rendered and the texts compared: around a user's turn may stand `("<|user|>", "<|end|>")`. The token
    that begins every text is left out, because llama.cpp adds it itself. None if there is no template, or if it does more than
    join turns of one form for each role.
    """
    if tokenizer.chat_template is None:
        return None
    # Render conversations that grow by a turn.
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, _PROBE_CONTENTS, strict=True)]
    system, user, answer, second_user = messages
    with_system = _render_by_tokenizer(tokenizer, [system, user])
    takes_system = with_system is not None and system["content"] in with_system
    first_turns = [system, user] if takes_system else [user]
    # What a turn adds to the text of the turns before it is that turn, with what is around its content.
    one_turn = _render_by_tokenizer(tokenizer, first_turns)
    with_answer = _render_by_tokenizer(tokenizer, [*first_turns, answer])
    with_second = _render_by_tokenizer(tokenizer, [*first_turns, answer, second_user])
    with_opening = _render_by_tokenizer(tokenizer, first_turns, add_generation_prompt=True)
    without_system = _render_by_tokenizer(tokenizer, [user])
    if one_turn is None or with_answer is None or with_second is None or with_opening is None or without_system is None:
        return None
    # What stands around the turns of a user, of the model, and of the system.
    around_user = _text_around(with_answer, with_second, second_user["content"])
    around_answer = _text_around(one_turn, with_answer, answer["content"])
    if around_user is None or around_answer is None or not with_opening.startswith(one_turn):
        return None
    user_turn = user["content"].join(around_user)
    around_system = None
    default_system = None
    if takes_system:
        before, _, after = one_turn.removesuffix(user_turn).partition(system["content"])
        around_system = (before, after)
        default_turn = without_system.removesuffix(user_turn)
        if default_turn:
            default_system = default_turn.removeprefix(before).removesuffix(after)
    # What opens an answer. Last, render whole conversations with these parts, to compare with the template's.
    opening = with_opening.removeprefix(one_turn)
    turns = TurnTexts(
        user=around_user,
        assistant=around_answer,
        system=around_system,
        answer_opening=opening,
        default_system=default_system,
    )
    if not _renders_like_template(turns, tokenizer, messages):
        return None
    return turns


def _render_by_tokenizer(
    tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
) -> str | None:
    """Render messages by the tokenizer's own chat template, without BOS; None if the template raises an error for them.

    `add_generation_prompt`: whether the opening of the next answer stands at its end.
    """
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception:  # noqa: BLE001 - a template refuses by errors of its own
        return None
    return str(text).removeprefix(leading_bos_text(tokenizer))


def leading_bos_text(tokenizer: Any) -> str:
    """The text that the tokenizer, and so llama.cpp, puts before every text. Often empty, even if there is a `bos_token`."""
    adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if not adds_bos:
        return ""
    return str(tokenizer.bos_token)


def _text_around(shorter: str, longer: str, content: str) -> tuple[str, str] | None:
    """What a chat template writes around one turn: the text before and after `content` in what `longer` adds to `shorter`.

    "<u>a", "<u>a<m>b<e>", "b" -> ("<m>", "<e>"). None if `longer` does not begin with `shorter`, or the added text does not
    have the content.
    """
    if not longer.startswith(shorter):
        return None
    before, found_content, after = longer.removeprefix(shorter).partition(content)
    if not found_content:
        return None
    return before, after


def _renders_like_template(turns: TurnTexts, tokenizer: Any, messages: list[dict[str, str]]) -> bool:
    """Check whether the parts that were found render conversations as the model's own template does.

    Conversations of one to three questions are compared. `messages`: one of the system, a question, an answer and a second
    question, of which the conversations are made.
    """
    system, user, answer, second_user = messages
    conversations = [[user], [user, answer, second_user], [user, answer, second_user, answer, user]]
    if turns.system:
        conversations += [[system, *conversation] for conversation in conversations]
    return all(
        turns.render(conversation) == _render_by_tokenizer(tokenizer, conversation, add_generation_prompt=True)
        for conversation in conversations
    )


class Modelfile(NamedTuple):
    """The text of an Ollama Modelfile."""

    text: str
    missing_part_note: str | None
    """What it lacks, and why; None if nothing."""


def modelfile_of(gguf_file: str, tokenizer: Any, generation_config: Any) -> Modelfile:
    """Write the Modelfile by which Ollama runs a GGUF file, with these lines:

    - `FROM`: the file.
    - `TEMPLATE`, and `SYSTEM` for a default system message; left out, with a note, if the chat template cannot be written so.
    - `PARAMETER stop`: for each token that ends an answer.
    - parameters of sampling if `generation_config` samples, else `PARAMETER temperature 0`.
    """
    lines = [f"FROM ./{gguf_file}"]
    missing_part_note = None
    turns = turn_texts_of_template(tokenizer)
    if turns is None:
        missing_part_note = (
            "its chat template is no row of turns that Ollama's language has; Ollama guesses one from the file"
        )
    elif '"""' in turns.template():
        missing_part_note = 'its chat template has """ in it, which a Modelfile cannot'
    else:
        lines.append(f'TEMPLATE """{turns.template()}"""')
        if turns.default_system is not None:
            lines.append(f'SYSTEM """{turns.default_system}"""')
    for token in tokenizer.convert_ids_to_tokens(end_token_ids(tokenizer, generation_config)):
        lines.append(f'PARAMETER stop "{token}"')
    if generation_config.do_sample:
        for parameter in SAMPLING_PARAMETERS:
            # The one parameter that has another name in Ollama.
            transformers_name = "repetition_penalty" if parameter == "repeat_penalty" else parameter
            setting = getattr(generation_config, transformers_name, None)
            if setting is not None:
                lines.append(f"PARAMETER {parameter} {setting}")
    else:
        lines.append("PARAMETER temperature 0")
    return Modelfile("\n".join(lines) + "\n", missing_part_note)
