"""Answers with the prompt computed once: those of transformers' `generate`, token for token."""

import copy

import pytest
import torch

from strategies import runtime as processes
from tests.helpers import writing as make
from tests.helpers.building import alone
from trainer.evaluation.base import DecodingConfig
from trainer.evaluation.generate import AnswerGenerator, transformers_model_of
from trainer.evaluation.group_answers import SharedPromptGenerator, can_share_prompts

PROMPTS = make.prompts(6)
SEEDS = [[100 * prompt + draw for draw in range(4)] for prompt in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def runtime():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        yield alone(processes.join_job("cpu", timeout_s=60, threads=1))
        processes.leave_job()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_answers_are_those_of_generate_whatever_is_written_at_a_time(tmp_path, runtime, architecture):
    """A third of the vocabulary ends an answer, so that rows leave; with stop strings too, and a batch of a part of a group."""
    engine, writer = make.made(tmp_path, architecture, runtime)
    assert can_share_prompts(transformers_model_of(engine))
    generation = copy.deepcopy(writer.generation_config)
    generation.eos_token_id = list(range(0, 384, 3))
    for rows, stop in ((3, []), (64, ["e"])):
        settings = DecodingConfig(max_new_tokens=9, temperature=0.8, draws=4, stop=stop)
        expected = AnswerGenerator(writer.tokenizer, generation, runtime, batch=64).generate_answers(
            engine, PROMPTS, settings, seeds=SEEDS, averaged=False, keep_logprobs=True
        )
        found = SharedPromptGenerator(writer.tokenizer, generation, runtime, batch=rows).generate_samples(
            engine, PROMPTS, settings, SEEDS
        )
        assert [
            (answer.prompt_index, answer.sample_index, answer.ids, answer.text, answer.has_ended) for answer in found
        ] == [
            (answer.prompt_index, answer.sample_index, answer.ids, answer.text, answer.has_ended) for answer in expected
        ]
        for answer, other in zip(found, expected, strict=True):
            assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        lengths = {len(answer.ids) for answer in found}
        assert min(lengths) < 3 and max(lengths) > 4


def test_models_without_rows_of_keys_are_written_by_generate(tmp_path, runtime):
    engine, _ = make.made(tmp_path, "llama", runtime)
    model = transformers_model_of(engine)
    model.config.layer_types = ["linear_attention"] * model.config.num_hidden_layers
    assert not can_share_prompts(model)
    assert torch.is_grad_enabled()
