"""Runs that are killed with -9 at random moments, again and again, until they are done: `python -m tests.faults.kills`.

A calm run says what comes out. Then runs of the same words are started, killed (amid a step, a save beside training, or the
export; all ranks, or one) and started again, until as many kills as asked for are done. Each start is looked at from outside:
what the run said it had saved is there, all that has a checkpoint's name has the bytes that its manifest says, and the run
goes on from the newest. A run that came to its end has the rows and the exported bytes of the calm one, bit for bit.
`export-verb` in place of a strategy kills `shardtune export` of one run (`export_kills.py`).
Ranks are forked from a process that has imported (`tests/helpers/nursery.py`), each in a session of its own.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from launch.config.compose import compose_config
from launch.runs.freeze import write_run_config
from tests.faults.runs import Runs, environment
from tests.helpers.launching import ROOT, free_port
from tests.helpers.speed import seconds
from tests.helpers.tokenizers import write_jsonl
from tests.helpers.warm import Forked, Nursery

SHARED = "-shared-rows"
"""End of the name of a strategy whose two ranks share each row of documents."""
ROUNDS = "-rounds"
"""End of the name of a strategy whose runs write what they learn from, in rounds of two steps."""
RANKS = {"single": 1, "fsdp2": 2, "zero2": 2, "zero3": 2, f"fsdp2{SHARED}": 2, f"fsdp2{ROUNDS}": 2}
"""Strategies, and the number of ranks of each."""
STEPS = 12
MOMENTS = {"any": 5, "saving": 3, "export": 2}
"""When is killed, and how often that is drawn: any moment from the start on, a checkpoint or the export being written."""
ROUND_MOMENTS = {"any": 3, "saving": 2, "export": 1, "writing": 5, "scoring": 5, "between": 4}
"""The same for runs of rounds: also while answers are written or scored, and between the two steps of a round."""
ALL_MOMENTS = (*MOMENTS, *(moment for moment in ROUND_MOMENTS if moment not in MOMENTS))
MEASURED = ("step", "loss", "grad_norm", "lr", "tokens", "eval/loss", "eval/accuracy", "reward", "eval/reward")
LIMIT_S, PEER_S = 120, 25
"""Seconds that a run may take on the machine that `tests/helpers/speed.py` measures by; that a rank waits for its peer."""


@dataclass(slots=True)
class Tally:
    """What was done to the runs of one strategy, and what is wrong with them."""

    strategy: str
    moments: Counter = field(default_factory=Counter)
    """Kills by when; `one rank` counts those of them that spared a peer."""
    resumed: int = 0
    """Starts that said from which checkpoint they go on."""
    kept: int = 0
    """Files of exports that a start kept from one that was killed."""
    finished: int = 0
    """Runs that came to their end and were compared."""
    torn: list[str] = field(default_factory=list)
    """Checkpoints that do not have their bytes, and starts that chose one, or another than the newest."""
    lost: list[str] = field(default_factory=list)
    """Checkpoints that were said to be saved and are not there."""
    changed: list[str] = field(default_factory=list)
    """Finished runs with other rows or exports than the calm one."""
    failed: list[str] = field(default_factory=list)
    """Starts that ended by themselves, with an error; ranks that never noticed that their peer was gone."""

    @property
    def kills(self) -> int:
        return sum(self.moments[moment] for moment in ALL_MOMENTS)

    @property
    def wrong(self) -> list[str]:
        return [f"{self.strategy}: {text}" for text in (*self.torn, *self.lost, *self.changed, *self.failed)]


class Campaign:
    """Kills of one strategy's runs."""

    def __init__(self, runs: Runs, strategy: str, chance: random.Random, nursery: Nursery) -> None:
        self.runs, self.strategy, self.chance, self.nursery = runs, strategy, chance, nursery
        self.tally, self.run, self._said = Tally(strategy), Path(), 0
        self.calm = self._begin("calm")
        began = time.monotonic()
        for rank in (ranks := self._start()):
            self._end(rank, ranks)
        assert self._state() == "done", self._told()
        self.takes_s = time.monotonic() - began
        self.expected = self._result()

    def kill(self, number: int, progress: Callable[[str], None] = lambda text: None) -> Tally:
        """Kill `number` times, and let the last run come to its end."""
        while self.tally.kills < number:
            self._begin(f"killed-{self.tally.finished + 1}")
            before = Counter(self.tally.moments)
            while self.tally.kills < number and self._life(self._moment()):
                pass
            if self._state() != "done":
                self._life(None)
            self._compare()
            done = self.tally.moments - before
            wrong = f"; {len(self.tally.wrong)} WRONG" if self.tally.wrong else ""
            progress(f"{self.strategy}: {self.tally.kills} of {number} kills; {self.run.name}: {dict(done)}{wrong}")
            if not self.tally.wrong:
                shutil.rmtree(self.run)
        return self.tally

    # -- a run and its starts --------------------------------------------------------------------------------------------

    def _begin(self, name: str) -> Path:
        self.run, self._said = self.runs.root / f"{self.strategy}-{name}", 0
        kind = [
            *("model.dropout=0.1", "batch.global=4"),
            *(f"data.eval_path={self.runs.root / 'eval.jsonl'}", "evaluation.every_steps=5"),
        ]
        if self.strategy.endswith(SHARED):
            kind += ["launcher.processes=2", "parallel.sequence=2"]
        if self.strategy.endswith(ROUNDS):
            kind = rounds_words(self.runs.root)
        words = self.runs.words(
            self.run.name,
            f"strategy={self.strategy.removesuffix(SHARED).removesuffix(ROUNDS)}",
            *("tuning=full", f"budget.steps={STEPS}", f"run.timeout_s={PEER_S}", *kind),
            *("checkpoint.every_steps=1", "checkpoint.background=true", "export.at_end=true"),
            "export.max_shard_gib=0.00003",  # several files, so that some are complete when the kill comes
        )
        write_run_config(compose_config(words[4:]), self.run)
        return self.run

    def _start(self) -> list[Forked]:
        """The ranks as a launcher starts them, but in sessions of their own; what they say is appended to `said.<rank>`."""
        world = RANKS[self.strategy]
        job = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "localhost"}
        job |= {"SHARDTUNE_CONFIG": self.run / "config.yaml", "SHARDTUNE_RUN_DIR": self.run}
        job["MASTER_PORT"] = free_port()
        ranks = []
        for rank in range(world):
            env = environment(**{key: str(value) for key, value in {**job, "RANK": rank, "LOCAL_RANK": rank}.items()})
            asked = {"module": "launch.train", "words": [], "env": env, "cwd": str(ROOT), "ranks": False}
            with (self.run / f"said.{rank}").open("a") as said:
                ranks.append(self.nursery.process(asked, [said.fileno()] * 2))
        self.runs.started.extend(ranks)
        return ranks

    def _life(self, moment: str | None) -> bool:
        """Start the run and kill it; False where it came to its end before, or was not to be killed."""
        newest, began = self._look(), time.monotonic()
        ranks = self._start()
        killed = moment is not None and self._wait(moment, ranks)
        if killed:
            one = len(ranks) > 1 and self.chance.random() < 0.15
            victims = [self.chance.choice(ranks)] if one else ranks
            for victim in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(victim.pid, signal.SIGKILL)
            self.tally.moments.update([moment, *(["one rank"] if one else [])])
        for rank in ranks:
            self._end(rank, ranks)
        self._look_back(newest)
        if not killed:  # the first one was slow
            self.takes_s = min(self.takes_s, time.monotonic() - began)
        if not killed and self._state() != "done":
            self.tally.failed.append(
                f"{self.run.name} ended with {[rank.returncode for rank in ranks]}: {self._told()}"
            )
        return killed

    def _moment(self) -> str:
        moments = ROUND_MOMENTS if self.strategy.endswith(ROUNDS) else MOMENTS
        return self.chance.choices(list(moments), list(moments.values()))[0]

    def _wait(self, moment: str, ranks: list[Forked]) -> bool:
        """Wait for the moment; False where the run was over before it came."""
        # What is there of earlier starts counts for nothing.
        met = before = self._signs(moment) if moment in ROUND_MOMENTS and moment not in MOMENTS else frozenset()
        skip = 0 if moment == "export" else self.chance.randrange(4)
        until = time.monotonic() + (self.chance.random() * 0.9 * self.takes_s if moment == "any" else seconds(LIMIT_S))
        while time.monotonic() < until:
            if any(rank.poll() is not None for rank in ranks):
                return False
            if moment != "any":
                met |= self._signs(moment)
                if len(met - before) > skip:
                    time.sleep(self.chance.random() * 0.15)
                    break
            time.sleep(0.01)
        return all(rank.poll() is None for rank in ranks)

    def _signs(self, moment: str) -> frozenset[str]:
        """What shows from outside that a moment has begun, as often as it has: a name for each time."""
        if moment == "scoring":
            marker = self.runs.root / SCORING_MARKER
            return frozenset([str(marker.stat().st_mtime_ns)] if marker.exists() else [])
        if moment in ("writing", "between"):
            # A row is there when its step is over. After an odd one the run is between the two steps of a round.
            rows = self.run / "metrics.jsonl"
            steps = re.findall(r'"step": (\d+)', rows.read_text(errors="replace")) if rows.exists() else []
            return frozenset(step for step in steps if int(step) % 2 == (moment == "between"))
        pattern = {"saving": "checkpoints/.step-*.writing", "export": ".export.writing"}[moment]
        return frozenset(path.name for path in self.run.glob(pattern))

    def _end(self, rank: Forked, ranks: list[Forked]) -> None:
        try:
            rank.wait(seconds(LIMIT_S))
        except subprocess.TimeoutExpired:
            self.tally.failed.append(f"{self.run.name}: rank {ranks.index(rank)} did not end: {self._told()}")
            os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()

    # -- what is looked at from outside ------------------------------------------------------------------------------------

    def _look(self) -> int | None:
        """The newest checkpoint's step, before a start; all that have the name of one must be whole, and what was said there."""
        steps = sorted(self.run.glob("checkpoints/step-*"))
        self.tally.torn += [f"{path} does not have its bytes" for path in steps if not whole(path)]
        newest = int(steps[-1].name[5:]) if steps else None
        told = re.findall(r"^checkpoint step-(\d+)", self._told(), re.MULTILINE)
        if told and (newest is None or newest < int(told[-1])):
            self.tally.lost.append(f"{self.run.name}: step {int(told[-1])} was saved, the newest is {newest}")
        return newest

    def _look_back(self, newest: int | None) -> None:
        """What the start that is over went on from."""
        said = self._told()[self._said :]
        self._said += len(said)
        found = re.search(r"resumed from step-(\d+)", said)
        self.tally.resumed += found is not None
        # A checkpoint that was written whole, and not yet published when the kill came, is published by the start.
        for recovered in re.findall(r"^checkpoint step-(\d+): all of it was written", said, re.MULTILINE):
            newest = max(int(recovered), newest or 0)
        begun = re.search(r"^step (\d+)/", said, re.MULTILINE)
        if (found and int(found[1]) != newest) or (begun and not found and newest is not None):
            self.tally.torn.append(f"{self.run.name}: step {newest} was there; {found[0] if found else 'begun anew'}")

    def _told(self) -> str:
        path = self.run / "said.0"
        return path.read_text(errors="replace") if path.exists() else ""

    def _state(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.run / "status.json").read_text())["state"]
        return "none"

    def _result(self) -> tuple[list[tuple], dict[str, str]]:
        """Rows, and the hash of each exported file of weights."""
        rows = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        weights = sorted((self.run / "export").glob("*.safetensors"))
        assert weights, self.run
        return [tuple(row.get(key) for key in MEASURED) for row in rows], {path.name: digest(path) for path in weights}

    def _compare(self) -> None:
        if self._state() != "done":
            return  # told as a failure
        self.tally.finished += 1
        for said in self.run.glob("said.*"):
            self.tally.kept += said.read_text(errors="replace").count("is kept from an earlier start")
        (rows, weights), (all_rows, all_weights) = self._result(), self.expected
        if rows != all_rows:
            first = next((a for a, b in zip(rows, all_rows, strict=False) if a != b), f"{len(rows)} rows")
            self.tally.changed.append(f"{self.run.name}: its rows differ from {first} on")
        if weights != all_weights:
            self.tally.changed.append(f"{self.run.name}: the export differs")


SCORING_MARKER = "scoring"
"""File beside the rewards of runs of rounds that each call of a reward touches, before it waits a moment."""
REWARDS = """
import pathlib, time

def even(completion_ids, completions, **_):
    pathlib.Path({marker!r}).touch()
    time.sleep(0.05)
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]
"""


def rounds_words(root: Path) -> list[str]:
    """Words of a run that writes what it learns from: two prompts with four answers each a step, rounds of two steps."""
    prompts, rewards = root / "prompts.jsonl", root / "rewards.py"
    if not rewards.exists():
        write_jsonl(prompts, [{"prompt": f"question {number}", "answer": str(number)} for number in range(24)])
        rewards.write_text(REWARDS.format(marker=str(root / SCORING_MARKER)))
    return [
        *("objective=grpo", "objective.group_size=4", f"objective.rewards={rewards}", "batch.global=8"),
        *("objective.rollout.max_new_tokens=6", "objective.rollout.steps=2"),
        *(f"data.path={prompts}", "data.eval_share=0.1", "evaluation.every_steps=5"),
    ]


def whole(checkpoint: Path) -> bool:
    """Whether a directory has the files that its manifest names, and their bytes; by this file's own reading."""
    try:
        files = json.loads((checkpoint / "manifest.json").read_text())["files"]
        there = {path.name for path in checkpoint.iterdir()} - {"manifest.json"}
        return there == set(files) and all(digest(checkpoint / name) == files[name]["sha256"] for name in files)
    except (OSError, ValueError, KeyError):
        return False


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    from tests.faults.export_kills import EXPORT, ExportCampaign

    parser = argparse.ArgumentParser(prog="python -m tests.faults.kills", description="Kill runs at random moments.")
    parser.add_argument("--kills", type=int, default=200, help="of all strategies together (200)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of what is drawn")
    parser.add_argument(
        "--strategies", nargs="+", choices=[*RANKS, EXPORT], default=[*RANKS, EXPORT], help="whose runs (all)"
    )
    asked = parser.parse_args()
    print(f"{asked.kills} kills of {', '.join(asked.strategies)}; --seed {asked.seed}", flush=True)
    share = -(-asked.kills // len(asked.strategies))
    root = Path(tempfile.mkdtemp(prefix="kills-"))
    runs, nursery, tallies = Runs(root), Nursery("deepspeed"), []
    try:
        for strategy in asked.strategies:
            chance = random.Random(f"{asked.seed} {strategy}")
            campaign: Campaign | ExportCampaign
            if strategy == EXPORT:
                campaign = ExportCampaign(runs, chance, nursery)
            else:
                campaign = Campaign(runs, strategy, chance, nursery)
            tallies.append(campaign.tally)
            campaign.kill(share, lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        print("broken off")
    finally:
        runs.close()
        nursery.close()
    return summary(tallies, root)


def summary(tallies: list[Tally], root: Path) -> int:
    """Print what was done and what is wrong; the exit code."""
    columns = (
        "strategy",
        "kills",
        *ALL_MOMENTS,
        "one rank",
        "resumed",
        "kept",
        "runs",
        "torn",
        "lost",
        "changed",
        "failed",
    )
    print("\n" + "".join(f"{name:>10}" for name in columns))
    for tally in tallies:
        counts = [
            tally.kills,
            *(tally.moments[name] for name in (*ALL_MOMENTS, "one rank")),
            tally.resumed,
            tally.kept,
            tally.finished,
        ]
        counts += [len(each) for each in (tally.torn, tally.lost, tally.changed, tally.failed)]
        print("".join(f"{value:>10}" for value in (tally.strategy, *counts)))
    wrong = [text for tally in tallies for text in tally.wrong]
    if wrong:
        print(*wrong, f"what is left of it: {root}", sep="\n")
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
