"""`train -m sweeper=optuna`: the words of a space, what is refused, and real searches that are stopped and gone on with."""

import json
import math
import re
import shlex
from types import SimpleNamespace

import pytest

from launch.main import main
from launch.sweep.search import SearchProgress, metric_by_step, run_search, write_search_page
from launch.sweep.space import SearchedSetting, split_searched_settings
from launch.sweep.sweeper import plan_search
from launch.train import launch_run
from strategies.errors import ConfigError
from tests.helpers.building import model_dir
from tests.helpers.tokenizers import write_chat_data
from tests.launch.test_pages_in_browser import searched
from trainer.reporting.status import RunState, write_status


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    path = tmp_path_factory.mktemp("search")
    write_chat_data(path / "train.jsonl", 32)
    model_dir(path)
    return path


def words(site, *more: str) -> list[str]:
    shared = [f"model.path={site / 'llama'}", f"data.path={site / 'train.jsonl'}", f"data.cache_dir={site / 'cache'}"]
    return [*shared, "sweeper=optuna", "strategy=single", "debug=tiny", "run.device=cpu", "budget.steps=4", *more]


def judged(site, *more: str) -> list[str]:
    return words(site, f"data.eval_path={site / 'train.jsonl'}", *more)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("optim.lr=interval(1e-5,1e-3)", {"low": 1e-5, "high": 1e-3, "is_logarithmic": False, "is_integer": False}),
        ("optim.lr=tag(log, interval(1e-5,1e-3))", {"low": 1e-5, "high": 1e-3, "is_logarithmic": True}),
        ("tuning.rank=interval(2,8)", {"low": 2, "high": 8, "is_integer": True, "step": None}),
        ("tuning.rank=tag(log,interval(2,64))", {"low": 2, "high": 64, "is_integer": True, "is_logarithmic": True}),
        ("tuning.rank=range(1,10,4)", {"low": 1, "high": 9, "is_integer": True, "step": 4}),
        ("tuning.rank=range(1,9,4)", {"low": 1, "high": 5}),
        ("optim.lr=range(0.1,0.5,0.1)", {"low": 0.1, "high": pytest.approx(0.4), "step": 0.1, "is_integer": False}),
        ("strategy=choice(ddp,fsdp2)", {"choices": ("ddp", "fsdp2")}),
        ("tuning.targets=[q_proj],[q_proj,v_proj]", {"choices": ("[q_proj]", "[q_proj,v_proj]")}),
        ("strategy=glob(fsdp*)", None),
        ("optim.lr=1e-4", None),
        ("data.path=odd(1).jsonl", None),
    ],
)
def test_search_space_words(word, meant):
    space, shared_arguments = split_searched_settings([word])
    assert (not space, shared_arguments) == ((True, [word]) if meant is None else (False, []))
    for name, value in (meant or {}).items():
        assert getattr(space[0], name) == value, name
    if meant:
        space[0].distribution()


def test_search_value_is_run_as_it_is_shown():
    """Six digits, and never outside of the ends because of them."""
    lr = SearchedSetting("optim.lr", "", low=1.23456789e-5, high=1e-3)
    assert lr.argument(0.000234567891) == "optim.lr=0.000234568"
    assert float(lr.argument(1.0)[9:]) == 1e-3
    assert SearchedSetting("tuning.rank", "", low=1, high=8, is_integer=True).argument(4) == "tuning.rank=4"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["optim.lr=loguniform(1e-5,1e-3)"], r"optim.lr=loguniform.*: is no distribution .*; write interval\("),
        (["optim.lr=interval(3,1)"], "goes from 3 to 1; write the smaller end first"),
        (["optim.lr=tag(log,interval(0,1))"], "a logarithm needs ends above 0"),
        (["optim.lr=tag(fast,interval(1,2))"], "there is no tag fast"),
        (["strategy=tag(log,choice(ddp,fsdp2))"], "log is of numbers between two ends"),
        (["optim.lr=tag(log,range(1,9))"], "a range has steps"),
        (["optim.lr=range(9,1)"], "which has no number"),
        (["optim.lr=shuffle(range(1,9))"], "leave shuffle out"),
        (["tuning=lora", "tuning.rank=interval(1.5,8)"], "tuning.rank is a whole number"),
        (["optim.lr=1e-4,2e-4", "optim.lr=1e-3"], "optim.lr is given twice"),
        (["optim.lr=1e-4"], "no setting has several values to search"),
        (["optim.lr=interval(-1,1e-3)"], r"optim.lr=-1\S*:? "),
        (
            ["optim.lr=1e-4,2e-4", "sweeper.trails=3"],
            "there is no setting sweeper.trails; did you mean sweeper.trials?",
        ),
        (["optim.lr=1e-4,2e-4", "sweeper.trials=0"], "sweeper.trials=0: must be at least 1"),
        (["optim.lr=1e-4,2e-4", "sweeper.prune=hyperband"], "must be one of none, median"),
        (["optim.lr=1e-4,2e-4", "sweeper.prune=median", "evaluation.every_steps=0"], "every_steps=0 does not measure"),
        (
            ["optim.lr=1e-4,2e-4", "sweeper.prune=median", "evaluation.generate.samples=2", "sweeper.metric=eval/bleu"],
            "every_steps=auto does not measure eval/bleu",
        ),
        (["optim.lr=1e-4,2e-4", "sweeper=nevergrad"], "there is no such sweeper"),
        (["optim.lr=1e-4,2e-4", "sweeper.metric=accuracy"], "must name an evaluation metric"),
        (["optim.lr=1e-4,2e-4", "sweeper.metric=eval/bleu", "evaluation.watch=eval/loss"], "give one of them"),
        (["optim.lr=1e-4,2e-4", "run.dir=a,b"], "run.dir=a,b: is the same for all trials"),
        (["optim.lr=1e-4,2e-4", "launcher=slurm"], "launcher=slurm: a search starts its trials where the command runs"),
    ],
)
def test_search_refuses_what_cannot_be_searched(site, more, said):
    with pytest.raises(ConfigError, match=said):
        plan_search(judged(site, *more))


def test_search_with_bad_input_ends_with_64_and_leaves_nothing(site, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "-m", *words(site, "optim.lr=1e-4,2e-4")]) == 64
    assert "there is no evaluation data that trials could be judged by (eval/loss)" in capsys.readouterr().err
    assert main(["train", *judged(site, "optim.lr=1e-4,2e-4")]) == 64
    assert "add -m" in capsys.readouterr().err
    monkeypatch.setattr("launch.sweep.sweeper.find_spec", lambda name: None)
    assert main(["train", "-m", *judged(site, "optim.lr=1e-4,2e-4")]) == 64
    assert "pip install -e '.[search]'" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def here(name, composed, run_dir, progress):
    """In this process, which is its only rank."""
    return launch_run(composed, run_dir)


SPACE = ["optim.lr=tag(log,interval(1e-4,1e-2))", "batch.global=4,8", "sweeper.trials=3"]


def test_search_that_is_stopped_and_resumed_is_the_same_search(site, capsys):
    """Three trials, the second one stopped in its directory; the same as one that was not. One more fails, and is a row."""
    asked, base = judged(site, *SPACE, f"run.dir={site / 'stopped'}"), site / "stopped"
    begun = []

    def stopping(name, composed, run_dir, progress):
        begun.append(run_dir.name)
        if run_dir.name == "1":
            write_status(run_dir, RunState.preempted, step=1)
            return 130
        return here(name, composed, run_dir, progress)

    assert run_search(plan_search(asked), base, stopping) == 130
    assert begun == ["0", "1"] and "not done" in capsys.readouterr().out

    def noting(name, composed, run_dir, progress):
        begun.append(run_dir.name)
        return here(name, composed, run_dir, progress)

    assert run_search(plan_search(asked), base, noting) == 0
    assert begun == ["0", "1", "1", "2"], "what was done is not run again"
    out = capsys.readouterr().out
    rows = re.findall(r"^ +(\d) +([\d.]+)  done +(optim.lr=\S+ batch.global=\d)$", out, re.MULTILINE)
    assert sorted(number for number, *_ in rows) == ["0", "1", "2"]
    for number, value, _ in rows:
        last = list(metric_by_step(base / number, "eval/loss").values())[-1]
        assert value == f"{last:.6g}"
    best = min(rows, key=lambda row: float(row[1]))
    assert rows[0] == best and f"best: trial {best[0]}, eval/loss {best[1]}, in" in " ".join(out.split())
    assert shlex.split(out.splitlines()[-1]) == best[2].split()
    # Drawn of the number alone: a search that was not stopped has the same words, here of trials that all fail.
    again = site / "whole"

    def failing(name, composed, run_dir, progress):
        raise ConfigError("the reason is " + "long " * 40)

    assert run_search(plan_search(judged(site, *SPACE, f"run.dir={again}")), again, failing) == 64
    failed = capsys.readouterr().out
    assert "there is no best one" in failed
    for number, _, text in rows:
        assert re.search(rf"^ +{number} +-  failed +{re.escape(text)}$", failed, re.MULTILINE)

    # More trials of the same search: one that fails stays a row, with its reason and in 80 columns.
    more = [*asked[:-1], "sweeper.trials=4", asked[-1]]
    assert run_search(plan_search(more), base, failing) == 0, "others are done"
    out = capsys.readouterr().out
    assert "failed" in out and "the reason is long long" in out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    page = (base / "search.html").read_text()
    assert f"Best: trial {best[0]}, eval/loss" in page and f"shardtune export {base / best[0]}" in page
    assert "Trials that failed" in page and "the reason is long long" in page
    assert page.count("<figcaption>") == 2 and page.count("<title>trial ") == 2 * 3, (
        "a drawing a setting, a point a trial"
    )
    with pytest.raises(ConfigError, match=r"sweeper.seed: 0 there, 1 here"):
        run_search(plan_search([*asked, "sweeper.seed=1"]), base, here)


def test_pruning_and_words_that_came_before(site, monkeypatch, capsys):
    """A trial behind the median is asked to stop as by `stop`, and told as pruned; the same words are not run twice."""
    base, sent = site / "pruned", []
    asked = judged(
        site, "run.seed=range(0,1000)", "sweeper.trials=7", "sweeper.prune=median", "evaluation.every_steps=2"
    )
    monkeypatch.setattr("launch.sweep.search.os.kill", lambda pid, number: sent.append(number))

    def told(name, composed, run_dir, progress):
        run_dir.mkdir(parents=True)
        progress.start_run(name, run_dir, 4)
        value = {"5": 8.0, "6": 9.0}.get(run_dir.name) or 2.0 - int(run_dir.name) / 10
        for step in (0, 2, 4):
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "eval/loss": value}) + "\n")
            if run_dir.name != "5":  # which ends before anybody looks: there is nothing left to stop
                progress.update()
            if sent:
                write_status(run_dir, RunState.preempted, step=step)
                return 75
        return 0

    assert run_search(plan_search([*asked, f"run.dir={base}"]), base, told) == 0
    out = capsys.readouterr().out
    assert len(sent) == 1 and re.search(r"^ +6 +9  pruned +run.seed=\d+$", out, re.MULTILINE)
    assert "behind the median at step 2" in out

    # A metric that no evaluation has ends the search with the first one.
    sent.clear()
    other = judged(site, "run.seed=1,2", "sweeper.metric=eval/foo", f"run.dir={site / 'other'}")
    with pytest.raises(ConfigError, match=r"sweeper.metric=eval/foo: the evaluations yield eval/loss; name one"):
        run_search(plan_search(other), site / "other", told)
    assert len(sent) == 1 and not (site / "other/1").exists()

    two = site / "twins"
    sent.clear()
    asked = judged(site, "run.seed=1,2", "sweeper.trials=4", f"run.dir={two}")
    assert run_search(plan_search(asked), two, told) == 0
    assert "the same settings as trial" in capsys.readouterr().out
    assert len(list(two.glob("*/metrics.jsonl"))) == 2


def test_page_of_a_search_leaves_out_what_has_no_place_and_never_ends_the_search(tmp_path, capsys):
    study, search = searched()
    trials = study.get_trials(deepcopy=False)
    trials[3].value = math.inf
    page = write_search_page(study, search, tmp_path).read_text()
    assert "infinite" in page and "nan" not in page.split("<svg")[1].split("</svg>")[0]
    (tmp_path / "full" / "search.html").mkdir(parents=True)
    assert write_search_page(study, search, tmp_path / "full") is None
    assert "no search.html: " in capsys.readouterr().err


def test_report_that_the_journal_could_not_take_is_repeated(tmp_path):
    """The disk may be full for a moment: the evaluation must not be missing in the study for good."""
    reported = {}
    is_disk_full = True

    def report(value, step):
        if is_disk_full:
            raise OSError("no space left on device")
        reported[step] = value

    study = SimpleNamespace(get_trials=lambda deepcopy: [SimpleNamespace(intermediate_values={})])
    trial = SimpleNamespace(number=0, study=study, report=report)
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "eval/loss": 2.5}\n')
    progress = SearchProgress(1, trial, tmp_path, "eval/loss", prune=False)
    with pytest.raises(OSError, match="no space"):
        progress.report_evaluations()
    is_disk_full = False
    progress.report_evaluations()
    progress.report_evaluations()
    assert reported == {5: 2.5}
