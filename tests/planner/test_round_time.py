"""Seconds of a round on a GPU: against the time that its bytes and operations alone take, worked out by hand."""

from dataclasses import replace

import pytest

from strategies.base import Fsdp2Config, Precision, SingleConfig
from tests.helpers.building import model_dir, run_config
from trainer.model.loading import load_model_config
from trainer.objectives.grpo_config import GrpoConfig, KlConfig
from trainer.objectives.rollouts import RolloutConfig
from trainer.planner.hardware import find_card
from trainer.planner.round_time import BLOCK_LAUNCH_S, GeneratorSizes, estimate_round_time, round_sizes_of_run

CARD = find_card("NVIDIA H100 80GB HBM3")
LARGE = GeneratorSizes(num_parameters=8_000_000_000, num_blocks=32, num_vocabulary_rows=128_256, weight_itemsize=2)
SMALL = GeneratorSizes(num_parameters=100_000_000, num_blocks=30, num_vocabulary_rows=32_000, weight_itemsize=2)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of 64 prompts with 8 answers a step."""
    llama_dir = model_dir(tmp_path_factory.mktemp("rounds"))
    objective = GrpoConfig(group_size=8, rollout=RolloutConfig(max_new_tokens=256, rows=256))
    made = run_config(llama_dir, "fsdp2", "full", micro=8, objective=objective)
    made.batch["global"] = 512
    return replace(made, strategy=Fsdp2Config(), precision=Precision.bf16)


def planned(config, model=LARGE, card=CARD, *, ranks=8, step_s=4.0, resting_bytes=0.0, key_bytes=131_072.0):
    sizes = round_sizes_of_run(config, load_model_config(config.model), 100.0, 200)
    sizes = replace(sizes, kv_cache_bytes_per_token=key_bytes)
    return estimate_round_time(
        sizes, model, config, card, num_ranks=ranks, num_hosts=1, step_s=step_s, resting_bytes=resting_bytes
    )


def test_the_load_of_a_round_is_that_of_its_settings(config):
    objective = replace(
        config.objective, kl=KlConfig(weight=0.1), rollout=replace(config.objective.rollout, steps=2, iterations=3)
    )
    sizes = round_sizes_of_run(replace(config, objective=objective), load_model_config(config.model), 100.0, 200)
    assert (sizes.num_prompts, sizes.group_size, sizes.num_answers, sizes.max_new_tokens) == (128, 8, 1024, 256)
    assert (sizes.num_steps, sizes.extra_forward_passes) == (6, 2)
    assert round_sizes_of_run(config, load_model_config(config.model), 100.0, 200).extra_forward_passes == 0


def test_a_large_model_writes_as_fast_as_memory_reads_its_weights(config):
    """64 rows a rank in one batch: 16 GB of weights at 3,350 GB/s are 4.8 ms, the kernels' launches 16 ms: 256 tokens of them."""
    fast_host = planned(config, replace(LARGE, num_blocks=1))
    reading_s = 256 * 16e9 / 3350e9
    assert reading_s < fast_host.generation_s < 2.5 * reading_s
    launching_s = 256 * 32 * BLOCK_LAUNCH_S
    assert launching_s < planned(config).generation_s < 1.2 * launching_s
    # A small model is bound by launches however few its bytes are.
    assert planned(config, SMALL).generation_s > 256 * 30 * BLOCK_LAUNCH_S


def test_fewer_rows_at_a_time_take_more_batches(config):
    few_rows = replace(config, objective=replace(config.objective, rollout=replace(config.objective.rollout, rows=16)))
    assert planned(few_rows).generation_s == pytest.approx(4 * planned(config).generation_s, rel=0.1)


def test_answers_at_a_time_are_halved_until_their_keys_fit_beside_the_weights(config):
    """A run without `objective.rollout.rows` writes fewer answers at a time instead of gathering weights for every token."""
    rollout = replace(config.objective.rollout, rows=None, max_new_tokens=4096)
    long_answers = replace(config, objective=replace(config.objective, rollout=rollout))
    key_bytes = (
        16 * 2**20 / 64
    )  # 64 answers of 4,296 tokens take 67 GiB, which do not fit beside 16 GB of weights; 32 do
    automatic = planned(long_answers, key_bytes=key_bytes)
    assert automatic.gathers_weights_once
    assert automatic.generation_bytes == LARGE.weight_bytes + 32 * 4296 * key_bytes
    rows = {rows: replace(rollout, rows=rows) for rows in (32, 64)}
    chosen = {
        n: planned(replace(config, objective=replace(config.objective, rollout=r)), key_bytes=key_bytes)
        for n, r in rows.items()
    }
    assert automatic == chosen[32]
    assert not chosen[64].gathers_weights_once  # what the user set is taken as it is


def test_weights_that_do_not_fit_whole_are_gathered_for_every_token(config):
    fits = planned(config)
    too_full = planned(config, resting_bytes=70 * 2**30)
    assert fits.gathers_weights_once and not too_full.gathers_weights_once
    gather_s = 16e9 * 7 / 8 / 450e9
    assert too_full.generation_s > 256 * gather_s > fits.generation_s
    assert planned(replace(config, strategy=SingleConfig()), ranks=1, resting_bytes=70 * 2**30).gathers_weights_once


def test_training_counts_every_step_and_every_look_back(config):
    assert planned(config).training_s == pytest.approx(4.0)
    several = replace(config.objective, rollout=replace(config.objective.rollout, steps=2, iterations=2))
    assert planned(replace(config, objective=several)).training_s == pytest.approx(4 * 4.0 + 2 * 4.0 / 3)


def test_rewards_count_once_they_were_measured(config):
    assert planned(config).scoring_s is None
    measured = planned(config, card=replace(CARD, scoring_s=0.01, writing_pace=2.0))
    assert measured.scoring_s == pytest.approx(5.12)
    assert measured.generation_s == pytest.approx(2 * planned(config).generation_s)
    assert measured.total_s == pytest.approx(measured.generation_s + 5.12 + 4.0)
    assert measured.seconds_per_step == measured.total_s
