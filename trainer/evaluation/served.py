"""Lets a server write the answers in place of a local model: vLLM, SGLang, or any server with OpenAI's /v1/completions.

Requests contain the token ids that the local model would get, so chat templates and special tokens are those of training.
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
from strategies.runtime import Runtime, derived_seed
from trainer.evaluation.base import DecodingConfig
from trainer.evaluation.endpoint.client import Client, first_choice, tokens_used
from trainer.evaluation.endpoint.judge import Judge
from trainer.evaluation.full_weights import GatherDecision
from trainer.evaluation.generate import GeneratedAnswer, GenerationThroughput
from trainer.evaluation.likelihood import Likelihood, Pair
from trainer.evaluation.tasks.model_interface import ModelInterface

if TYPE_CHECKING:
    from trainer.evaluation.base import EvaluationConfig

KEY = "evaluation.server"


@dataclass(slots=True)
class ServedAnswerGenerator:
    """Takes the place of `AnswerGenerator`: a server writes the answers and computes the likelihoods."""

    client: Client
    model: str
    tokenizer: Any
    stop_now: Callable[[], bool] = lambda: False
    throughput: GenerationThroughput | None = None
    on_batch: Callable[[int, int], None] = lambda done, batches: None
    """Called after each batch of requests with the number of finished batches, and of all batches."""

    def generate_answers(
        self, engine: Any, prompts: Sequence[Sequence[int]], settings: DecodingConfig
    ) -> list[GeneratedAnswer]:
        """What the server writes to each prompt, draw by draw, in their order; without the ids of its tokens."""
        if settings.beams > 1:  # which a task of lm-evaluation-harness may ask for in its YAML
            raise ConfigError(
                f"{KEY}: {settings.beams} beams are asked for, and servers of this kind search none; evaluate without it"
            )
        began = time.perf_counter()
        prompt_draws = []  # (number of the prompt, number of the draw) of each request
        for prompt_number in range(len(prompts)):
            prompt_draws += [(prompt_number, draw) for draw in range(settings.draws)]

        # Special tokens do not appear in the text in which a server looks for stop strings: they are sent as ids.
        special_stops = [text for text in settings.stop if text in self.tokenizer.all_special_tokens]
        text_stops = [text for text in settings.stop if text not in special_stops]
        extra: dict[str, Any] = {}
        if settings.top_k:
            extra["top_k"] = settings.top_k
        if special_stops:
            extra["stop_token_ids"] = self.tokenizer.convert_tokens_to_ids(special_stops)

        def request_answer(prompt_draw: tuple[int, int]) -> tuple[GeneratedAnswer, int]:
            """(the answer to one prompt, its number of tokens; 0 if the server does not count them)."""
            prompt_number, draw = prompt_draw
            seed = None
            if settings.temperature:
                seed = derived_seed(settings.seed, "draw", prompt_number, draw) % 2**31  # servers take int32
            response = self.client.send(
                lambda api: api.completions.create(
                    model=self.model,
                    prompt=[*prompts[prompt_number]],
                    max_tokens=settings.max_new_tokens,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    stop=text_stops or None,
                    seed=seed,
                    extra_body=extra or None,
                )
            )
            choice = first_choice(response)
            text = getattr(choice, "text", None)
            if not isinstance(text, str):
                raise ConfigError(
                    f"{KEY}.url={self.client.config.url}: answers /v1/completions without a text; give the address of a server "
                    "that completes prompts, as vLLM does"
                )
            tokens = tokens_used(response, "completion_tokens") or 0
            ended = getattr(choice, "finish_reason", None) == "stop"
            return GeneratedAnswer(prompt_number, text, [], ended, draw), tokens

        results = self._send_all(request_answer, prompt_draws)
        # There are no local weights to gather; the description says who wrote.
        description = f"written by {self.model} at {self.client.config.url}"
        gathering = GatherDecision(sharded=False, gathered_once=True, description=description)
        total_tokens = sum(answer_tokens for _, answer_tokens in results)
        self.throughput = GenerationThroughput(total_tokens, time.perf_counter() - began, gathering)
        return [answer for answer, _ in results]

    def likelihoods(self, engine: Any, pairs: Sequence[Pair]) -> list[Likelihood]:
        """The likelihood of each continuation after its context. Raises ConfigError if the server does not tell it.

        `pairs`: (token ids of the context, token ids of the continuation). ([5, 8], [13, 2]) -> the likelihood of [13, 2].
        """

        def request_likelihood(pair: Pair) -> Likelihood:
            """The likelihood of one continuation. Raises ConfigError if the server sends no log-probabilities of the prompt."""
            context, continuation = pair
            ids = [*context, *continuation]
            # The server echoes the prompt with log-probabilities; the one token that it must add is ignored.
            response = self.client.send(
                lambda api: api.completions.create(
                    model=self.model, prompt=ids, max_tokens=1, temperature=0.0, logprobs=1, echo=True
                )
            )
            logprobs = getattr(first_choice(response), "logprobs", None)
            token_logprobs = getattr(logprobs, "token_logprobs", None) or []
            scored = slice(len(context), len(ids))  # the tokens of the continuation
            continuation_logprobs = token_logprobs[scored]
            if len(token_logprobs) < len(ids) or any(logprob is None for logprob in continuation_logprobs):
                raise ConfigError(
                    f"{KEY}.url={self.client.config.url}: tells no log-probabilities of a prompt's tokens (echo with logprobs, "
                    "as vLLM does), which tasks of likelihood need; ask it for written answers alone, or evaluate without it"
                )
            # Of each position {"likeliest token": its log-probability}. If a server leaves them out, the continuation counts
            # as greedy (each token the likeliest one).
            top_logprobs = getattr(logprobs, "top_logprobs", None) or [None] * len(ids)
            is_greedy = True
            for logprob, top in zip(continuation_logprobs, top_logprobs[scored], strict=True):
                if top is not None and not logprob >= max(top.values()):  # a NaN is not greedy either
                    is_greedy = False
            return Likelihood(float(sum(continuation_logprobs)), len(continuation_logprobs), is_greedy)

        return self._send_all(request_likelihood, pairs)

    def _send_all(self, request: Callable[[Any], Any], arguments: Sequence[Any]) -> list[Any]:
        """What `request` returns for each argument, with `parallel` requests at a time. Raises Interrupted if the run must stop.

        Requests go in batches of four a connection: between batches progress is shown, and the run may stop.
        """
        results: list[Any] = []
        batch_size = 4 * self.client.config.parallel
        begins = range(0, len(arguments), batch_size)
        with ThreadPoolExecutor(self.client.config.parallel) as pool:
            for finished_batches, begin in enumerate(begins, 1):
                results += pool.map(request, arguments[begin : begin + batch_size])
                self.on_batch(finished_batches, len(begins))
                if self.stop_now():
                    raise Interrupted
        return results


@dataclass(slots=True)
class ServedModel(ModelInterface):
    """The model of a server, as tasks see it."""

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
    """The model of a server, as tasks see it. Raises ConfigError if the server has another model.

    `path`: the model's directory on this machine, whose tokenizer `encoder` has. `positions`: most tokens that the model can see;
    None if its configuration does not say.
    """
    client = Client(config.server, KEY)
    model = find_served_model(client, path)
    answer_generator: Any = ServedAnswerGenerator(client, model, encoder.tokenizer, stop_now)
    not_loaded: Any = None  # every request that would need the model is overridden in ServedModel
    return ServedModel(
        engine=not_loaded,
        built=not_loaded,
        answer_generator=answer_generator,
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
    """The name under which a server serves the model in `path`.

    It is `evaluation.server.model` if that is set; else the one whose name or directory is `path`, or has the same last part.
    Raises ConfigError that lists the served models, if the set one is not among them, or if none or several fit the path.
    """
    served_models = client.models()
    names = [str(model["id"]) for model in served_models]
    served = f"the server at {client.config.url} serves {', '.join(names[:20]) or 'none'}"
    configured = client.config.model
    if configured is not None:
        if configured not in names:
            raise ConfigError(f"{KEY}.model={configured}: {served}; name one of these, or start the server with it")
        return configured
    matches = []
    for model in served_models:
        # "root" is vLLM's: the path that the model was loaded from.
        served_names = (str(model.get("id") or ""), str(model.get("root") or ""))
        if any(_is_same_model(name, path) for name in served_names):
            matches.append(str(model["id"]))
    if len(matches) != 1:
        raise ConfigError(
            f"{KEY}.model: not set, and {served}, of which {len(matches)} are named as model.path={path}; name the one"
        )
    return matches[0]


def _is_same_model(name: str, path: str) -> bool:
    """Whether a served name is the path, or its last part."""
    if not name:
        return False
    is_same_path = Path(name).expanduser().resolve() == Path(path).expanduser().resolve()
    return is_same_path or Path(name).name == Path(path).name
