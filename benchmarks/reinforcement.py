"""Benchmark of learning from rewards: shardtune's `objective=grpo` beside TRL's `GRPOTrainer`, in answers per CPU second.

    python benchmarks/reinforcement.py [--seeds 0,1,2] [--tasks words,story] [--steps 20] [--turn 1] [--again]

Both train SmolLM2-135M-Instruct with LoRA in float32 on one thread, with the same prompts, the same file of rewards and the
same batch. For each task and seed both are started, and take turns of `--turn` steps; the order is reversed each time. A pair
of runs that was measured is kept, so that an interrupted benchmark goes on where it was. Makes
`benchmarks/results/reinforcement.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import select
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from environments import WORK, hardware, install, python_of  # noqa: E402

RESULTS = HERE / "results" / "reinforcement.json"
OURS = "shardtune"
PEER = "TRL"
SCRIPTS = {OURS: ("reinforce_shardtune.py", None), PEER: ("reinforce_trl.py", "trl")}
"""The script of each trainer, and its environment; None: this one."""
PROMPTS = 8
GROUP = 8
"""Prompts of a step, and answers to each (the default of `peers/rounds.py`)."""
LAST_STEPS = 5
"""The reward that a run has reached is the mean over its last steps: that of one step is noisy."""
REWARDS = '''"""Rewards in TRL's convention, which both trainers call as they are."""

END = {end}


def three_words(completions, completion_ids, **kwargs):
    """1 for three words, a third less for each word too many or too few, 0 for an answer that was cut off."""
    scores = []
    for messages, ids in zip(completions, completion_ids):
        distance = abs(len(messages[0]["content"].split()) - 3)
        scores.append(max(0.0, 1 - distance / 3) if END in ids else 0.0)
    return scores


def different_words(completions, **kwargs):
    """The share of an answer's words that are different from all words before."""
    scores = []
    for messages in completions:
        words = messages[0]["content"].lower().split()
        scores.append(len(set(words)) / max(1, len(words)))
    return scores
'''


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked, how long an answer may get, and the reward."""

    name: str
    prompt: str
    reward: str
    new: int
    """Longest answer in tokens."""
    micro: int
    """Answers in a forward pass while learning."""
    steps: int
    """Steps of a run; the first one is not measured."""
    goal: float
    """shardtune should write, score and learn at least this many times as many answers per CPU second as the peer."""


TASKS = (
    Task("words", "Describe {} in exactly three words.", "three_words", new=12, micro=32, steps=20, goal=2.5),
    Task("story", "Write a long story about {}.", "different_words", new=128, micro=8, steps=4, goal=1.2),
)


@dataclass(slots=True)
class Measured:
    """What one run reported."""

    cpu_s: list[float] = field(default_factory=list)
    """CPU seconds of each step. That of the first one holds the start of the process."""
    peak_mb: float = 0.0
    rewards: list[float] = field(default_factory=list)
    """Mean reward of each step's answers."""
    lengths: list[float] = field(default_factory=list)
    """Mean tokens of each step's answers."""
    version: str = ""
    loads: list[float] = field(default_factory=list)
    """Load average of the machine at the end of each step."""


class Failed(RuntimeError):
    """A trainer ended early, or was silent for too long; the message is the end of what it printed."""


class Run:
    """A trainer in a process of its own, which waits after each turn until it is told to go on."""

    def __init__(self, name: str, task: Task, seed: int, args: argparse.Namespace, model: Path) -> None:
        self.measured = Measured()
        self.steps = args.steps or task.steps
        self.turn = args.turn
        self.patience_s = args.patience
        self.out = WORK / "reinforcement" / f"{task.name}-{seed}-{name.lower()}"
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        self.log = self.out / "log.txt"
        go_read, self.go = os.pipe()
        self.reports, report_write = os.pipe()
        script, environment_name = SCRIPTS[name]
        command = [python_of(environment_name), str(HERE / "peers" / script), f"--model={model}", f"--out={self.out}"]
        command += [f"--inputs={inputs_of(task)}", f"--reward={task.reward}", f"--new={task.new}", f"--seed={seed}"]
        command += [f"--steps={self.steps}", f"--turn={self.turn}", f"--micro={task.micro}", f"--prompts={PROMPTS}"]
        one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "RAYON", "ARROW")}
        environment = {**os.environ, **one_thread, "BENCH_PIPES": f"{go_read},{report_write}"}
        environment.pop("PYTHONPATH", None)
        if environment_name is None:
            environment["PYTHONPATH"] = str(HERE.parent)
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.out,
                pass_fds=(go_read, report_write),
            )
        os.close(go_read)
        os.close(report_write)
        self._unread = b""

    def take_turn(self) -> None:
        """Let it take its next steps, and read what they cost. Raises Failed."""
        if self.measured.cpu_s:
            os.write(self.go, b"g")
        for _ in range(min(self.turn, self.steps - len(self.measured.cpu_s))):
            report = self._next_report()
            self.measured.cpu_s.append(report["cpu_s"])
            self.measured.peak_mb = report["peak_mb"]
            self.measured.loads.append(os.getloadavg()[0])
        if len(self.measured.cpu_s) == self.steps:
            report = self._next_report()
            self.measured.rewards = report["rewards"]
            self.measured.lengths = report["lengths"]
            self.measured.version = report["version"]

    def _next_report(self) -> dict[str, Any]:
        until = time.monotonic() + self.patience_s
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self.reports], [], [], max(0.0, until - time.monotonic()))
            received = os.read(self.reports, 65536) if ready else b""
            if not received:
                lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
                last_lines = " ".join(line.strip() for line in lines[-8:])
                silence = "" if ready else f"was silent for {self.patience_s:.0f} s; "
                raise Failed(f"{silence}{last_lines[-600:]} (see {self.log})")
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def end(self) -> None:
        """End the process, however far it is."""
        # Closed, the gate ends a trainer that waits there.
        os.close(self.go)
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.reports)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="a pair of runs for each")
    parser.add_argument("--tasks", default=",".join(task.name for task in TASKS))
    parser.add_argument("--steps", type=int, help="steps of a run; default: 20 of words, 4 of story")
    parser.add_argument("--turn", type=int, default=1, help="steps of a trainer until it is the other's turn")
    parser.add_argument("--patience", type=float, default=3600, help="longest silence of a trainer in seconds")
    parser.add_argument("--again", action="store_true", help="measure pairs anew that were measured")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def inputs_of(task: Task) -> Path:
    """The directory of a task's prompts and rewards."""
    return WORK / "reinforcement" / f"inputs-{task.name}"


def write_inputs(task: Task, model: Path) -> None:
    """Write the prompts, as messages, and the rewards. The subjects are those of `shardtune demo objective=grpo`."""
    from launch.demo.results import load_tokenizer
    from launch.demo.three_words import TRAINED_SUBJECTS

    directory = inputs_of(task)
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for subject in TRAINED_SUBJECTS:
        messages = [{"role": "user", "content": task.prompt.format(subject)}]
        lines.append(json.dumps({"prompt": messages}) + "\n")
    (directory / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    rewards = REWARDS.format(end=load_tokenizer(model).eos_token_id)
    (directory / "rewards.py").write_text(rewards, encoding="utf-8")


def run_pair(task: Task, seed: int, args: argparse.Namespace, model: Path) -> dict[str, Measured]:
    """Both trainers with one seed, in turns. Raises Failed."""
    runs: dict[str, Run] = {}
    try:
        # One after the other, so that neither starts while the other is measured.
        names = [OURS, PEER] if seed % 2 == 0 else [PEER, OURS]
        for name in names:
            runs[name] = Run(name, task, seed, args, model)
            runs[name].take_turn()
        for turn in range(1, math.ceil((args.steps or task.steps) / args.turn)):
            order = names if turn % 2 == 0 else names[::-1]
            for name in order:
                runs[name].take_turn()
                rate = answers_per_cpu_s(runs[name].measured)
                print(f"  {task.name}, seed {seed}, step {turn + 1}, {name}: {rate:.2f} answers/CPU-s", flush=True)
    finally:
        for run in runs.values():
            run.end()
    return {name: run.measured for name, run in runs.items()}


def kept_pair(task: Task, seed: int, args: argparse.Namespace, model: Path) -> dict[str, Measured]:
    """Both trainers with one seed: as they were measured before with these settings, or now. Raises Failed."""
    name = f"{task.name}-{seed}-{args.steps or task.steps}-{PROMPTS}-{task.micro}-{args.turn}.json"
    path = WORK / "reinforcement" / "pairs" / name
    if path.exists() and not args.again:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {trainer: Measured(**measured) for trainer, measured in kept.items()}
    pair = run_pair(task, seed, args, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({trainer: asdict(measured) for trainer, measured in pair.items()}), encoding="utf-8")
    return pair


def answers_per_cpu_s(measured: Measured) -> float:
    """The rate of the steps after the first, which holds the start of the process."""
    return PROMPTS * GROUP / median(measured.cpu_s[1:])


def summary(task: Task, pairs: list[dict[str, Measured]]) -> dict[str, Any]:
    """What a task's pairs say, a pair for each seed: rates, their ratio, and the rewards at the end."""
    rates = {name: [answers_per_cpu_s(pair[name]) for pair in pairs] for name in SCRIPTS}
    ratios = [ours / peer for ours, peer in zip(rates[OURS], rates[PEER], strict=True)]
    ends = {name: [mean(pair[name].rewards[-LAST_STEPS:]) for pair in pairs] for name in SCRIPTS}
    first_rewards = {name: mean(pair[name].rewards[0] for pair in pairs) for name in SCRIPTS}
    difference = mean(ends[OURS]) - mean(ends[PEER])
    standard_error = None
    learns_as_much = None
    if len(pairs) > 1:
        variances = [stdev(rewards) ** 2 / len(rewards) for rewards in ends.values()]
        standard_error = math.sqrt(sum(variances))
        learns_as_much = difference >= -2 * standard_error
    return {
        "task": task.name,
        "steps": len(pairs[0][OURS].cpu_s),
        "micro": task.micro,
        "rates": rates,
        "ratio": median(ratios),
        "ratios": ratios,
        "goal": task.goal,
        "first_reward": first_rewards,
        "last_rewards": ends,
        "reward_difference": difference,
        "standard_error": standard_error,
        "learns_as_much": learns_as_much,
        "tokens_of_an_answer": {name: mean(mean(pair[name].lengths) for pair in pairs) for name in SCRIPTS},
        "peak_mb": {name: max(pair[name].peak_mb for pair in pairs) for name in SCRIPTS},
    }


def page(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Learning from rewards: results",
        "",
        f"Command: `{result['command']}` ({result['minutes']:.0f} minutes)",
        "",
        "Setup ([how it is measured](../README.md#learning-from-rewards)):",
        "",
        f"- **Machine:** {result['hardware']}; load average {result['load'][0]:.1f} to {result['load'][1]:.1f}. One thread.",
        f"- **Versions:** {'; '.join(result['versions'])}.",
        "- **Training:** SmolLM2-135M-Instruct, LoRA of rank 16 on all linear layers, float32. "
        f"{PROMPTS} prompts with {GROUP} answers each per step, seeds {result['seeds']}. The trainers take turns of "
        f"{result['turn']} step(s).",
        "- **Speed:** medians over the steps after the first. A step generates answers, scores them and trains on them. Its CPU "
        "seconds include the processes that compute rewards.",
        "",
        "| task | steps | answers per pass | trainer | tokens per answer | answers/CPU-s, by seed | peak MB | "
        f"reward of the first step | of the last {LAST_STEPS}, by seed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        for name in SCRIPTS:
            rates = ", ".join(f"{rate:.2f}" for rate in row["rates"][name])
            rewards = ", ".join(f"{reward:.3f}" for reward in row["last_rewards"][name])
            lines.append(
                f"| {row['task']} | {row['steps']} | {row['micro']} | {name} | {row['tokens_of_an_answer'][name]:.1f} | "
                f"{rates} | {row['peak_mb'][name]:,.0f} | {row['first_reward'][name]:.3f} | {rewards} |"
            )
    lines.append("")
    for row in result["rows"]:
        line = f"- {row['task']}: shardtune is {row['ratio']:.2f} times as fast (goal {row['goal']})"
        if row["standard_error"] is not None:
            verdict = "not below" if row["learns_as_much"] else "below"
            line += (
                f"; difference of the final reward {row['reward_difference']:+.3f} (standard error "
                f"{row['standard_error']:.3f}): {verdict} TRL's reward minus two standard errors"
            )
        lines.append(line + ".")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the pairs and write the results; 1 if a trainer failed."""
    from launch.demo.embedded import fetch_demo_model

    args = arguments()
    started_at = time.monotonic()
    WORK.mkdir(exist_ok=True)
    trouble = install("trl")
    if trouble is not None:
        print(f"trl: {trouble}", file=sys.stderr)
        return 1
    model = fetch_demo_model()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    measured: dict[str, list[dict[str, Measured]]] = {}
    tasks = [task for task in TASKS if task.name in args.tasks.split(",")]
    for task in tasks:
        write_inputs(task, model)
        try:
            measured[task.name] = [kept_pair(task, seed, args, model) for seed in seeds]
        except Failed as failed:
            print(f"{task.name}: {failed}", file=sys.stderr)
            return 1
    runs = [one for pairs in measured.values() for pair in pairs for one in pair.values()]
    loads = [load for one in runs for load in one.loads]
    result = {
        "command": " ".join(["python benchmarks/reinforcement.py", *sys.argv[1:]]),
        "hardware": hardware(),
        "versions": sorted({one.version for one in runs}),
        "minutes": (time.monotonic() - started_at) / 60,
        "load": [min(loads), max(loads)],
        "seeds": args.seeds,
        "turn": args.turn,
        "rows": [summary(task, measured[task.name]) for task in tasks],
        "measured": {
            name: [{k: asdict(v) for k, v in pair.items()} for pair in pairs] for name, pairs in measured.items()
        },
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(page(result), encoding="utf-8")
    print(page(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
