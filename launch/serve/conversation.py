"""A conversation with a model in this process: prompts by its chat template, answers streamed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from launch.serve.models import ChatModel
from strategies.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class ChatSettings:
    """How answers are generated."""

    max_tokens: int = 512
    """Most new tokens of an answer."""
    temperature: float | None = None
    """0 takes the most likely token; None: as the export's own settings say, which is 0 if they say nothing."""
    seed: int = 0
    """Of sampling."""
    system: str | None = None
    """The system prompt."""


@dataclass(slots=True)
class Conversation:
    """A conversation with one model. A model without a chat template gets each prompt as it is, without the earlier turns."""

    chat_model: ChatModel
    settings: ChatSettings
    messages: list[dict[str, str]] = field(default_factory=list)
    num_answer_tokens: int = 0
    """Number of tokens in the last answer."""
    is_cut: bool = False
    """Whether the last answer reached `max_tokens`."""
    _stop_requested: threading.Event = field(default_factory=threading.Event)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model takes turns: it has a chat template."""
        return self.chat_model.tokenizer.chat_template is not None

    @property
    def is_sampled(self) -> bool:
        """Whether answers are sampled, and so depend on the seed."""
        if self.settings.temperature is None:
            return self.chat_model.samples_by_default
        return self.settings.temperature > 0

    def clear(self) -> None:
        """Forget the earlier turns."""
        self.messages.clear()

    def stop(self) -> None:
        """End the answer that is being generated, after its next token."""
        self._stop_requested.set()

    def stream_answer(self, prompt: str) -> Iterator[str]:
        """Answer a prompt of the user: yields the answer in pieces as it is generated, then adds the turn to `messages`.

        An answer that is stopped (`stop`) ends where it is, and its turn is added too; one whose reader gives up is not. A
        model without a chat template keeps no turns. Raises ConfigError if the prompt does not fit into the model's context,
        or if the chat template refuses it.
        """
        messages = [*self.messages, {"role": "user", "content": prompt}]
        prompt_ids = self._prompt_ids(messages)
        context_length = self.chat_model.context_length
        max_answer_tokens = context_length - len(prompt_ids)
        if max_answer_tokens < 1:
            remedy = "shorten it, or start again with /new" if self.messages else "shorten it"
            raise ConfigError(
                f"the prompt has {len(prompt_ids)} tokens and {self.chat_model.name} takes {context_length}, "
                f"its answer included; {remedy}"
            )
        self._stop_requested.clear()
        pieces = []
        for piece in self._generate(prompt_ids, min(max_answer_tokens, self.settings.max_tokens)):
            pieces.append(piece)
            yield piece
        if self.has_chat_template:
            self.messages[:] = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    def _prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Write the conversation out as the token ids that the model goes on from, the system prompt first if there is one.

        - with a chat template: all `messages`, and the opening of the answer;
        - without: the last message alone, which is the prompt.
        Raises ConfigError if the template refuses the messages.
        """
        tokenizer = self.chat_model.tokenizer
        system = self.settings.system
        if not self.has_chat_template:
            prompt = messages[-1]["content"]
            return list(tokenizer(f"{system}\n{prompt}" if system else prompt)["input_ids"])
        if system:
            messages = [{"role": "system", "content": system}, *messages]
        try:
            return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        except Exception as error:
            raise ConfigError(
                f"the chat template of {self.chat_model.name} refuses this ({' '.join(str(error).split())})"
            ) from error

    def _generate(self, prompt_ids: list[int], max_tokens: int) -> Iterator[str]:
        """Generate up to `max_tokens` tokens in a thread, since transformers' loop blocks, and yield the text as it comes.

        At the end it sets `num_answer_tokens` and `is_cut` (whether the answer was cut off at `max_tokens`). If the reader
        stops early, the thread is stopped too. An error of the thread is raised here.
        """
        import torch
        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(self.chat_model.tokenizer, skip_prompt=True, skip_special_tokens=True)
        outputs: list[Any] = []
        errors: list[BaseException] = []

        def generate_in_thread() -> None:
            try:
                outputs.append(self._generate_into_streamer(streamer, prompt_ids, max_tokens))
            except BaseException as error:  # noqa: BLE001 - raised again where the pieces are read
                errors.append(error)
                streamer.end()  # else the reader would wait for ever

        torch.manual_seed(self.settings.seed)
        thread = threading.Thread(target=generate_in_thread, name=f"writing {self.chat_model.name}", daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            # Also if the reader gives up in the middle of the answer.
            self._stop_requested.set()
            thread.join()
        if errors:
            raise errors[0]
        output_ids = outputs[0]  # (1, tokens of the prompt and the answer)
        self.num_answer_tokens = output_ids.shape[1] - len(prompt_ids)
        end_tokens = self.chat_model.generation_config.eos_token_id or []  # a list: a model may have several
        self.is_cut = self.num_answer_tokens >= max_tokens and int(output_ids[0, -1]) not in end_tokens

    def _generate_into_streamer(self, streamer: Any, prompt_ids: list[int], max_tokens: int) -> Any:
        """Generate an answer, piece by piece into `streamer`, until it ends or `stop` is asked for. Runs in the thread.

        Returns the token ids of prompt and answer, int64 [1, tokens].
        """
        import torch
        from transformers import StoppingCriteriaList

        def stop_if_requested(generated: Any, scores: Any, **_: Any) -> Any:
            """transformers' stopping criterion: for each sequence, whether it ends now."""
            return torch.full((len(generated),), self._stop_requested.is_set(), device=generated.device)

        model = self.chat_model.model
        inputs = torch.tensor([prompt_ids], device=model.device)
        return model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=self._generation_config(max_tokens),
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([stop_if_requested]),
        )

    def _generation_config(self, max_tokens: int) -> Any:
        """transformers' settings for one answer: those of the export, with the length and the temperature of this chat."""
        import copy

        generation_config = copy.deepcopy(self.chat_model.generation_config)
        generation_config.max_new_tokens = max_tokens
        generation_config.do_sample = self.is_sampled
        if not self.is_sampled:  # else transformers warns of settings that greedy decoding ignores
            generation_config.temperature = None
            generation_config.top_p = None
            generation_config.top_k = None
        elif self.settings.temperature is not None:
            generation_config.temperature = self.settings.temperature
        return generation_config
