"""Law 1 for every tuning method: the same steps as `single`, from the same start, resumed bit for bit."""

import pytest

from launch.config.compose import compose_config
from strategies.registry import STRATEGIES
from tests.helpers.covering import chosen, takes, values, whole
from tests.helpers.learning import LEAST_LEARNED
from tests.helpers.ranks import CASE_S
from tests.parity import plan as planned
from tests.parity.methods import FEWER, RESUMED, STEPS
from tests.parity.plan import CASES, GATHERING, covering, engine_of, everything, kind_of, main_cases, missing, plan
from trainer.config.combinations import FEATURES, CombinationState, combination_verdict, methods_by_name
from trainer.config.validate import config_problems
from trainer.optim.support import OPTIMIZER_SUPPORT
from trainer.tuning.table import TUNING_METHODS, TuningMethod

TOLERANCE = 1e-5
BF16 = 1e-2
"""What rounding to 8 bits of mantissa may change of a loss within five steps, as in test_features.py."""


def assert_close(found, expected, tolerance=TOLERANCE):
    assert len(found) == len(expected)
    for (loss, norm), (right_loss, right_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(right_loss, rel=tolerance)
        assert norm == pytest.approx(right_norm, rel=5 * tolerance if tolerance == BF16 else tolerance)


@pytest.mark.parametrize("run", plan(), ids=lambda run: run.key)
def test_a_method_takes_the_same_steps_as_single_from_the_same_start(ask, run):
    limit_s = 240 if run.feature == "compile" else CASE_S  # tracing takes minutes where lengths and layers differ
    curves = ask("methods", "curves", run.case, run.strategy, run.feature, run.optim, limit_s=limit_s)
    found, expected = curves["found"], curves["expected"]
    assert curves["start"] == 0.0
    assert len(expected) in (FEWER, STEPS)
    rounded = run.feature == "bf16"
    assert_close(found, expected, BF16 if rounded else TOLERANCE)
    assert not rounded or found != expected
    assert curves["learned"] > LEAST_LEARNED, "it learns nothing: the comparison is blind"


DEALT_UNDER_HSDP = [
    case
    for case in main_cases().values()
    if planned.Run(case, "hsdp", "experts").verdict.state is CombinationState.tested
]


@whole("two ranks show it under fsdp2, and test_matrix_experts.py under hsdp with full tuning and LoRA")
@pytest.mark.parametrize("case", DEALT_UNDER_HSDP)
def test_a_method_with_dealt_experts_takes_the_same_steps_in_replicas_of_two_ranks(ranks, case):
    curves = ranks[4].ask("methods", "curves", case, "hsdp", "experts", "adamw")
    assert curves["start"] == 0.0
    assert_close(curves["found"], curves["expected"])
    assert curves["learned"] > LEAST_LEARNED, "it learns nothing: the comparison is blind"


def dear(case):
    """Under ZeRO-3 each rotation of OFT's takes a gathering."""
    return takes(case) * (3 if case[0] == "oft" else 1)


@pytest.mark.parametrize(
    ("case", "strategy"),
    [*chosen([(case, name) for case in RESUMED for name in ("fsdp2", "zero3")], values, dear), ("adalora", "ddp")],
)
def test_resume_is_bit_equal_and_crosses_strategies(ask, case, strategy):
    found = ask("methods", "resume", case, strategy)
    assert found["resumed"] == found["uninterrupted"]
    assert_close(found["elsewhere"], found["uninterrupted"])


def test_methods_matrix_has_a_case_for_every_row_and_a_run_for_every_cell():
    assert missing(everything(), axes=("strategy", "feature", "optim")) == []


def test_methods_choice_meets_every_pair_that_it_promises():
    """Kinds of strategies with features, engines with optimizers; each method with what its modules are likely to break under."""
    runs, met = everything(), covering()
    assert {run.key for run in met} == {run.key for run in met if run.legal} and {run.case for run in met} == set(CASES)
    for run in runs:
        if run.feature != "compile":
            assert any((kind_of(run), run.feature) == (kind_of(one), one.feature) for one in met), run
        assert any(run.strategy == one.strategy for one in met), run
        assert (engine_of(run), run.optim) in {(engine_of(one), one.optim) for one in met}, run
    for case in main_cases().values():
        legal, own = ([run for run in some if run.case == case] for some in (runs, met))
        for kind in (
            lambda run: run.strategy in ("fsdp2", "zero3"),
            lambda run: run.strategy in GATHERING,
            lambda run: run.strategy not in GATHERING,
            lambda run: run.feature in ("checkpointing", "selective"),
        ):
            assert any(map(kind, own)) or not any(map(kind, legal)), case


def test_a_row_without_a_case_would_be_noticed(monkeypatch):
    monkeypatch.setitem(TUNING_METHODS, "newest", TuningMethod(title="added without a case"))
    assert missing(everything(), axes=("strategy",)) == ["newest: no case in tests/helpers/methods.py"]


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()


def test_files_that_rank_0_makes_leave_all_ranks_alike(ask):
    """`state_dict` reshards on the rank that calls it: the others would then wait for it in the next forward pass."""
    before, after = ask("methods", "files")
    assert before == after > 0


@pytest.mark.parametrize("case", planned.main_cases().values())
def test_methods_that_the_table_refuses_are_refused_when_composed_and_no_others(case, directory):
    """The reason and the nearest legal choice stand in the line."""
    words = ["model.path=model", "data.path=train.jsonl", "run.device=cpu", "budget.steps=10", "schedule=constant"]
    base = compose_config([*words, "strategy=ddp", "launcher.processes=2"]).config

    def compare(run: planned.Run) -> None:
        world_size = 4 if run.feature == "experts" else 2  # under hsdp a replica has two ranks then
        found, verdict = config_problems(run.config(base), world_size=world_size), run.verdict
        if verdict.state is CombinationState.refused:
            assert any(verdict.reason in line and verdict.instead in line for line in found), (run, found)
        elif verdict.state is CombinationState.tested:
            assert found == [], run

    for strategy in planned.SHARDING:
        for feature in FEATURES:
            compare(planned.Run(case, strategy, feature))
        for optim in planned.OPTIMIZERS:
            compare(planned.Run(case, strategy, "plain", optim))


def test_only_known_words_are_refused_and_legal_choices_are_named():
    words = {feature.property_name for feature in FEATURES.values()} - {""}
    for row, method in methods_by_name().items():
        assert set(method.refusal_by_property) <= words | {"quantised"}, row
        assert set(method.refusal_by_optimizer) <= set(map(str, OPTIMIZER_SUPPORT)), row
        for strategy in STRATEGIES:
            for feature in FEATURES:
                verdict = combination_verdict(row, strategy, feature)
                assert (verdict.state is CombinationState.refused) == bool(verdict.instead)
                assert (verdict.state is CombinationState.tested) == (not verdict.reason)
