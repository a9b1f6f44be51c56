"""Generates the answers of a round with the run's own engine, under every strategy, with the present weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from strategies.runtime import Runtime, derived_seed
from trainer.evaluation.base import DecodingConfig
from trainer.evaluation.group_answers import SharedPromptGenerator
from trainer.objectives.rollouts import RolloutConfig
from trainer.rollout.types import Answer, AnswerGroup, Prompt

if TYPE_CHECKING:
    from strategies.base import Engine

SPECIAL_TOKEN_SETTINGS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""The settings of a model's generation_config that hold while training."""
UNREPORTED_SETTINGS = ("do_sample", "temperature", "max_length", "max_new_tokens", "transformers_version", "use_cache")
"""Settings of a generation_config that a run replaces, or that change no sample: nobody needs to be told of them."""


class EngineGroupGenerator:
    """Generates the answers of a round with the weights that are being trained, on the run's own engine.

    The random numbers of an answer depend on (seed of the run, number of its prompt, index of the answer) alone: ranks, strategy
    and rows at a time change an answer only by rounding.
    """

    def __init__(
        self,
        tokenizer: Any,
        generation_config: Any,
        settings: RolloutConfig,
        runtime: Runtime,
        *,
        seed: int,
        rows: int,
        stop_now: Callable[[], bool] = lambda: False,
    ) -> None:
        """`rows`: most answers that this rank generates at a time. `stop_now`: asked on all ranks after each batch."""
        self.settings = settings
        self.seed = seed
        self._answer_generator = SharedPromptGenerator(
            tokenizer, with_special_tokens_only(generation_config), runtime, batch=rows, stop_now=stop_now
        )

    def generate_groups(self, engine: Engine, prompts: Sequence[Prompt], num_samples: int) -> list[AnswerGroup]:
        """Let the trained weights answer prompts: a group of `num_samples` answers for each prompt, the same on all ranks.

        All ranks must call with the same prompts. Raises Interrupted, on all ranks alike, if the run is asked to stop, and
        DataError for a prompt that leaves no position for an answer.
        """
        settings = DecodingConfig(
            max_new_tokens=self.settings.max_new_tokens,
            temperature=self.settings.temperature,
            stop=list(self.settings.stop),
            draws=num_samples,
        )
        seeds = []
        for prompt in prompts:
            seeds.append(
                [derived_seed(self.seed, "answer", prompt.prompt_number, sample) for sample in range(num_samples)]
            )
        # The trained weights generate, not their average: the loss compares with the log-probabilities of these weights.
        generated = self._answer_generator.generate_samples(engine, [prompt.ids for prompt in prompts], settings, seeds)
        groups = [AnswerGroup(prompt, []) for prompt in prompts]
        for sample in generated:
            assert sample.logprobs is not None, "`generate_samples` keeps them"
            answer = Answer(sample.sample_index, sample.ids, sample.logprobs, sample.text, sample.has_ended)
            groups[sample.prompt_index].answers.append(answer)
        return groups


def with_special_tokens_only(generation_config: Any) -> Any:
    """Keep of a model's GenerationConfig (transformers) only the special tokens (`SPECIAL_TOKEN_SETTINGS`), as a new one.

    All else is left out, because a repetition penalty, top_p or top_k would change what is sampled, but not the probabilities
    that are trained.
    """
    from transformers import GenerationConfig

    kept = {name: getattr(generation_config, name, None) for name in SPECIAL_TOKEN_SETTINGS}
    return GenerationConfig(**{name: ids for name, ids in kept.items() if ids is not None})


def ignored_generation_settings(generation_config: Any) -> list[str]:
    """The settings of a model's generation_config that do not hold while training, to tell the user: ["top_k=2", "top_p=0.5"].

    Only settings that differ from transformers' defaults and are neither empty nor 0.
    """
    changed = generation_config.to_diff_dict()
    names = [name for name in sorted(changed) if name not in (*SPECIAL_TOKEN_SETTINGS, *UNREPORTED_SETTINGS)]
    return [f"{name}={changed[name]}" for name in names if changed[name] and not name.startswith("_")]
