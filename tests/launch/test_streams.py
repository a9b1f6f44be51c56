"""The command in surroundings that lack something: standard streams, characters of the terminal, docstrings."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest

from launch.main import main
from launch.streams import printable_output, printable_text, write_control_sequence
from tests.helpers.building import model_dir
from tests.helpers.covering import whole
from tests.helpers.launching import ROOT, clean_environment, command_here
from tests.helpers.speed import seconds
from tests.helpers.tokenizers import write_chat_data, write_jsonl
from tests.helpers.warm import forked
from tests.launch.runs.made import made

CLOSED = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "-"]
"""What runs a command without standard streams."""
ASCII_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
STUB = """
import os, sys
from pathlib import Path
from types import ModuleType
from launch import main

def verb(argv):
    with Path(argv[0]).open("w", encoding="utf-8") as saved:
        for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
            print("Z\\u00fcrich", file=stream, flush=True)
            os.write(descriptor, b"a library\\n")
        saved.write("saved" if saved.fileno() > 2 else "a stream's descriptor")
    return 75

sys.modules["launch.train"] = ModuleType("launch.train")
sys.modules["launch.train"].main = verb
sys.exit(main.main())
"""
"""A command whose verb needs no library: it prints, as libraries do too, while a file of its own is open."""


def stub(path, *, prefix=(), **environment):
    command = [*prefix, sys.executable, "-c", STUB, "train", path]
    env = clean_environment(**environment)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=False)


def test_command_without_standard_streams_keeps_its_files_apart_from_them(tmp_path):
    done = stub(tmp_path / "file", prefix=CLOSED)
    assert (done.returncode, (tmp_path / "file").read_text()) == (75, "saved")


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, b"Z\\xfcrich\na library\n"),
        ({"PYTHONIOENCODING": "latin-1"}, b"Z\xfcrich\na library\n"),
        (ASCII_LOCALE, "Zürich\na library\n".encode()),
    ],
    ids=["ascii terminal", "latin-1 terminal", "locale C"],
)
def test_command_prints_what_the_encoding_can(tmp_path, environment, shown):
    path = tmp_path / "Übung"
    done = stub(path, **environment)
    assert (done.returncode, done.stdout, path.read_text()) == (75, shown, "saved")


def test_a_word_that_is_no_text_is_refused_by_name(tmp_path):
    done = stub(os.fsencode(tmp_path) + b"/\xfcbung", PYTHONUTF8="1")
    assert done.returncode == 64
    assert rb"/\udcfcbung: is not valid utf-8" in done.stderr


def test_python_without_docstrings_is_named(tmp_path):
    done = stub(tmp_path / "file", PYTHONOPTIMIZE="2")
    assert (done.returncode, b"set PYTHONOPTIMIZE=1, or unset it" in done.stderr) == (64, True)
    assert stub(tmp_path / "file", PYTHONOPTIMIZE="1").returncode == 75


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, data with Chinese answers, data of which a line is torn, and a run, below a name with an umlaut."""
    path = tmp_path_factory.mktemp("Übung")
    model_dir(path)
    write_jsonl(path / "rows.jsonl", [{"prompt": f"Frage {row}", "completion": f"答案 {row} 😀"} for row in range(24)])
    write_chat_data(path / "torn.jsonl", 24)
    with (path / "torn.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "user"\n')
    assert command_here(["train", *words(path)]) == 0
    return path


def words(path, *, run="run", data="rows.jsonl", processes=1):
    several = ["strategy=ddp"] if processes > 1 else []
    settings = ["run.device=cpu", "run.threads=1", "batch.global=8", "batch.micro=4", "budget.steps=2"]
    settings += ["logging.wandb=disabled", "export.at_end=false", f"data.cache_dir={path / 'cache'}"]
    settings += [f"model.path={path / 'llama'}", f"data.path={path / data}", f"run.dir={path / run}"]
    return [*settings, f"launcher.processes={processes}", *several]


@pytest.mark.parametrize("processes", [1, 2])
def test_command_without_standard_streams_trains_and_writes_failures_into_its_files(place, processes):
    """Of a launcher that cron or a daemon starts; with two processes each rank inherits what the launcher has."""
    for run, data, code in (("closed", "rows.jsonl", 0), ("failed", "torn.jsonl", 65)):
        run_dir = place / f"{run}-{processes}"
        given = words(place, run=run_dir.name, data=data, processes=processes)
        command = [sys.executable, "-m", "tests.helpers.closed_streams", "train", *given]
        null = os.open(os.devnull, os.O_WRONLY)
        process = forked(command, clean_environment(), null, ranks=True)
        os.close(null)
        assert process.wait(seconds(120)) == code
        state = json.loads((run_dir / "status.json").read_text())["state"]
        assert state == ("failed" if code else "done")
        assert (run_dir / "failure.json").exists() == bool(code)
    assert "torn.jsonl:25" in json.loads((run_dir / "failure.json").read_text())["message"]


VERBS = {
    "prepare": lambda path: words(path),
    "train": lambda path: words(path, run="in-ascii"),
    "status": lambda path: [str(path)],
    "logs": lambda path: [str(path / "run")],
    "export": lambda path: [str(path / "run"), f"to={path / 'exported'}"],
    "evaluate": lambda path: [f"model.path={path / 'llama'}", f"data.eval_path={path / 'rows.jsonl'}", *SMALL],
    "stop": lambda path: [str(path / "run"), "--dry-run"],
}
SMALL = ["evaluation.tasks=[loss]", "run.device=cpu", "run.threads=1", "launcher.processes=1", "to=reports"]


def test_every_verb_answers_a_terminal_of_ascii(place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for verb, arguments in VERBS.items():
        said = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(said, encoding="ascii", write_through=True))
        assert command_here([verb, *arguments(place)]) == 0, verb
        assert said.getvalue().isascii(), verb
        if verb in ("prepare", "train", "export"):
            assert b"\\xdcbung" in said.getvalue(), verb


def test_json_stays_json_on_a_terminal_of_ascii(place, monkeypatch):
    said = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(said, encoding="latin-1"))
    assert main(["logs", str(place / "run"), "--json"]) == 0
    sys.stdout.flush()
    assert "Übung" in json.loads(said.getvalue())["run"]


@whole("the stub shows the streams and the encoding, and forked ranks that a run trains")
@pytest.mark.parametrize("processes", [1, 2])
def test_the_whole_command_in_poor_surroundings(place, processes):
    for name, prefix, environment in (("poor-closed", CLOSED, {}), ("poor-locale-ü", [], ASCII_LOCALE)):
        given = words(place, run=name, processes=processes)
        shutil.rmtree(place / name, ignore_errors=True)
        command = [*prefix, sys.executable, "-m", "launch.main", "train", *given]
        assert subprocess.run(command, cwd=ROOT, env=clean_environment(**environment), check=False).returncode == 0
        assert json.loads((place / name / "status.json").read_text())["state"] == "done"


HOSTILE = "named \x1b]0;pwned\x07 \x1b[2J\x9b2J \x1b[31mred\x1b[0m \u202egnp.exe"
"""Sets the title, clears the screen twice, colours, and turns the direction of writing."""


@pytest.fixture
def hostile_run(tmp_path):
    """A run of somebody else's, in whose every record and name stands what a terminal would obey."""
    run = made(tmp_path, f"run {HOSTILE.split()[1]}", state="failed", reason=HOSTILE, host=HOSTILE, job=HOSTILE)
    about = {"error": HOSTILE, "message": HOSTILE, "phase": HOSTILE, "traceback": HOSTILE, "rank": 0, "host": HOSTILE}
    (run / "failure.json").write_text(json.dumps(about))
    facts = {"total_steps": 10, "strategy": HOSTILE, "tuning": HOSTILE, "objective": HOSTILE, "base_model": HOSTILE}
    (run / "run.json").write_text(
        json.dumps({**facts, "substitutions": {HOSTILE: HOSTILE}, "versions": {HOSTILE: HOSTILE}})
    )
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, HOSTILE: 3.0, "slow": HOSTILE}) + "\n")
    (run / "logs").mkdir()
    for name in ("rank-0.log", "output.log", f"{HOSTILE.split()[1]}.log"):
        (run / "logs" / name).write_text(f"2026-11-29 12:00:00 {HOSTILE}\n")
    (run / "config.yaml").write_text(f"# sha256: {'0' * 64}\nrun:\n  dir: {json.dumps(HOSTILE)}\n")
    return run


@pytest.mark.parametrize("verb", ["status", "logs", "stop", "export", "evaluate", "compare"])
def test_terminal_obeys_nothing_in_the_records_of_others(hostile_run, verb, capfd, monkeypatch):
    monkeypatch.chdir(hostile_run.parent)
    command_here([verb, str(hostile_run)])
    shown = "".join(capfd.readouterr())
    assert "Traceback" not in shown and "pwned" in shown
    assert not set(shown) & {"\x1b", "\x07", "\x9b", "\u202e"}, repr(shown)
    assert "\\u001b]0;pwned\\u0007" in shown
    if verb == "status":
        assert command_here([verb, str(hostile_run), "--json"]) == 0
        json.loads(capfd.readouterr().out)


def test_terminal_output_that_redraws_still_can(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr("sys.stdout", written)
    with printable_output():
        write_control_sequence(sys.stdout, "\r\x1b[K")
        print("a\tb\x1b[31m")
    assert written.getvalue() == "\r\x1b[Ka\tb\n"
    assert printable_text("plain text, Ümläüte and 日本") == "plain text, Ümläüte and 日本"
