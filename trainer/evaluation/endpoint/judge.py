"""A judge model behind an address: cached, within a budget, on rank 0 alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from strategies.cache_dir import cache_directory
from strategies.errors import ConfigError, Interrupted, LimitReached, ShardtuneError
from strategies.runtime import Runtime, broadcast_object
from trainer.evaluation.endpoint.client import Client, first_choice, tokens_used
from trainer.evaluation.endpoint.config import JudgeConfig
from trainer.reporting.status import write_text_atomic

JUDGE_SETTING = "evaluation.judge"


class _QuestionsByCache(NamedTuple):
    """Questions, told apart by whether the cache has a verdict on them."""

    verdict_by_question: dict[str, str]
    new_questions: list[str]
    """Those without a verdict, each once."""


@dataclass(slots=True)
class Judge:
    """Asks the judge model. A command has one instance, since the budget is for all of its tasks together."""

    config: JudgeConfig
    runtime: Runtime
    stop_now: Callable[[], bool] = lambda: False
    num_calls: int = 0
    """Questions that were sent to the server."""
    num_tokens_used: int = 0
    """Tokens that the server counted for these questions and their verdicts."""
    num_cached: int = 0
    """Questions whose verdict was in the cache."""
    _client: Client = field(init=False)

    def __post_init__(self) -> None:
        self._client = Client(self.config, JUDGE_SETTING)

    def collect_verdicts(self, questions: Sequence[str]) -> list[str]:
        """Ask the judge model each question, such as which of two answers is better; every rank gets all verdicts.

        Verdicts that were given before come from a cache on the disk. All ranks must call. Raises on all ranks or none:
        LimitReached if the budget does not suffice (of calls, before the first one is sent), ConfigError and EndpointFailed of
        the server, StorageError of the cache, Interrupted if the run is asked to stop.
        """
        cached = self._call_on_rank_0(lambda: self._split_by_cache(questions))
        verdict_by_question = cached.verdict_by_question
        # Ranks meet after each chunk, so that none waits long for the others, and all stop at the same chunk.
        chunk_size = self.config.parallel
        for begin in range(0, len(cached.new_questions), chunk_size):
            remaining_questions = cached.new_questions[begin:]
            ask_chunk = partial(self._ask_and_cache, remaining_questions[:chunk_size], len(remaining_questions))
            verdict_by_question |= self._call_on_rank_0(ask_chunk)
            if self.stop_now():  # asks all ranks
                raise Interrupted
        return [verdict_by_question[question] for question in questions]

    def _split_by_cache(self, questions: Sequence[str]) -> _QuestionsByCache:
        """Look up each question in the cache, and check that the budget of calls suffices for the rest. Only rank 0 calls.

        Raises LimitReached if it does not, before anything is sent.
        """
        model = self._client.resolve_model_name() if questions else ""
        verdict_by_question = {}
        new_questions = []
        for question in dict.fromkeys(questions):  # each different question once
            verdict = self._cached_verdict(model, question)
            if verdict is None:
                new_questions.append(question)
            else:
                verdict_by_question[question] = verdict
        self.num_cached += len(verdict_by_question)
        if self.num_calls + len(new_questions) > self.config.max_calls:
            raise LimitReached(
                f"{JUDGE_SETTING}.max_calls={self.config.max_calls}: {len(new_questions)} questions are to be asked, "
                f"{self.num_calls} were, and {len(verdict_by_question)} are in the cache; nothing was sent. Raise it, or ask "
                "fewer rows (max_rows)"
            )
        return _QuestionsByCache(verdict_by_question, new_questions)

    def _call_on_rank_0(self, function: Callable[[], Any]) -> Any:
        """Call a function on rank 0 alone, which alone talks to the server; every rank returns or raises what rank 0 does.

        A collective: all ranks must call.
        """
        own_result: Any = None
        own_error: ShardtuneError | None = None
        if self.runtime.is_main:
            try:
                own_result = function()
            except ShardtuneError as error:
                own_error = error
        main_result, main_error = broadcast_object((own_result, own_error), self.runtime)
        if main_error is not None:
            raise main_error
        return main_result

    def _ask_and_cache(self, questions: list[str], num_left: int) -> dict[str, str]:
        """Send questions to the judge model, several at a time, and write its verdicts to the cache; returns them by question.

        Only rank 0 calls. `num_left`: questions that the command still has to ask, these included. Raises LimitReached, before
        anything is sent, if `max_tokens` is used up. So the tokens of one call may go beyond that limit.
        """
        limit = self.config.max_tokens  # the budget of the whole command, not of an answer
        if limit is not None and self.num_tokens_used >= limit:
            raise LimitReached(
                f"{JUDGE_SETTING}.max_tokens={limit}: used up ({self.num_tokens_used}), with {num_left} questions left; what was "
                "said is in the cache and not asked again: raise it and start the same command"
            )
        with ThreadPoolExecutor(self.config.parallel) as pool:
            verdicts_with_tokens = [*pool.map(self._ask, questions)]
        model = self._client.resolve_model_name()
        verdict_by_question = {}
        for question, (verdict, num_tokens) in zip(questions, verdicts_with_tokens, strict=True):
            self.num_calls += 1
            self.num_tokens_used += num_tokens
            cache_entry = {"model": model, "said": verdict, "tokens": num_tokens}
            # After each few questions, so that hardly any is paid for twice if the command is cut short.
            write_text_atomic(self._cache_file(model, question), json.dumps(cache_entry) + "\n")
            verdict_by_question[question] = verdict
        return verdict_by_question

    def _ask(self, question: str) -> tuple[str, int]:
        """Send one question to the judge model; returns (its text, tokens used; 0 if the server does not count them).

        Raises ConfigError if the budget `max_tokens` is set and the server does not count.
        """
        model = self._client.resolve_model_name()
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
        verdict = text if isinstance(text, str) else ""
        tokens = tokens_used(answer, "total_tokens")
        if tokens is None and self.config.max_tokens is not None:
            raise ConfigError(
                f"{JUDGE_SETTING}.max_tokens={self.config.max_tokens}: the server at {self.config.url} does not tell the tokens "
                f"it took (usage.total_tokens); leave {JUDGE_SETTING}.max_tokens out, and limit {JUDGE_SETTING}.max_calls"
            )
        return verdict, tokens or 0

    def _cache_file(self, model: str, question: str) -> Path:
        """The file that holds the verdict on a question, named by a hash of everything that decides it."""
        config = self.config
        key_parts = [config.url, model, question, config.temperature, config.max_new_tokens]
        name = hashlib.sha256(json.dumps(key_parts).encode()).hexdigest()
        if config.cache_dir:
            directory = Path(config.cache_dir).expanduser()
        else:
            directory = cache_directory() / "judge"
        return directory / name[:2] / f"{name}.json"

    def _cached_verdict(self, model: str, question: str) -> str | None:
        """The verdict that the cache has on a question; None if it has none, or a file that cannot be read."""
        try:
            entry = json.loads(self._cache_file(model, question).read_text(encoding="utf-8"))
            return str(entry["said"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def describe_what_decides_verdicts(self) -> str:
        """Which judge it was, for reports: two evaluations with another text are not comparable. "judge:qwen|temperature:0"."""
        return f"judge:{self.config.model}|temperature:{self.config.temperature:g}"


def request_text(document: Any) -> str:
    """What the user asked for in a document, as the judge is shown it.

    - Its prompt, if it is no conversation.
    - The content of the turn before the last answer, if there is one such turn.
    - Else all turns before the last answer, each as "role: content".
    """
    if document.messages is None:
        return str(document.prompt)
    last_answer = max(number for number, turn in enumerate(document.messages) if turn["role"] == "assistant")
    turns = document.messages[:last_answer]
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n\n".join(_turn_lines(turns))


def _turn_lines(turns: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Each turn of a conversation as `role: content`."""
    for turn in turns:
        yield f"{turn['role']}: {turn['content']}"
