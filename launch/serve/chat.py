"""`shardtune chat`: talk with an exported model in the terminal, with its base model beside it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.config.help_text import show_help
from launch.config.verb_arguments import (
    VerbArguments,
    asks_for_help,
    flag,
    help_rows,
    option,
    positional,
    read_arguments,
)
from launch.serve.config import ServedType
from launch.streams import printable_text
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.serve.conversation import Conversation
    from launch.serve.exported import ExportedModel


@dataclass(kw_only=True)
class ChatArguments(VerbArguments):
    """What `shardtune chat` takes."""

    export: str = positional("give one run or export, as in shardtune chat runs/x")
    prompt: str | None = positional(
        "a prompt is one word for the shell; put it into quotes", required=False, key="prompt"
    )
    against: str | None = option(
        "a second model to show: base, none, a run or export; default: base in a terminal, none if the output goes elsewhere",
        example="base",
    )
    system: str | None = option("the system prompt", example='"..."')
    max_tokens: int = option("most new tokens in an answer", default=512, least=1)
    temperature: float | None = option(
        "0 always takes the most likely token; null: the value in the export, or 0 if it has none", least=0, most=2
    )
    seed: int = option("seed of the sampling", default=0, least=0)
    device: str = option("the device: auto, cpu, cuda, cuda:1", default="auto")
    dtype: ServedType = option("data type: auto (as stored), float32, bfloat16, float16", default=ServedType.auto)
    accept: list[str] = option(
        "use the adapter on another base model than that of its training",
        default=[],
        example="[base]",
        choices=("base",),
    )
    as_json: bool = flag("print one JSON object per answer", key="--json")


USAGE = f"""usage: shardtune chat <run or export> ["prompt"] [against=base|none|<run or export>] [--json]

  shardtune chat runs/first                       in the terminal, the tuned model next to its base
  shardtune chat runs/first "Sum this up: ..."    one answer
  cat letter.txt | shardtune chat runs/first > answer.txt

chat uses the chat template and the stop tokens of the export. If the model has no template, it continues your text.
If your prompt looks like a setting, write prompt="...".

{help_rows(ChatArguments)}

In the terminal: /new starts a new conversation, /quit or Ctrl-D ends chat, Ctrl-C stops an answer."""


def main(argv: list[str]) -> int:
    """Run `shardtune chat` with the arguments `argv`: one answer to a prompt, or a dialogue; returns the exit code.

    Raises ConfigError if an argument is wrong or a model cannot be loaded.
    """
    if asks_for_help(argv):
        show_help(USAGE)
        return 0
    arguments, problems = read_arguments("chat", ChatArguments, argv)
    if problems:
        raise ConfigError(problems)
    from launch.serve.exported import check_base_of_export, find_export

    exported = find_export(arguments.export)
    # How the base differs from that of the training, if the user accepts that; else ConfigError.
    for line in check_base_of_export(exported, accept="base" in arguments.accept):
        print(f"accepted: base: {line}", file=sys.stderr, flush=True)
    # What to compare with. A script wants the answer alone; in a terminal the base shows what the tuning has changed.
    is_for_people = sys.stdout.isatty() and not arguments.as_json
    against = arguments.against or ("base" if is_for_people else "none")
    other_export = None if against in ("base", "none") else find_export(against)
    prompt = _prompt_of_command_or_pipe(arguments)
    conversations = _load_conversations(exported, other_export, against, arguments)
    if prompt is None:
        return _converse(conversations)
    _print_answers(conversations, prompt, as_json=arguments.as_json)
    return 0


def _prompt_of_command_or_pipe(arguments: ChatArguments) -> str | None:
    """The one prompt to answer: that of the command line, else the text that is piped in; None for a dialogue in the terminal.

    Raises ConfigError if the prompt is empty.
    """
    prompt = arguments.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().removesuffix("\n")
    if prompt is not None and not prompt.strip():
        raise ConfigError("the prompt is empty; give one in quotes, or pipe one in")
    return prompt


def _load_conversations(
    exported: ExportedModel, other_export: ExportedModel | None, against: str, arguments: ChatArguments
) -> list[Conversation]:
    """Load the models that the user talks to, with a conversation each: the tuned one last, before it the one to compare with.

    `against`: what `exported` is compared with:
    - `base`: its base model. If that is not on this machine: ConfigError if `against=base` was set by the user, else a message,
      and the tuned model answers alone;
    - `none`: nothing;
    - the directory of `other_export`: that export.
    """
    from launch.serve.conversation import ChatSettings, Conversation
    from launch.serve.models import load_base_chat_model, load_chat_model

    settings = ChatSettings(
        max_tokens=arguments.max_tokens, temperature=arguments.temperature, seed=arguments.seed, system=arguments.system
    )
    device = arguments.device
    dtype = str(arguments.dtype)
    tuned_model = load_chat_model(exported, device=device, dtype=dtype)
    compared_model = None
    if against == "base":
        compared_model = load_base_chat_model(exported, device=device, dtype=dtype)
        is_set_by_user = arguments.against is not None
        if compared_model is None and is_set_by_user:
            raise ConfigError(
                f"against=base: the base of {exported.path} is not on this machine; name another export, or against=none"
            )
        if compared_model is None:
            print("(the base model is not on this machine: only the tuned model answers)", file=sys.stderr)
    elif other_export is not None:
        compared_model = load_chat_model(other_export, device=device, dtype=dtype)
    chat_models = [tuned_model] if compared_model is None else [compared_model, tuned_model]
    return [Conversation(chat_model, settings) for chat_model in chat_models]


def _print_answers(conversations: list[Conversation], prompt: str, *, as_json: bool) -> None:
    """Answer one prompt with each model (the base and the tuned one, say), and print the answers.

    - `as_json`: one JSON object (`_answers_as_json`);
    - a terminal, and two models: side by side;
    - else: one after the other, below their names if there are two.
    """
    from launch.serve.chat_screen import stream_in_columns

    if as_json:
        print(_answers_as_json(conversations, prompt))
        return
    in_terminal = sys.stdout.isatty()
    if in_terminal and len(conversations) > 1:
        stream_in_columns(conversations, prompt)
        return
    for conversation in conversations:
        if len(conversations) > 1:
            print(f"{conversation.chat_model.name}:")
        for piece in conversation.stream_answer(prompt):
            # A terminal would obey control characters that the model generates; a file gets them as they are.
            print(printable_text(piece) if in_terminal else piece, end="", flush=True)
        print()
        if conversation.is_cut:
            print(f"(cut at max_tokens={conversation.settings.max_tokens})", file=sys.stderr)


def _answers_as_json(conversations: list[Conversation], prompt: str) -> str:
    """Answer one prompt with each model, as JSON text for scripts.

    {"prompt": ..., "answers": [{"model": "base", "text": ..., "tokens": 40, "cut": false}, ...]}; `cut`: whether an answer
    reached `max_tokens`.
    """
    answers = []
    for conversation in conversations:
        # Generated first: `num_answer_tokens` and `is_cut` are about the last answer.
        text = "".join(conversation.stream_answer(prompt))
        answers.append(
            {
                "model": conversation.chat_model.name,
                "text": text,
                "tokens": conversation.num_answer_tokens,
                "cut": conversation.is_cut,
            }
        )
    return json.dumps({"prompt": prompt, "answers": answers}, ensure_ascii=False)


def _converse(conversations: list[Conversation]) -> int:
    """Hold a dialogue in the terminal: each prompt is answered by every model, until /quit or Ctrl-D; returns the exit code 0."""
    from launch.serve.chat_screen import stream_in_columns

    names = " and ".join(conversation.chat_model.name for conversation in conversations)
    print(f"{names}; /new starts a new conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer")
    if not conversations[-1].has_chat_template:
        print("(no chat template: the model continues what you type, and does not see earlier turns)")
    while True:
        try:
            prompt = input("> ").strip()
        except EOFError:
            print()
            return 0
        if prompt == "/quit":
            return 0
        if prompt == "/new":
            for conversation in conversations:
                conversation.clear()
        elif prompt:
            try:
                stream_in_columns(conversations, prompt)
            except ConfigError as error:
                print(error)
