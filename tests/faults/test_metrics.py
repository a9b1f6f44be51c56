"""Metrics stay readable and complete: numbers that JSON cannot have, and an evaluation that a signal broke off."""

import json
import signal

from tests.helpers.tokenizers import write_chat_data


def strict(text):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_metrics_that_are_not_finite_are_null_and_named_alike_under_every_strategy(runs):
    shown = {}
    for strategy in ("single", "zero2"):
        words = [
            f"strategy={strategy}",
            "tuning=full",
            "budget.steps=3",
            "optim.lr=1e30",
            "checkpoint.save_final=false",
        ]
        code, said = runs.run_here(f"nan-{strategy}", *words, "optim.max_grad_norm=0", "schedule.warmup_share=0")
        assert code == 0, said
        directory = runs.root / f"nan-{strategy}"
        rows = [strict(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        strict((directory / "run.json").read_text())
        shown[strategy] = [(row["step"], row["loss"] is None, row.get("not_finite")) for row in rows]
        assert rows[-1]["loss"] is None and rows[-1]["grad_norm"] is None
    assert shown["single"] == shown["zero2"]
    assert shown["single"][-1] == (3, True, ["loss", "grad_norm"])


def test_an_evaluation_broken_off_by_a_signal_is_made_up(runs):
    write_chat_data(runs.root / "long-eval.jsonl", 150, seed=3)
    words = [f"data.eval_path={runs.root / 'long-eval.jsonl'}", "budget.steps=4", "evaluation.every_steps=2"]
    words += ["evaluation.batch=1", "evaluation.at_start=false", "evaluation.patience=9"]
    assert runs.run_here("uncut", *words)[0] == 0
    process = runs.start("cut", *words, **runs.held_at("cut", 2))
    runs.wait_for_step("cut", 2, process)  # its row is written, and the evaluation begins with the signal
    process.send_signal(signal.SIGTERM)
    assert runs.end(process) == 75
    assert runs.status("cut")["step"] == 2
    assert not any("eval/loss" in row for row in runs.rows("cut")), "the signal came too late to break it off"
    code, said = runs.run_here("cut", *words)
    assert code == 0, said

    def numbers(run):
        return [(row["step"], row.get("loss"), row.get("eval/loss")) for row in runs.rows(run)]

    assert numbers("cut") == numbers("uncut")
    kept = [sorted(path.name for path in (runs.root / run / "checkpoints").iterdir()) for run in ("cut", "uncut")]
    assert kept[0] == kept[1]
    assert [row["step"] for row in runs.rows("cut") if "eval/loss" in row] == [2, 4]

    def progress(run):
        outcome = json.loads((runs.root / run / "run.json").read_text())["outcome"]
        return {key: outcome["progress"][key] for key in ("step", "best_metric", "best_step", "stale_evaluations")}

    assert progress("cut") == progress("uncut")
