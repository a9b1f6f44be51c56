"""A run directory of somebody else's is data: each way out of it, tried on a reader who never typed it, and on who did.

Author and reader have homes of their own: what each typed before is kept below `XDG_STATE_HOME`.
"""

import json
import os
import shlex
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from launch.config import trusted_values
from launch.config.code_digest import NoDigest, task_code_digest
from launch.config.compose import apply_overrides, compose_config, load_frozen_config, recompose_frozen_config
from launch.config.frozen import _identifying_settings, _settings_sha256
from launch.config.known_settings import all_settings
from launch.config.outside_values import values_needing_consent
from launch.config.read_run import may_write_results
from launch.evaluate.plan import GROUPS_BESIDE_RUN
from strategies.settings import Reach, setting
from tests.helpers.building import model_dir
from tests.helpers.endpoint import serving
from tests.helpers.launching import ROOT, command_here
from trainer.config.reach import reach_of
from trainer.config.tree import metadata_by_key
from trainer.data.config import SourceConfig
from trainer.evaluation.base import TaskConfig
from trainer.model.config import ModelConfig
from trainer.objectives.base import TeacherConfig
from trainer.objectives.distillation import DistillationConfig
from trainer.objectives.frozen_model import teacher_model

HARNESS = find_spec("lm_eval") is not None
EVERYTHING = ["model", *(["task"] if HARNESS else []), "sent", "verdicts"]
ROWS = [{"prompt": f"question {n}?\n", "completion": f"answer {n}"} for n in range(8)]
TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast

class Theirs(PreTrainedTokenizerFast):
    def __init__(self, *words, **settings):
        super().__init__(*words, **settings)
        Path({marker!r}).touch()
"""
HARNESS_TASK = """
task: theirs
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: !function functions.text
doc_to_target: "{{{{completion}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 2}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
FUNCTIONS = """
from pathlib import Path

def text(row):
    Path({marker!r}).touch()
    return row["prompt"]
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The author's run, which reaches out in every way; what it sends, runs and writes can be looked at."""
    root = tmp_path_factory.mktemp("read_run")
    model_dir(root)
    (root / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    ran = {name: root / f"{name}-ran" for name in ("model", "task")}
    (root / "llama" / "theirs.py").write_text(TOKENIZER.format(marker=str(ran["model"])))
    about = json.loads((root / "llama" / "tokenizer_config.json").read_text())
    about |= {"auto_map": {"AutoTokenizer": [None, "theirs.Theirs"]}, "tokenizer_class": "Theirs"}
    (root / "llama" / "tokenizer_config.json").write_text(json.dumps(about))
    (root / "task").mkdir()
    (root / "task" / "theirs.yaml").write_text(HARNESS_TASK.format(rows=root / "rows.jsonl"))
    (root / "task" / "functions.py").write_text(FUNCTIONS.format(marker=str(ran["task"])))
    with serving(chat=lambda body: "Grade: 7") as stub, pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(root / "modules"))
        patch.setenv("JUDGE_CREDENTIAL", "only-the-judge-knows")
        made = SimpleNamespace(root=root, stub=stub, ran=ran, patch=patch, run=root / "run")
        made.home = lambda name: patch.setenv("XDG_STATE_HOME", str(root / name))
        made.home("author")
        assert command_here(["train", *words_of(made)]) == 0
        assert {*what_happened(made)} == {*EVERYTHING}, "what this run does could not be seen"
        yield made


def words_of(site):
    """What the author types to train."""
    root, tasks = site.root, "evaluation.tasks"
    words = [f"model.path={root}/llama", f"data.path={root}/rows.jsonl", f"data.eval_path={root}/rows.jsonl"]
    words += [
        "tuning=lora",
        "budget.steps=1",
        "batch.global=4",
        "batch.micro=4",
        "run.threads=1",
        f"run.dir={site.run}",
    ]
    words += ["model.trust_remote_code=true", f"data.cache_dir={root}/cache", "export.at_end=false"]
    words += ["logging.wandb=offline", "logging.entity=the-author", "logging.tables=true", "evaluation.at_start=false"]
    words += [f"{tasks}.q.kind=judge", f"{tasks}.q.path={root}/rows.jsonl", f"{tasks}.q.write.max_new_tokens=2"]
    words += [f"evaluation.judge.url={site.stub.url}", "evaluation.judge.model=judge-1"]
    words += ["evaluation.judge.key_env=JUDGE_CREDENTIAL", f"evaluation.judge.cache_dir={root}/verdicts"]
    if HARNESS:
        words += [f"{tasks}.theirs.kind=lm_eval", f"{tasks}.theirs.path={root}/task"]
    return words


@pytest.fixture(autouse=True)
def nothing_happened(site):
    """Before each test: nothing was sent, run or written, and the reader has typed nothing."""
    site.stub.requests.clear()
    shutil.rmtree(site.root / "verdicts", ignore_errors=True)
    shutil.rmtree(site.root / "reader", ignore_errors=True)
    for marker in site.ran.values():
        marker.unlink(missing_ok=True)
    site.home("reader")


def what_happened(site):
    """Everything that reached out."""
    happened = [name for name, marker in site.ran.items() if marker.exists()]
    happened += ["sent"] if site.stub.requests else []
    happened += ["verdicts"] if (site.root / "verdicts").exists() else []
    return happened


def of_somebody(site, place, **changes):
    """The author's run with other settings, whose hash fits, as somebody who means harm would write it."""
    shutil.copytree(site.run, place)
    text = (place / "config.yaml").read_text()
    tree = OmegaConf.create(text)
    for key, value in changes.items():
        OmegaConf.update(tree, key, value, merge=False)
    plain = OmegaConf.to_container(tree)
    (place / "config.yaml").write_text(
        f"# sha256: {_settings_sha256(_identifying_settings(plain))}\n{OmegaConf.to_yaml(tree)}"
    )
    return place


def refused(capfd, way):
    """What is said of a command that the reader must allow first: (all of it, the command to paste)."""
    assert command_here([*map(str, way)]) == 64, way
    shown = capfd.readouterr().err
    assert "1 problem\n" in shown and "reaches out of the run" in shown and "Traceback" not in shown
    pasted = next(line for line in shown.splitlines() if line.startswith(f"      shardtune {way[0]} "))
    return shown, shlex.split(pasted)[1:]


def test_foreign_run_gets_nothing_of_its_reader(site, tmp_path, capfd):
    """Address with variable, code of the model and of a task, files, places, trackers: by every verb that reads a run."""
    took = {"device_name": "NVIDIA A10G", "step_s": 1.0}
    facts = json.loads((site.run / "run.json").read_text())
    facts |= {"device": "cuda:0", "receipt": {"predicted": {}, "measured": took}}
    theirs = of_somebody(site, tmp_path / "theirs")
    (theirs / "run.json").write_text(json.dumps(facts))
    before = sorted(path.name for path in theirs.iterdir())
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "who?"}\n')
    mine, code = model_dir(tmp_path), "model.trust_remote_code=true"
    task = ["evaluation.tasks.q.kind=exact_match", f"evaluation.tasks.q.path={site.root}/rows.jsonl"]
    evaluated = [code, f"evaluation.judge.url={site.stub.url}", "evaluation.judge.key_env=JUDGE_CREDENTIAL", task[1]]
    evaluated += [f"evaluation.judge.cache_dir={site.root}/verdicts"]
    evaluated += [f"evaluation.tasks.theirs.path={site.root}/task"] if HARNESS else []
    ways = [
        (["evaluate", theirs], evaluated),
        (["export", theirs, f"to={tmp_path}/out"], [code]),
        (["review", "make", theirs, f"prompts={prompts}"], [code]),
        (["plan", f"model.path={mine}", "hardware=a10g", f"from={theirs}"], [f"from.{code}"]),
        (["evaluate", f"model.path={mine}", *task, f"against={theirs}"], [f"against.{code}"]),
    ]
    for way, words in ways:
        shown, pasted = refused(capfd, way)
        assert {*pasted} == {*map(str, way), *words}
        assert str(site.root / "reader" / "shardtune") in shown, "the directory that a container must mount"
        assert what_happened(site) == [], way
    assert sorted(path.name for path in theirs.iterdir()) == before and not (tmp_path / "out").exists()


def test_foreign_run_values_that_the_reader_allows_are_used_and_remembered(site, tmp_path, capfd):
    theirs = of_somebody(site, tmp_path / "theirs")
    way = ["evaluate", theirs, "evaluation.resamples=2", f"to={tmp_path}/report"]
    _, pasted = refused(capfd, way)
    assert command_here(pasted) == 0
    shown = capfd.readouterr().err
    assert (
        f"{theirs}: not used, since you have not typed it before: data.cache_dir, logging.wandb, logging.entity"
        in shown
    )
    assert {*what_happened(site)} == {*EVERYTHING}
    used = load_frozen_config(tmp_path / "report" / "evaluation" / "job.yaml")
    assert (used.logging.entity, used.logging.tables) == (None, False), "the reader's rows would go to the author's W&B"
    assert command_here([*map(str, way)]) == 0
    kept = [path for path in trusted_values.trusted_values_directory().rglob("*") if path.is_file()]
    assert kept and {path.stat().st_mode & 0o777 for path in kept} == {0o600}
    assert (trusted_values.trusted_values_directory() / "typed").stat().st_mode & 0o777 == 0o700


def test_own_run_asks_for_nothing_also_when_it_was_copied(site, tmp_path, capfd, monkeypatch):
    site.home("author")
    copied = tmp_path / "copied"
    shutil.copytree(site.run, copied)
    monkeypatch.chdir(tmp_path)
    assert command_here(["evaluate", str(copied), "evaluation.resamples=2"]) == 0
    assert {*what_happened(site)} == {*EVERYTHING}
    assert load_frozen_config(copied / "evaluation" / "job.yaml").logging.entity == "the-author"
    assert (copied / "evaluation.json").exists() and list(copied.glob("evaluation/wandb/offline-run-*"))
    site.ran["model"].unlink()
    assert command_here(["export", str(copied), f"to={tmp_path}/out"]) == 0
    assert what_happened(site).count("model") and "not used" not in capfd.readouterr().err


def test_foreign_run_variable_and_its_address_are_allowed_as_one_value(site, tmp_path, capfd, monkeypatch):
    """An address of the reader's does not bring the variable that somebody else's run names, nor the other way round."""
    theirs = of_somebody(
        site, tmp_path / "theirs", **{"model.trust_remote_code": False, "evaluation.judge.key_env": "OF_THE_READER"}
    )
    monkeypatch.setenv("OF_THE_READER", "not-to-be-told")
    only = ["evaluation.tasks=[]", "evaluation.tasks.q.kind=judge", f"evaluation.tasks.q.path={site.root}/rows.jsonl"]
    for typed in (f"evaluation.judge.url={site.stub.url}", "evaluation.judge.key_env=OF_THE_READER"):
        shown, _ = refused(capfd, ["evaluate", theirs, *only, typed, f"to={tmp_path}/report"])
        assert "your environment variable OF_THE_READER" in shown
    assert what_happened(site) == []


def test_foreign_run_code_is_known_by_its_files_and_asked_for_when_they_change(site, tmp_path):
    site.home("author")
    config = load_frozen_config(site.run / "config.yaml")
    known = {
        value.effect
        for value in values_needing_consent(config)
        if trusted_values.was_value_allowed_before(value.identity)
    }
    assert any("runs the Python code" in effect for effect in known)
    moved = tmp_path / "moved"
    shutil.copytree(site.root / "llama", moved)
    config.model.path = str(moved)

    def code():
        return next(value for value in values_needing_consent(config) if "model.trust_remote_code" in value.settings)

    assert trusted_values.was_value_allowed_before(code().identity)
    (moved / "rows.txt").write_text("no code")
    assert trusted_values.was_value_allowed_before(code().identity)
    (moved / "theirs.py").write_text((moved / "theirs.py").read_text() + "# more\n")
    assert not trusted_values.was_value_allowed_before(code().identity)
    about = json.loads((moved / "tokenizer_config.json").read_text())
    about["auto_map"] = {"AutoTokenizer": [None, f"{tmp_path}/elsewhere.Theirs"]}
    (moved / "tokenizer_config.json").write_text(json.dumps(about))
    assert code().identity is None, "the file may lie anywhere, and be changed by anybody"


def test_foreign_run_code_counts_if_not_here_yet_or_spelled_otherwise(tmp_path):
    """Names of code in escaped JSON, a hub model that would be fetched, a linked folder."""
    config = compose_config(["model.path=m", "data.path=d", "budget.steps=1"], check=False).config
    elsewhere, model = tmp_path / "elsewhere", tmp_path / "model"
    elsewhere.mkdir(), model.mkdir()
    (elsewhere / "x.py").write_text("")
    config.model.path, config.model.trust_remote_code = str(model), True
    (model / "config.json").write_text("{}")
    assert values_needing_consent(config) == [], "there is no code"
    (model / "config.json").write_text(json.dumps({"auto_map": f"{elsewhere}--x.X"}).replace("auto", "\\u0061uto"))
    [value] = values_needing_consent(config)
    (elsewhere / "x.py").write_text("changed")
    assert value.identity != values_needing_consent(config)[0].identity
    (model / "config.json").write_text('{"auto_map": "nobody/fetched-this--x.X"}')
    assert values_needing_consent(config)[0].identity is not None, "it is not fetched, and cannot run"
    config.model.download = True
    assert values_needing_consent(config)[0].identity is None
    (model / "folder").symlink_to(elsewhere)
    config.model.download = False
    before = values_needing_consent(config)[0].identity
    (elsewhere / "x.py").write_text("changed again")
    assert values_needing_consent(config)[0].identity != before
    (model / "folder").unlink()
    # transformers takes this file in place of config.json.
    (model / "config.json").write_text('{"configuration_files": ["config.5.0.0.json"]}')
    (model / "config.5.0.0.json").write_text(json.dumps({"auto_map": {"AutoConfig": f"{elsewhere}/x.X"}}))
    assert values_needing_consent(config)[0].identity is None
    config.model.path, config.model.download = "nobody/has-this", True
    by_setting = {key: each.identity for each in values_needing_consent(config) for key in each.settings}
    assert by_setting["model.trust_remote_code"] == {"code_of": "nobody/has-this"}


def test_foreign_run_fetches_nothing_before_the_reader_allows_it(site, tmp_path, monkeypatch, capfd):
    """A record may name a commit of a hub model that this machine does not have."""
    hub = {"model.path": "nobody/has-this", "model.tokenizer": "nobody/has-that", "model.download": True}
    theirs = of_somebody(site, tmp_path / "theirs", **hub)
    (theirs / "run.json").write_text(json.dumps({"base_commit": "0" * 40}))
    wanted = []

    def snapshot_download(name, *, local_files_only, **_):
        wanted.extend([] if local_files_only else [name])
        raise OSError("not here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    shown, _ = refused(capfd, ["export", theirs, f"to={tmp_path}/out"])
    assert "it fetches and runs the Python code of nobody/has-this" in shown and wanted == []


def test_foreign_run_lm_eval_task_is_known_by_all_that_it_loads_and_nothing_else(tmp_path):
    folder, beside = tmp_path / "tasks", tmp_path / "beside"
    (folder / "runs").mkdir(parents=True), beside.mkdir()
    task = folder / "mine.yaml"
    (beside / "common.txt").write_text("doc_to_text: !function called.text\n")
    (beside / "called.py").write_text("")
    (beside / "deep.py").write_text("")
    deep = str(beside / "deep").replace("/", ".")
    task.write_text(f"include: ../beside/common.txt\ntask: mine\ndoc_to_target: !function {deep}.target\n")
    for path in (task, folder):
        for file in (beside / "common.txt", beside / "called.py", beside / "deep.py", task):
            before = task_code_digest(path)
            file.write_text(file.read_text() + "# more\n")
            assert task_code_digest(path) != before, (path, file)
    before = task_code_digest(task)
    (folder / "runs" / "config.yaml").write_text("a run of the user's")
    assert task_code_digest(task) == before, "the own task would be asked for after each run"
    (folder / "again.yaml").write_text("a: &a [*a]\n")
    task_code_digest(folder)
    for broken in ("a: [", 'include: "\\0"'):
        (beside / "common.txt").write_text(broken)
        with pytest.raises(NoDigest):
            task_code_digest(task)


def test_foreign_run_task_name_does_not_pass_for_a_setting():
    config = compose_config(["model.path=m", "data.path=d", "budget.steps=1"], check=False).config
    for name, path in (("x.kind", "/somewhere/task.yaml"), ("a.b", "/somewhere/task.yaml"), ("plain", "auto")):
        config.evaluation.tasks = {name: TaskConfig(kind="lm_eval", path=path)}
        assert any(path in str(value.settings) for value in values_needing_consent(config)), name
    config.evaluation.tasks = {}
    config.data.sources = {"c4.en": SourceConfig(path="d")}
    assert values_needing_consent(config) == []


def test_foreign_run_directory_of_another_user_is_not_written(site, tmp_path, monkeypatch):
    site.home("author")
    theirs = of_somebody(site, tmp_path / "theirs", **{"evaluation.tasks": {}, "logging.tables": False})
    before = sorted(path.name for path in theirs.iterdir())
    monkeypatch.chdir(tmp_path)
    another = SimpleNamespace(environ=os.environ, geteuid=lambda: theirs.stat().st_uid + 1)
    monkeypatch.setattr("launch.config.read_run.os", another)  # what was typed before stays the reader's
    task = ["evaluation.tasks.q.kind=exact_match", f"evaluation.tasks.q.path={site.root}/rows.jsonl"]
    assert command_here(["evaluate", str(theirs), *task, "evaluation.tasks.q.write.max_new_tokens=2"]) == 0
    assert (tmp_path / "runs" / "evaluate-theirs" / "evaluation.json").exists()
    assert sorted(path.name for path in theirs.iterdir()) == before


def test_foreign_run_link_does_not_decide_where_results_are_written(tmp_path):
    run, other = tmp_path / "downloaded", tmp_path / "other"
    run.mkdir(), other.mkdir()
    (run / "config.yaml").touch()
    assert may_write_results(run)
    (run / "evaluation").symlink_to(other)
    assert not may_write_results(run)
    (run / "evaluation").unlink()
    (run / "evaluation" / "logs").mkdir(parents=True)
    assert may_write_results(run)
    log = run / "evaluation" / "logs" / "rank-0.log"
    log.symlink_to(other / "rc")  # which is not there yet
    assert not may_write_results(run)
    log.unlink()
    log.symlink_to(run / "elsewhere.log")
    assert may_write_results(run), "a link within the run"
    (run / "reports").symlink_to(other)
    assert not may_write_results(run)


def test_ranks_of_an_evaluation_may_share_rows_whatever_the_run_did(site, tmp_path):
    """The held-out loss of a document that fits no single rank needs them."""
    config = load_frozen_config(of_somebody(site, tmp_path / "theirs") / "config.yaml")
    assert recompose_frozen_config(config, ["parallel.sequence=2"], GROUPS_BESIDE_RUN).parallel.sequence == 2


def test_foreign_run_configuration_resolves_nothing_when_it_is_evaluated(site, tmp_path, monkeypatch):
    monkeypatch.setenv("OF_THE_READER", "not-to-be-told")
    theirs = of_somebody(site, tmp_path / "theirs")
    config = load_frozen_config(theirs / "config.yaml")
    config.logging.notes = "${oc.env:OF_THE_READER}"
    for again in (
        recompose_frozen_config(config, ["evaluation.batch=2"], GROUPS_BESIDE_RUN),
        apply_overrides(config, ["model.download=false"]),
    ):
        assert again.logging.notes == "${oc.env:OF_THE_READER}"
    assert (
        recompose_frozen_config(config, ["logging.notes='${oc.env:OF_THE_READER}'"], GROUPS_BESIDE_RUN).logging.notes
        == "not-to-be-told"
    )


def test_teacher_code_is_trusted_by_its_own_setting(site):
    model = ModelConfig(path="student", trust_remote_code=True)
    teacher = DistillationConfig(teacher=TeacherConfig(path="teacher"))
    assert not teacher_model(model, teacher).trust_remote_code
    teacher.teacher.trust_remote_code = True
    assert teacher_model(ModelConfig(path="student"), teacher).trust_remote_code
    composed = [
        compose_config(
            ["model.path=m", "budget.steps=3", "objective=distillation", "objective.teacher.path=t", *more], check=False
        )
        for more in ([], ["objective.teacher.trust_remote_code=true"])
    ]
    assert composed[0].sha256 == composed[1].sha256, "an earlier run could not go on with the word"


def test_training_goes_on_where_allowed_values_cannot_be_stored(site, monkeypatch, capsys):
    config = load_frozen_config(site.run / "config.yaml")
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    trusted_values.remember_config(config)
    [line] = capsys.readouterr().err.splitlines()
    assert "cannot be written" in line and "will ask" in line
    place = site.root / "reader" / "shardtune" / "typed"
    monkeypatch.setenv("XDG_STATE_HOME", str(site.root / "reader"))
    monkeypatch.setattr(trusted_values, "MAX_VALUES", 3)
    trusted_values.remember_config(config)
    assert len([*place.iterdir()]) == 3
    place.chmod(0o777)
    assert not any(
        trusted_values.was_value_allowed_before(value.identity) for value in values_needing_consent(config)
    ), "anybody may have typed them"
    place.chmod(0o700)
    assert any(trusted_values.was_value_allowed_before(value.identity) for value in values_needing_consent(config))
    monkeypatch.setattr("launch.config.trusted_values.os.geteuid", lambda: place.stat().st_uid + 1)
    assert not any(
        trusted_values.was_value_allowed_before(value.identity) for value in values_needing_consent(config)
    ), "another user typed them"
    trusted_values.remember_config(config)
    assert "is another user's" in capsys.readouterr().err


def test_settings_say_at_their_own_field_what_they_reach():
    silent = {key for key in all_settings() if metadata_by_key()[key].reach is None}
    assert silent == set(), (
        "say at these fields whether they describe a run or reach out of it: setting(..., reach=...)"
    )
    with pytest.raises(TypeError, match="reach"):
        setting(None)  # no default: who adds a setting has to decide
    assert (
        reach_of("evaluation.tasks.facts.path") is Reach.file
        and reach_of("evaluation.tasks.facts.kind") is Reach.describes
    )
    with pytest.raises(KeyError):
        reach_of("model.invented")


def test_verbs_read_a_run_through_one_function():
    """Who reads a frozen configuration without it starts or follows what this user has started, or compares texts with it.

    `earlier_overrides.py` takes one of the budgets that were typed now. `plan.py` of evaluate asks whether a value that
    counts as a secret now is the run's own. The page of a run asks which of its settings are no defaults.
    """
    allowed = {
        "cluster/node.py",
        "cluster/oom_retry.py",
        "compare/run_page/contents.py",
        "config/earlier_overrides.py",
        "config/frozen.py",
        "config/read_run.py",
        "config/resume.py",
        "doctor/verify_rank.py",
        "evaluate/checks.py",
        "evaluate/command.py",
        "evaluate/reward_trial.py",
        "export/writing.py",
        "runs/status_lineage.py",
        "train.py",
    }
    launch = ROOT / "launch"
    readers = {
        file.relative_to(launch).as_posix()
        for file in launch.rglob("*.py")
        if "load_frozen_config(" in file.read_text(encoding="utf-8")
    }
    assert readers == allowed, f"read a run by launch.config.read_run.read_run: {readers ^ allowed}"
