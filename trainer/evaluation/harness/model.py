"""Our engine as a model of lm-evaluation-harness: ranks share its requests, and every rank gets all answers.

Texts become tokens, and what is too long is cut, as in the harness's own `hf` model (HFLM, 0.4.13): the numbers are the same.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

from jinja2 import TemplateError
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from strategies.errors import ConfigError, DataError
from trainer.evaluation.base import DecodingConfig
from trainer.evaluation.harness.compat import begins_with_prefix, longest_context, normalized_generation_kwargs
from trainer.evaluation.likelihood import ContinuationPair, Likelihood


def _remember_error(method: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator for requests of the harness: keeps an error of our own model in `ended_by`, and raises it.

    The harness passes errors on, so that the caller could not tell them from its own.
    """

    @wraps(method)
    def with_error_noted(self: EngineLM, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except BaseException as error:
            self.ended_by = error
            raise

    return with_error_noted


class EngineLM(TemplateLM):
    """lm-eval's model interface, answered by our engine. Each request is a collective: all ranks must ask the same."""

    tokenizer: Any  # the harness declares it as None

    def __init__(self, answer_generator: Any, engine: Any, config: Any, decoding: DecodingConfig) -> None:
        """`config`: the model's, of transformers. `decoding`: its seed and batch size are used; all else is the task's."""
        super().__init__()
        self.answer_generator = answer_generator
        self.engine = engine
        self.decoding = decoding
        self.tokenizer = answer_generator.tokenizer
        self.backend = "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal"
        # As lm-eval's own `hf` model decides it.
        self.max_length = longest_context(config, self.tokenizer)
        self.shortened_texts: Counter[str] = Counter()
        """Number of texts that were too long for the model and lost their beginning, by kind of text."""
        self.dropped_system_turns = 0
        self.ended_by: BaseException | None = None

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos_id = self.tokenizer.bos_token_id
        return int(bos_id) if bos_id is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def notes(self) -> Iterator[str]:
        """Sentences for the report about requests that were changed: shortened, or without their system turn."""
        for kind, number in (+self.shortened_texts).items():  # the plus drops counts of 0
            yield f"{number} {kind} were longer than the model's {self.max_length} positions and lost their beginning"
        if self.dropped_system_turns:
            yield (
                f"{self.dropped_system_turns} questions went without their system turn, which the chat template has no "
                "place for"
            )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; lm-eval calls it.

        The token that the tokenizer puts before a text (BOS) comes first, unless the text already begins with it.
        """
        if add_special_tokens is None:
            prefix_text = self.tokenizer.decode(self.prefix_token_id)
            if begins_with_prefix(string, prefix_text):
                add_special_tokens = False
        arguments = {}
        if add_special_tokens is not None:  # else the tokenizer's own default holds
            arguments["add_special_tokens"] = add_special_tokens
        ids: list[int] = self.tokenizer.encode(string, **arguments)
        return ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-probability, whether it is greedy) of each continuation after its context."""
        results: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return results

    @_remember_error
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """How likely each continuation is, as lm-eval wants it: (log-probability, whether it is greedy). lm-eval calls it.

        A request is (texts, context ids, continuation ids).
        """
        pairs = [self._fit_to_positions(context, continuation) for _, context, continuation in requests]
        return [(likelihood.logprob, likelihood.greedy) for likelihood in self._likelihoods(pairs)]

    def _fit_to_positions(self, context: list[int], continuation: list[int]) -> ContinuationPair:
        """Cut the beginning of a context, so that it fits the model's positions, as lm-eval's own `hf` model does.

        A cut context is counted in `shortened_texts`. An encoder reads the context alone, so there the continuation is not
        counted. Raises DataError for a continuation without tokens, or with too many by itself.
        """
        if not continuation:
            raise DataError("a choice has no tokens, so that there is nothing to score")
        if self.backend == "seq2seq":
            if len(context) > self.max_length:
                self.shortened_texts["contexts"] += 1
            return ContinuationPair(context[-self.max_length :], continuation)
        if len(continuation) > self.max_length:
            raise DataError(
                f"a choice has {len(continuation)} tokens, more than the model's {self.max_length} positions"
            )
        # The last token of the continuation is only predicted: it takes no position.
        excess = len(context) + len(continuation) - (self.max_length + 1)
        if excess > 0:
            self.shortened_texts["contexts"] += 1
        return ContinuationPair(context[max(0, excess) :], continuation)

    def _likelihoods(self, pairs: Sequence[ContinuationPair]) -> list[Likelihood]:
        """The likelihood of each continuation after its context. A collective."""
        likelihoods: list[Likelihood] = self.answer_generator.likelihoods(self.engine, pairs)
        return likelihoods

    @_remember_error
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, for perplexities; lm-eval calls it. Returns a number for each request.

        A long text is cut into windows of the model's length that do not overlap, and their log-likelihoods are added up.
        """
        pairs = []  # of each window
        request_of_pair = []  # number of the request that the window is of
        for number, request in enumerate(requests):
            # lm-eval's own windows, so that the numbers are the same as lm-eval's.
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                pairs.append(ContinuationPair(*utils.make_disjoint_window(window)))
                request_of_pair.append(number)

        logprobs = [0.0] * len(requests)
        likelihoods = self._likelihoods(pairs) if pairs else []
        for number, likelihood in zip(request_of_pair, likelihoods, strict=True):
            logprobs[number] += likelihood.logprob
        return logprobs

    @_remember_error
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Let the model continue each context; lm-eval calls it. Requests with the same settings are answered together.

        A context that is too long loses its beginning, and is counted in `shortened_texts`. The arguments of a request are
        (context, generation settings), such as ("Q: 2 + 2?", {"until": ["\\n"], "max_gen_toks": 64}). Raises ConfigError if
        the settings leave no position for a context.
        """
        request_indices_by_settings: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            # As a text, since a dictionary cannot be a key.
            settings = json.dumps(request.args[1], sort_keys=True, default=str)
            request_indices_by_settings.setdefault(settings, []).append(index)
        texts = [""] * len(requests)
        for request_indices in request_indices_by_settings.values():
            decoding = self._decoding_config(requests[request_indices[0]].args[1])
            longest_prompt = self.max_length
            if self.backend != "seq2seq":  # prompt and answer share the positions
                longest_prompt -= decoding.max_new_tokens
            if longest_prompt <= 0:
                raise ConfigError(
                    f"generation_kwargs max_gen_toks={decoding.max_new_tokens}: the model has {self.max_length} positions, which "
                    "leaves no room for a question; give options.generation={max_gen_toks: ...}"
                )
            prompts = []
            for index in request_indices:
                prompt_ids = self.tok_encode(requests[index].args[0])
                if len(prompt_ids) > longest_prompt:
                    self.shortened_texts["contexts"] += 1
                prompts.append(prompt_ids[-longest_prompt:])
            answers = self.answer_generator.generate_answers(self.engine, prompts, decoding)
            for index, answer in zip(request_indices, answers, strict=True):
                texts[index] = answer.text
        return texts

    def _decoding_config(self, generation_kwargs: dict[str, Any]) -> DecodingConfig:
        """Turn a task's `generation_kwargs` into our settings of generation, with the defaults of lm-eval's own `hf` model."""
        settings = normalized_generation_kwargs(generation_kwargs)
        decoding = DecodingConfig(
            max_new_tokens=int(settings["max_gen_toks"]),
            beams=int(settings.get("num_beams") or 1),
            stop=[text for text in settings["until"] if text],
            seed=self.decoding.seed,
            batch_tokens=self.decoding.batch_tokens,
        )
        if settings["do_sample"]:  # else the answer is greedy, whatever temperature the task names
            decoding.temperature = float(settings.get("temperature") or 1.0)
            decoding.top_p = float(settings.get("top_p") or 1.0)
            decoding.top_k = int(settings.get("top_k") or 0)
        return decoding

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a conversation as text by the model's chat template; lm-eval calls it, and tokenises the text.

        Some templates refuse a system turn. It is then left out, and counted for the report.
        """

        def render(turns: list[dict[str, str]]) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    turns,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

        try:
            return render(chat_history)
        except TemplateError:
            self.dropped_system_turns += any(turn["role"] == "system" for turn in chat_history)
            return render([turn for turn in chat_history if turn["role"] != "system"])
