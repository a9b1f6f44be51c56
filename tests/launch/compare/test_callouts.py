"""Call-outs on the page of a run: what each says of the run's end, its export and its findings, and the words to type."""

import json

from launch.compare.run_page.verdict import run_callouts, run_verdict
from tests.launch.compare.test_run_page import CONFIG, OVERFIT, html, read, run_of


def test_callouts_name_the_words_that_go_with_their_cause(tmp_path):
    """Each of what a page can say of an end, an export or a step that stood out."""

    def only(name, held_out=(3.0, 2.5, 2.0), **run):
        (callout,) = run_callouts(read(run_of(tmp_path / name, held_out, **run)))
        return callout.heading, callout.commands

    def retry(name, ending, words):
        return (f"shardtune train {tmp_path / name}/config.yaml run.dir={tmp_path / name}-{ending} {words}",)

    heading, commands = only("worse", (2.0, 3.0, 2.5))
    assert heading == "No step is better than the model before training"
    assert commands == retry("worse", "lower-rate", "optim.lr=0.3")

    config = CONFIG | {"evaluation": {"patience": 2}, "challenges": {"overfitting": {"action": "stop"}}}
    ended = {"outcome": {"stopped_early": True}}
    patience = {"early_stopping": {"found": True, "step": 20, "says": "eval/loss has not improved"}}
    heading, commands = only("patience", config=config, challenges=patience, **ended)
    assert heading == "The run stopped early" and commands == retry("patience", "longer", "evaluation.patience=4")
    assert run_verdict(read(tmp_path / "patience")).heading == "Better, but: early stopping"
    run_of(tmp_path / "overfit", (3.0, 2.0, 2.5), config=config, challenges={"overfitting": OVERFIT}, **ended)
    stopped = next(each for each in run_callouts(read(tmp_path / "overfit")) if each.heading == "The run stopped early")
    assert stopped.commands == retry("overfit", "longer", "challenges.overfitting.action=note")

    exported = {"exported_checkpoint": {"which": "best", "step": 10}}
    remedies = {
        "patient": (["evaluation.patience=3 (stop at the best)", "fewer epochs"], "again", "evaluation.patience=3"),
        "lower": (["a lower optim.lr, or fewer budget.steps"], "lower-rate", "optim.lr=0.3"),
        "other": (["data.sources.<name>.replay=true (mix text in)", "tuning=lora, or freeze"], "again", "tuning=lora"),
    }
    for name, (tried, ending, words) in remedies.items():
        found = {"overfitting": OVERFIT | {"remedies": tried}}
        overfits, _ = run_callouts(read(run_of(tmp_path / name, (3.0, 2.0, 2.5), challenges=found, **exported)))
        assert (overfits.heading, overfits.commands) == ("The run overfits", retry(name, ending, words))

    refused = {"metric": "eval/loss", "bound": "<1", "passed": False, "says": "eval/loss: is 2, must be below 1"}
    gates = {"gates": [refused], "override": None}
    refusal = ("Nothing was exported", (f"shardtune export {tmp_path / 'refused'}",))
    assert only("refused", gates=gates) == refusal and "is 2, must be below 1" in html(tmp_path / "refused")
    passed_over = only("passed over", gates=gates | {"override": "a demo"})
    assert passed_over == ("Exported although a gate is not passed", ())
    assert run_callouts(read(run_of(tmp_path / "later", gates=gates, exports=[{"gates": []}]))) == []
    assert run_callouts(read(run_of(tmp_path / "passed", gates={"gates": [refused | {"passed": True}]}))) == []
    assert only("damaged", export_problem="a file is damaged")[0] == "Nothing was exported"

    rolled_back = run_of(tmp_path / "rolled back")
    (rolled_back / "events.jsonl").write_text(json.dumps({"step": 5, "action": "rollback", "values": {"loss": 9.5}}))
    (stood_out,) = run_callouts(read(rolled_back))
    assert (stood_out.heading, stood_out.commands) == ("1 step stood out", ())
