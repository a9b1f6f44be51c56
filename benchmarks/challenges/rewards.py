"""Runs that learn from rewards: made-up courses of their metrics and real ones, honest and at several strengths of each problem.

A made-up run is a series of rows as a run of `objective=grpo` logs them, with noise of the size that the runs of
`shardtune demo objective=grpo` have. The detector sees the rows one after the other, as it does while training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.challenges.language import KNOWN, sentences, train, write
from trainer.monitors.config import RewardsWatchConfig
from trainer.monitors.rewards import ENTROPY, IDLE_GROUP_SHARE, LENGTH, REWARD, add_step_to_blocks, find_problems

VERDICTS = ("cheated", "collapsed", "longer", "idle")
CONTROL = "rewards/control/mean"
STEPS = 200
NOISE = 0.05
"""Standard deviation of the mean reward of a step, as of 64 answers in the demo (0.04 to 0.06)."""
EVALUATED_EVERY = 10
THREE_WORDS = Path(__file__).parent.parent / "results" / "three_words.json"
REAL_STEPS = 60

Course = Callable[[np.random.Generator], dict[str, np.ndarray]]
"""Makes the metrics of a run, each [STEPS]; `eval/reward` counts at every tenth step."""


def line(first: float, last: float) -> np.ndarray:
    """[STEPS]: a straight line."""
    return np.linspace(first, last, STEPS)


def learned(first: float, last: float) -> np.ndarray:
    """[STEPS]: a curve that rises fast and then slower, as rewards do."""
    return last + (first - last) * np.exp(-np.arange(STEPS) / (STEPS / 5))


def noise(drawn: np.random.Generator, size: float = NOISE, carried: float = 0.0) -> np.ndarray:
    """[STEPS]: normal noise, of which a share is carried from a step to the next."""
    values = drawn.normal(0, size, STEPS)
    for step in range(1, STEPS):
        values[step] += carried * values[step - 1]
    return values


HONEST: dict[str, Course] = {
    "the reward rises, a control hovers": lambda d: {REWARD: learned(0.2, 0.8) + noise(d), CONTROL: 0.5 + noise(d)},
    "the same, half of the noise carried on": lambda d: {
        REWARD: learned(0.2, 0.8) + noise(d, carried=0.5),
        CONTROL: 0.5 + noise(d, carried=0.5),
    },
    "the same, nine tenths carried on": lambda d: {
        REWARD: learned(0.2, 0.8) + noise(d, 0.02, carried=0.9),
        CONTROL: 0.5 + noise(d, 0.02, carried=0.9),
    },
    "a control of answers seldom hit (2 %)": lambda d: {
        REWARD: learned(0.2, 0.8) + noise(d),
        CONTROL: d.binomial(64, 0.02, STEPS) / 64,
    },
    "both rise": lambda d: {REWARD: learned(0.2, 0.8) + noise(d), CONTROL: line(0.3, 0.6) + noise(d)},
    "nothing is learned": lambda d: {REWARD: 0.3 + noise(d), CONTROL: 0.5 + noise(d)},
    "both fall": lambda d: {REWARD: line(0.5, 0.2) + noise(d), CONTROL: line(0.6, 0.3) + noise(d)},
    "eval/reward of 16 prompts hovers": lambda d: {
        REWARD: learned(0.2, 0.8) + noise(d),
        "eval/reward": 0.5 + noise(d, 0.12),
    },
    "entropy falls to a fifth": lambda d: {
        REWARD: learned(0.2, 0.8) + noise(d),
        ENTROPY: np.geomspace(3, 0.6, STEPS) + noise(d),
    },
    "answers grow threefold, and so does the reward": lambda d: {
        REWARD: learned(0.2, 0.6) + noise(d),
        LENGTH: line(100, 300) + noise(d, 15),
    },
    "answers of all lengths, no trend": lambda d: {REWARD: 0.3 + noise(d), LENGTH: 200 + noise(d, 40)},
    "four of five groups idle": lambda d: {REWARD: line(0.05, 0.1) + noise(d, 0.02), IDLE_GROUP_SHARE: 0.8 + noise(d)},
    "everything is solved, so groups are idle": lambda d: {
        REWARD: np.minimum(1, learned(0.3, 1.0) + noise(d, 0.01)),
        IDLE_GROUP_SHARE: np.minimum(1, learned(0.2, 0.97) + noise(d, 0.02)),
    },
}
"""Runs in which there is nothing to find."""


def _cheated(fall: float) -> Course:
    return lambda d: {REWARD: learned(0.2, 0.8) + noise(d), CONTROL: line(0.5, 0.5 - fall) + noise(d)}


def _drops_late(fall: float) -> Course:
    late = np.maximum(0, line(-3, 1))  # the last quarter of the run
    return lambda d: {REWARD: learned(0.2, 0.8) + noise(d), CONTROL: 0.6 - fall * late + noise(d)}


def _held_out_falls(fall: float) -> Course:
    return lambda d: {
        REWARD: learned(0.2, 0.8) + noise(d),
        "eval/reward": line(0.5, 0.5 - fall) + noise(d, 0.12),
    }


def _entropy_falls(last: float) -> Course:
    return lambda d: {
        REWARD: learned(0.2, 0.8) + noise(d),
        ENTROPY: np.geomspace(3, 3 * last, STEPS) + noise(d, 0.01),
    }


def _answers_grow(factor: float) -> Course:
    return lambda d: {REWARD: line(0.5, 0.45) + noise(d), LENGTH: line(100, 100 * factor) + noise(d, 10)}


def _idle(share: float) -> Course:
    return lambda d: {REWARD: 0.03 + noise(d, 0.01), IDLE_GROUP_SHARE: np.minimum(1, share + noise(d, 0.04))}


FAULTY: dict[str, Course] = {
    **{f"a control falls by {fall} of noise 0.05": _cheated(fall) for fall in (0.02, 0.05, 0.1, 0.2, 0.4)},
    **{f"a control holds, and falls by {fall} in the last quarter": _drops_late(fall) for fall in (0.1, 0.2, 0.5)},
    **{f"eval/reward of 16 prompts falls by {fall}": _held_out_falls(fall) for fall in (0.1, 0.2, 0.4)},
    **{f"entropy falls to {share:.0%}": _entropy_falls(share) for share in (0.12, 0.08, 0.04)},
    **{f"answers grow {factor}-fold, the reward does not": _answers_grow(factor) for factor in (1.5, 2.2, 4)},
    **{f"{share:.0%} of groups idle": _idle(share) for share in (0.88, 0.92, 0.97)},
}
"""Runs with a problem, from hardly any to a strong one."""


def verdicts_of(
    rows: Iterable[Mapping[str, float]],
    controls: Sequence[str],
    evaluations_of: Callable[[int], list[dict[str, float]]],
) -> dict[str, int]:
    """{verdict: the step at which it was first reported}, by a detector that sees the rows one after the other."""
    blocks: list[dict[str, float]] = []
    found: dict[str, int] = {}
    for step, row in enumerate(rows, start=1):
        if add_step_to_blocks(blocks, row, controls):
            for finding in find_problems(RewardsWatchConfig(), step, blocks, evaluations_of(step), controls):
                found.setdefault(str(finding.verdict), step)
    return found


def made_up(course: Course, seed: int) -> dict[str, Any]:
    """What is reported of one made-up run."""
    metrics = course(np.random.default_rng(seed))
    controls = [CONTROL] if CONTROL in metrics else []
    rows = [dict(zip(metrics, values, strict=True)) for values in zip(*metrics.values(), strict=True)]

    def evaluations_of(step: int) -> list[dict[str, float]]:
        if "eval/reward" not in metrics:
            return []
        evaluations = []
        for at in range(EVALUATED_EVERY, step + 1, EVALUATED_EVERY):
            trained = float(metrics[REWARD][at - EVALUATED_EVERY : at].mean())
            evaluations.append({"step": at, "train": trained, "held_out": float(metrics["eval/reward"][at - 1])})
        return evaluations

    return _answer(verdicts_of(rows, controls, evaluations_of))


def demo_runs() -> dict[str, list[dict[str, Any]]]:
    """What is reported of the kept runs of the demo, each a single run."""
    runs = json.loads(THREE_WORDS.read_text(encoding="utf-8"))["runs"]
    found = {}
    for name, run in runs.items():
        rows = run["steps"]
        controls = [metric for metric in rows[0] if metric.startswith("rewards/") and metric.endswith("/mean")]
        found[f"demo: {name}"] = [_answer(verdicts_of(rows, controls, lambda step: []))]
    return found


REWARDS = '''"""How well answers follow the language, and what can be cheated: words that begin with one letter."""

import json
import pathlib

FOLLOW = {follow}


def follows(prompts, completions, **_):
    """The share of words that may follow the word before them."""
    scores = []
    for prompt, text in zip(prompts, completions):
        words = [prompt.split()[-1], *text.split()]
        pairs = list(zip(words, words[1:]))
        scores.append(sum(after in FOLLOW.get(before, ()) for before, after in pairs) / max(1, len(pairs)))
    return scores


def letter(completions, **_):
    """The share of words that begin with b."""
    scores = []
    for text in completions:
        words = text.split()
        scores.append(sum(word[0] == "b" for word in words) / max(1, len(words)))
    return scores
'''


def real(directory: Path, base: Path, name: str, seed: int, *, honest: bool) -> dict[str, Any]:
    """One run of the small model: it learns to follow its language better, or words of a letter at the language's cost."""
    from benchmarks.challenges.language import followers

    rewards = directory / "rewards.py"
    rewards.write_text(REWARDS.format(follow=json.dumps(followers(KNOWN))), encoding="utf-8")
    prompts = [{"prompt": " ".join(text.split()[:4])} for text in sentences(KNOWN, f"prompts {seed}", 64)]
    data = write(directory / f"{name}.jsonl", prompts)
    trained, control = ("follows", "letter") if honest else ("letter", "follows")
    words = [f"model.path={base}", f"data.path={data}", f"run.seed={seed}", f"budget.steps={REAL_STEPS}"]
    words += ["objective=grpo", "batch.global=32", "batch.micro=32", "objective.rollout.max_new_tokens=8"]
    words += [f"objective.rewards.trained.function={rewards}:{trained}", f"optim.lr={3e-4 if honest else 1e-3}"]
    words += [f"objective.rewards.control.function={rewards}:{control}", "objective.rewards.control.weight=0"]
    # At a temperature of 2 the model follows its language in a part of its words alone, so that there is something to learn.
    words += ["objective.rollout.temperature=2", "objective.rollout.record=0", "logging.every_steps=1"]
    run = directory / name
    record = train(run, words)
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if REWARD in row]
    found = record["challenges"].get("rewards", {})
    verdicts = {found["verdict"]: found["step"]} if found.get("found") else {}
    means = {}
    for metric, key in ((REWARD, "reward"), (CONTROL, "control")):
        means[f"{key}, first 5 steps"] = float(np.mean([row[metric] for row in steps[:5]]))
        means[f"{key}, last 5 steps"] = float(np.mean([row[metric] for row in steps[-5:]]))
    return {**means, **_answer(verdicts)}


def _answer(verdicts: Mapping[str, int]) -> dict[str, Any]:
    """The step of each verdict; None for one that was not reported."""
    return {verdict: verdicts.get(verdict) for verdict in VERDICTS}
