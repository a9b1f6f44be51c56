"""Ranks that are forked train, print and fail as those of torchrun do."""

from pathlib import Path

import pytest

from tests.faults.runs import Runs
from tests.helpers.launching import SHARES, free_port


def test_warm_forked_run_leaves_what_a_run_leaves_and_a_failing_rank_its_reason(tmp_path):
    runs = Runs(tmp_path)
    two = ["launcher.processes=2", "strategy=ddp", "budget.steps=2"]
    code, said = runs.run_here("good", *two)
    assert code == 0 and "ddp, lora, 2 process(es)" in said and "step 2/2" in said, said
    assert [row["step"] for row in runs.rows("good")] == [1, 2] and runs.status("good")["state"] == "done"
    code, said = runs.run_here("bad", *two, "tuning.targets=[nothing]")
    assert code == 64 and "matches no module" in said, said
    assert runs.status("bad")["state"] == "failed"


@pytest.mark.skipif(not Path("/proc/sys/net").exists(), reason="asks Linux")
def test_warm_rendezvous_port_is_given_to_nobody_else(monkeypatch):
    given_out = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    for worker in ("gw0", "gw9"):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        ports = {free_port() for _ in range(9)}
        assert max(ports) < int(given_out[0]) and {port % SHARES for port in ports} == {int(worker[2:]) % SHARES}
