"""What holds for every test: repeatable examples, limits scaled to the machine, configurations composed once.

The summary says which part of the matrices was run, by which seed, and how slow the machine was taken to be.
With `-n auto` several workers share the tests: `tests/helpers/parallel.py`.
"""

import functools
import gc
import hashlib
import os
import pickle
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers import covering, garbage, speed, uncompiled
from trainer.stopping.signals import unblock_signals

settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    max_examples=covering.examples(100),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")

LIMIT_S = 300
"""Seconds that one test may take, its fixtures included, on the machine that `tests/helpers/speed.py` measures by."""


_SLOWNESS: list[float] = []
"""What each worker has measured."""
_LEFT_OUT: dict[str, int] = covering.LEFT_OUT
"""Cases that are not run, by file; each worker collects all files, so that any of them knows all."""


def pytest_addoption(parser):
    parser.addoption(
        "--cpu", action="store_true", help="print the CPU seconds of each file, and of the costliest tests"
    )


def pytest_configure(config):
    garbage.look_seldom()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell's background job, which all it starts inherits
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--cpu"):
        from tests.helpers import cpu

        config.pluginmanager.register(cpu.Spent())


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported stays: nothing of it is looked at for garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        garbage.set_aside()
        gc.enable()


def pytest_collection_modifyitems(config, items):
    """A limit for each test that has none of its own: pytest-timeout's option is a constant, and machines differ."""
    if hasattr(config, "workerinput"):
        from tests.helpers import parallel

        items.sort(key=lambda item: parallel.place_of(item.nodeid))
    for item in items:
        marked = item.get_closest_marker("timeout")
        limit = marked.args[0] if marked else LIMIT_S
        item.add_marker(pytest.mark.timeout(speed.seconds(limit)), append=False)


def pytest_runtest_setup():
    """What a test starts takes signals as from a user's shell: a verb called in this process before has held them."""
    unblock_signals()


def pytest_terminal_summary(terminalreporter):
    """Say what was chosen, so that a failure can be repeated and a choice be changed."""
    runs = "the whole matrices" if covering.EVERYTHING else f"a covering choice of each matrix, seed {covering.SEED}"
    terminalreporter.write_line(
        f"ran {runs} (SHARDTUNE_TEST_ALL, SHARDTUNE_TEST_SEED); "
        f"limits for a machine {max(_SLOWNESS, default=0.0) or speed.slowness():.1f} times as slow"
    )
    lines = covering.left_out_of_changed_files(_LEFT_OUT, covering.changed_files()) if _LEFT_OUT else []
    for line in lines:
        terminalreporter.write_line(f"{line}; SHARDTUNE_TEST_ALL=1 runs them")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """How many workers `-n auto` is: xdist counts cores without threads of their own, which are one on many rented machines."""
    from tests.helpers import parallel

    return int(os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS") or parallel.num_workers())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from tests.helpers import parallel

    return parallel.Rooms(config, log)


def pytest_sessionfinish(session):
    """In a worker: tell how slow the machine was taken to be, and which cases were left out."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["slowness"] = speed.slowness()
        session.config.workeroutput["left_out"] = covering.LEFT_OUT


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    output = getattr(node, "workeroutput", {})
    _SLOWNESS.append(output.get("slowness", 0.0))
    _LEFT_OUT.update(output.get("left_out", {}))


@pytest.fixture(scope="module", autouse=True)
def garbage_set_aside():
    """Before each file: all that was imported, and what the files before it left."""
    garbage.set_aside()


@pytest.fixture(scope="module", autouse=True)
def no_job_left(request):
    """A job of this process that a file joined, it leaves: the next one's simulated ranks would take part in it."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    distributed.destroy_process_group()
    pytest.fail(f"{request.node.nodeid} has joined a job (strategies.runtime.join_job), and not left it by stop()")


@pytest.fixture(scope="module", autouse=True)
def bitsandbytes_as_written():
    """Of files that ask for it, which imports it before their tests."""
    uncompiled.as_written()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models of tests are too small for threads, which wait for each other wherever something else runs."""
    import torch

    from strategies import runtime

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "num_usable_cores", lambda: 1)
        yield


@pytest.fixture(scope="session", autouse=True)
def state_of_the_tests(tmp_path_factory):
    """What commands remember of what was typed goes below a directory of the session, and not into the developer's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp().parent / "state"))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk():
    """No test cuts the power: a run syncs thirty files, a sixth of its time. That it does has tests with disks of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def measured_once():
    """How fast this processor multiplies, and what the sources are: a quarter of a run of a few steps, and the same for all."""
    from trainer.reporting import reference_speed
    from trainer.session import identity

    asked = ((reference_speed, "measured_matmul_tflops"), (identity, "source_digest"))
    with pytest.MonkeyPatch.context() as patch:
        for module, name in asked:
            patch.setattr(module, name, functools.cache(getattr(module, name)))
        yield


def _yaml_files(directory: Path):
    """(path, time of its change) of each file that a choice may be read from; a glob takes as long as composing."""
    if directory.is_dir():
        directory = directory.resolve()
        for place in (directory, *(entry.path for entry in os.scandir(directory) if entry.is_dir())):
            for entry in os.scandir(place):
                if entry.name.endswith(".yaml"):
                    yield entry.path, entry.stat().st_mtime_ns


@pytest.fixture(scope="session", autouse=True)
def composed_once(tmp_path_factory):
    """Hydra takes most of the time of composing, and gives the same for the same choices as long as no file changed.

    What one worker has composed the others read.
    """
    from launch.config import compose

    original, base_of_worker = compose._compose_choices, tmp_path_factory.getbasetemp()
    place = (base_of_worker.parent if "PYTEST_XDIST_WORKER" in os.environ else base_of_worker) / "composed"
    place.mkdir(exist_ok=True)

    def base(choices):
        files = sorted(yaml for each in (compose.CONF_DIR, *compose.USER_CONFIG_DIRS) for yaml in _yaml_files(each))
        path = place / hashlib.sha256(repr((tuple(choices.items()), files)).encode()).hexdigest()
        if not path.exists():
            aside = path.with_suffix(f".{os.getpid()}")
            aside.write_bytes(pickle.dumps(original(choices)))
            aside.replace(path)
        return pickle.loads(path.read_bytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compose, "_compose_choices", base)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_page_of_each_run():
    """Drawing it takes longer than most runs here; what it is, and when it is written, has tests of its own."""
    from launch.compare import run_report

    written = run_report.write_report_at_end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_report, "write_report_at_end", lambda config, run_dir: None)
        yield written


@pytest.fixture(scope="module")
def pages_of_runs(no_page_of_each_run):
    """Runs write theirs, as for users."""
    from launch.compare import run_report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_report, "write_report_at_end", no_page_of_each_run)
        yield


@pytest.fixture(scope="module")
def browser():
    """Chromium for pages of ours; skips where there is none."""
    from tests.helpers import browser

    with browser.started() as found:
        yield found


@pytest.fixture(scope="module")
def runtime():
    """A job of this process alone; what joining it wrote to the environment goes with it."""
    from strategies import runtime as processes

    before = dict(os.environ)
    yield processes.join_job("cpu", timeout_s=60, threads=1)
    processes.leave_job()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Directories of tiny models with a tokenizer, by architecture and type; each made once."""
    import torch
    from safetensors.torch import load_file, save_file

    from tests.helpers.models import tiny_model_dir
    from tests.helpers.tokenizers import tiny_tokenizer

    made = {}

    def base(architecture, dtype=torch.float32):
        if (architecture, dtype) not in made:
            path = tmp_path_factory.mktemp("base") / f"{architecture}-{dtype}".replace("torch.", "")
            tiny_model_dir(path, architecture, pad_token_id=2)
            if dtype is not torch.float32:
                tensors = load_file(path / "model.safetensors")
                save_file({k: v.to(dtype) for k, v in tensors.items()}, path / "model.safetensors", {"format": "pt"})
            tiny_tokenizer().save_pretrained(path)
            made[architecture, dtype] = path
        return made[architecture, dtype]

    return base


@pytest.fixture(scope="module")
def base(bases):
    """A tiny llama."""
    return bases("llama")
