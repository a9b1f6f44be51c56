"""What holds for every test: repeatable examples, limits scaled to the machine, configurations composed once.

The summary says which part of the matrices was run, by which seed, and how slow the machine was taken to be.
"""

import copy

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers import covering, speed

settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

LIMIT_S = 300
"""Seconds that one test may take, its fixtures included, on the machine that `tests/helpers/speed.py` measures by."""


def pytest_collection_modifyitems(items):
    """A limit for each test that has none of its own: pytest-timeout's option is a constant, and machines differ."""
    for item in items:
        marked = item.get_closest_marker("timeout")
        limit = marked.args[0] if marked else LIMIT_S
        item.add_marker(pytest.mark.timeout(speed.seconds(limit)), append=False)


def pytest_terminal_summary(terminalreporter):
    """Say what was chosen, so that a failure can be repeated and a choice be changed."""
    runs = "the whole matrices" if covering.EVERYTHING else f"a covering choice of each matrix, seed {covering.SEED}"
    terminalreporter.write_line(
        f"ran {runs} (SHARDTUNE_TEST_ALL, SHARDTUNE_TEST_SEED); limits for a machine {speed.slowness():.1f} times as slow"
    )


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models of tests are too small for threads, which wait for each other wherever something else runs."""
    import torch

    from strategies import runtime

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "usable_cores", lambda: 1)
        yield


@pytest.fixture(scope="session", autouse=True)
def composed_once():
    """Hydra takes most of the time of composing, and gives the same for the same choices as long as no file changed."""
    from launch import compose

    composed, original = {}, compose._base

    def base(choices):
        files = {(path, path.stat().st_mtime_ns) for path in compose.CONF_DIR.rglob("*.yaml")}
        key = tuple(choices.items()), frozenset(files)
        if key not in composed:
            composed[key] = original(choices)
        tree, problems = composed[key]
        return copy.deepcopy(tree), list(problems)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compose, "_base", base)
        yield
