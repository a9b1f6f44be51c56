"""Generates answers by a server in place of the local model: vLLM, SGLang, any with OpenAI's /v1/completions.

It is sent the token ids that the local model would get, so that chat templates and special tokens are those of
training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError, Interrupted
from strategies.runtime import Runtime, derive_seed
from trainer.evaluation.base import WritingConfig
from trainer.evaluation.endpoint.client import Client, first_choice, tokens_used
from trainer.evaluation.endpoint.judge import Judge
from trainer.evaluation.full_weights import GatherDecision
from trainer.evaluation.generate import GenerationThroughput, WrittenAnswer
from trainer.evaluation.likelihood import Likelihood, Pair
from trainer.evaluation.tasks.model_interface import ModelInterface

if TYPE_CHECKING:
    from trainer.evaluation.base import EvaluationConfig

KEY = "evaluation.server"


@dataclass(slots=True)
class ServedWriter:
    """Stands in for the writer of an engine."""

    client: Client
    model: str
    tokenizer: Any
    stop_now: Callable[[], bool] = lambda: False
    throughput: GenerationThroughput | None = None
    on_batch: Callable[[int, int], None] = lambda done, turns: None
    """Hears after each batch of requests how many are done, and of how many."""

    def answers(self, engine: Any, prompts: Sequence[Sequence[int]], settings: WritingConfig) -> list[WrittenAnswer]:
        """What the server writes to each prompt, draw by draw, in their order; without the ids of its tokens."""
        if settings.beams > 1:  # which a task of lm-evaluation-harness may ask for in its YAML
            raise ConfigError(
                f"{KEY}: {settings.beams} beams are asked for, and servers of this kind search none; evaluate without it"
            )
        began = time.perf_counter()
        rows = [(number, draw) for number in range(len(prompts)) for draw in range(settings.draws)]
        hidden = [text for text in settings.stop if text in self.tokenizer.all_special_tokens]
        extra: dict[str, Any] = {"top_k": settings.top_k} if settings.top_k else {}
        if hidden:  # which no server shows in the text that it looks for stops in
            extra["stop_token_ids"] = self.tokenizer.convert_tokens_to_ids(hidden)

        def ask(row: tuple[int, int]) -> tuple[WrittenAnswer, int]:
            said = self.client.send(
                lambda api: api.completions.create(
                    model=self.model,
                    prompt=[*prompts[row[0]]],
                    max_tokens=settings.max_new_tokens,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    stop=[text for text in settings.stop if text not in hidden] or None,
                    seed=derive_seed(settings.seed, "draw", *row) % 2**31 if settings.temperature else None,
                    extra_body=extra or None,
                )
            )
            choice = first_choice(said)
            text = getattr(choice, "text", None)
            if not isinstance(text, str):
                raise ConfigError(
                    f"{KEY}.url={self.client.config.url}: answers /v1/completions without a text; give the address of a server "
                    "that completes prompts, as vLLM does"
                )
            tokens = tokens_used(said, "completion_tokens") or 0
            ended = getattr(choice, "finish_reason", None) == "stop"
            return WrittenAnswer(row[0], text, [], ended, row[1]), tokens

        found = self._send_all(ask, rows)
        how = GatherDecision(False, True, f"written by {self.model} at {self.client.config.url}")
        self.throughput = GenerationThroughput(sum(tokens for _, tokens in found), time.perf_counter() - began, how)
        return [one for one, _ in found]

    def likelihoods(self, engine: Any, pairs: Sequence[Pair]) -> list[Likelihood]:
        """How likely the server's model holds each continuation. Raises ConfigError where it tells no likelihoods of prompts."""

        def ask(pair: Pair) -> Likelihood:
            ids, begin = [*pair[0], *pair[1]], len(pair[0])
            said = self.client.send(
                lambda api: api.completions.create(
                    model=self.model, prompt=ids, max_tokens=1, temperature=0.0, logprobs=1, echo=True
                )
            )
            told = getattr(first_choice(said), "logprobs", None)
            each = getattr(told, "token_logprobs", None) or []
            if len(each) < len(ids) or any(value is None for value in each[begin : len(ids)]):
                raise ConfigError(
                    f"{KEY}.url={self.client.config.url}: tells no log-probabilities of a prompt's tokens (echo with logprobs, "
                    "as vLLM does), which tasks of likelihood need; ask it for written answers alone, or evaluate without it"
                )
            best = (getattr(told, "top_logprobs", None) or [None] * len(ids))[begin : len(ids)]
            held = each[begin : len(ids)]
            greedy = all(top is None or value >= max(top.values()) for value, top in zip(held, best, strict=True))
            return Likelihood(float(sum(held)), len(held), greedy)

        return self._send_all(ask, pairs)

    def _send_all(self, ask: Callable[[Any], Any], rows: Sequence[Any]) -> list[Any]:
        found, size = list[Any](), 4 * self.client.config.parallel
        begins = range(0, len(rows), size)
        with ThreadPoolExecutor(self.client.config.parallel) as pool:
            for done, begin in enumerate(begins, 1):
                found += pool.map(ask, rows[begin : begin + size])
                self.on_batch(done, len(begins))
                if self.stop_now():
                    raise Interrupted
        return found


@dataclass(slots=True)
class ServedModel(ModelInterface):
    """A served model that can be asked."""

    served_name: str = field(default="")

    @property
    def model_config(self) -> Any:
        return SimpleNamespace(max_position_embeddings=self.max_positions)

    def logits(self, samples: Any) -> list[list[float]]:
        raise ConfigError(f"{KEY}: a server tells no logits of a classifier's head; evaluate without it")

    def sequence_losses(self, dataset: Any, max_rows: int | None) -> dict[int, tuple[float, float]]:
        raise ConfigError(f"{KEY}: a server tells no losses as training reckons them; evaluate without it")


def connect_served_model(
    config: EvaluationConfig,
    path: str,
    encoder: Any,
    positions: int | None,
    runtime: Runtime,
    stop_now: Callable[[], bool],
) -> ServedModel:
    """The model of a server, of which `path` is the directory here. Raises ConfigError where it serves another one."""
    client = Client(config.server, KEY)
    model = find_served_model(client, path)
    writer: Any = ServedWriter(client, model, encoder.tokenizer, stop_now)
    nothing: Any = None
    return ServedModel(
        engine=nothing,
        built=nothing,
        writer=writer,
        encoder=encoder,
        runtime=runtime,
        max_positions=positions,
        label_names=None,
        stop_now=stop_now,
        batch=config.batch,
        judge=Judge(config.judge, runtime, stop_now) if config.judge.url else None,
        served_name=model,
    )


def find_served_model(client: Client, path: str) -> str:
    """Which of a server's models is the one in `path`. Raises ConfigError with what there is."""
    listed = client.models()
    names = [str(each["id"]) for each in listed]
    there = f"the server at {client.config.url} serves {', '.join(names[:20]) or 'none'}"
    if (wanted := client.config.model) is not None:
        if wanted not in names:
            raise ConfigError(f"{KEY}.model={wanted}: {there}; name one of these, or start the server with it")
        return wanted
    same = [
        str(each["id"])
        for each in listed
        if any(_is_same_model(str(each.get(at) or ""), path) for at in ("id", "root"))
    ]
    if len(same) != 1:
        raise ConfigError(
            f"{KEY}.model: not set, and {there}, of which {len(same)} are named as model.path={path}; name the one"
        )
    return same[0]


def _is_same_model(name: str, path: str) -> bool:
    return bool(name) and (
        Path(name).expanduser().resolve() == Path(path).expanduser().resolve() or Path(name).name == Path(path).name
    )
