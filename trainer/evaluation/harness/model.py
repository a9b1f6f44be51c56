"""Our engine as a model of lm-evaluation-harness: ranks share its requests, and every rank gets all answers.

Texts become tokens, and what is too long is cut, as in the harness's own `hf` model (HFLM, 0.4.13), so that the numbers are its.
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
from trainer.evaluation.base import WritingConfig
from trainer.evaluation.harness.compat import begins_with, generation_settings, longest_context
from trainer.evaluation.likelihood import Likelihood, Pair


def _remember_error(method: Callable[..., Any]) -> Callable[..., Any]:
    """Keep what a request ended with apart from what the harness itself raises."""

    @wraps(method)
    def kept(self: EngineLM, *given: Any, **named: Any) -> Any:
        try:
            return method(self, *given, **named)
        except BaseException as error:
            self.ended_by = error
            raise

    return kept


class EngineLM(TemplateLM):
    """Answers the harness's requests. Each is a collective: all ranks must ask the same."""

    tokenizer: Any  # the harness declares it as None

    def __init__(self, writer: Any, engine: Any, config: Any, how: WritingConfig) -> None:
        """`config`: the model's, of transformers; `how`: seed and batches of what is written, the rest is the task's."""
        super().__init__()
        self.writer, self.engine, self.writing = writer, engine, how
        self.tokenizer = writer.tokenizer
        self.backend = "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal"
        self.max_length = longest_context(config, self.tokenizer)
        self.shortened_texts: Counter[str] = Counter()
        """Texts that were too long for the model and lost their beginning, by what was asked."""
        self.dropped_system_turns = 0
        self.ended_by: BaseException | None = None

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return int(begin) if begin is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def notes(self) -> Iterator[str]:
        """What was done to requests, a sentence each."""
        for what, number in (+self.shortened_texts).items():
            yield f"{number} {what} were longer than the model's {self.max_length} positions and lost their beginning"
        if self.dropped_system_turns:
            yield (
                f"{self.dropped_system_turns} questions went without their system turn, which the chat template has no "
                "place for"
            )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with the first token that the tokenizer puts before a text unless the text has it."""
        if add_special_tokens is None and begins_with(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **special)
        return ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """How likely each continuation is after its context."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    @_remember_error
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = [self._fit_to_positions(context, more) for _, context, more in requests]
        return [(each.logprob, each.greedy) for each in self._likelihoods(asked)]

    def _fit_to_positions(self, context: list[int], more: list[int]) -> Pair:
        if not more:
            raise DataError("a choice has no tokens, so that there is nothing to score")
        if self.backend == "seq2seq":
            self.shortened_texts["contexts"] += len(context) > self.max_length
            return context[-self.max_length :], more
        if len(more) > self.max_length:
            raise DataError(f"a choice has {len(more)} tokens, more than the model's {self.max_length} positions")
        over = len(context) + len(more) - (self.max_length + 1)
        self.shortened_texts["contexts"] += over > 0
        return context[max(0, over) :], more

    def _likelihoods(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        found: list[Likelihood] = self.writer.likelihoods(self.engine, pairs)
        return found

    @_remember_error
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, whose windows of the model's length do not overlap."""
        pairs, whose = [], []
        for number, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                pairs.append(utils.make_disjoint_window(window))
                whose.append(number)
        found = [0.0] * len(requests)
        for number, each in zip(whose, self._likelihoods(pairs) if pairs else [], strict=True):
            found[number] += each.logprob
        return found

    @_remember_error
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes to each context; requests of equal settings together."""
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        found = [""] * len(requests)
        for numbers in alike.values():
            how = self._settings(requests[numbers[0]].args[1])
            most = self.max_length if self.backend == "seq2seq" else self.max_length - how.max_new_tokens
            if most <= 0:
                raise ConfigError(
                    f"generation_kwargs max_gen_toks={how.max_new_tokens}: the model has {self.max_length} positions, which "
                    "leaves no room for a question; give options.generation={max_gen_toks: ...}"
                )
            asked = [self.tok_encode(requests[number].args[0]) for number in numbers]
            self.shortened_texts["contexts"] += sum(len(ids) > most for ids in asked)
            written = self.writer.answers(self.engine, [ids[-most:] for ids in asked], how)
            for number, one in zip(numbers, written, strict=True):
                found[number] = one.text
        return found

    def _settings(self, kwargs: dict[str, Any]) -> WritingConfig:
        said = generation_settings(kwargs, 256)
        draws = bool(said["do_sample"])
        return WritingConfig(
            max_new_tokens=int(said["max_gen_toks"]),
            beams=int(said.get("num_beams") or 1),
            temperature=float(said.get("temperature") or 1.0) if draws else 0.0,
            top_p=float(said.get("top_p") or 1.0) if draws else 1.0,
            top_k=int(said.get("top_k") or 0) if draws else 0,
            stop=[text for text in said["until"] if text],
            seed=self.writing.seed,
            batch_tokens=self.writing.batch_tokens,
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without its system turn where the template knows none."""

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
