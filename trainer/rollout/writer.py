"""Writes the answers of a round with the run's own engine, under every strategy, with the weights as they are now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from strategies.runtime import Runtime, derived_seed
from trainer.evaluation.base import DecodingConfig
from trainer.evaluation.group_answers import SharedPromptGenerator
from trainer.objectives.rollouts import RolloutConfig
from trainer.rollout.types import Answer, Group, Prompt

if TYPE_CHECKING:
    from strategies.base import Engine

END_SETTINGS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""What is taken of a model's generation_config while training."""
WITHOUT_EFFECT = ("do_sample", "temperature", "max_length", "max_new_tokens", "transformers_version", "use_cache")
"""Settings of a generation_config that a run replaces, or that change no draw: nobody needs to be told of them."""


class EngineGroupGenerator:
    """A `GroupGenerator` on the run's own engine.

    The draws of an answer belong to (seed of the run, place of its prompt in the order, number of the answer): neither ranks,
    nor strategy, nor rows at a time change them, but by rounding.
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
        """`rows`: most answers that this rank writes at a time. `stop_now`, asked on all ranks after each batch, ends it."""
        self.settings = settings
        self.seed = seed
        self._answer_generator = SharedPromptGenerator(
            tokenizer, end_tokens_only(generation_config), runtime, batch=rows, stop_now=stop_now
        )

    def generate_groups(self, engine: Engine, prompts: Sequence[Prompt], draws: int) -> list[Group]:
        """See `GroupGenerator.generate_groups`. Also raises DataError for a prompt that leaves no position for an answer."""
        settings = DecodingConfig(
            max_new_tokens=self.settings.max_new_tokens,
            temperature=self.settings.temperature,
            stop=list(self.settings.stop),
            draws=draws,
        )
        seeds = []
        for prompt in prompts:
            seeds.append([derived_seed(self.seed, "answer", prompt.prompt_number, draw) for draw in range(draws)])
        # The weights that train, not their average: what is learned is how likely these weights made the answers.
        written = self._answer_generator.generate_samples(engine, [prompt.ids for prompt in prompts], settings, seeds)
        groups = [Group(prompt, []) for prompt in prompts]
        for answer in written:
            assert answer.logprobs is not None
            drawn = Answer(answer.sample_index, answer.ids, answer.logprobs, answer.text, answer.has_ended)
            groups[answer.prompt_index].answers.append(drawn)
        return groups


def end_tokens_only(generation_config: Any) -> Any:
    """A generation_config with the end tokens of a model's own and nothing else.

    A repetition penalty, top_p or top_k changes what is drawn, but not the probabilities that are learned.
    """
    from transformers import GenerationConfig

    kept = {name: getattr(generation_config, name, None) for name in END_SETTINGS}
    return GenerationConfig(**{name: ids for name, ids in kept.items() if ids is not None})


def ignored_generation_settings(generation_config: Any) -> list[str]:
    """What of a model's generation_config does not hold while answers are written to learn from, as `name=value`."""
    changed = generation_config.to_diff_dict()
    names = [name for name in sorted(changed) if name not in (*END_SETTINGS, *WITHOUT_EFFECT)]
    return [f"{name}={changed[name]}" for name in names if changed[name] and not name.startswith("_")]
