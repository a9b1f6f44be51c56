"""Rounds in one process: what is written, dealt, counted and kept, with the product's engine and loader."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from strategies.base import Progress
from strategies.errors import DataError, Diverged, Interrupted
from tests.helpers.building import model_dir, take_steps
from tests.helpers.rounds import prompts_of, round_config, round_trainer, share_of_even_ids, texts_of
from trainer.data.batches.order import GlobalOrder
from trainer.evaluation import decoding, group_answers
from trainer.monitors.anomalies import Outlier
from trainer.monitors.config import ChallengesConfig
from trainer.monitors.detectors import ChallengeDetectors
from trainer.monitors.guard_config import Action
from trainer.objectives.grpo_config import Normalise
from trainer.objectives.policy import SAMPLING_DIFFERENCE_METRIC
from trainer.objectives.rollouts import IdleGroups
from trainer.reporting.tracking import Trackers
from trainer.rollout.generator import ignored_generation_settings
from trainer.rollout.round_file import ROUND_FILE
from trainer.rollout.round_table import round_table

CLOSE = 1e-3
"""Distance of the two best noisy scores of a draw above which no rounding of float32 changes it."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("rounds")
    model_dir(path)
    return path


def made_trainer(root, runtime, *, micro=4, progress=None, reward=share_of_even_ids, stop_now=lambda: False, **changes):
    config = round_config(root, root / "llama", "single", micro=micro, **changes)
    return round_trainer(config, prompts_of(config), runtime, progress=progress, reward=reward, stop_now=stop_now)


def test_a_draw_belongs_to_its_place_and_number_whatever_is_written_at_a_time(root, runtime, monkeypatch):
    """Rows at a time and micro-batches change rounding alone: the same tokens, and the same steps.

    The seed is one with which no draw of the first two rounds is closer than `CLOSE`; closer ones may change by rounding.
    """
    gaps = []

    def measured(scores, seeds, position):
        gaps.append(smallest_gap(scores, seeds, position))
        return draw(scores, seeds, position)

    draw = decoding.sample_in_two_levels
    monkeypatch.setattr(group_answers, "sample_in_two_levels", measured)
    curves = []
    texts = []
    for micro, rows in ((4, 1), (3, 7), (16, 64)):
        trainer = made_trainer(root, runtime, micro=micro, rollout={"rows": rows})
        curves.append(take_steps(trainer, 2))
        texts.append(texts_of(trainer))
    assert min(gaps) > CLOSE
    assert texts[0] == texts[1] == texts[2]
    lengths = [len(ids) for group in texts[0] for ids in group]
    assert len(lengths) == 32 and max(lengths) <= 8
    assert len({tuple(ids) for group in texts[0] for ids in group}) > 16  # draws differ
    for curve in curves[1:]:
        for step, first in zip(curve, curves[0], strict=True):
            assert step == pytest.approx(first, rel=1e-5, abs=1e-6)


def test_how_a_model_wants_to_be_drawn_from_does_not_hold_while_it_learns_and_is_told(
    root, runtime, tmp_path, monkeypatch
):
    """Qwen's models come with a repetition penalty, top_p and top_k: these would change what is drawn, not what is learned.

    transformers' `generate` would apply them; it writes where the loop of groups cannot.
    """
    model = tmp_path / "llama"
    shutil.copytree(root / "llama", model)
    own = GenerationConfig.from_pretrained(model)
    own.update(do_sample=True, temperature=0.1, repetition_penalty=5.0, top_p=0.5, top_k=2)
    own.save_pretrained(model)
    assert ignored_generation_settings(GenerationConfig.from_pretrained(model)) == [
        "repetition_penalty=5.0",
        "top_k=2",
        "top_p=0.5",
    ]
    texts = []
    for directory in (root / "llama", model):
        config = round_config(root, directory, "single", micro=16)
        trainer = round_trainer(config, prompts_of(config), runtime)
        take_steps(trainer, 1)
        texts.append(texts_of(trainer))
        monkeypatch.setattr(group_answers, "can_share_prompts", lambda model: False)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_a_prompt_computed_once_for_its_answers_gives_the_same_steps(tmp_path, runtime, architecture):
    """Beside answers each with its prompt; in whole groups and in parts of them. gemma2 has windows and capped scores."""
    model = model_dir(tmp_path, architecture, **({"sliding_window": 8} if architecture == "gemma2" else {}))
    curves = []
    tokens = []
    for shares, micro in ((False, 16), (True, 16), (True, 3)):
        trainer = round_trainer(
            config := round_config(tmp_path, model, "single", micro=micro), prompts_of(config), runtime
        )
        batcher = trainer.loader.round_builder.batcher
        assert batcher.shares_prompts
        trainer.loader.round_builder.batcher = replace(batcher, shares_prompts=shares)
        curves.append(take_steps(trainer, 3))
        batch = next(trainer.loader.steps(12, 1))
        tokens.append(sum(micro_batch["input_ids"].numel() for micro_batch in batch.micro_batches))
    for curve in curves[1:]:
        for step, apart in zip(curve, curves[0], strict=True):
            assert step == pytest.approx(apart, rel=1e-5, abs=1e-6)
    assert tokens[1] < tokens[2] < tokens[0]


def smallest_gap(scores, seeds, position):
    """How far the two best noisy scores of a draw are apart, at the level where they are closest."""
    missing = -scores.shape[1] % decoding.BLOCK_TOKENS
    padded = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf).unflatten(1, (-1, decoding.BLOCK_TOKENS))
    blocks = padded.logsumexp(-1).double() + decoding.gumbel_noise(seeds, 2 * position, padded.shape[1])
    chosen = padded[torch.arange(len(scores)), blocks.argmax(-1)].double()
    tokens = chosen + decoding.gumbel_noise(seeds, 2 * position + 1, decoding.BLOCK_TOKENS)
    gaps = []
    for level in (blocks, tokens):
        best = level.topk(2, dim=-1).values
        gaps.append(float((best[:, 0] - best[:, 1]).min()))
    return min(gaps)


def test_prompts_are_neither_skipped_nor_taken_twice(root, runtime):
    """14 prompts, 4 a round: the second epoch begins in the middle of the fourth round, in an order of its own."""
    trainer = made_trainer(root, runtime)
    take_steps(trainer, 7)
    scorer = trainer.loader.round_builder.scorer
    places = [group.prompt.prompt_number for groups in scorer.scored for group in groups]
    assert places == list(range(28)) and trainer.progress.samples == 28
    prompts = [tuple(group.prompt.ids) for groups in scorer.scored for group in groups]
    assert sorted(prompts[:14]) == sorted(prompts[14:])
    assert prompts[:14] != prompts[14:]


def test_the_counts_of_a_step_are_those_of_the_learned_answers(root, runtime):
    """The first answer of each group is unscored, and truncated ones are left out: neither in sums nor in counts.

    An `e` ends an answer, so that some end.
    """

    def reward(group):
        return [np.nan, *share_of_even_ids(group)[1:]]

    leave_out = {"mask_truncated": True, "normalise": Normalise.answer, "rollout": {"stop": ["e"]}}
    trainer = made_trainer(root, runtime, micro=3, reward=reward, **leave_out)
    batch = next(trainer.loader.steps(0, 1))
    made = trainer.loader.current_round
    learned = [a for group in made.groups for a in group.answers[1:] if a.has_ended]
    assert 0 < len(learned) < 12
    tokens = sum(len(answer.ids) for answer in learned)
    assert batch.totals == {"loss": len(learned), "tokens": tokens, "answers": len(learned)}
    weights = np.concatenate([micro["loss_weights"] for micro in batch.micro_batches])
    assert weights.sum() == pytest.approx(len(learned)) and len(weights) == tokens
    assert batch.samples == 4 and batch.facts["answers/unscored"] == 4


def test_a_round_of_several_steps_goes_on_from_its_checkpoint(root, runtime, tmp_path):
    """Two steps taken twice each: stopped after the first or the third, the rest of the round is the same."""
    rounds = {"steps": 2, "iterations": 2}
    whole = made_trainer(root, runtime, rollout=rounds)
    expected = take_steps(whole, 5)
    assert len(whole.loader.round_builder.scorer.scored) == 2 and whole.progress.samples == 8
    for stopped_after in (1, 3):
        first = made_trainer(root, runtime, rollout=rounds)
        take_steps(first, stopped_after)
        assert first.progress.samples == 0 and first.progress.round_step == stopped_after
        state = tmp_path / f"state{stopped_after}"
        state.mkdir()
        rank_state = first.engine.state(first.progress)
        rank_state.attachments = first.loader.attachments()
        rank_state.save(state)
        assert (state / ROUND_FILE).exists()

        second = made_trainer(root, runtime, rollout=rounds)
        loaded = second.engine.load(state)
        for name in ("step", "samples", "round_step", "tokens"):
            setattr(second.progress, name, getattr(loaded, name))
        second.loader.restore(state)
        assert second.loader.current_round.metrics == first.loader.current_round.metrics
        assert take_steps(second, 5 - stopped_after) == expected[stopped_after:]
        assert len(second.loader.round_builder.scorer.scored) == 1


@pytest.mark.parametrize("step", [2, 3], ids=["its own round", "a later round"])
def test_a_rollback_into_a_round_leaves_out_the_round_that_stands_out(root, runtime, tmp_path, step):
    """Rounds of two steps, a checkpoint after the first one."""
    trainer = made_trainer(root, runtime, rollout={"steps": 2})
    take_steps(trainer, 1)
    state = trainer.engine.state(trainer.progress)
    state.attachments = trainer.loader.attachments()
    state.save(tmp_path)
    take_steps(trainer, step - 1)
    first_sample = 0 if step == 2 else 8
    outlier = Outlier(step=step, values={}, scores={}, action=Action.rollback, first_sample=first_sample, began=step)
    trainer.checkpoints = SimpleNamespace(pending_step=None, roll_back=lambda last_good_step: tmp_path)
    trainer._roll_back(outlier)
    assert (trainer.progress.step, trainer.progress.round_step) == (1, int(step == 3))
    scorer = trainer.loader.round_builder.scorer
    scorer.scored.clear()
    take_steps(trainer, 2)
    # Of 14 prompts in epochs, the next round has those that follow what is left out.
    first_place = first_sample + 8
    dataset = trainer.loader.round_builder.prompts.dataset
    units = GlobalOrder(14, trainer.settings.seed, shuffle=True).units(first_place, 8)
    prompts = [tuple(group.prompt.ids) for group in scorer.scored[0]]
    assert prompts == [tuple(dataset.sample(int(unit)).input_ids.tolist()) for unit in units]


def test_each_step_of_a_round_has_the_reward_of_its_round(root, runtime):
    trainer = made_trainer(root, runtime, rollout={"steps": 2, "iterations": 2})
    facts = [batch.facts for batch in trainer.loader.steps(0, 5)]
    assert [fact["round_step"] for fact in facts] == [0, 1, 2, 3, 0]
    assert len({fact["reward"] for fact in facts[:4]}) == 1 and facts[4]["reward"] != facts[0]["reward"]
    assert ["write_s" in fact for fact in facts] == [True, False, False, False, True]
    # The detector counts the answers of a round once.
    challenges = ChallengeDetectors(ChallengesConfig(), planned_evaluations=1, judged_loss_term="loss")
    challenges.metrics_of_control_rewards = []
    challenges.add_step_metrics(
        trainer.progress, [{"step": step, "loss": 0.0, **fact} for step, fact in enumerate(facts, 1)]
    )
    assert [block["reward"] for block in trainer.progress.reward_blocks] == [facts[0]["reward"], facts[4]["reward"]]


def test_trackers_show_answers_of_a_round_with_the_row_of_its_step(root, runtime):
    trainer = made_trainer(root, runtime)
    next(trainer.loader.steps(0, 1))
    table = round_table(trainer.loader.current_round, 11)
    assert table.columns == ["step", "prompt", "place", "reward", "answer", "rewards/reward", "advantage", "ended"]
    assert [row[2] for row in table.rows] == ["best", "", "", "worst"] * 4
    rewards = [row[3] for row in table.rows[:4]]
    assert rewards == sorted(rewards, reverse=True)

    seen = []
    tracker = SimpleNamespace(
        log=lambda row, step: seen.append(step), log_table=lambda name, table, step: seen.append((name, step))
    )
    trackers = Trackers(None, [tracker])
    trackers.log_table_with_row("rounds", table, step=11)
    for step in (10, 11, 12):
        trackers.log({"loss": 0.0}, step=step)
    assert seen == [10, 11, ("rounds", 11), 12]
    trackers.log_table_with_row("rounds", table, step=13)
    trackers.rewind(11)
    trackers.log({"loss": 0.0}, step=13)
    assert seen[-1] == 13


def test_idle_groups_are_dropped_or_replaced(root, runtime):
    """Groups of prompts with an even place score alike."""

    def reward(group):
        return (
            [1.0] * 4
            if group.prompt.prompt_number % 2 == 0
            else [float(answer.sample_index) for answer in group.answers]
        )

    dropped = made_trainer(root, runtime, reward=reward, idle_groups=IdleGroups.drop)
    batch = next(dropped.loader.steps(0, 1))
    assert batch.totals["answers"] == 8 and batch.facts["frac_reward_zero_std"] == 0.5

    replaced = made_trainer(root, runtime, reward=reward, idle_groups=IdleGroups.replace)
    batches = list(replaced.loader.steps(0, 1))
    made = replaced.loader.current_round
    assert [group.prompt.prompt_number for group in made.groups] == [1, 3, 5, 7]
    assert batches[0].samples == 8 and batches[0].totals["answers"] == 16
    assert batches[0].facts["groups/replaced"] == 4 and batches[0].facts["groups/missing"] == 0


def test_rewards_that_tell_nothing_apart_end_the_run(root, runtime):
    trainer = made_trainer(root, runtime, reward=lambda group: [0.5] * 4, idle_groups=IdleGroups.replace)
    with pytest.raises(
        DataError, match=r"in none of \d+ groups of 4 answers do the rewards differ .rewards lie between 0.5"
    ):
        next(trainer.loader.steps(0, 1))


def test_a_step_without_anything_learned_moves_nothing_but_the_count(root, runtime):
    trainer = made_trainer(root, runtime, micro=3, reward=lambda group: [np.nan] * 4)
    assert take_steps(trainer, 1) == [(0.0, 0.0)]
    assert trainer.progress.samples == 4


def test_a_stop_while_a_round_is_made_is_raised_before_the_next_part(root, runtime):
    calls = []

    def stop_now():
        calls.append(1)
        return len(calls) > 2

    trainer = made_trainer(root, runtime, stop_now=stop_now, rollout={"rows": 4})
    with pytest.raises(Interrupted):
        next(trainer.loader.steps(0, 1))
    assert trainer.loader.round_builder.scorer.scored == []


def test_answers_of_other_weights_end_the_run(root, runtime):
    trainer = made_trainer(root, runtime)
    trainer.loader.check_generated_answers([{"step": 1, SAMPLING_DIFFERENCE_METRIC: 1e-5}, {"step": 2}])
    with pytest.raises(Diverged, match=r"step 3: .* differ by 0.25 nats a token, more than 0.001"):
        trainer.loader.check_generated_answers([{"step": 3, SAMPLING_DIFFERENCE_METRIC: 0.25}])
    assert replace(Progress(round_step=3)).as_json()["round_step"] == 3
