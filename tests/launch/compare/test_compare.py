"""`shardtune compare` on real runs: two strategies of one command, and one that fails; what they left is not touched."""

import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.compare.answer import MAIN_COLUMNS
from launch.main import main
from tests.helpers.building import model_dir
from tests.helpers.launching import ROOT, command_here
from tests.helpers.tokenizers import write_chat_data
from trainer.checkpoints.layout import checkpoint_dirs_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs/0 (ddp) and runs/1 (fsdp2), where `train -m` leaves them, and `broken`, whose rate is absurd.

    In this process, which is their only rank; docs/comparing.md, whose examples are run, has two ranks of a real `train -m`.
    """
    site = tmp_path_factory.mktemp("compare")
    data = write_chat_data(site / "train.jsonl", 32)
    words = [f"model.path={model_dir(site)}", f"data.path={data}", f"data.eval_path={data}", "budget.steps=6"]
    words += [f"data.cache_dir={site / 'cache'}", "export.at_end=false", "debug=tiny", "run.device=cpu"]
    assert command_here(["train", *words, "strategy=ddp", f"run.dir={site / 'runs/0'}"]) == 0
    assert command_here(["train", *words, "strategy=fsdp2", f"run.dir={site / 'runs/1'}"]) == 0
    broken = ["strategy=single", "run.seed=1", "optim.lr=1e30", "optim.max_skipped_steps=2"]
    assert command_here(["train", *words, *broken, f"run.dir={site / 'broken'}"]) == 70
    return site


def compare(capsys, *words) -> tuple[int, str, str]:
    code = main(["compare", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def compared(capsys, *words) -> list[dict]:
    code, out, err = compare(capsys, *words, "--json")
    assert code == 0, err
    return json.loads(out)["runs"]


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def changed(run: Path, to: Path, change) -> Path:
    """A copy of a run whose rows `change` has been at, row by row."""
    shutil.copytree(run, to)
    rows = rows_of(run)
    for row in rows:
        change(row)
    (to / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return to


def test_compare_two_strategies_of_one_command(runs, capsys):
    """Names, the promise of the same loss, and numbers equal to what each run itself found."""
    ddp, fsdp2 = compared(capsys, runs / "runs")
    assert [ddp["name"], fsdp2["name"]] == ["ddp", "fsdp2"]
    assert [ddp["state"], ddp["reason"], ddp["loss_difference"]] == ["done", None, None]
    assert (
        fsdp2["loss_difference"]["same"]
        and fsdp2["loss_difference"]["early"] <= 1e-5
        and fsdp2["loss_difference"]["steps"] == 6
    )
    assert fsdp2["verdict"].startswith("fsdp2: same loss as ddp")
    assert fsdp2["differing"] == {"strategy.name": "fsdp2"}
    for found, run in ((ddp, runs / "runs/0"), (fsdp2, runs / "runs/1")):
        outcome, measured = json.loads((run / "run.json").read_text())["outcome"], found["measured"]
        assert measured["tokens_per_s"] == pytest.approx(outcome["speed"]["tokens_per_s"], rel=1e-12)
        assert measured["mfu"] is None and "mfu" not in outcome["speed"], "on CPUs"
        assert (measured["warmup_steps"], measured["loss"]) == (1, outcome["last_row"]["loss"])
        assert measured["memory_gib"] == outcome["last_row"]["memory_gib"]  # a peak never falls
        assert (measured["before"], measured["after"]) == (outcome["before"], outcome["after"])
        assert measured["before"]["eval/loss"] != measured["after"]["eval/loss"]
        size = sum(file.stat().st_size for file in (run / "checkpoints").rglob("*") if file.is_file())
        assert measured["checkpoint_gib"] == pytest.approx(size / 2**30)


def test_compare_keeps_a_failed_run_as_a_row(runs, tmp_path, capsys):
    """Its reason is told, and that its seed makes its losses another's: those of a run that says it had two ranks."""
    shutil.copytree(runs / "runs/0", tmp_path / "two")
    noted = json.loads((tmp_path / "two/run.json").read_text())
    (tmp_path / "two/run.json").write_text(json.dumps({**noted, "world_size": 2}))
    code, out, _ = compare(capsys, tmp_path / "two", runs / "broken")
    assert code == 0
    said = " ".join(out.split())
    assert "failed at step 3: rank 0, training: gradients were not finite for 2 steps in a row" in said
    assert "its losses cannot be compared with those of ddp-lr2e-5-seed42-2ranks (other run.seed)" in said
    assert "its loss is NaN or infinite from step 2 on" in said
    assert max(map(len, out.splitlines())) <= 80
    _, broken = compared(capsys, runs / "runs/0", runs / "broken")
    assert broken["not_comparable"] == ["run.seed: 42 and 1"] and broken["loss_difference"] is None


def test_a_name_made_of_settings_has_the_directory_that_was_typed_below_it(runs, tmp_path, monkeypatch, capsys):
    """Also a long one, within 80 columns. A name that ends with the directory's, as of equal runs, needs no such line."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    long = Path("a-directory-with-a-name-of-many-words") / "in-which-runs-of-last-week-are-kept" / "a-second-try"
    for name, run in (("first", "0"), ("second", "0"), (long, "1")):
        shutil.copytree(runs / "runs" / run, name)
    code, out, _ = compare(capsys, "first", long)
    table = out[: out.index("\n\n")].splitlines()
    assert code == 0 and [line.split()[0] for line in table[1:3]] == ["ddp", "first"]
    assert table[3].startswith("fsdp2 ") and "".join(map(str.strip, table[4:])) == str(long)
    assert len(table) == 6 and max(map(len, out.splitlines())) <= 80
    assert [run["name"] for run in compared(capsys, "first", long)] == ["ddp", "fsdp2"]
    _, out, _ = compare(capsys, "first", "second", runs / "runs/1")
    table = out[: out.index("\n\n")]
    assert "ddp-first" in table and "ddp-second" in table and "  first" not in table and "  second" not in table
    assert str(runs / "runs/1") in table.replace("\n  ", "")


def test_compare_tells_another_loss_from_drift_by_the_step_where_curves_part(runs, tmp_path, capsys):
    """A thousandth at step 3 is another loss; at step 6 it is drift alone."""

    def at(step):
        def change(row):
            if row["step"] == step and "loss" in row:
                row["loss"] *= 1.001

        return change

    early = changed(runs / "runs/0", tmp_path / "early", at(3))
    late = changed(runs / "runs/0", tmp_path / "late", at(6))
    _, one, two = compared(capsys, runs / "runs/0", early, late)
    assert (one["name"], two["name"]) == ("early", "late")  # no setting differs
    assert (
        one["loss_difference"]["early"] == pytest.approx(1e-3)
        and one["loss_difference"]["early_step"] == 3
        and not one["loss_difference"]["same"]
    )
    assert "not the loss of 0: it differs by 0.001 at step 3" in one["verdict"]
    assert two["loss_difference"]["early"] == 0 and two["loss_difference"]["same"]
    assert two["loss_difference"]["drift"] == pytest.approx(1e-3) and two["loss_difference"]["drift_step"] == 6
    assert "same loss as 0, to the last digit" in two["verdict"]


def test_compare_reports_speed_and_memory_as_ratios(runs, tmp_path, capsys):
    """The first logging interval counts for no median, however slow it was."""

    def change(row):
        if "loss" in row:
            row["tokens_per_s"] *= 1.4 if row["step"] > 1 else 1000
            row["memory_gib"] *= 0.3

    _, other = compared(capsys, runs / "runs/0", changed(runs / "runs/0", tmp_path / "other", change))
    assert other["verdict"].endswith("1.4 x its tokens/s, 0.3 x its memory")


def test_compare_shows_a_run_that_goes_on_and_one_that_never_began(runs, tmp_path, capsys):
    running, begun = tmp_path / "running", tmp_path / "begun"
    shutil.copytree(runs / "runs/0", running)
    status = json.loads((running / "status.json").read_text())
    (running / "status.json").write_text(
        json.dumps({**status, "state": "running", "step": 2, "time": 0})
    )  # as it was resumed
    text = (running / "metrics.jsonl").read_text()
    (running / "metrics.jsonl").write_text(text[: text.index('"step": 6') + 30])  # the row is being written
    begun.mkdir()
    shutil.copy(runs / "runs/0/config.yaml", begun)
    _, one, two = compared(capsys, runs / "runs/0", running, begun)
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime((running / "metrics.jsonl").stat().st_mtime))
    assert one["reason"].startswith(f"running at step 5, last seen at {written}")
    assert one["loss_difference"]["steps"] == 5
    assert two["reason"] == "not started" and two["measured"]["steps"] == 0 and two["measured"]["loss"] is None
    assert two["verdict"] == "begun: not started; no step to compare with 0"


def test_compare_writes_csv_json_and_markdown(runs, tmp_path, capsys):
    to = tmp_path / "report"
    code, out, _ = compare(capsys, runs / "runs", runs / "broken", f"to={to}")
    assert code == 0 and f"written: {to / 'compare.md'}" in out
    table = list(csv.DictReader((to / "compare.csv").open()))
    found = json.loads((to / "compare.json").read_text())
    assert [row["name"] for row in table] == [run["name"] for run in found["runs"]]
    assert float(table[1]["tokens_per_s"]) == found["runs"][1]["measured"]["tokens_per_s"]
    assert table[2]["state"] == "failed" and table[2]["run.seed"] == "1"
    page = (to / "compare.md").read_text()
    assert all(run["verdict"] in page for run in found["runs"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["runs/0", "cache"], "cache: not a run directory (there is no config.yaml in it"),
        (["runs/0", "runs/7"], "runs/7: there is no such directory"),
        (["runs/0", "strategy=ddp,fsdp2"], "runs/0: not of the form key=value; name runs that exist, or settings"),
        (["runs", "runs/1"], "runs/1: named twice"),
        (["runs", "--jsn"], "--jsn: there is no such flag"),
        (["runs", "to=train.jsonl"], "to=train.jsonl: is a file; name a directory"),
        (["runs", "to="], "to needs a value, as in to=<directory>"),
        (["runs", "to=report", "to=report"], "to=report: to is given twice"),
        (["to=report"], "no run directory is named"),
    ],
)
def test_compare_refuses_what_is_no_run(runs, monkeypatch, capsys, words, said):
    monkeypatch.chdir(runs)
    code, _, err = compare(capsys, *words)
    assert code == 64 and said in err
    assert not (runs / "report").exists()


def test_compare_leaves_out_and_counts_rows_that_cannot_be_read(runs, tmp_path, capsys):
    torn = tmp_path / "torn"
    shutil.copytree(runs / "runs/0", torn)
    rows = (torn / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    first_step = next(number for number, row in enumerate(rows) if b'"loss"' in row)
    rows[first_step] = b'{"step": 1, "loss": "high"}\n'
    (torn / "metrics.jsonl").write_bytes(b"\xe9\n" + b"".join(rows))
    (torn / "events.jsonl").write_text("[" * 100_000 + "\n")
    code, out, _ = compare(capsys, torn)
    assert code == 0
    assert f"{torn}: 3 lines of its metrics or events cannot be read and are left out" in " ".join(out.split())


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("identity.json", '{"data": 3}', "data is not an object"),
        ("identity.json", "[]", "it holds no object"),
        ("run.json", '{"receipt": "none"}', "receipt is not an object"),
        ("run.json", "[" * 100_000, "maximum recursion depth exceeded"),
        ("run.json", " " * 2**24 + "{}", f"has {2**24 + 2} bytes, more than {2**24}"),
    ],
)
def test_compare_names_files_that_hold_something_else(runs, tmp_path, capsys, file, text, said):
    odd = tmp_path / "odd"
    shutil.copytree(runs / "runs/0", odd)
    (odd / file).write_text(text)
    code, _, err = compare(capsys, runs / "runs/0", odd)
    assert code == 64 and f"{odd / file}: " in err and said in err


def test_compare_finds_the_newest_checkpoint_in_any_directory_of_the_run(runs, tmp_path, capsys):
    """The highest step, whatever its number of digits, and also one that only `checkpoint.fallback_dir` could take."""
    far, other = tmp_path / "far", tmp_path / "disk"
    shutil.copytree(runs / "runs/0", far)
    for step, size in ((999999, 1), (1000000, 2)):
        (far / f"checkpoints/step-{step}").mkdir()
        (far / f"checkpoints/step-{step}/a.safetensors").write_bytes(bytes(size * 2**20))
    _, found = compared(capsys, runs / "runs/0", far)
    assert found["measured"]["checkpoint_gib"] == 2 / 1024
    config = (far / "config.yaml").read_text()
    assert "fallback_dir: null" in config
    (far / "config.yaml").write_text(config.replace("fallback_dir: null", f"fallback_dir: {other}"))
    newest = checkpoint_dirs_of(far, str(other))[1] / "step-1000001"
    newest.mkdir(parents=True)
    (newest / "a.safetensors").write_bytes(bytes(3 * 2**20))
    _, found = compared(capsys, runs / "runs/0", far)
    assert found["measured"]["checkpoint_gib"] == 3 / 1024


def test_compare_shows_the_start_checkpoint_and_memory_that_runs_noted(runs, capsys):
    """Start, checkpoint and planned memory are those of the receipt in `run.json`."""
    code, out, _ = compare(capsys, runs / "runs")
    said = " ".join(out.split())
    for found, run in zip(compared(capsys, runs / "runs"), (runs / "runs/0", runs / "runs/1"), strict=True):
        receipt, measured = json.loads((run / "run.json").read_text())["receipt"], found["measured"]
        for key in ("start_s", "evaluation_before_s", "checkpoint_s"):
            assert measured[key] == receipt["measured"][key] > 0, key
        assert measured["planned_gib"] == receipt["predicted"]["memory_gib"]
        started = f"{measured['start_s'] - measured['evaluation_before_s']:.1f} {measured['checkpoint_s']:.2f} "
        assert f"{found['name']} {measured['planned_gib']:.3g} {started}" in said
        assert f"Planned memory: {receipt['predicted']['memory_by']}" in said
    assert code == 0 and max(map(len, out.splitlines())) <= 80


def test_compare_imports_no_torch(runs):
    """That is what makes it answer at once."""
    asked = "import sys; from launch.main import main; code = main(sys.argv[1:]); assert code == 0, code"
    asked += "; assert not {'torch', 'hydra', 'transformers'} & set(sys.modules), 'slow imports'"
    done = subprocess.run(
        [sys.executable, "-c", asked, "compare", str(runs / "runs")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_run_that_learns_labels_has_no_rate_of_learned_tokens():
    learned = next(say for name, say in MAIN_COLUMNS if name == "supervised/s")
    runs = [SimpleNamespace(measured=SimpleNamespace(supervised_tokens_per_s=rate)) for rate in (0.0, None, 12.34)]
    assert [learned(run) for run in runs] == ["-", "-", "12.3"]
