"""`compare.html`: one file that asks for nothing, plots that are drawn, tables whose cells sort, nothing unescaped."""

import itertools
import json
import re
import shutil
import sys

import pytest

from launch.compare import page as page_module
from launch.compare.answer import comparison_html
from launch.compare.command import print_and_write_comparison
from launch.compare.comparison import compare_points
from launch.compare.settings import PointSource, read_comparison_file, write_comparison_file
from launch.compare.workspace import workspace_script, write_workspace_script_of_runs
from launch.config.prices import gpu_hour_price
from strategies.errors import ConfigError
from tests.launch.compare.test_conclusion import point
from trainer.pages import vega

pytest.importorskip("altair")
vl_convert = pytest.importorskip("vl_convert")
SPEED = {"a-ddp": 100.0, "a-ddp-repeat2": 120.0, "b": 50.0}


@pytest.fixture
def rows(tmp_path):
    """Two points, the first with two repeats, the second evaluated too, and one that was refused; as runs leave them."""
    for name, speed in SPEED.items():
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text(f"strategy: {{name: {name}}}\nlogging: {{every_steps: 1}}\n")
        told = {"loss": 3.0, "memory_gib": 1.5, "step_s": 0.5, "data_wait_s": 0.01, "forward_s": 0.1, "backward_s": 0.3}
        told |= {"tokens_per_s": speed, "optimizer_s": 0.04}
        lines = [{"step": n, **told, "tokens": 100 * n, "loss": 3.0 - n / 10} for n in range(1, 8)]
        lines += [{"step": 7, "eval/loss": 2.5, "tokens": 700}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        receipt = {"predicted": {"memory_gib": 1.25}, "measured": {"start_s": 9.0, "evaluation_before_s": 1.0}}
        (run / "run.json").write_text(json.dumps({"receipt": receipt, "world_size": 2, "device": "cpu"}))
        (run / "status.json").write_text(json.dumps({"state": "done"}))
    return [
        PointSource((tmp_path / "a-ddp", tmp_path / "a-ddp-repeat2"), "a-ddp", price_per_hour=3.6),
        PointSource((tmp_path / "b",), "b"),
        PointSource((), "c", refused=("</script><b>no</b>",), config={"strategy.name": "c"}),
    ]


def specs(text: str) -> dict[str, str]:
    figure = r'<figure class="plot" id="([\w-]+)">.*?<script type="application/json">(.*?)</script>'
    return dict(re.findall(figure, text, re.DOTALL))


def test_compare_page_makes_no_request_and_escapes_what_it_shows(rows):
    text = comparison_html(compare_points(rows))
    assert "default-src 'none'" in text and "connect-src" not in text
    html = text.split("<script>")[0]
    assert not re.findall(r"<(?:img|iframe|script[^>]*\bsrc)\b", html)
    assert re.findall(r'<[^>]+\bhref="([^"]*)"', html) == ["data:,"]
    assert text.count("<script") == text.count("</script>")
    assert "&lt;/script&gt;&lt;b&gt;no&lt;/b&gt;" in text and "<b>no</b>" not in text


def test_every_plot_is_drawn_with_every_point(rows):
    drawn = specs(comparison_html(compare_points(rows)))
    assert list(drawn) == ["difference", "loss", "held-out", "trade", "speed", "memory", "parts", "course"]
    svg = {name: vl_convert.vegalite_to_svg(spec) for name, spec in drawn.items()}
    assert svg["loss"].count('aria-roledescription="line mark"') == 2
    assert svg["loss"].count('aria-roledescription="point"') == 14
    assert svg["speed"].count('aria-roledescription="bar"') == 2
    assert svg["memory"].count('aria-roledescription="bar"') == 2  # measured: on a CPU the plan is of something else
    assert svg["parts"].count('aria-roledescription="bar"') == 10
    assert svg["trade"].count('aria-roledescription="point"') == 2
    loss = json.loads(drawn["loss"])
    assert [param["name"] for param in loss["params"]] == ["over"]
    values = loss["data"]["values"].splitlines()
    assert values[:3] == ["point_index,step,tokens,seconds,loss", "0,1,100,0.5,2.9", "0,2,200,1,2.8"]


@pytest.mark.parametrize("count", [9, 14])
def test_no_two_runs_share_a_colour(rows, tmp_path, count):
    long = "train-single-lora-lr0.01-global8-1rank"  # as runs that exist are named by what differs
    several = [PointSource((tmp_path / "b",), f"{long}-{number}") for number in range(count)]
    drawn = vl_convert.vegalite_to_svg(specs(comparison_html(compare_points(several, gpu_hour_price)))["loss"])
    colours = re.findall(r'role-legend-symbol[^>]*><path[^>]*? (?:stroke|fill)="(#\w+)"', drawn)
    assert len(colours) == len({*colours}) == count
    assert all(f">{run.name}</text>" in drawn for run in several), "a name is cut where it differs"


AXES = {
    "strategy.name": ("ddp", "fsdp2"),
    "tuning.name": ("full", "lora"),
    "optim.lr": (1e-4, 1e-3),
    "optim.name": ("adamw", "sgd"),
}


@pytest.fixture
def on_four_axes(tmp_path):
    """Points at all 16 combinations of four settings, whose losses are from 1e-7 to 1e-4 apart."""
    several = []
    for number, values in enumerate(itertools.product(*AXES.values())):
        settings = dict(zip(AXES, values, strict=True))
        losses = 3 + 1e-7 * 10 ** (number % 4)
        several.append(point(tmp_path, "-".join(map(str, values)), settings=settings, losses=losses))
    return compare_points(several)


def test_points_are_told_apart_by_colour_then_dash_then_mark(on_four_axes):
    """Colours for the first axis, dashes for the second, shapes of marks for the others together; each legend can be clicked."""
    text = specs(comparison_html(on_four_axes))["loss"]
    drawn = vl_convert.vegalite_to_svg(text)
    looks = {}
    for label, stroke, dash in re.findall(
        r'<path aria-label="([^"]*)"[^>]*"line mark"[^>]* stroke="(#\w+)"[^>]* stroke-dasharray="([\d,]+)"', drawn
    ):
        words = dict(part.split(": ", 1) for part in label.split("; "))
        looks.setdefault((words["strategy"], words["tuning"]), []).append((stroke, dash))
    assert {pair: len(of_pair) for pair, of_pair in looks.items()} == dict.fromkeys(
        itertools.product(("ddp", "fsdp2"), ("full", "lora")), 4
    )
    by_pair = {}
    for pair, of_pair in looks.items():
        (by_pair[pair],) = {*of_pair}  # the other axes change neither
    colours = {strategy: {by_pair[strategy, tuning][0] for tuning in ("full", "lora")} for strategy in ("ddp", "fsdp2")}
    dashes = {tuning: {by_pair[strategy, tuning][1] for strategy in ("ddp", "fsdp2")} for tuning in ("full", "lora")}
    assert [len(each) for each in (*colours.values(), *dashes.values())] == [1, 1, 1, 1]
    assert colours["ddp"] != colours["fsdp2"] and dashes["full"] != dashes["lora"]
    titles = re.findall(r'role-legend-title"[^>]*><text[^>]*>([^<]*)<', drawn)
    assert titles == ["strategy", "tuning", "optim.lr, optim"]
    for label in ("ddp", "lora", "1e-4, adamw", "1e-4, sgd", "1e-3, adamw", "1e-3, sgd"):
        assert f">{label}</text>" in drawn
    symbols = re.findall(r'role-legend-symbol[^>]*><path[^>]*? d="([^"]+)"', drawn)
    assert len({*symbols[-4:]}) == 4, "each value of the other axes has a mark of its own"
    bound = [param for param in json.loads(text)["layer"][0]["params"] if param.get("bind") == "legend"]
    assert [param["select"]["fields"] for param in bound] == [["axis0"], ["axis1"], ["axis2"]]


def test_differences_from_the_first_point_stand_on_a_logarithmic_axis(on_four_axes):
    """Each power of ten is as far from the next as any other."""
    drawn = vl_convert.vegalite_to_svg(specs(comparison_html(on_four_axes))["difference"])
    labels = re.findall(r'translate\(-7,([\d.]+)\)"[^>]*>(1e-\d)</text>', drawn)
    heights = {label: float(height) for height, label in labels}
    assert {"1e-8", "1e-7", "1e-6", "1e-5"} <= heights.keys()
    gaps = [heights[f"1e-{power}"] - heights[f"1e-{power - 1}"] for power in (8, 7, 6)]
    assert gaps == pytest.approx([gaps[0]] * 3) and gaps[0] > 10


def test_compare_page_numbers_over_repeats(rows):
    """The middle of the repeats, their spread, price and parts; computed by hand here."""
    a, b, _ = compare_points(rows).points
    assert a.measured.tokens_per_s == 110 and a.summary.spread == (100, 120) and b.summary.spread is None
    assert a.summary.dollars_per_million == pytest.approx(3.6 * 2 / 3600 / 110 * 1e6)
    assert b.summary.dollars_per_million is None
    assert a.summary.parts_s == pytest.approx(
        {"data": 0.01, "forward": 0.1, "backward": 0.3, "optimizer": 0.04, "rest": 0.05}
    )
    facts = rows[1].directories[0] / "run.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"device_name": "NVIDIA A10G"}))
    a, b, _ = compare_points(rows, gpu_hour_price).points
    assert a.summary.dollars_per_million == pytest.approx(3.6 * 2 / 3600 / 110 * 1e6)
    assert b.summary.dollars_per_million == pytest.approx(gpu_hour_price("NVIDIA A10G") * 2 / 3600 / 50 * 1e6)


@pytest.mark.parametrize(
    ("recorded", "entity"),
    [
        ({"from_environment": {"logging.entity": "us (all)", "logging.group": "g"}}, "us (all)"),
        ({"substitutions": {"logging.entity": "us (WANDB_ENTITY)", "logging.group": "g (WANDB_RUN_GROUP)"}}, "us"),
        ({"from_environment": {"logging.group": "g"}, "substitutions": {"logging.entity": "left out (no)"}}, None),
    ],
    ids=["values", "sentences of an early run", "no team"],
)
def test_compare_page_links_the_wandb_team_that_a_variable_decided(rows, recorded, entity):
    run = rows[1].directories[0]
    (run / "config.yaml").write_text("strategy: {name: b}\nlogging: {wandb: offline}\n")
    (run / "run.json").write_text(json.dumps(recorded))
    text = workspace_script(compare_points([PointSource((run,), "b")]), run)
    assert f"ENTITY = {entity!r}" in text and "ws.Metric(\"Group\").isin(['g'])" in text


@pytest.mark.parametrize(
    ("editions", "settings", "loss", "x"),
    [
        ((1, 1), ("", ""), ["loss"], "tokens"),
        ((1, 2), ("", ""), ["loss", "train/loss"], "Step"),
        ((2, 2), ("", ""), ["train/loss"], "train/global_step"),
        ((2, 3), ("", ""), ["train/loss"], "train/global_step"),
        ((2, 2), ("x: seconds", "x: seconds"), ["train/loss"], "time/training_s"),
        ((2, 2), ("x: epoch", "x: step"), ["train/loss"], "train/num_tokens"),
        ((2, 2), ("", "batch: {global: 8}"), ["train/loss"], "train/num_tokens"),
    ],
)
def test_compare_page_in_wandb_has_the_names_of_each_run(rows, editions, settings, loss, x):
    """Of runs that began before metrics had names of their own in trackers, too, and beside later ones."""
    for row, edition, setting in zip(rows, editions, settings, strict=False):
        other = setting if setting.startswith("batch") else "batch: {global: 4}"
        axis = setting if setting.startswith("x") else "tags: []"
        for run in row.directories:
            (run / "config.yaml").write_text(f"strategy: {{name: a}}\nlogging: {{wandb: offline, {axis}}}\n{other}\n")
            (run / "run.json").write_text(json.dumps({"metric_names": edition}))
    script = workspace_script(compare_points(rows), rows[0].directories[0])
    assert f"\nLOSS = {loss!r}\n" in script and f"\nX = {x!r}\n" in script


def trials(root, count: int) -> list:
    """Run directories of a search: each has a learning rate of its own, and one of two methods."""
    run_dirs = []
    for number in range(count):
        run = root / str(number)
        run.mkdir(parents=True)
        method = ("lora", "full")[number % 2]
        config = f"strategy: {{name: ddp}}\ntuning: {{name: {method}}}\noptim: {{lr: {0.001 * (number + 1)}}}\n"
        (run / "config.yaml").write_text(f"{config}logging: {{wandb: offline}}\nevaluation: {{watch: eval/accuracy}}\n")
        rows = [{"step": 1, "loss": 2.0}, {"step": 1, "eval/accuracy": 0.5}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run / "status.json").write_text(json.dumps({"state": "done"}))
        outcome = {"progress": {"wandb_id": f"id{number}"}}
        (run / "run.json").write_text(json.dumps({"outcome": outcome, "metric_names": 2}))
        run_dirs.append(run)
    return run_dirs


def test_search_in_wandb_is_grouped_by_its_choices_alone(tmp_path):
    """A number that each trial has for itself would make groups of one run."""
    run_dirs = [*trials(tmp_path / "search", 6), tmp_path / "search/not-begun"]
    line = write_workspace_script_of_runs(run_dirs, tmp_path / "search")
    assert line == f"in W&B: {tmp_path / 'search/workspace.py'} makes a view and a report of these runs there"
    script = (tmp_path / "search/workspace.py").read_text()
    assert "COLUMNS = ['tuning', 'lr']" in script and "GROUP_BY = ['tuning']" in script
    assert "BASELINE = 'id0'" in script and "FINAL = 'final/eval/accuracy'" in script
    assert "'Which settings are best?'" in script and "['id0', 'id1', 'id2', 'id3', 'id4', 'id5']" in script
    assert "'Which learns best?'" in script and "'Is it the same loss?'" not in script
    assert write_workspace_script_of_runs([tmp_path / "search/not-begun"], tmp_path / "search") is None


def test_single_run_in_wandb_has_questions_of_its_own(tmp_path, capsys):
    (run,) = trials(tmp_path / "runs", 1)
    print_and_write_comparison([PointSource((run,))], None, as_json=False)
    assert f"written: {run / 'report.html'}, workspace.py (for W&B)" in " ".join(capsys.readouterr().out.split())
    script = (run / "workspace.py").read_text()
    assert "'Does it learn?'" in script and "BASELINE = None" in script and "GROUP_BY = []" in script
    compile(script, "workspace.py", "exec")


def test_comparison_that_is_not_in_wandb_says_why(rows, tmp_path, capsys):
    print_and_write_comparison(rows, tmp_path / "to", as_json=False)
    out = " ".join(capsys.readouterr().out.split())
    assert "not in W&B: these runs were recorded with logging.wandb=disabled, which debug= sets too" in out
    assert not (tmp_path / "to/workspace.py").exists()


def test_compare_page_leaves_warm_up_steps_out_of_speeds(rows):
    b = rows[1].directories[0]
    told = [json.loads(line) for line in (b / "metrics.jsonl").read_text().splitlines()]
    for row in told[:5]:
        row["tokens_per_s"] = 1.0
    (b / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    speeds = [compare_points([PointSource((b,), warmup=warmup)]).points[0].measured for warmup in (0, 1, 5, 7)]
    assert [found.warmup_steps for found in speeds] == [0, 1, 5, 0]  # with nothing left, all count, and a note says so
    assert [found.tokens_per_s for found in speeds] == [1.0, 1.0, 50.0, 1.0]


def test_compare_page_sets_a_loss_beside_that_of_the_same_job(rows, tmp_path):
    """Strategies beside each other, methods beside the first; speed and memory beside the first of all."""

    def point(name: str, tuning: str, strategy: str, factor: float) -> PointSource:
        run = tmp_path / name
        shutil.copytree(tmp_path / "b", run)
        config = f"strategy: {{name: {strategy}}}\ntuning: {{name: {tuning}}}\nlogging: {{every_steps: 1}}\n"
        (run / "config.yaml").write_text(config)
        told = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        told = [row | {"loss": row["loss"] * factor} if "loss" in row else row for row in told]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
        return PointSource((run,), name)

    ways = [("full-ddp", "full", "ddp", 1.0), ("full-fsdp2", "full", "fsdp2", 1 + 1e-7)]
    ways += [("lora-ddp", "lora", "ddp", 1.01), ("lora-zero2", "lora", "zero2", 1.01 * (1 + 1e-7))]
    refused = PointSource((), "lora-single", refused=("no",), config={"strategy.name": "single"})
    found = compare_points([refused, *(point(*way) for way in ways)])
    assert found.default_baseline_name == "full-ddp"
    assert [run.baseline_name for run in found.points] == [None, None, "full-ddp", "full-ddp", "lora-ddp"]
    assert [run.loss_difference and run.loss_difference.is_same_loss for run in found.points] == [
        None,
        None,
        True,
        False,
        True,
    ]
    assert found.points[4].verdict == (
        "lora-zero2: same loss as lora-ddp within 1e-7; 1.0 x its tokens/s, 1.0 x its memory"
    )
    assert found.points[3].verdict == (
        "lora-ddp: eval/loss 2.5000, no difference shown from full-ddp (2.5000; one run each); 1.0 x its tokens/s, "
        "1.0 x its memory"
    )


def test_compare_page_without_its_plotting_package_leaves_the_rest(rows, tmp_path, monkeypatch, capsys):
    for module in (page_module, vega):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "altair", None)
    print_and_write_comparison(rows, tmp_path / "to", as_json=False)
    assert "compare.html with plots needs altair" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "to").iterdir()}
    assert written == {"compare.md", "compare.csv", "compare.json", "compare.html"}
    page = (tmp_path / "to" / "compare.html").read_text()
    assert not specs(page) and '<table class="data sortable" id="points">' in page and "vegaEmbed =" not in page
    print_and_write_comparison(rows[1:2], tmp_path / "single", as_json=False)
    assert "Plots need the extra" in (tmp_path / "single/compare.html").read_text()


def test_rows_are_read_back_and_a_damaged_record_is_named(rows, tmp_path):
    write_comparison_file(tmp_path, rows, ["strategy=a,b"])
    assert read_comparison_file(tmp_path) == rows
    for text in ('{"points": [{"directories": 3}]}', "[" * 100_000):
        (tmp_path / "comparison.json").write_text(text)
        with pytest.raises(ConfigError, match=r"comparison\.json: cannot be read"):
            read_comparison_file(tmp_path)
