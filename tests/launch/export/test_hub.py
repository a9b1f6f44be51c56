"""`shardtune export to=hub:`: what is written offline is what is pushed, with results where the hub looks for them."""

import json
import subprocess
import sys

import pytest
import yaml

from tests.helpers.hub import hub
from tests.helpers.launching import command_here
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data
from trainer.checkpoints.manifest import manifest_sha256
from trainer.reporting.documents.facts import ModelFacts
from trainer.reporting.documents.hub_results import write_hub_results
from trainer.reporting.results import KeptReport

NAME = "someone/tuned"


@pytest.fixture(scope="module", name="run")
def _run(tmp_path_factory):
    """A run of LoRA whose last checkpoint was evaluated: the report as `shardtune evaluate` keeps it."""
    root = tmp_path_factory.mktemp("hub")
    model = tiny_model_dir(root / "model", "llama", pad_token_id=2)
    tiny_tokenizer().save_pretrained(model)
    data = write_chat_data(root / "train.jsonl", 16)
    words = [f"model.path={model}", f"data.path={data}", f"data.cache_dir={root / 'cache'}", "batch.global=4"]
    words += ["batch.micro=4", "budget.steps=2", "logging.wandb=disabled", "run.device=cpu", "tuning=lora"]
    run = root / "run"
    assert command_here(["train", *words, "export.at_end=false", f"run.dir={run}"]) == 0
    facts = root / "facts.jsonl"
    facts.write_text(json.dumps({"prompt": "hello\n", "completion": "you"}) + "\n")
    words = ["evaluation.tasks.facts.kind=exact_match", f"evaluation.tasks.facts.path={facts}"]
    words += ["evaluation.tasks.facts.write.max_new_tokens=2", "evaluation.resamples=100", "run.device=cpu"]
    assert command_here(["evaluate", str(run), *words]) == 0
    return run


@pytest.fixture(name="there")
def _there(tmp_path, monkeypatch):
    """(root of the hub, what was asked); the hub's client, which reads its address when it is imported, asks there."""
    with hub(tmp_path / "site") as (address, asked):
        for name, value in (("ENDPOINT", address), ("HF_HUB_DISABLE_XET", True), ("HF_HUB_OFFLINE", False)):
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield tmp_path / "site" / "models", asked


def files(folder):
    """Content by name; .gitattributes is the hub's own."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_hub_push_has_what_a_dry_run_wrote(run, there, capsys):
    root, asked = there
    words = [f"to=hub:{NAME}", "benchmarks={facts: owner/facts/easy}"]
    assert command_here(["export", str(run), *words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    folder = run / "hub" / "someone--tuned"
    written = files(folder)
    assert "not pushed" in said and "private repository someone/tuned" in said and "adapter_model.safetensors" in said
    assert command_here(["export", str(run), *words]) == 0
    told = capsys.readouterr()
    assert files(root / NAME) == files(folder) and written.keys() == files(folder).keys()
    for name in written.keys() - {"README.md", "adapter_config.json"}:  # with a date; with peft's sets, in any order
        assert written[name] == files(folder)[name], name
    assert any(line.startswith("POST /api/repos/create") for line in asked) and "PUT /large" in asked
    assert "hf_test" not in told.out + told.err

    about = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    (result,) = about["model-index"][0]["results"]
    metric = result["metrics"][0]
    assert result["dataset"]["name"] == "facts.jsonl" and metric["type"] == "exact_match"
    report = json.loads((run / "evaluation.json").read_text())
    assert metric["value"] == report["tasks"]["facts"]["metrics"]["exact_match"]["value"]
    (entry,) = yaml.safe_load((folder / ".eval_results" / "facts.yaml").read_text())
    assert entry["dataset"] == {"id": "owner/facts", "task_id": "easy"} and entry["value"] == metric["value"]

    assert command_here(["export", str(run), *words]) == 0, "it is there now, and private"
    assert sum("repos/create" in line for line in asked) == 1


def test_a_public_repository_is_not_pushed_to_unasked(run, there, capsys):
    root, asked = there
    (root / NAME).mkdir(parents=True)
    assert command_here(["export", str(run), f"to=hub:{NAME}"]) == 64
    assert "and public; say hub.private=false" in capsys.readouterr().err
    assert not any("commit" in line for line in asked) and not files(root / NAME)


def test_hub_push_that_cannot_be_is_refused_before_anything_is_written(run, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for words, said in (
        (["to=hub:tuned"], "name the owner too"),
        (["to=hub:a/b/c"], "is no name of a repository"),
        (["to=hub:a/b", "hub.private=maybe"], "must be true or false"),
        (["to=hub:a/b"], "needs a token"),
        (["--dry-run"], "goes with to=hub:"),
        ([f"to={tmp_path / 'x'}", "hub.private=false"], "goes with to=hub:"),
        (["to=hub:a/b", "--dry-run", "benchmarks=[x]"], "must be data sets of the hub by task"),
    ):
        assert command_here(["export", str(run), *words]) == 64
        assert said in capsys.readouterr().err
    assert not (run / "hub" / "a--b").exists()


def test_results_are_only_claimed_of_data_that_the_hub_has(tmp_path):
    metrics = {"exact_match": {"value": 0.25, "low": 0.2, "high": 0.3}, "f1": {"value": 0.5}}
    task = {"kind": "exact_match", "path": "hub:org/set", "num_rows": 8, "metrics": metrics}
    report = {"model": {"artefact": "a1"}, "tasks": {"mine": task, "local": {**task, "path": "/data/secret.jsonl"}}}
    facts = ModelFacts(artefact="a1", reports=[KeptReport("evaluation", tmp_path, report)])
    (written,) = write_hub_results(tmp_path, facts)
    (entry,) = yaml.safe_load(written.read_text())
    assert written.name == "mine.yaml" and entry["dataset"]["id"] == "org/set" and entry["value"] == 0.25
    assert "8 rows, 95 % interval 0.2 to 0.3" in entry["notes"]
    facts.benchmarks = {"local": "org/other/part"}
    entries = [yaml.safe_load(file.read_text())[0]["dataset"] for file in write_hub_results(tmp_path, facts)]
    assert entries == [{"id": "org/set", "task_id": "default"}, {"id": "org/other", "task_id": "part"}]
    facts.artefact = "another"
    assert write_hub_results(tmp_path, facts) == []


def test_hub_push_reports_the_checkpoint_that_is_exported(run):
    report = json.loads((run / "evaluation.json").read_text())
    assert report["model"]["artefact"] == manifest_sha256(max((run / "checkpoints").glob("step-*")))


@pytest.mark.parametrize("benchmarks", ["{a: b}", "[owner/name]", "{a: owner/name/task/more}", "{a: ["])
def test_benchmarks_that_name_no_data_set_of_the_hub_are_refused(benchmarks):
    program = f"from launch.export.hub import parse_benchmark_data_sets\nparse_benchmark_data_sets({benchmarks!r})"
    # -O leaves out asserts, by which such values were refused.
    done = subprocess.run([sys.executable, "-O", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "must be data sets of the hub by task" in done.stderr
