"""A conversation with a model in this process: prompts by its chat template, answers streamed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from launch.serve.models import Talking
from strategies.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class TalkSettings:
    """How it is asked."""

    max_tokens: int = 512
    """Most new tokens of an answer."""
    temperature: float | None = None
    """0 takes the most likely token; null: as the export's own settings say, which is 0 where they say nothing."""
    seed: int = 0
    """Of the draws."""
    system: str | None = None
    """What the model is told before anything else."""


@dataclass(slots=True)
class Talk:
    """One model's side of it. Models without a chat template are told the text as it is, each time anew."""

    talking: Talking
    settings: TalkSettings
    messages: list[dict[str, str]] = field(default_factory=list)
    tokens: int = 0
    """Of the last answer."""
    cut: bool = False
    """Whether the last answer reached `max_tokens`."""
    _stop: threading.Event = field(default_factory=threading.Event)

    @property
    def templated(self) -> bool:
        """Whether it takes turns."""
        return self.talking.tokenizer.chat_template is not None

    @property
    def draws(self) -> bool:
        """Whether its answers depend on the seed."""
        return self.talking.samples if self.settings.temperature is None else self.settings.temperature > 0

    def forget(self) -> None:
        """Begin anew."""
        self.messages.clear()

    def stop(self) -> None:
        """End the answer that is being written after its next token."""
        self._stop.set()

    def ask(self, prompt: str) -> Iterator[str]:
        """The answer, in pieces. Raises ConfigError where the prompt does not fit, or the template refuses it."""
        asked = [*self.messages, {"role": "user", "content": prompt}]
        ids = self._ids(asked, prompt)
        room = self.talking.positions - len(ids)
        if room < 1:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens and {self.talking.name} takes {self.talking.positions}, its answer included; "
                "shorten it" + (", or begin anew with /new" if self.messages else "")
            )
        self._stop.clear()
        pieces = []
        for piece in self._written(ids, min(room, self.settings.max_tokens)):
            pieces.append(piece)
            yield piece
        if self.templated:
            self.messages[:] = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def _ids(self, asked: list[dict[str, str]], prompt: str) -> list[int]:
        tokenizer, system = self.talking.tokenizer, self.settings.system
        if not self.templated:
            return list(tokenizer(f"{system}\n{prompt}" if system else prompt)["input_ids"])
        told = [{"role": "system", "content": system}, *asked] if system else asked
        try:
            return list(tokenizer.apply_chat_template(told, add_generation_prompt=True, return_dict=False))
        except Exception as error:
            raise ConfigError(
                f"the chat template of {self.talking.name} refuses this ({' '.join(str(error).split())})"
            ) from error

    def _written(self, ids: list[int], room: int) -> Iterator[str]:
        import torch
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        model, stopped = self.talking.model, self._stop
        streamer = TextIteratorStreamer(self.talking.tokenizer, skip_prompt=True, skip_special_tokens=True)
        inputs = torch.tensor([ids], device=model.device)
        made: dict[str, Any] = {}

        def until_stopped(written: Any, scores: Any, **_: Any) -> Any:
            return torch.full((len(written),), stopped.is_set(), device=written.device)

        def write() -> None:
            try:
                made["ids"] = model.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    generation_config=self._generation(room),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([until_stopped]),
                )
            except BaseException as error:  # noqa: BLE001 - raised again where the pieces are read
                made["error"] = error
                streamer.end()

        torch.manual_seed(self.settings.seed)
        thread = threading.Thread(target=write, name=f"writing {self.talking.name}", daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stopped.set()
            thread.join()
        if "error" in made:
            raise made["error"]
        self.tokens = made["ids"].shape[1] - len(ids)
        ends = self.talking.own.eos_token_id or []
        self.cut = self.tokens >= room and int(made["ids"][0, -1]) not in ends

    def _generation(self, room: int) -> Any:
        import copy

        own = copy.deepcopy(self.talking.own)
        own.max_new_tokens = room
        own.do_sample = self.draws
        if not self.draws:
            own.temperature = own.top_p = own.top_k = None
        elif self.settings.temperature is not None:
            own.temperature = self.settings.temperature
        return own
