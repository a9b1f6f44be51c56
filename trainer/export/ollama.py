"""An Ollama Modelfile beside a GGUF file: the chat template in Ollama's language, and the tokens that end an answer.

Ollama's templates are Go's, so the model's own is taken apart by rendering it. The template that is put together from
the parts must render other conversations to the same text. A template that is not a row of turns, each alike, gives
no Modelfile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.export.end_tokens import ending_tokens

_SAID = ("SystemText", "UserText", "AnswerText", "SecondUserText")
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty")


@dataclass(frozen=True, slots=True)
class Turns:
    """What stands around the text of each role."""

    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | None
    begin: str
    """What opens the answer."""
    default_system: str | None = None
    """What the template says where nobody gives a system message."""

    def render(self, messages: list[dict[str, str]]) -> str:
        """A conversation and the opening of its answer, as Ollama writes it."""
        around = {"user": self.user, "assistant": self.assistant, "system": self.system or ("", "")}
        if self.default_system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        return "".join(m["content"].join(around[m["role"]]) for m in messages) + self.begin

    def template(self) -> str:
        """In Go's language."""
        roles = [("user", self.user), ("assistant", self.assistant)]
        roles += [("system", self.system)] if self.system else []
        cases = "{{ else ".join(
            f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}' for role, (before, after) in roles
        )
        return "{{- range .Messages }}{{ " + cases + "{{ end }}{{ end }}" + self.begin


def turns(tokenizer: Any) -> Turns | None:
    """The parts of the chat template; None where it is not made of turns that are each alike. Begins without the first token,
    which llama.cpp puts there itself."""
    system, user, answer, second = (
        {"role": role, "content": text}
        for role, text in zip(("system", "user", "assistant", "user"), _SAID, strict=True)
    )
    if tokenizer.chat_template is None:
        return None
    with_system = _rendered(tokenizer, [system, user])
    first = [system, user] if with_system is not None and system["content"] in with_system else [user]
    texts = [_rendered(tokenizer, talk) for talk in (first, [*first, answer], [*first, answer, second])]
    opened, bare = _rendered(tokenizer, first, begin=True), _rendered(tokenizer, [user])
    if any(text is None for text in (*texts, opened, bare)):
        return None
    asked, answered, again = (str(text) for text in texts)
    around_user = _around(answered, again, second["content"])
    around_answer = _around(asked, answered, answer["content"])
    if around_user is None or around_answer is None or not str(opened).startswith(asked):
        return None
    last = user["content"].join(around_user)
    before, alone = asked.removesuffix(last), str(bare).removesuffix(last)
    around_system, default = None, None
    if system in first:
        parts = before.partition(system["content"])
        around_system = (parts[0], parts[2])
        if alone:
            default = alone.removeprefix(parts[0]).removesuffix(parts[2])
    found = Turns(around_user, around_answer, around_system, str(opened).removeprefix(asked), default)
    return found if _holds(found, tokenizer, [system, user, answer, second]) else None


def _rendered(tokenizer: Any, talk: list[dict[str, str]], *, begin: bool = False) -> str | None:
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=begin)
    except Exception:  # noqa: BLE001 - a template refuses in words of its own
        return None
    return str(text).removeprefix(first_token(tokenizer))


def first_token(tokenizer: Any) -> str:
    """What the tokenizer, and llama.cpp after it, puts before every text; often nothing, also where it has a `bos_token`."""
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if begins else ""


def _around(shorter: str, longer: str, said: str) -> tuple[str, str] | None:
    if not longer.startswith(shorter):
        return None
    before, found, after = longer.removeprefix(shorter).partition(said)
    return (before, after) if found else None


def _holds(found: Turns, tokenizer: Any, talk: list[dict[str, str]]) -> bool:
    """Whether put together they are the template's own text, for conversations of one to three turns."""
    system, user, answer, second = talk
    talks = [[user], [user, answer, second], [user, answer, second, answer, user]]
    talks += [[system, *each] for each in talks] if found.system else []
    return all(found.render(each) == _rendered(tokenizer, each, begin=True) for each in talks)


def modelfile(file: str, tokenizer: Any, generation: Any) -> tuple[str, str | None]:
    """(the text of a Modelfile for `file`, what it lacks or None)."""
    lines, found = [f"FROM ./{file}"], turns(tokenizer)
    lacking = None
    if found is None:
        lacking = "its chat template is no row of turns that Ollama's language has; Ollama guesses one from the file"
    if found is not None and '"""' in found.template():
        found, lacking = None, 'its chat template has """ in it, which a Modelfile cannot'
    if found is not None:
        lines.append(f'TEMPLATE """{found.template()}"""')
        if found.default_system is not None:
            lines.append(f'SYSTEM """{found.default_system}"""')
    for end in tokenizer.convert_ids_to_tokens(ending_tokens(tokenizer, generation)):
        lines.append(f'PARAMETER stop "{end}"')
    if not generation.do_sample:
        lines.append("PARAMETER temperature 0")
    for name in SAMPLING if generation.do_sample else ():
        value = getattr(generation, "repetition_penalty" if name == "repeat_penalty" else name, None)
        if value is not None:
            lines.append(f"PARAMETER {name} {value}")
    return "\n".join(lines) + "\n", lacking
