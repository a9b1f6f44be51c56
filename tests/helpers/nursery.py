"""The process that others are forked from: `python -m tests.helpers.nursery <descriptor> <modules>`, asked by `warm.py`."""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from tests.helpers.garbage import look_seldom

IMPORTED = (
    "launch.config.compose",
    "launch.train",
    "launch.runs.freeze",
    "launch.cluster.torchrun",
    "trainer.run",
    "trainer.data.transforms.privacy.stage",
    "strategies.single",
    "transformers.models.llama.modeling_llama",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "wandb",
    "wandb.sdk.launch.inputs.internal",  # which takes each run three seconds when it begins
    "hydra",
    "ftfy",
    "pyarrow",
    "pydantic.type_adapter",
    "requests",
)
"""DeepSpeed is not among them: ranks that need it import it themselves, so that others are what they are for a user."""
WITH = {"deepspeed": ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer")}
"""A module that some need beside it, and what it imports itself when it is first used."""
WITHOUT_THREADS = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
"""Environment of a process that others are forked from: it may have no threads of OpenBLAS, OpenMP or Arrow's memory."""
FAULT = "TESTS_FAULT"
"""The variable that names a module for ranks to import before they begin: what it changes goes wrong in them."""
PASSED = 200
"""Descriptor of the first that a forked process is given beside its outputs."""
GRACE_S = 5
"""Seconds between the failure of a rank and the end of its peers, as under torchrun."""


def main(descriptor: int, *also: str) -> None:
    """In the process that forks: import, and start ranks as they are asked for, until nobody asks any more."""
    look_seldom()  # and so do those that are forked
    _import(*IMPORTED)
    importlib.import_module("trainer.tuning.compat.peft").load_peft()
    _import(*also)
    _compose()
    _measure()
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # as in the process of the tests
    with socket.socket(fileno=descriptor) as asked:
        _serve(asked)


def _import(*names: str) -> None:
    for name in names:
        importlib.import_module(name)
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "threads, which a forked process would miss"
    gc.collect()
    gc.freeze()


def _compose() -> None:
    """Compose a run, so that those that are forked know the schemas of all settings and Hydra's grammar: 0.17 s of each."""
    from launch.config.compose import compose_config

    compose_config(["model.path=gpt2", "budget.steps=1", "run.device=cpu"], check=False)
    gc.collect()
    gc.freeze()


def _measure() -> None:
    """How fast this processor multiplies, for all that are forked: a tenth of a second at the start of each rank."""
    import torch

    from trainer.reporting import reference_speed

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # others could not be forked
    found = reference_speed.measured_matmul_tflops()
    torch.set_num_threads(threads)
    reference_speed.measured_matmul_tflops = lambda: found  # type: ignore[assignment]
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "threads, which a forked process would miss"


def _serve(asked: socket.socket) -> None:
    others: dict[str, socket.socket] = {}
    while True:
        while not select.select([asked], [], [], 1.0)[0]:
            _bury()
        request, given, _, _ = socket.recv_fds(asked, 1 << 20, 16)
        if not request:
            return
        job = json.loads(request)
        if also := job.pop("also", ""):
            if also not in others:
                others[also] = _with(also, asked, *others.values())
            socket.send_fds(others[also], [json.dumps(job).encode()], given)
            if "world" in job:
                asked.send(others[also].recv(64))
        elif "world" in job:
            asked.send(str(_ranks(job, given)).encode())
        elif os.fork() == 0:
            for other in (asked, *others.values()):
                other.close()
            _beside(job, *given)
        for descriptor in given:
            os.close(descriptor)


def _with(module: str, *kept: socket.socket) -> socket.socket:
    """Asked through it: one that is forked from this process, with another module imported; what was `kept` is not its own."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        try:
            for other in (ours, *kept):
                other.close()
            os.environ.update(WITHOUT_THREADS)  # a launcher has a user's environment; its ranks get theirs with the job
            _import(*WITH.get(module, (module,)))
            _serve(theirs)
        except BaseException:  # noqa: BLE001 - whatever it is: shown as Python shows it
            traceback.print_exc()
        finally:
            os._exit(0)
    theirs.close()
    return ours


@contextlib.contextmanager
def _ranks_forked() -> Iterator[None]:
    """Have the ranks of what this process is to run forked by a child of it, which imports nothing either."""
    from tests.helpers import warm

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if (pid := os.fork()) == 0:
        try:
            os.setsid()  # a terminal's Ctrl-C is for the launcher
            ours.close()
            _serve(theirs)
        finally:
            os._exit(0)
    theirs.close()
    found = cache(lambda: warm.Nursery.of(ours, pid))
    with (
        mock.patch.object(warm, "nursery", found),
        mock.patch("launch.cluster.torchrun.run_ranks_on_this_host", warm.interrupted),
    ):
        yield


def _bury() -> None:
    """Take leave of those who waited for a process and told of its end."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _beside(job: dict[str, Any], told: int, *given: int) -> None:
    """Fork the process, tell who it is, wait for it and tell how it ended. Does not return."""
    try:
        os.setsid()  # what ends it, or its session, is not meant for this one
        if (pid := os.fork()) == 0:
            os.close(told)
            _alone(job, *given)
        for descriptor in given:
            os.close(descriptor)
        os.write(told, f"{pid}\n".encode())
        os.write(told, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
    finally:
        os._exit(0)


def _customize() -> None:
    """As Python does when it starts."""
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(":") if path and path not in sys.path]
    try:
        importlib.import_module("sitecustomize")
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise


def _alone(job: dict[str, Any], *given: int) -> None:
    """Be `python -m module ...` with these outputs and further descriptors. Does not return."""
    code = 1
    try:
        os.setsid()
        for descriptor, place in zip(given, (1, 2, *range(PASSED, PASSED + len(given))), strict=False):
            os.dup2(descriptor, place)
            os.close(descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(job["cwd"])
        os.environ.clear()
        os.environ.update(job["env"])
        sys.argv = ["", *job["words"]]
        sys.modules.pop(job["module"], None)
        _customize()
        with _ranks_forked() if job["ranks"] else contextlib.nullcontext():
            runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - whatever it is: shown as Python shows it
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            threading._shutdown()
            atexit._run_exitfuncs()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code & 0xFF)


def _ranks(job: dict[str, Any], outputs: list[int]) -> int:
    running, code, deadline = {}, 0, float("inf")
    for rank in range(job["world"]):
        if (pid := os.fork()) == 0:
            _rank(rank, job, outputs)
        running[pid] = rank
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            del running[pid]
            code = code or os.waitstatus_to_exitcode(status)
            if code and deadline == float("inf"):
                deadline = time.monotonic() + GRACE_S
        elif time.monotonic() > deadline:
            for left in running:
                os.kill(left, signal.SIGKILL)
            deadline = float("inf")
        else:
            time.sleep(0.01)
    return code


def _rank(rank: int, job: dict[str, Any], outputs: list[int]) -> None:
    from launch.main import run_guarded
    from launch.train import exit_process
    from trainer.stopping.signals import block_signals

    try:
        block_signals()
        for output, place in zip(outputs, (1, 2), strict=True):
            os.dup2(output, place)
        os.chdir(job["cwd"])
        os.environ.clear()
        os.environ.update({**job["env"], "RANK": str(rank), "LOCAL_RANK": str(rank)})
        _customize()
        if FAULT in os.environ:
            importlib.import_module(os.environ[FAULT])
        exit_process(run_guarded(job["verb"], []))
    finally:
        os._exit(70)  # `end` did not come back: never on into the loop of the process that forked this one


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
