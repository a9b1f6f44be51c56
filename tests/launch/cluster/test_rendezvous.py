"""What keeps ranks from meeting is said with the setting, and which host has not come is said while it is waited for."""

import os
import socket
from types import SimpleNamespace

import psutil
import pytest

from launch.cluster import rendezvous
from launch.cluster.hosts import ThisHost, interface_by_address
from launch.cluster.rendezvous import MissingHostsReport, StuckTorchrunGuard
from launch.main import main
from strategies import network
from strategies.errors import ConfigError
from tests.helpers.building import model_dir
from tests.helpers.tokenizers import write_chat_data
from trainer.config.run import LauncherConfig
from trainer.reporting.status import record_failure


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    root = tmp_path_factory.mktemp("rendezvous")
    data = write_chat_data(root / "train.jsonl", 8)
    settings = [f"model.path={model_dir(root)}", f"data.path={data}", f"data.cache_dir={root / 'cache'}"]
    sizes = ["run.device=cpu", "run.threads=1", "batch.global=2", "batch.micro=1", "budget.steps=1"]
    return ["train", *settings, *sizes, "logging.wandb=disabled", f"run.dir={root / 'run'}"]


def refused(capfd, words, *more):
    assert main([*words, *more]) == 64
    shown = capfd.readouterr().err
    assert "Traceback" not in shown
    return shown


def test_rendezvous_with_a_wrong_interface_port_or_rank_is_a_message(words, capfd, monkeypatch):
    with monkeypatch.context() as env:
        env.setenv("GLOO_SOCKET_IFNAME", "ib77")
        said = refused(capfd, words, "strategy=single")
        assert "GLOO_SOCKET_IFNAME=ib77: this host has no interface ib77, only " in said
        said = refused(capfd, words, "strategy=ddp", "launcher.processes=2")
        assert "`unset GLOO_SOCKET_IFNAME`" in said
    with monkeypatch.context() as env:
        env.setenv("RANK", "x")
        assert "RANK=x: no whole number, so left over" in refused(capfd, words)
    address = next((a for a in interface_by_address() if ":" not in a and not a.startswith("127.")), None)
    if address is not None:  # else this host has no other name than its loopback's
        with socket.create_server(("", 0)) as taken:
            port = taken.getsockname()[1]
            more = ["strategy=ddp", "launcher.nodes=2", "launcher.node_rank=0", f"launcher.rdzv={address}:{port}"]
            said = refused(capfd, words, *more)
        assert f"launcher.rdzv={address}:{port}: another process of this host listens on port {port}" in said


def test_ranks_of_a_host_without_a_loopback_address_are_refused(monkeypatch):
    monkeypatch.setattr(network, "LOOPBACK", "203.0.113.1")  # of documentation: nobody has it
    with pytest.raises(ConfigError, match=r"launcher\.processes=2: ranks of one host meet at .*ip link set lo up"):
        network.check_loopback_address(2)


@pytest.mark.parametrize(
    ("nodes", "first", "said"),
    [
        (2, True, "host 1 of 2 has not come to 10.0.0.1:29500; start the same command there"),
        (
            4,
            True,
            "1 of 4 hosts have come to 10.0.0.1:29500, this one and 0 more; on the others start the same command",
        ),
        (4, False, "host 3 of 4 waits for the others at 10.0.0.1:29500, the first host"),
    ],
)
def test_hosts_that_do_not_come_are_named_until_the_ranks_run(nodes, first, said, capfd, monkeypatch):
    now = 0.0
    monkeypatch.setattr(rendezvous, "time", SimpleNamespace(monotonic=lambda: now))
    ranks = []
    monkeypatch.setattr(rendezvous, "rank_processes", lambda agent: ranks)
    launcher = LauncherConfig(nodes=nodes, rdzv="10.0.0.1:29500")
    waiting = MissingHostsReport(launcher, ThisHost(0 if first else 3, "10.0.0.1", "eth0", first))
    agent = psutil.Process(os.getpid())
    told_at = []
    for second in range(200):
        now = float(second)
        waiting.poll(agent)
        if shown := capfd.readouterr().err:
            assert said in shown
            told_at.append(second)
    assert told_at == [20, 60, 120, 180]  # at most 30 s until the first, 60 s between two
    ranks.append(agent)
    now = 300.0
    waiting.poll(agent)
    assert capfd.readouterr().err == ""


def test_torchrun_that_outlives_failed_ranks_is_ended(tmp_path, monkeypatch):
    """It may wait for a host that is cut off; without a failure it rightly waits for other hosts' ranks."""
    now, ranks, killed = 0.0, ["a rank"], []
    monkeypatch.setattr(rendezvous, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(rendezvous, "rank_processes", lambda agent: ranks)
    left_behind = StuckTorchrunGuard(tmp_path)
    agent = SimpleNamespace(kill=lambda: killed.append(now))

    def look_until(end):
        nonlocal now
        while now < end:
            now += 1
            left_behind.poll(agent)

    look_until(100)
    ranks.clear()
    look_until(200)
    assert killed == []
    record_failure(tmp_path, 0, RuntimeError("cut off"), "training")
    look_until(300)
    assert killed and 215 < killed[0] < 240
