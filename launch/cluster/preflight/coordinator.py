"""Starts a preflight on the nodes, and collects their reports until they suffice."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.cluster.containers import INSIDE
from launch.cluster.preflight.node import MARK
from launch.cluster.preflight.node_facts import VARIABLE, VISIBLE_S, PreflightRequest
from launch.cluster.preflight.verdict import Heard, PreflightVerdict, judge
from strategies.errors import StorageError
from trainer.config.sbatch_options import gpu_request, ranks_per_node
from trainer.data.read.paths import is_address, is_hub

LOOK_S = 30.0
"""Seconds within which each node must have said what it sees."""
GRACE_S, LATE_S = 3.0, 10.0
"""Seconds for what is still said when a node has ended without a word, and for what others see that are slow."""
LABELLED = re.compile(r"\s*(\d+): ?(.*)")
LINE = re.compile(rf"{MARK} (\d+) (-?\d+) (\d+)/(\d+) (.*)")
GONE = re.compile(r"srun: error: (\S+): task (\d+): ")
SHELL = 'set -e; eval "$SHARDTUNE_SETUP"; setup >&2; exec "$@"'


def asked_of(tree: dict[str, Any], nodes: int) -> PreflightRequest:
    """What the nodes are to look at for a run whose configuration, as plain values, is `tree`."""
    launcher, model, data, run = (tree[part] for part in ("launcher", "model", "data", "run"))
    processes = ranks_per_node(launcher)
    request = gpu_request(launcher)
    gpus = processes if run["device"] == "cuda" else 0
    if request is not None:
        gpus = request.count
    sources = [source.get("path") for source in (data["sources"] or {}).values()]
    paths = [
        str(path) for value in (data["path"], *sources) for path in (value if isinstance(value, list) else [value])
    ]
    mine = [path for path in paths if path != "None" and not is_hub(path) and not is_address(path)]
    needed = None if model["download"] else model["path"]
    return PreflightRequest(
        nodes=nodes,
        processes=processes,
        gpus=gpus,
        run_dir=str(Path(run["dir"]).expanduser().absolute()) if run["dir"] else None,
        model=needed,
        tokenizer=None if model["download"] else model["tokenizer"],
        revision=model["revision"],
        paths=mine,
        exchange=launcher.get("preflight", "full") == "full",
        device=str(run["device"]),
    )


@dataclass(slots=True)
class Command:
    """What is started, for one node or (`node` None, srun with labels) for all of them."""

    argv: list[str]
    env: Mapping[str, str]
    node: int | None = None


@dataclass(slots=True)
class _Gathering:
    """Lines as they come."""

    asked: PreflightRequest
    heard: Heard
    lines: queue.Queue[tuple[int | None, str] | None] = field(default_factory=queue.Queue)
    pieces: dict[tuple[int, int], list[str]] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    """Nodes whose process has ended with an error."""

    def take(self, node: int | None, line: str) -> None:
        """Sort one line out."""
        if node is None and (label := LABELLED.fullmatch(line)):
            node, line = int(label[1]), label[2]
        if (found := LINE.fullmatch(line)) is not None:
            where, rank, number, of, piece = int(found[1]), int(found[2]), int(found[3]), int(found[4]), found[5]
            self.pieces.setdefault((where, rank), []).append(piece)
            if number == of:
                self._say(where, rank, json.loads("".join(self.pieces.pop((where, rank)))))
            return
        if (ended := GONE.match(line)) is not None:
            self.gone.add(int(ended[2]))
            self.heard.hosts[int(ended[2])] = ended[1]
        if line.strip() and not line.startswith(("srun: job ", "srun: launch/", "srun: Terminating")):
            (self.heard.unplaced if node is None else self.heard.said.setdefault(node, [])).append(line.strip()[:300])

    def _say(self, node: int, rank: int, value: dict[str, Any]) -> None:
        if "look" in value:
            self.heard.looks[node] = {**value["look"], "heard_at": time.time()}
        elif "exchange" in value:
            self.heard.exchange = value["exchange"]
        else:
            self.heard.failed.append({"node": node, "rank": rank, "error": value["error"]})


def ask(
    asked: PreflightRequest, commands: list[Command], hosts: list[str], *, waits: bool = False
) -> tuple[Heard, PreflightVerdict]:
    """Start the commands, hear the nodes, and judge. `waits`: the nodes may first have to be waited for, in SLURM's queue.

    Everything that was started has ended when it returns. Errors: StorageError where the run directory cannot be written here.
    """
    asked.token = uuid.uuid4().hex[:12]
    with _shared(asked) as place:
        heard = Heard(hosts)
        gathering = _Gathering(asked, heard)
        started = [_start(command, asked, gathering.lines) for command in commands]
        try:
            heard.waited_s = _hear(gathering, started, waits)
        finally:
            _end(started)
        end = time.monotonic() + VISIBLE_S
        while place is not None:
            heard.visible = {node for node in heard.looks if (place / str(node)).exists()}
            if heard.visible == set(heard.looks) or time.monotonic() > end:
                break
            time.sleep(0.2)
        else:
            heard.visible = set(heard.looks)
    return heard, judge(asked, heard)


@contextlib.contextmanager
def _shared(asked: PreflightRequest) -> Iterator[Path | None]:
    """The place in the run directory where the asker and the nodes see each other's files; gone afterwards."""
    if asked.run_dir is None:
        yield None
        return
    place = Path(asked.run_dir).expanduser() / "preflight" / asked.token
    try:
        place.mkdir(parents=True)
        (place / "asked").write_text(asked.token, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"{place}: cannot be written ({error.strerror or error}); free space, or set run.dir"
        ) from error
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):
            place.parent.rmdir()


def _start(command: Command, asked: PreflightRequest, lines: queue.Queue[Any]) -> subprocess.Popen[str]:
    env = {**command.env, VARIABLE: asked.to_json()}
    process = subprocess.Popen(
        command.argv,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )

    def read(pipe: Any) -> None:
        for line in pipe:
            lines.put((command.node, line.rstrip("\n")))
        lines.put(None)

    for pipe in (process.stdout, process.stderr):
        threading.Thread(target=read, args=(pipe,), daemon=True).start()
    return process


def _hear(gathering: _Gathering, started: list[subprocess.Popen[str]], waits: bool) -> float:
    """Until all was said, something is wrong, or time is up; seconds since the first sign of the nodes."""
    asked, heard = gathering.asked, gathering.heard
    began: float | None = None if waits else time.monotonic()
    pipes, gone_at, looked_at = 2 * len(started), 0.0, 0.0
    while True:
        now = time.monotonic()
        waited = 0.0 if began is None else now - began
        whole = len(heard.looks) == asked.nodes
        if gathering.gone - set(heard.looks) and not gone_at:
            gone_at = now
        if pipes == 0 or (not whole and waited > LOOK_S):
            return waited
        left = set(range(asked.nodes)) - set(heard.looks) - gathering.gone
        if gone_at and now - gone_at > (LATE_S if left else GRACE_S):
            heard.cut_off = left
            return waited
        if whole:
            looked_at = looked_at or now
            if judge(asked, heard, whole=False).problems or not asked.exchange or asked.nodes * asked.processes == 1:
                return waited
            if heard.exchange or (heard.failed and now - looked_at > GRACE_S) or now - looked_at > 2 * asked.timeout_s:
                return waited
        try:
            line = gathering.lines.get(timeout=0.2)
        except queue.Empty:
            continue
        if line is None:
            pipes -= 1
            continue
        gathering.take(*line)
        began = began or (time.monotonic() if heard.looks or heard.said else None)


def _end(started: list[subprocess.Popen[str]]) -> None:
    for process in started:
        if process.poll() is None:
            process.terminate()
    for process in started:
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def by_srun(
    nodes: int,
    python: str,
    options: list[str],
    env: Mapping[str, str] | None = None,
    *,
    before: Sequence[str] = (),
) -> list[Command]:
    """All nodes through one srun, with `options` of its own; `SHARDTUNE_SETUP` in the environment is the set-up of a node.

    `before` stands before the command: what puts it into a container.
    """
    argv = [
        "srun",
        "--label",
        f"--export=ALL,{INSIDE}=1",
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        *options,
    ]
    argv += ["--cpu-bind=none", "--kill-on-bad-exit=0", "--wait=0"]
    argv += [*before, "bash", "-c", SHELL, "setup", python, "-m", "launch.cluster.preflight.node", "node"]
    return [Command(argv, env if env is not None else os.environ)]


def here(env: Mapping[str, str] | None = None) -> list[Command]:
    """This host as the only node."""
    root = str(Path(__file__).resolve().parents[3])
    own = {**(os.environ if env is None else env), "PYTHONPATH": root, "PYTHONSAFEPATH": "1", "SHARDTUNE_NODE": "0"}
    return [Command([sys.executable, "-m", "launch.cluster.preflight.node", "node"], own, 0)]
