"""What a notebook shows of a run: how it went first, then numbers and losses, whatever state the run is in."""

import json

import shardtune
from tests.launch.notebook.test_notebook import without_scripts, write_run


def test_good_run_begins_with_its_verdict(tmp_path):
    html = without_scripts(shardtune.Run(write_run(tmp_path / "good"))._repr_html_())
    assert html.index("Held-out loss got better") < html.index('class="cards"') < html.index("<svg")
    assert "before training 3.200" in html and "2.500" in html and "ranks together" in html
    assert "report.html" not in html
    (tmp_path / "good/report.html").touch()
    assert "report.html" in shardtune.Run(tmp_path / "good")._repr_html_()


def test_run_that_failed_or_diverged_says_so_first(tmp_path):
    failed = shardtune.Run(write_run(tmp_path / "failed", steps=3, state="failed"))._repr_html_()
    assert "callout bad" in failed and "out of memory" in failed and "shardtune logs" in failed
    run = write_run(tmp_path / "diverged", loss=lambda step: None if step > 3 else 3.0)
    diverged = without_scripts(shardtune.Run(run)._repr_html_())
    assert "The loss is not a number from step 4 on" in diverged and "callout bad" in diverged


def test_run_without_files_or_of_many_steps_is_shown(tmp_path):
    assert "No run to show" in shardtune.Run(tmp_path / "nothing")._repr_html_()
    (tmp_path / "frozen").mkdir()
    (tmp_path / "frozen/config.yaml").write_text("strategy: {name: ddp}\n")
    assert "Not started" in shardtune.Run(tmp_path / "frozen")._repr_html_()
    run = write_run(tmp_path / "long", steps=20_000)
    with (run / "metrics.jsonl").open("a") as metrics:
        for step in range(1, 20_000, 10):
            metrics.write(json.dumps({"step": step, "eval/loss": 2.0 + step % 9}) + "\n")
    without_scripts(shardtune.Run(run)._repr_html_())
