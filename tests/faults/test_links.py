"""Hosts and their network: none at all, and a link that goes down amid training (network namespaces as hosts)."""

import subprocess
import time

import pytest

from tests.faults.runs import ROOT, environment, wait
from tests.helpers import ssh_hosts
from tests.helpers.covering import whole
from tests.helpers.launching import free_port
from tests.helpers.speed import seconds

if reason := ssh_hosts.missing_networks():
    pytest.skip(reason, allow_module_level=True)


def test_network_is_not_needed_by_one_process_and_named_by_a_strategy_of_several(runs):
    nothing = {"PYTHONPATH": f"{ROOT / 'tests' / 'faults' / 'alone'}:{ROOT}"}
    single = runs.start("single-alone", "budget.steps=2", "export.at_end=true", paced=False, **nothing)
    sharded = runs.start("sharded-alone", "budget.steps=2", "strategy=fsdp2", paced=False, **nothing)
    assert (runs.end(single), runs.end(sharded)) == (0, 64)
    assert "strategy=fsdp2: this host has no network" in runs.said("sharded-alone")
    assert "Traceback" not in runs.said("sharded-alone")
    with_network = runs.run_here("single-network", "budget.steps=2")
    assert with_network[0] == 0
    assert runs.curve("single-alone") == runs.curve("single-network")


@whole("tests/strategies/test_heartbeat.py stops the store's process, which a link that is down is alike")
def test_network_link_that_goes_down_ends_both_hosts_by_the_timeout(runs, tmp_path):
    with ssh_hosts.two_networks(tmp_path) as hosts:
        place = f"launcher.rdzv={hosts.address(0)}:{free_port()}"
        words = ["strategy=ddp", "launcher.nodes=2", "launcher.processes=1", place, "run.timeout_s=20"]
        command = runs.words("cut", *words, "batch.global=8")
        started = []
        for number in range(2):
            with (runs.root / f"cut.{number}.out").open("w") as out:
                started.append(
                    subprocess.Popen(
                        [*hosts.command(number), *command],
                        env=environment(),
                        cwd=ROOT,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )
            if number == 0:
                wait(lambda: (runs.root / "cut" / "config.yaml").exists(), "the first host has begun", started[0])
        wait(lambda: len(runs.rows("cut")) > 2, "both train", started[0])
        hosts.link(1, "down")
        begun = time.monotonic()
        assert [process.wait(seconds(90)) for process in started] == [70, 70]
        assert time.monotonic() - begun < seconds(90)
        assert hosts.processes(0) == hosts.processes(1) == []
    assert "where the ranks meet, has not answered for" in runs.said("cut.1")
