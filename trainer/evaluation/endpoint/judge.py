"""A judge model behind an address: cached, within a budget, on rank 0 alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from strategies.cache_dir import cache_directory
from strategies.errors import ConfigError, Interrupted, LimitReached, ShardtuneError
from strategies.runtime import Runtime, broadcast_object
from trainer.evaluation.endpoint.client import Client, first_choice, tokens_used
from trainer.evaluation.endpoint.config import JudgeConfig
from trainer.reporting.status import write_text_atomic

KEY = "evaluation.judge"


@dataclass(slots=True)
class Judge:
    """Asks the judge. One for a command: its budget is that of all tasks together."""

    config: JudgeConfig
    runtime: Runtime
    stop_now: Callable[[], bool] = lambda: False
    calls: int = 0
    """Questions that were sent."""
    tokens: int = 0
    """Tokens that the server counted for them."""
    cached: int = 0
    """Questions that the cache answered."""
    _client: Client = field(init=False)

    def __post_init__(self) -> None:
        self._client = Client(self.config, KEY)

    def verdicts(self, questions: Sequence[str]) -> list[str]:
        """What it says to each question, in their order, the same on every rank. All ranks must call.

        Raises on all ranks or none: LimitReached where the budget does not suffice (of calls before the first is sent),
        ConfigError and EndpointFailed of the server, StorageError of the cache, Interrupted where the run is asked to stop.
        """
        known: dict[str, str] = {}
        chunks: list[list[str]] = []

        def begin() -> int:
            model = self._client.model() if questions else ""
            asked = list(dict.fromkeys(questions))
            known.update({each: said for each in asked if (said := self._cached_verdict(model, each)) is not None})
            self.cached += len(known)
            new = [each for each in asked if each not in known]
            if self.calls + len(new) > self.config.max_calls:
                raise LimitReached(
                    f"{KEY}.max_calls={self.config.max_calls}: {len(new)} questions are to be asked, {self.calls} were, and "
                    f"{len(known)} are in the cache; nothing was sent. Raise it, or ask fewer rows (max_rows)"
                )
            size = self.config.parallel
            chunks.extend(new[begin : begin + size] for begin in range(0, len(new), size))
            return len(chunks)

        def go_on(number: int) -> None:
            known.update(self._ask_and_cache(chunks[number], sum(map(len, chunks[number:]))))

        for number in range(self._on_main(begin)):
            self._on_main(partial(go_on, number))
            if self.stop_now():
                raise Interrupted
        return self._on_main(lambda: [known[each] for each in questions])

    def _on_main(self, do: Callable[[], Any]) -> Any:
        """What `do` returns on rank 0, where alone it is called; what it raises is raised on all ranks. All must call."""
        said: tuple[Any, ShardtuneError | None] = (None, None)
        if self.runtime.is_main:
            try:
                said = (do(), None)
            except ShardtuneError as error:
                said = (None, error)
        result, failed = broadcast_object(said, self.runtime)
        if failed is not None:
            raise failed
        return result

    def _ask_and_cache(self, questions: list[str], left: int) -> dict[str, str]:
        """The verdicts of some questions, which are remembered."""
        spent = self.config.max_tokens
        if spent is not None and self.tokens >= spent:
            raise LimitReached(
                f"{KEY}.max_tokens={spent}: used up ({self.tokens}), with {left} questions left; what was said is in the cache "
                "and not asked again: raise it and start the same command"
            )
        with ThreadPoolExecutor(self.config.parallel) as pool:
            said = [*pool.map(self._ask, questions)]
        model = self._client.model()
        for question, (text, used) in zip(questions, said, strict=True):
            self.calls, self.tokens = self.calls + 1, self.tokens + used
            write_text_atomic(
                self._cache_file(model, question), json.dumps({"model": model, "said": text, "tokens": used}) + "\n"
            )
        return {question: text for question, (text, _) in zip(questions, said, strict=True)}

    def _ask(self, question: str) -> tuple[str, int]:
        model = self._client.model()
        answer = self._client.send(
            lambda api: api.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question}],
                temperature=self.config.temperature,
                max_tokens=self.config.max_new_tokens,
            )
        )
        # An answer without text counts as one that says nothing: its verdict is unknown.
        text = getattr(getattr(first_choice(answer), "message", None), "content", None)
        used = tokens_used(answer, "total_tokens")
        if used is None and self.config.max_tokens is not None:
            raise ConfigError(
                f"{KEY}.max_tokens={self.config.max_tokens}: the server at {self.config.url} does not tell the tokens it took "
                f"(usage.total_tokens); leave {KEY}.max_tokens out, and limit {KEY}.max_calls"
            )
        return text if isinstance(text, str) else "", used or 0

    def _cache_file(self, model: str, question: str) -> Path:
        config = self.config
        said = [config.url, model, question, config.temperature, config.max_new_tokens]
        name = hashlib.sha256(json.dumps(said).encode()).hexdigest()
        return (
            (Path(config.cache_dir).expanduser() if config.cache_dir else cache_directory() / "judge")
            / name[:2]
            / f"{name}.json"
        )

    def _cached_verdict(self, model: str, question: str) -> str | None:
        try:
            return str(json.loads(self._cache_file(model, question).read_text(encoding="utf-8"))["said"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def signature(self) -> str:
        """What decides its verdicts, for the record."""
        return f"judge:{self.config.model}|temperature:{self.config.temperature:g}"


def request_text(document: Any) -> str:
    """What a document asks, as the judge is shown it: its prompt, or all turns before the last answer."""
    if document.messages is None:
        return str(document.prompt)
    last = max(place for place, turn in enumerate(document.messages) if turn["role"] == "assistant")
    turns = document.messages[:last]
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n\n".join(_turn_lines(turns))


def _turn_lines(turns: Sequence[dict[str, Any]]) -> Iterator[str]:
    for turn in turns:
        yield f"{turn['role']}: {turn['content']}"
