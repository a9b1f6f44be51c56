"""The experiments of the lessons: what is kept is what the table of experiments says, and pages show it."""

import json
import runpy
import sys
from dataclasses import replace

import pytest

from tests.helpers.launching import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks.course.experiments import EXPERIMENTS, Column, Experiment
from benchmarks.course.measuring import RESULTS, measure_experiment

MAKER = runpy.run_path(str(ROOT / "docs" / "make_experiments.py"))
KEPT = [name for name in EXPERIMENTS if (RESULTS / f"{name}.json").is_file()]
TOY = Experiment(
    "toy",
    "Does it matter?",
    "A toy.",
    lambda directory, seeds: None,
    ("optim.lr=1e-3", "data.path={data}/{seed}.jsonl"),
    {"first": (), "lower": ("optim.lr=1e-4",), "like the first": ("optim.lr=2e-3",)},
    (Column("loss", "eval/loss", 2), Column("steps", "steps", 0, greater_is_better=None)),
    "",
    "",
)


def toy_train(made, losses):
    """Makes runs of a toy whose loss depends on the rate and the seed."""

    def train(run, words):
        settings = dict(word.split("=", 1) for word in words)
        made.append(run.name)
        run.mkdir(parents=True)
        if settings["optim.lr"] not in losses:
            raise ValueError("no such rate")
        return {"eval/loss": losses[settings["optim.lr"]] + 0.1 * int(settings["run.seed"]), "steps": 8}

    return train


def test_pages_show_the_kept_numbers():
    for path in MAKER["pages"]():
        text = path.read_text(encoding="utf-8")
        assert MAKER["page"](text) == text, "run: python docs/make_experiments.py"
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == MAKER["list_page"](), (
        "run: python docs/make_experiments.py"
    )


def test_kept_runs_are_those_of_the_table_of_experiments():
    assert {path.stem for path in RESULTS.glob("*.json")} <= set(EXPERIMENTS)
    for name in KEPT:
        points = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["points"]
        assert set(points) <= set(EXPERIMENTS[name].points)
        for point, runs in points.items():
            for seed, run in runs.items():
                assert run["words"] == EXPERIMENTS[name].words_of(point, int(seed)), (name, point, seed)


def test_an_interrupted_experiment_goes_on_where_it_was(tmp_path):
    made = []
    train = toy_train(made, {"1e-3": 1.0, "2e-3": 1.0})
    arguments = {"work": tmp_path / "work", "results": tmp_path, "train": train}
    assert measure_experiment(TOY, [1], **arguments) == 1  # 1e-4 fails, the others are kept
    kept = json.loads((tmp_path / "toy.json").read_text(encoding="utf-8"))["points"]
    assert kept["lower"]["1"]["failed"] == "ValueError: no such rate" and kept["first"]["1"]["eval/loss"] == 1.1

    made.clear()
    arguments["train"] = toy_train(made, {"1e-3": 1.0, "2e-3": 1.0, "1e-4": 0.5, "3e-4": 0.7})
    assert measure_experiment(TOY, [1, 2], **arguments) == 0
    assert made == ["lower-seed1", "first-seed2", "lower-seed2", "like-the-first-seed2"]

    # A point with other words is another point: only it is made again.
    made.clear()
    changed = replace(TOY, points=TOY.points | {"lower": ("optim.lr=3e-4",)})
    assert measure_experiment(changed, [1, 2], **arguments) == 0
    assert made == ["lower-seed1", "lower-seed2"]


def test_a_run_that_another_experiment_has_made_is_not_made_again(tmp_path):
    made = []
    train = toy_train(made, {"1e-3": 1.0, "2e-3": 1.5, "1e-4": 0.5})
    for name, rows in {"toy": "the same", "same": "the same", "other": "another"}.items():
        (tmp_path / "work" / name).mkdir(parents=True)
        (tmp_path / "work" / name / "1.jsonl").write_text(rows)
        measure_experiment(
            replace(TOY, name=name, points={"first": ()}), [1], work=tmp_path / "work", results=tmp_path, train=train
        )
    # `same` has the settings and the rows of `toy`; the rows of `other` are others in a file of the same name.
    assert made == ["first-seed1", "first-seed1"]
    assert (tmp_path / "work" / "same" / "runs" / "first-seed1").is_symlink()
    kept = [json.loads((tmp_path / f"{name}.json").read_text())["points"]["first"]["1"] for name in ("toy", "same")]
    assert kept[0] == kept[1]


def test_a_difference_counts_only_if_the_seeds_do_not_meet(tmp_path):
    train = toy_train([], {"1e-3": 1.0, "2e-3": 1.05, "1e-4": 0.5})
    measure_experiment(TOY, [1, 2, 3], work=tmp_path / "work", results=tmp_path, train=train)
    record = json.loads((tmp_path / "toy.json").read_text(encoding="utf-8"))
    assert MAKER["table"](TOY, record).splitlines()[2:5] == [
        "| first | 1.20 (1.10 to 1.30) | - | 8 |",
        "| lower | 0.70 (0.60 to 0.80) | -0.50, better | 8 |",
        "| like the first | 1.25 (1.15 to 1.35) | none | 8 |",
    ]


def test_a_page_that_names_no_experiment_is_refused():
    with pytest.raises(SystemExit, match="experiment nonesuch: is not in"):
        MAKER["page"]("<!-- begin experiment: nonesuch -->\n<!-- end -->")


def test_an_experiment_without_numbers_has_no_table(tmp_path, monkeypatch):
    monkeypatch.setitem(MAKER["page"].__globals__, "RESULTS", tmp_path)
    text = "before\n<!-- begin experiment: dirty -->\nan old table\n<!-- end -->\nafter"
    assert MAKER["page"](text) == "before\n<!-- begin experiment: dirty -->\n<!-- end -->\nafter"
