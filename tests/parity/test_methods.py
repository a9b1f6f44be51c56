"""Law 1 for every tuning method: the same steps as `single`, from the same start, resumed bit for bit."""

import os

import pytest

from launch.compose import compose
from strategies.base import StrategyName
from tests.helpers.launching import run_job
from tests.parity import plan as planned
from tests.parity.methods import RESUMED, STEPS
from tests.parity.plan import ALL, CASES, covering, everything, missing, plan
from trainer.config.combinations import FEATURES, State, cell, rows
from trainer.config.validate import problems_of
from trainer.optim.support import SUPPORT
from trainer.tuning.table import METHODS, Method

TOLERANCE = 1e-5
LEAST_LEARNED = 10 * TOLERANCE
"""What a curve (its losses, or its gradient norms, which move more) must differ by from one at a rate of zero."""
BF16 = 1e-2
"""What rounding to 8 bits of mantissa may change of a loss within five steps, as in test_features.py."""
RUNS = {run.key: run for run in plan()}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the job reports of a case: one job for all, or with SHARDTUNE_TEST_ALL one for each."""
    reports: dict[str, dict] = {}

    def of(case: str) -> dict:
        asked = [case] if os.environ.get(ALL) else []
        name = case if asked else "all"
        if name not in reports:
            reports[name] = run_job(
                "tests.parity.methods", 2, tmp_path_factory.mktemp("methods"), *asked, timeout_s=1700
            )
        return reports[name]

    return of


def assert_close(found, expected, tolerance=TOLERANCE):
    assert len(found) == len(expected)
    for (loss, norm), (right_loss, right_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(right_loss, rel=tolerance)
        assert norm == pytest.approx(right_norm, rel=5 * tolerance if tolerance == BF16 else tolerance)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("key", RUNS)
def test_a_method_takes_the_same_steps_as_single_from_the_same_start(report, key):
    run = RUNS[key]
    curves = report(run.case)["curves"]
    found, expected, still = curves["shared"][key], curves["lone"][run.oracle], curves["still"][run.still]
    assert found["start"] == 0.0
    assert len(expected) == STEPS
    rounded = run.feature == "bf16"
    assert_close(found["found"], expected, BF16 if rounded else TOLERANCE)
    assert not rounded or found["found"] != expected
    moved = max(abs(a / b - 1) for e, s in zip(expected, still, strict=True) for a, b in zip(e, s, strict=True))
    assert moved > LEAST_LEARNED, "it learns nothing: the comparison is blind"


@pytest.mark.parametrize(
    ("case", "strategy"), [*((case, name) for case in RESUMED for name in ("fsdp2", "zero3")), ("adalora", "ddp")]
)
def test_resume_is_bit_equal_and_crosses_strategies(report, case, strategy):
    found = report("resume")["resume"][f"{case} {strategy}"]
    assert found["resumed"] == found["uninterrupted"]
    assert_close(found["elsewhere"], found["uninterrupted"])


def test_no_row_is_without_a_case_and_no_cell_without_a_run():
    """The choice meets every strategy and feature with every method; all runs every optimizer, too."""
    gaps = missing(covering(), axes=("strategy", "feature"))
    assert [gap for gap in gaps if not gap.endswith("feature compile")] == []
    assert missing(everything(), axes=("strategy", "feature", "optim")) == []
    assert {run.key for run in covering()} == {run.key for run in covering() if run.legal}
    met = {(axis, getattr(run, axis), run.strategy) for run in covering() for axis in ("feature", "optim")}
    for axis, names in (("feature", planned.EXACT), ("optim", planned.OPTIMIZERS)):
        for name in names:
            for strategy in planned.SHARDING:
                legal = any(planned.Run(case, strategy, **{axis: name}).legal for case in CASES)
                assert (axis, name, strategy) in met or not legal, (axis, name, strategy)


def test_a_row_without_a_case_would_be_noticed(monkeypatch):
    monkeypatch.setitem(METHODS, "newest", Method(title="added without a case"))
    assert missing(everything(), axes=("strategy",)) == ["newest: no case in tests/helpers/methods.py"]


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()


def test_files_that_rank_0_makes_leave_all_ranks_alike(report):
    """`state_dict` reshards on the rank that calls it: the others would then wait for it in the next forward pass."""
    before, after = report("files")["files"]
    assert before == after > 0


@pytest.mark.parametrize("case", planned.main_cases().values())
def test_what_the_table_refuses_is_refused_when_composed_and_nothing_else_is(case, directory):
    """The reason and the nearest legal choice stand in the line."""
    words = ["model.path=model", "data.path=train.jsonl", "run.device=cpu", "budget.steps=10", "schedule=constant"]
    base = compose([*words, "strategy=ddp", "launcher.processes=2"]).config

    def compare(run: planned.Run) -> None:
        found, verdict = problems_of(run.config(base), world_size=2), run.verdict
        if verdict.state is State.refused:
            assert any(verdict.reason in line and verdict.instead in line for line in found), (run, found)
        elif verdict.state is State.tested:
            assert found == [], run

    for strategy in planned.SHARDING:
        for feature in FEATURES:
            compare(planned.Run(case, strategy, feature))
        for optim in planned.OPTIMIZERS:
            compare(planned.Run(case, strategy, "plain", optim))


def test_only_known_words_are_refused_and_legal_choices_are_named():
    words = {feature.word for feature in FEATURES.values()} - {""}
    for row, method in rows().items():
        assert set(method.refused) <= words | {"quantised"}, row
        assert set(method.optimizers) <= set(map(str, SUPPORT)), row
        for strategy in StrategyName:
            for feature in FEATURES:
                verdict = cell(row, strategy, feature)
                assert (verdict.state is State.refused) == bool(verdict.instead)
                assert (verdict.state is State.tested) == (not verdict.reason)
