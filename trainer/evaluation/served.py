"""Lets a server generate the answers in place of a local model: vLLM, SGLang, or any server with OpenAI's /v1/completions.

Requests contain the token ids that the local model would get, so chat templates and special tokens are those of training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from trainer.evaluation.likelihood import ContinuationPair, Likelihood
from trainer.evaluation.tasks.model_interface import ModelInterface, SequenceLoss

if TYPE_CHECKING:
    from trainer.evaluation.base import EvaluationConfig

SERVER_SETTING = "evaluation.server"


@dataclass(frozen=True, slots=True)
class _CompletionRequest:
    """A prompt, as token ids, that is sent for one sample."""

    prompt: list[int]
    prompt_index: int
    sample_index: int


@dataclass(frozen=True, slots=True)
class _Completion:
    """The server's answer to one request."""

    answer: GeneratedAnswer
    num_tokens: int
    """Tokens of the answer; 0 if the server does not count them."""


@dataclass(slots=True)
class ServedAnswerGenerator:
    """Takes the place of `AnswerGenerator`: a server generates the answers and computes the likelihoods."""

    client: Client
    model: str
    tokenizer: Any
    stop_now: Callable[[], bool] = lambda: False
    throughput: GenerationThroughput | None = None
    on_batch: Callable[[int, int], None] = lambda num_finished, num_batches: None
    """Called after each batch of requests with (finished batches, all batches)."""

    def generate_answers(
        self, engine: Any, prompts: Sequence[Sequence[int]], decoding: DecodingConfig
    ) -> list[GeneratedAnswer]:
        """Let the server answer prompts (token ids): `decoding.draws` answers to each, prompt by prompt.

        They come without token ids. `engine`: not used; it stands where a local model's is. Also sets `throughput`. Raises
        ConfigError if beams are asked for or the server refuses a request, EndpointFailed if it does not answer, Interrupted
        if the run is asked to stop.
        """
        if decoding.beams > 1:  # a task of lm-evaluation-harness may ask for beams in its YAML
            raise ConfigError(
                f"{SERVER_SETTING}: {decoding.beams} beams are asked for, and servers of this kind search none; "
                "evaluate without it"
            )
        began = time.perf_counter()
        requests = []
        for prompt_index, prompt in enumerate(prompts):
            for sample_index in range(decoding.draws):
                requests.append(_CompletionRequest(list(prompt), prompt_index, sample_index))
        completions = self._send_all(lambda request: self._request_completion(request, decoding), requests)
        # There are no local weights to gather. Reports print the decision with the throughput: it says which server generated.
        description = f"written by {self.model} at {self.client.config.url}"
        gathering = GatherDecision(sharded=False, gathered_once=True, description=description)
        total_tokens = sum(completion.num_tokens for completion in completions)
        self.throughput = GenerationThroughput(total_tokens, time.perf_counter() - began, gathering)
        return [completion.answer for completion in completions]

    def _request_completion(self, request: _CompletionRequest, decoding: DecodingConfig) -> _Completion:
        """Send one prompt to the server for one answer. Raises ConfigError if it sends no text or refuses, EndpointFailed."""
        # Special tokens do not appear in the text in which a server looks for stop strings, so they are sent as ids.
        special_stops = [text for text in decoding.stop if text in self.tokenizer.all_special_tokens]
        text_stops = [text for text in decoding.stop if text not in special_stops]
        extra_settings: dict[str, Any] = {}  # those that OpenAI's protocol does not have
        if decoding.top_k:
            extra_settings["top_k"] = decoding.top_k
        if special_stops:
            extra_settings["stop_token_ids"] = self.tokenizer.convert_tokens_to_ids(special_stops)
        seed = None
        if decoding.temperature:
            seed = derived_seed(decoding.seed, "draw", request.prompt_index, request.sample_index)
            seed %= 2**31  # servers take int32
        response = self.client.send(
            lambda api: api.completions.create(
                model=self.model,
                prompt=request.prompt,
                max_tokens=decoding.max_new_tokens,
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                stop=text_stops or None,
                seed=seed,
                extra_body=extra_settings or None,
            )
        )
        # None for an answer without choices.
        choice = first_choice(response)
        text = getattr(choice, "text", None)
        if not isinstance(text, str):
            raise ConfigError(
                f"{SERVER_SETTING}.url={self.client.config.url}: answers /v1/completions without a text; give the address of a "
                "server that completes prompts, as vLLM does"
            )
        has_ended = getattr(choice, "finish_reason", None) == "stop"
        answer = GeneratedAnswer(
            prompt_index=request.prompt_index, text=text, ids=[], has_ended=has_ended, sample_index=request.sample_index
        )
        return _Completion(answer, num_tokens=tokens_used(response, "completion_tokens") or 0)

    def likelihoods(self, engine: Any, pairs: Sequence[ContinuationPair]) -> list[Likelihood]:
        """How likely the server's model finds each continuation after its context, in the order of the pairs of token ids.

        Raises ConfigError if the server sends no log-probabilities of a prompt's tokens, EndpointFailed if it does not answer,
        Interrupted if the run is asked to stop. `engine`: not used.
        """
        return self._send_all(self._request_likelihood, pairs)

    def _request_likelihood(self, pair: ContinuationPair) -> Likelihood:
        """Ask the server how likely one continuation is. Raises ConfigError if it sends no log-probabilities of the prompt."""
        context, continuation = pair
        ids = [*context, *continuation]
        # With `echo`, the server returns the prompt with log-probabilities. The one token that it must generate is ignored.
        response = self.client.send(
            lambda api: api.completions.create(
                model=self.model, prompt=ids, max_tokens=1, temperature=0.0, logprobs=1, echo=True
            )
        )
        response_logprobs = getattr(first_choice(response), "logprobs", None)
        token_logprobs = getattr(response_logprobs, "token_logprobs", None) or []
        continuation_slice = slice(len(context), len(ids))
        continuation_logprobs = token_logprobs[continuation_slice]
        if len(token_logprobs) < len(ids) or any(logprob is None for logprob in continuation_logprobs):
            raise ConfigError(
                f"{SERVER_SETTING}.url={self.client.config.url}: tells no log-probabilities of a prompt's tokens (echo with "
                "logprobs, as vLLM does), which tasks of likelihood need; ask it for written answers alone, or evaluate without "
                "it"
            )
        # {"likeliest token": its log-probability} of each position. Where a server leaves it out, the token counts as greedy.
        top_logprobs = getattr(response_logprobs, "top_logprobs", None) or [None] * len(ids)
        is_greedy = True
        for logprob, top in zip(continuation_logprobs, top_logprobs[continuation_slice], strict=True):
            if top is not None and not logprob >= max(top.values()):  # written so that a NaN is not greedy
                is_greedy = False
        return Likelihood(
            logprob=float(sum(continuation_logprobs)), num_tokens=len(continuation_logprobs), greedy=is_greedy
        )

    def _send_all(self, request: Callable[[Any], Any], arguments: Sequence[Any]) -> list[Any]:
        """Send many requests, several at a time, and return the results in the order of `arguments`.

        `request`: sends one. As many run at a time as `evaluation.server.parallel` says. They are made in batches, four for
        each connection. After each batch, `on_batch` is called, and Interrupted is raised if the run is asked to stop.
        """
        results: list[Any] = []
        num_connections = self.client.config.parallel
        batch_size = 4 * num_connections
        batch_starts = range(0, len(arguments), batch_size)
        with ThreadPoolExecutor(num_connections) as pool:
            for num_finished, start in enumerate(batch_starts, 1):
                results += pool.map(request, arguments[start : start + batch_size])
                self.on_batch(num_finished, len(batch_starts))
                if self.stop_now():
                    raise Interrupted
        return results


@dataclass(slots=True)
class ServedModel(ModelInterface):
    """The model of a server, as tasks see it."""

    @property
    def model_config(self) -> Any:
        return SimpleNamespace(max_position_embeddings=self.max_positions)

    def logits(self, samples: Any) -> list[list[float]]:
        raise ConfigError(f"{SERVER_SETTING}: a server tells no logits of a classifier's head; evaluate without it")

    def sequence_losses(self, dataset: Any, max_rows: int | None) -> dict[int, SequenceLoss]:
        raise ConfigError(
            f"{SERVER_SETTING}: a server does not tell losses as training computes them; evaluate without it"
        )


def connect_served_model(
    config: EvaluationConfig,
    path: str,
    encoder: Any,
    positions: int | None,
    runtime: Runtime,
    stop_now: Callable[[], bool],
) -> ServedModel:
    """Build the interface through which evaluation tasks ask a model that a server serves; no weights are loaded here.

    `path`: the model's directory on this machine, whose tokenizer `encoder` has. `positions`: the number of positions of the
    model; None if its configuration does not say. Raises ConfigError if the server serves another model.
    """
    client = Client(config.server, SERVER_SETTING)
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
    )


def find_served_model(client: Client, path: str) -> str:
    """Find the name under which a server serves the model in `path`.

    - `evaluation.server.model` is set: that name. Raises ConfigError if the server does not serve it.
    - Else: the one model whose name or directory is `path`, or has the same last component ("/models/llama" and "llama").
      Raises ConfigError if none or several do.
    """
    served_models = client.list_models()
    ids = [str(model["id"]) for model in served_models]
    served_text = f"the server at {client.config.url} serves {', '.join(ids[:20]) or 'none'}"
    configured = client.config.model
    if configured is not None:
        if configured not in ids:
            raise ConfigError(
                f"{SERVER_SETTING}.model={configured}: {served_text}; name one of these, or start the server with it"
            )
        return configured
    matching_ids = []
    for model in served_models:
        # "root" is vLLM's: the path that the model was loaded from.
        served_names = (str(model.get("id") or ""), str(model.get("root") or ""))
        if any(_is_same_model(name, path) for name in served_names):
            matching_ids.append(str(model["id"]))
    if len(matching_ids) != 1:
        raise ConfigError(
            f"{SERVER_SETTING}.model: not set, and {served_text}, of which {len(matching_ids)} are named as "
            f"model.path={path}; name the one"
        )
    return matching_ids[0]


def _is_same_model(name: str, path: str) -> bool:
    """Whether a served name is the path, or has the same last component."""
    if not name:
        return False
    is_same_path = Path(name).expanduser().resolve() == Path(path).expanduser().resolve()
    return is_same_path or Path(name).name == Path(path).name
