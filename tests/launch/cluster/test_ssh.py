"""Ranks of several hosts started over ssh: two hosts with a real sshd each; but for the last test a stand-in runs there."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from launch.cluster import ssh, ssh_nodes
from launch.cluster.torchrun import RedirectedOutput
from strategies.errors import ConfigError, NodesUnfit
from tests.helpers import ssh_hosts
from tests.helpers.covering import whole
from tests.helpers.launching import clean_environment
from tests.helpers.models import tiny_model_dir
from tests.helpers.speed import seconds
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data
from trainer.config.run import LauncherConfig
from trainer.reporting.status import read_failure, record_failure

if reason := ssh_hosts.missing():
    pytest.skip(reason, allow_module_level=True)

CLONE = Path(__file__).parents[3]
ODD = 'it\'s "a" $HOME `x` \\ und ü\nnext line '


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with ssh_hosts.two_hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both


@pytest.fixture
def run(hosts, tmp_path, monkeypatch):
    """Start on both hosts; the exit code, the signals, and what was shown. `at` is called when both have begun."""
    monkeypatch.setattr(ssh_nodes, "NODE_MODULE", "tests.launch.cluster.ssh_node")
    monkeypatch.setenv("ODD", ODD)
    place = tmp_path / "a run's directory"
    place.mkdir()
    monkeypatch.chdir(place)
    (place / "config.yaml").write_text("# what was frozen\n")

    def start(what, at=None, names=hosts.names, options=()):
        monkeypatch.setenv("STAND_IN", what)
        launcher = LauncherConfig(hosts=list(names), nodes=len(names), ssh=[*hosts.options, *options], processes=2)
        begun = threading.Thread(target=_once_begun, args=(place, at), daemon=True)
        if at is not None:
            begun.start()
        ended = ssh.run_ranks_on_hosts(
            SimpleNamespace(launcher=launcher), place, "id-1", RedirectedOutput(place / "shown", lambda: None)
        )
        if at is not None:
            begun.join()
        return ended

    start.place = place
    start.told = lambda number: json.loads((place / f"node-{number}.json").read_text())
    yield start
    assert hosts.processes(0) == hosts.processes(1) == []  # however it ended


def _once_begun(place: Path, at) -> None:
    deadline = time.monotonic() + seconds(60)
    while len(list(place.glob("node-?.json"))) < 2:
        if time.monotonic() > deadline:
            return  # a signal now would be this process's own
        time.sleep(0.02)
    at()


def test_ssh_tells_each_host_its_number_and_gives_it_the_local_environment(run, hosts):
    assert run("0,0") == (0, set())
    for number in range(2):
        told = run.told(number)
        assert told["environment"]["ODD"] == ODD
        assert told["cwd"] == str(run.place)
        assert told["told"]["config"] == str(run.place / "config.yaml") and told["told"]["module"] == "launch.train"
        assert told["begin"]["rank"] == number and told["begin"]["run_id"] == "id-1"
        assert told["begin"]["rdzv"].startswith(f"{hosts.address(0)}:2")
        assert told["environment"]["SSH_CONNECTION"].split()[2] == hosts.address(number)  # the host's own stays
    shown = (run.place / "shown").read_text().splitlines()
    assert sorted(shown) == ["beta: node 1 complains", "node 0 complains", "node 0 prints"]
    for number, name in enumerate(hosts.names):
        log = (run.place / "logs" / f"hosts-1-{number}.log").read_text().splitlines()
        assert log[0] == f"# {name}" and {*log[1:]} == {f"node {number} prints", f"node {number} complains"}


def test_ssh_host_that_fails_ends_the_others(run, monkeypatch):
    monkeypatch.setattr(ssh, "STOP_GRACE_S", 0.3)
    assert run("wait,3") == (3, set())
    assert run.told(0)["signals"][0] == "SIGINT"
    assert read_failure(run.place) == {}  # its ranks say why


def test_ssh_host_that_is_lost_is_named_and_ends_the_others(run, hosts, monkeypatch):
    monkeypatch.setattr(ssh, "STOP_GRACE_S", 0.3)

    def cut():
        record_failure(run.place, 0, RuntimeError("Connection closed by peer [10.0.0.2]:4"), "training")
        ours = [p for p in psutil.Process().children() if p.name() == "ssh" and "beta" in p.cmdline()]
        ours[0].kill()

    code, signals = run("wait,wait", cut)
    assert code != 0 and not signals
    failure = read_failure(run.place)
    assert failure["message"].startswith("host beta was lost")
    assert (failure["rank"], failure["host"], failure["retry"]) == (2, "beta", "node_fail")
    deadline = time.monotonic() + seconds(30)
    while hosts.processes(1) and time.monotonic() < deadline:  # nobody talks with beta any more: it ends by itself
        time.sleep(0.05)
    assert run.told(0)["signals"] and run.told(1)["signals"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_ssh_passes_a_signal_to_every_host(run, number, code):
    assert run("wait,wait", lambda: os.kill(os.getpid(), number)) == (code, {number})
    assert [run.told(node)["signals"] for node in range(2)] == [[number.name]] * 2


def test_ssh_hosts_that_cannot_be_reached_are_named_with_what_ssh_says(run, hosts):
    nobody = f"{hosts.net}.77"
    with pytest.raises(NodesUnfit) as refused:
        run("0,0", names=["alpha", nobody, "nowhere.invalid"], options=["-o", "ConnectTimeout=1"])
    said = str(refused.value).splitlines()
    assert len(said) == 3 and said[1].startswith(f"  {nobody}: is not reached: ssh: connect to host {nobody} port 22: ")
    assert said[2].startswith("  nowhere.invalid: is not reached: ssh: Could not resolve hostname nowhere.invalid")
    assert "must work without a password" in said[1] and not list(run.place.glob("node-*"))


def test_ssh_host_without_the_same_python_or_clone_is_reported(run, monkeypatch):
    monkeypatch.setattr(ssh_nodes.sys, "executable", "/no/such/python")
    with pytest.raises(NodesUnfit, match=r"alpha: has no /no/such/python, the Python that runs here"):
        run("0,0")
    monkeypatch.setattr(ssh_nodes.sys, "executable", "/usr/bin/python3")  # which has nothing of ours installed
    monkeypatch.setattr(ssh_nodes, "CODE_DIRECTORY", Path("/no/such/clone"))
    with pytest.raises(NodesUnfit, match=r"beta: has no shardtune at /no/such/clone"):
        run("0,0")


def test_ssh_that_is_not_installed_is_reported(run, monkeypatch, tmp_path):
    with monkeypatch.context() as poor, pytest.raises(ConfigError, match="there is no ssh here"):
        poor.setenv("PATH", str(tmp_path))
        run("0,0")


def test_the_users_options_go_before_ours(hosts):
    """ssh takes the first value that it is given of an option."""
    launcher = LauncherConfig(ssh=[*hosts.options, "-o", "ConnectTimeout=3"])
    asked = ssh_nodes.ssh_command("alpha", launcher)
    said = subprocess.run([asked[0], "-G", *asked[1:]], capture_output=True, text=True, check=True).stdout.splitlines()
    assert "connecttimeout 3" in said and "batchmode yes" in said


HELLO = {"ssh": ["10.0.0.1"], "config": "sha", "gpus": 0, "port": 24000, **ssh_nodes._own_versions()}


def node(name: str, **hello) -> ssh_nodes.Node:
    return ssh_nodes.Node(name, subprocess.Popen(["true"], stdin=subprocess.PIPE), {**HELLO, **hello})


@pytest.mark.parametrize(
    ("hello", "said"),
    [
        ({}, "b: is the same host as a (10.0.0.1)"),
        ({"ssh": ["10.0.0.2"], "code": "x"}, "b: has another code than that of this host"),
        ({"ssh": ["10.0.0.2"], "torch": "1.0"}, "b: has another torch 1.0 than"),
        ({"ssh": ["10.0.0.2"], "config": None}, "b: does not see the run directory as it was written here"),
        ({"ssh": ["10.0.0.2"], "gpus": 8}, "b: has 8 GPUs, and this host none to tell by; give launcher.processes"),
    ],
)
def test_a_host_that_differs_is_refused(hello, said):
    with pytest.raises(NodesUnfit) as refused:
        ssh_nodes.refuse_unfit_hosts([node("a"), node("b", **hello)], LauncherConfig(hosts=["a", "b"]), "sha")
    assert said in str(refused.value) and "a: " not in str(refused.value)


def test_ssh_output_of_a_host_is_read_on_when_it_cannot_be_stored(tmp_path, capsys, monkeypatch):
    """Else its ranks would wait for ever to say more: a pipe takes 64 KiB."""
    says = "echo shardtune-node {}; yes step | head -n 100000; echo over"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    talks = ssh_nodes.Node("alpha", subprocess.Popen(["sh", "-c", says], **pipes))
    (tmp_path / "hosts-1-0.log").symlink_to("/dev/full")
    monkeypatch.setattr(ssh, "re", SimpleNamespace(match=lambda *_: None))  # takes that file for the first start's
    try:
        ssh.NodeOutput(tmp_path, None).start_reading_output([talks])
        assert talks.process.wait(seconds(60)) == 0
    finally:
        talks.process.kill()
    for reader in talks.output_readers:
        reader.join(seconds(30))
    assert capsys.readouterr().out.endswith("step\nover\n")


@pytest.mark.parametrize(
    ("first", "second", "met"),
    [
        ("10.0.0.1", "10.0.0.2", "10.0.0.1:24000"),
        ("fd00::1", "fd00::2", "[fd00::1]:24000"),
        ("127.0.0.1", "10.0.0.2", "10.0.0.9:24000"),  # the first is this host: under the address towards the second
    ],
)
def test_ssh_rendezvous_is_an_address_of_the_first_host_that_the_second_reaches(first, second, met, monkeypatch):
    monkeypatch.setattr(
        ssh_nodes, "local_address_towards", lambda address, said: "10.0.0.9" if address == second else address
    )
    assert ssh_nodes.rendezvous_address([node("a", ssh=[first]), node("b", ssh=[second])]) == met


def test_two_hosts_by_loopback_addresses_cannot_meet():
    with pytest.raises(ConfigError, match="a is reached by a loopback address, at which the others do not find it"):
        ssh_nodes.rendezvous_address([node("a", ssh=["127.0.0.1"]), node("b", ssh=["127.0.0.2"])])


WORDS = "strategy=fsdp2 run.device=cpu batch.global=8 batch.micro=2 logging.wandb=disabled logging.report=false"


@whole("the same with a stand-in for the ranks above; ranks of several hosts in tests/slurm")
def test_ssh_two_hosts_train_as_one_process_does_and_a_killed_rank_ends_both(hosts, tmp_path):
    tiny_tokenizer().save_pretrained(tiny_model_dir(tmp_path / "model"))
    data = write_chat_data(tmp_path / "train.jsonl", 16)
    words = [f"model.path={tmp_path / 'model'}", f"data.path={data}", f"data.cache_dir={tmp_path / 'cache'}"]
    words += [*WORDS.split(), "logging.every_steps=1", f"launcher.ssh=[{','.join(hosts.options)}]"]
    train = [sys.executable, "-m", "launch.main", "train", *words]
    over = ["launcher.hosts=[alpha,beta]"]

    def losses(name: str) -> list[float]:
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if "loss" in row]

    env = clean_environment()
    two = [*train, *over, "budget.steps=3", f"run.dir={tmp_path / 'two'}"]
    assert subprocess.run(two, cwd=CLONE, env=env, timeout=seconds(200)).returncode == 0
    one = [word for word in train if not word.startswith("launcher.ssh")]
    one = [*one, "strategy=single", "budget.steps=3", f"run.dir={tmp_path / 'one'}"]
    assert subprocess.run(one, cwd=CLONE, env=env, timeout=seconds(200)).returncode == 0
    assert len(losses("two")) == 3 and losses("two") == pytest.approx(losses("one"), rel=1e-5)

    long = subprocess.Popen([*train, *over, "budget.steps=9999", f"run.dir={tmp_path / 'long'}"], cwd=CLONE, env=env)
    deadline = time.monotonic() + seconds(200)
    while not (tmp_path / "long" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks = [p for p in map(psutil.Process, hosts.processes(1)) if p.environ().get("RANK") == "1"]
    ranks[0].kill()
    assert long.wait(seconds(60)) == 70
    failure = read_failure(tmp_path / "long")
    assert failure["rank"] == 1 and "was killed by SIGKILL" in failure["message"]
    assert hosts.processes(0) == hosts.processes(1) == []
