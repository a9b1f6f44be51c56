"""How a process leaves: several ranks before their interpreter takes itself apart, one alone in the ordinary way."""

import io
import os
import subprocess
import sys
from pathlib import Path

import absl.logging
import pytest

from launch.output import ClosableStream
from strategies.errors import Preempted
from trainer import run
from trainer.config.run import RunConfig

LEAVE = """
import atexit, sys
from launch.train import exit_process

class Aborts:  # as threads of a process group may, when their objects are taken apart
    def __del__(self, abort=__import__("os").abort):
        abort()

kept = sys.modules["kept"] = Aborts()
atexit.register(lambda: print("what was registered"))
print("said before", end="")
exit_process(int(sys.argv[1]))
"""


def leave(code, **environment):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE") and not k.startswith("SLURM_")}
    return subprocess.run(
        [sys.executable, "-c", LEAVE, str(code)],
        env={**env, **environment},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )


UNHEARD = """
import os, sys
from types import ModuleType
from launch.main import run_guarded

def main(argv):
    for number in range(3):
        for stream in (sys.stdout, sys.stderr):
            print(f"step {number} of a run", file=stream, flush=True)
    print("what is still buffered when the interpreter ends")
    with open(argv[0], "w") as saved:
        saved.write("saved")
    return 75

sys.modules["launch.train"] = ModuleType("launch.train")
sys.modules["launch.train"].main = main
sys.exit(run_guarded("train", sys.argv[1:]))
"""


@pytest.mark.parametrize("full", [False, True])
def test_run_goes_on_when_nobody_reads_its_output(tmp_path, full):
    end, theirs = (None, os.open("/dev/full", os.O_WRONLY)) if full else os.pipe()
    if end is not None:
        os.close(end)  # as when the `tee` behind a command has ended, or the terminal is closed
    words = [sys.executable, "-c", UNHEARD, str(tmp_path / "progress")]
    done = subprocess.run(words, cwd=Path(__file__).parents[3], stdout=theirs, stderr=theirs, check=False)
    os.close(theirs)
    assert (done.returncode, (tmp_path / "progress").read_text()) == (75, "saved")


def test_a_library_that_has_kept_a_stream_does_not_close_that_of_the_process():
    """absl's handler closes what is no stream of the process when the logging of another library, uvicorn's, is set up."""
    own = io.StringIO()
    handler = absl.logging.PythonHandler(ClosableStream(own))
    handler.close()
    assert not own.closed


INTERRUPTED = """
import os, signal, sys
from types import ModuleType
from launch.main import run_guarded

def main(argv):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("the signal did not come")
    except KeyboardInterrupt:  # as libraries do amid their imports
        raise ImportError("cannot import a part of it")

sys.modules["launch.plan.command"] = ModuleType("launch.plan.command")
sys.modules["launch.plan.command"].main = main
signal.signal(signal.SIGINT, signal.default_int_handler)
code = run_guarded("plan", [])
print(code, signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


def test_ctrl_c_during_an_import_that_then_fails_is_no_error_of_ours():
    """Once in thirty starts it ended with 70 and the traceback of a library."""
    words = [sys.executable, "-c", INTERRUPTED]
    done = subprocess.run(words, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("130 True\n", "shardtune plan: interrupted\n")


def test_exit_of_one_of_several_ranks_cannot_be_aborted():
    done = leave(0, RANK="0", WORLD_SIZE="2")
    assert (done.returncode, done.stdout) == (0, "said beforewhat was registered\n")
    failed = leave(70, RANK="1", WORLD_SIZE="2")
    assert (failed.returncode, failed.stdout) == (70, "said before")
    for environment in ({}, {"RANK": "0", "WORLD_SIZE": "1"}):  # alone: the ordinary end, with all that is in it
        assert leave(0, **environment).returncode < 0


@pytest.mark.parametrize(("error", "failed"), [(RuntimeError("x"), True), (Preempted("x"), False), (None, False)])
def test_exit_of_a_run_from_its_process_groups_says_whether_it_failed(error, failed, tmp_path, monkeypatch):
    told = []

    def ended(*_):
        if error is not None:
            raise error

    monkeypatch.setattr(run, "_run", ended)
    monkeypatch.setattr(run.processes, "leave_job", lambda *, failed: told.append(failed))
    if error is None:
        run.train_as_rank(RunConfig(), tmp_path, "x", print)
    else:
        with pytest.raises(type(error)):
            run.train_as_rank(RunConfig(), tmp_path, "x", print)
    assert told == [failed]
