"""`shardtune demo objective=grpo`: a small real model learns from a reward to answer in exactly three words."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.config.help_text import show_help
from launch.demo.embedded import MODEL_NAME, fetch_demo_model
from launch.demo.results import greedy_answer, held_out_evaluations, load_tokenizer, num_processes, run_dir_of
from strategies import exit_codes
from strategies.cache_dir import cache_directory
from strategies.errors import ShardtuneError

USAGE = """usage: shardtune demo objective=grpo [key=value ...]

  shardtune demo objective=grpo
  shardtune demo objective=grpo strategy=zero2

This demo shows reinforcement learning with a reward. SmolLM2-135M-Instruct is asked to describe things in exactly three
words. It writes eight answers to each prompt, a reward function counts their words, and the model learns to write more
like the better answers. Nobody shows it a right one. The demo prints the reward function and the `train` command that it
runs. Settings that you type override those of that command.

There is no data to fetch: the prompts name 20 things to train on, and 8 others to evaluate with. A step takes 8 prompts
with 8 answers of at most 12 tokens, and there are 20 steps.

The demo ends with exit code 69 if the reward on the held-out prompts does not rise by 0.25. The reward knows nothing
of meaning: it shows that the model learned the form of an answer, not that it describes better. At the end stands a
command that trains the same with a reward that can be cheated. docs/reinforcement.md explains both."""
TRAINED_SUBJECTS = [
    "a garden",
    "a river",
    "a city",
    "a poem",
    "a storm",
    "a forest",
    "a mountain",
    "a winter",
    "the ocean",
    "the moon",
    "a library",
    "a kitchen",
    "a violin",
    "a train",
    "a market",
    "a desert",
    "a friend",
    "a morning",
    "a castle",
    "a candle",
]
HELD_OUT_SUBJECTS = [
    "a lighthouse",
    "a bridge",
    "an island",
    "a summer",
    "a painting",
    "a village",
    "a teacher",
    "the stars",
]
REWARD_SOURCE = '''"""The reward of `shardtune demo objective=grpo`: three words, and an end."""


def three_words(completions, truncated):
    """1 for three words, a third less for each word too many or too few, 0 for an answer that was cut off."""
    scores = []
    for answer, was_cut in zip(completions, truncated):
        distance = abs(len(answer.split()) - 3)
        score = max(0.0, 1 - distance / 3)
        scores.append(0.0 if was_cut else score)
    return scores
'''
CHEATABLE_REWARD_SOURCE = '''"""A reward with a hole: an answer that is cut off after three words counts as three words."""


def three_words(completions):
    """1 for three words, a third less for each word too many or too few, however the answer ends."""
    distances = [abs(len(answer.split()) - 3) for answer in completions]
    return [max(0.0, 1 - distance / 3) for distance in distances]


def ended(completions, truncated):
    """1 for an answer that ends by itself. A control of weight 0: measured, not learned."""
    return [0.0 if was_cut else 1.0 for was_cut in truncated]
'''
GROUP_SIZE = 8
PROMPTS_PER_STEP = 8
STEPS = 20
MAX_ANSWER_TOKENS = 12
"""Most tokens of an answer; one that is longer is cut off."""
MAX_CHEATABLE_ANSWER_TOKENS = 5
"""The same for the reward that can be cheated. Answers must be cut off often, or the model never meets the hole."""
MIN_RISE = 0.25
"""`eval/reward` must rise by this much from the base model to the end of the run."""
NUM_SHOWN_PROMPTS = 6
"""Held-out prompts whose answers are printed at the end."""
REWARD_METRIC = "eval/reward"


@dataclass(frozen=True, slots=True)
class DemoFiles:
    """The files of the demo: prompts to train on and held out, the reward, and the reward that can be cheated."""

    train: Path
    held_out: Path
    rewards: Path
    cheatable_rewards: Path


class NothingLearned(ShardtuneError):
    """The reward on held-out prompts did not rise as it should."""

    exit_code = exit_codes.CHECK_FAILED


def main(argv: list[str]) -> int:
    """Run `shardtune demo objective=grpo`: a model learns three-word answers from a reward alone; returns the exit code.

    Other arguments in `argv` are passed on to `shardtune train`. Errors: FetchError, StorageError, NothingLearned if the reward
    did not rise enough, and what training raises.
    """
    if {"-h", "--help"} & set(argv):
        show_help(USAGE)
        return 0
    # What is trained, and by which rewards.
    started_at = time.monotonic()
    model = fetch_demo_model()
    files = write_demo_files(cache_directory() / "demo" / "three-words")
    arguments = [*training_arguments(model, files, Path("runs") / time.strftime("three-words-%Y%m%d-%H%M%S")), *argv]
    run_dir = run_dir_of(arguments)
    indented_rewards = REWARD_SOURCE.rstrip("\n").replace("\n", "\n  | ")
    print(
        f"demo: {MODEL_NAME} learns to answer in exactly three words. Nobody shows it such an answer: a reward scores those "
        f"that it writes.\n{files.rewards}:\n  | {indented_rewards}\n"
        f"budget: {STEPS} steps of {PROMPTS_PER_STEP} prompts with {GROUP_SIZE} answers each; {len(TRAINED_SUBJECTS)} "
        f"prompts to train on, {len(HELD_OUT_SUBJECTS)} held out\n"
        f"$ shardtune train {shlex.join(arguments)}\n",
        flush=True,
    )
    from launch.main import run_guarded

    exit_code = run_guarded("train", arguments)
    if exit_code:
        return exit_code
    # The mean reward of each evaluation, from the base model on.
    rewards = [metrics[REWARD_METRIC] for metrics in held_out_evaluations(run_dir, REWARD_METRIC)]
    if not rewards:  # `--dry-run` and `--cfg` only print
        return 0
    print_answers(run_dir / "export")
    print(summary_text(run_dir, time.monotonic() - started_at))
    # Only printed, for the user to run: a reward with a hole, and a control that shows how the model uses it.
    cheatable = training_arguments(model, files, Path(f"{run_dir}-cheatable"), cheatable=True)
    cheatable += [argument for argument in argv if not argument.startswith("run.dir=")]  # another run, beside this one
    print(
        "\nThe same with a reward that can be cheated: it does not look whether an answer ends, and answers are cut off after "
        f"{MAX_CHEATABLE_ANSWER_TOKENS} tokens. Watch rewards/ended/mean, a control:\n$ shardtune train {shlex.join(cheatable)}",
        flush=True,
    )
    refuse_small_rise(rewards[0], rewards[-1])
    return 0


def write_demo_files(directory: Path) -> DemoFiles:
    """Write the demo's prompts and reward functions into `directory`, where the run reads them. Errors: StorageError."""
    from trainer.reporting.status import write_text_atomic

    files = DemoFiles(
        train=directory / "train.jsonl",
        held_out=directory / "held-out.jsonl",
        rewards=directory / "rewards.py",
        cheatable_rewards=directory / "cheatable.py",
    )
    for path, subjects in ((files.train, TRAINED_SUBJECTS), (files.held_out, HELD_OUT_SUBJECTS)):
        lines = [json.dumps({"prompt": prompt_about(subject)}) + "\n" for subject in subjects]
        write_text_atomic(path, "".join(lines))
    write_text_atomic(files.rewards, REWARD_SOURCE)
    write_text_atomic(files.cheatable_rewards, CHEATABLE_REWARD_SOURCE)
    return files


def prompt_about(subject: str) -> str:
    """The prompt of a subject."""
    return f"Describe {subject} in exactly three words."


def training_arguments(model: Path, files: DemoFiles, run_dir: Path, *, cheatable: bool = False) -> list[str]:
    """The arguments after `shardtune train` for the demo, or for its variant with a reward that can be cheated.

    `cheatable`: also measures by a control whether answers end, and cuts answers off so early that the model finds the hole.
    """
    answers_per_step = PROMPTS_PER_STEP * GROUP_SIZE
    processes = num_processes()
    rewards = [f"objective.rewards={files.rewards}"]
    answer_tokens = MAX_ANSWER_TOKENS
    if cheatable:
        answer_tokens = MAX_CHEATABLE_ANSWER_TOKENS
        rewards = [
            f"objective.rewards.three_words.function={files.cheatable_rewards}:three_words",
            f"objective.rewards.ended.function={files.cheatable_rewards}:ended",
            "objective.rewards.ended.weight=0",
        ]
    return [
        f"model.path={model}",
        f"data.path={files.train}",
        f"data.eval_path={files.held_out}",
        f"data.cache_dir={cache_directory() / 'data'}",
        "objective=grpo",
        *rewards,
        f"objective.group_size={GROUP_SIZE}",
        f"objective.rollout.max_new_tokens={answer_tokens}",
        "tuning=lora",
        "strategy=fsdp2",
        "optim.lr=3e-4",
        # Twenty steps are too few for a rate that rises and falls.
        "schedule=constant",
        "schedule.warmup_share=0",
        f"batch.global={answers_per_step}",
        f"batch.micro={answers_per_step // processes}",
        f"budget.steps={STEPS}",
        "evaluation.every_steps=5",
        "logging.every_steps=1",
        f"launcher.processes={processes}",
        "export.verify=true",
        f"run.dir={run_dir}",
    ]


def print_answers(export: Path) -> None:
    """Print what the base and the tuned model answer to the first held-out prompts.

    `export`: the directory of the run's adapter. It is loaded by plain transformers and peft, which shows that it needs nothing
    of shardtune.
    """
    from trainer.export.load import load_export

    model = load_export(export)
    tokenizer = load_tokenizer(export)
    print("\nthe export through plain transformers and peft, greedy answers to held-out prompts:", flush=True)
    for subject in HELD_OUT_SUBJECTS[:NUM_SHOWN_PROMPTS]:
        prompt = prompt_about(subject)
        with model.disable_adapter():
            base_answer = greedy_answer(model, tokenizer, prompt, MAX_ANSWER_TOKENS)
        tuned_answer = greedy_answer(model, tokenizer, prompt, MAX_ANSWER_TOKENS)
        print(f"\n  {prompt}\n    base model:  {base_answer}\n    tuned model: {tuned_answer}", flush=True)


def summary_text(run_dir: Path, duration_s: float) -> str:
    """Write the last lines of the demo: rewards by step, held-out metrics before and after, what that shows, and where all is."""
    from trainer.reporting.results import read_metric_rows

    evaluations = held_out_evaluations(run_dir, REWARD_METRIC)
    # The first evaluation is that of the model before training.
    base_metrics = evaluations[0]
    tuned_metrics = evaluations[-1]
    step_rows = [row for row in read_metric_rows(run_dir) if "reward" in row]
    lines = [
        f"\ndemo finished in {duration_s / 60:.1f} minutes",
        f"mean reward of the answers that were learned from, by step: {rewards_by_step_text(step_rows)}",
        f"held-out, {len(HELD_OUT_SUBJECTS)} greedy answers     base     tuned",
    ]
    for label, metric in (
        ("reward", REWARD_METRIC),
        ("tokens of an answer", "eval/completions/mean_length"),
        ("share cut off", "eval/completions/clipped_ratio"),
    ):
        lines.append(f"  {label:<24} {base_metrics[metric]:>9.4f} {tuned_metrics[metric]:>9.4f}")
    lines += [
        "This shows that the model learned a form from a reward alone: answers of three words that end. It does not show that",
        "they describe well, for the reward does not look, and eight prompts tell only large differences.",
        f"curves      {run_dir / 'report.html'}",
        f"answers     {run_dir / 'rounds'} (a Parquet file for each step: prompts, answers, rewards, advantages)",
        f"model       {run_dir / 'export'} (a PEFT adapter; its README.md is the model card)",
    ]
    return "\n".join(lines)


def rewards_by_step_text(step_rows: list[dict[str, Any]]) -> str:
    """The reward of the first step, of every fourth, and of the last: "1: 0.06, 4: 0.41, ..."."""
    last_step = step_rows[-1]["step"]
    shown_rows = [row for row in step_rows if row["step"] in (1, last_step) or row["step"] % 4 == 0]
    return ", ".join(f"{row['step']}: {row['reward']:.2f}" for row in shown_rows)


def refuse_small_rise(base_reward: float, tuned_reward: float) -> None:
    """Raise NothingLearned if the held-out reward did not rise by `MIN_RISE`."""
    if tuned_reward - base_reward < MIN_RISE:
        raise NothingLearned(
            f"demo: {REWARD_METRIC} went from {base_reward:.4f} to {tuned_reward:.4f}; it should rise by {MIN_RISE}. With the "
            "demo's own settings this is a defect."
        )
