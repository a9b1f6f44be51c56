"""Energy of hosts: what codecarbon says of a real run stands in the record and the card, and a meter that fails ends nothing."""

import importlib.util
import json

import pytest

from launch.config.compose import compose_config
from strategies.errors import ConfigError
from tests.helpers.launching import command_here
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data
from trainer.reporting import energy
from trainer.reporting.documents.compute import training_compute
from trainer.reporting.run_record import RunOutcome, RunRecord

THERE = importlib.util.find_spec("codecarbon") is not None


def words(root, name, *more):
    given = ["run.device=cpu run.threads=1 launcher.processes=1 strategy=single logging.wandb=disabled batch.global=4"]
    given = [*given[0].split(), "batch.micro=2", "budget.steps=1", "logging.report=false", "logging.energy=DEU"]
    return [*given, f"model.path={root / 'model'}", f"data.path={root / 'rows.jsonl'}", f"run.dir={root / name}", *more]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    root = tmp_path_factory.mktemp("energy")
    tiny_tokenizer().save_pretrained(tiny_model_dir(root / "model", "llama"))
    write_chat_data(root / "rows.jsonl", 8)
    return root


@pytest.mark.skipif(not THERE, reason="needs codecarbon")
def test_energy_of_a_run_is_in_its_record_and_card(site):
    assert command_here(["train", *words(site, "run")]) == 0
    (path,) = (site / "run" / "energy").glob("*.json")
    said, record = json.loads(path.read_text()), json.loads((site / "run" / "run.json").read_text())["energy"]
    assert record["kwh"] == said["kwh"] > 0 and record["hosts"] == 1
    assert said["kwh"] == pytest.approx(said["gpu_kwh"] + said["cpu_kwh"] + said["memory_kwh"])
    card = (site / "run" / "export" / "README.md").read_text()
    assert f"energy: {said['kwh']:.3g} kWh (an estimate by {said['by']}, of 1 host(s)" in card and "of DEU)" in card
    other = {"kwh": 2.0, "kg_co2e": 1.0, "hours": 3.0, "country": "DEU", "by": "codecarbon", "host": "n2"}
    (path.parent / "9-n2.json").write_text(json.dumps(other))
    (path.parent / "9-n3.json").write_text("{")  # killed amid its first
    both = energy.energy_of_run(site / "run")
    assert (both["kwh"], both["hosts"]) == (pytest.approx(2.0 + said["kwh"]), 2)


def test_energy_meter_that_fails_is_reported_and_ends_nothing(site, monkeypatch, capsys):
    monkeypatch.setattr(energy, "find_spec", lambda name: True)

    def broken(self):
        raise RuntimeError("no such counter")

    monkeypatch.setattr(energy._Meter, "_create_codecarbon_tracker", broken)
    assert command_here(["train", *words(site, "broken", "export.at_end=false")]) == 0
    assert "energy is not measured on" in (said := capsys.readouterr().out) and "no such counter" in said
    assert json.loads((site / "broken" / "run.json").read_text())["energy"] is None


def test_energy_without_a_meter_is_from_the_answered_watts_or_left_open():
    run = RunRecord(flops_per_token=1.0, world_size=2, outcome=RunOutcome(speed={"tokens_per_s": 100.0}))
    found = training_compute(run, {"device_watts": 500}, 360_000)
    assert (found.kwh, found.energy_source) == (1.0, "an estimate: device hours times 500 W")
    assert training_compute(run, {}, 360_000).kwh is None


def test_energy_that_cannot_be_measured_is_refused_before_anything_starts(site, monkeypatch):
    monkeypatch.setattr(energy, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package codecarbon \(pip install -e '\.\[energy\]'\)"):
        compose_config(words(site, "none"))
    with pytest.raises(ConfigError, match="must be the three letters of a country"):
        compose_config(words(site, "none", "logging.energy=Germany"))
