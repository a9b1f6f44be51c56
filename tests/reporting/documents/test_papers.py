"""Card and papers of a real run: what was measured of its weights, what people said, what nobody answered."""

import json
import re

import pytest
from huggingface_hub import ModelCard

from tests.helpers.launching import command_here
from tests.launch.review import site

PAPERS = ["datasheet", "annex_xi", "annex_xii", "training_summary", "processing"]
ANSWERS = 'provider: "Clinic | of X"\nlicence: my-own-terms\nbase_flop: 1e12\nintended_use: Notes of wards.\n'


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(run, export) of a run that was evaluated against its base and judged by two people."""
    root = tmp_path_factory.mktemp("papers")
    run = site.made(root)
    loss = ["evaluation.tasks.general.kind=loss", f"evaluation.tasks.general.path={root}/train.jsonl"]
    assert command_here(["evaluate", str(run), *loss, "against=base", "run.threads=1", "evaluation.resamples=100"]) == 0
    files = []
    for name, wins in (("ada", 2), ("bert", 3)):
        files.append(root / f"{name}.json")
        said = site.answers(run, name, lambda item, wins=wins: "other" if item["prompt"] % wins == 0 else "tuned")
        files[-1].write_text(json.dumps(said))
    assert command_here(["review", "score", str(run), *map(str, files)]) == 0
    (root / "answers.yaml").write_text(ANSWERS)
    words = [f"papers=[{','.join(PAPERS)}]", f"answers={root}/answers.yaml", f"to={root}/export"]
    assert command_here(["export", str(run), *words]) == 0
    return run, root / "export"


def test_the_card_has_metadata_that_the_hub_reads_and_every_measurement(exported):
    run, export = exported
    card = ModelCard.load(export / "README.md")
    assert card.data.license == "other" and card.data.license_name == "my-own-terms" and card.data.base_model == "llama"
    (report,) = (run / "reports").glob("evaluation-*.json")
    told = json.loads(report.read_text())
    loss, base = (
        told["tasks"]["general"]["metrics"]["loss"],
        told["against"]["tasks"]["general"]["metrics"]["loss"]["value"],
    )
    assert (
        f"| general/loss | {loss['value']:.4g} | {loss['low']:.4g} to {loss['high']:.4g} | {base:.4g} | 8 |"
        in card.text
    )
    rate = json.loads((run / "review" / "result.json").read_text())["metrics"]["win_rate"]["value"]
    assert f"2 reviewer(s), 12 prompts, blind: win rate {rate:.4g} (95 % interval" in card.text
    record = json.loads((run / "run.json").read_text())
    flop = record["flops_per_token"] * record["outcome"]["progress"]["tokens"]
    assert f"floating-point operations of training: {flop:.3g}" in card.text and "Notes of wards." in card.text
    assert "How many watts" in card.text and "*Open:*" in card.text


def test_papers_say_that_they_are_no_advice_what_is_open_and_nothing_of_the_machine(exported):
    run, export = exported
    for name in PAPERS:
        text = (export / "papers" / f"{name}.md").read_text()
        assert "*Open:*" in text and str(run.parent) not in text and "None" not in text, name
        assert name == "datasheet" or "no legal advice" in text
    xi = (export / "papers" / "annex_xi.md").read_text()
    assert re.search(
        r"Tuning used [\d.]+ % of the base's 1e\+12 operations, as answered: \*\*not more than one third\*\*", xi
    )
    assert "Clinic | of X" in (export / "papers" / "annex_xii.md").read_text()
    processing = (export / "papers" / "processing.md").read_text()
    assert (
        "PERSON (needs data.privacy.engine=presidio)" in processing.replace("\\", "")
        and "counted and **kept**" in processing
    )


def test_card_leaves_out_numbers_of_other_weights_and_says_so(exported):
    run, export = exported
    for report in (run / "reports").glob("*.json"):
        told = json.loads(report.read_text())
        told["model"]["artefact"] = "0" * 64
        report.write_text(json.dumps(told))
    assert command_here(["export", str(run), f"to={export}-2"]) == 0
    text = (export.with_name("export-2") / "README.md").read_text()
    assert (
        "2 report(s) of the run are about other weights" in text
        and "general/loss" not in text.partition("<details>")[0]
    )
    assert "Nobody has judged these weights" in text and not (export.with_name("export-2") / "papers").exists()
