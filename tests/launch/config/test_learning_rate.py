"""`optim.lr` that nobody has set: the usual rate of the combination, kept by a run that has begun."""

import pytest

from launch.compare.points import plan_points
from launch.config import learning_rate
from launch.config.compose import compose_config
from launch.config.frozen import load_frozen_config
from launch.main import main
from launch.runs.freeze import write_run_config
from strategies.errors import ConfigError
from trainer.config.run import LEARNING_RATE_KEY
from trainer.optim import rates
from trainer.session.rate_text import learning_rate_of, rate_lines

BASE = ["model.path=m", "data.path=d.jsonl", "budget.steps=100", "run.device=cpu"]


@pytest.fixture(autouse=True)
def outside_a_job(monkeypatch, tmp_path):
    """In a directory with data, and no part of a job."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def rate(*words):
    return compose_config([*BASE, *words], check=False).config.optim.lr


def begun(run_dir, *words):
    """A run directory with a checkpoint."""
    write_run_config(compose_config([*BASE, *words, f"run.dir={run_dir}"]), run_dir)
    (run_dir / "checkpoints" / "step-000005").mkdir(parents=True)
    return run_dir


def test_unset_rate_goes_by_method_objective_and_optimizer():
    assert rate() == 2e-5
    assert rate("tuning=lora") == 2e-4
    assert rate("tuning=lora", "objective=dpo") == 2e-5 and rate("objective=dpo") == 1e-6
    # A factor where nobody has measured: as much lower as LoRA's.
    assert rate("tuning=ia3", "objective=dpo") == pytest.approx(rate("tuning=ia3") / 10)
    assert rate("optim=lion") == 3e-6 and rate("optim=lion", "tuning=lora") == 3e-5
    assert rate("tuning=peft", "tuning.type=hira") == 4.5e-3
    assert rate("tuning=lora", "optim.lr=0.5") == 0.5
    assert rate("tuning=lora", "optim.lr=null") == 2e-4
    assert rate("experiment=minilm_classification") == 2e-4  # which gives its own


def test_rate_that_no_table_has_must_be_given():
    words = [*BASE, "tuning=peft", "tuning.type=waveft"]
    with pytest.raises(ConfigError) as error:
        compose_config(words)
    [problem] = [problem for problem in error.value.problems if problem.startswith("optim.lr")]
    assert "give one" in problem and "0.0002 with optim=adamw and lora" in problem
    assert not any(problem.startswith("optim.lr") for problem in _problems([*words, "optim.lr=1e-3"]))
    for odd in (
        ["optim=adafactor", "tuning=ia3"],
        ["optim=muon", "optim.scale=original"],
        ["optim=sgd", "objective=dpo"],
    ):
        assert any(problem.startswith("optim.lr: not set") for problem in _problems([*BASE, *odd])), odd


def _problems(words):
    try:
        compose_config(words)
    except ConfigError as error:
        return error.problems
    return []


def test_every_method_and_objective_has_a_rate_with_a_source():
    from trainer.objectives.registry import FAMILIES
    from trainer.optim.config import AdamwConfig
    from trainer.tuning.table import TUNING_METHODS

    for method in TUNING_METHODS:
        for objective in FAMILIES:
            usual = rates.usual_learning_rate(AdamwConfig(), method, objective)
            assert usual is not None and usual.source, (method, objective)
            assert usual.low <= usual.usual <= usual.high, (method, objective)


def test_identity_has_the_number_and_not_the_word():
    unset, given = compose_config([*BASE, "tuning=lora"]), compose_config([*BASE, "tuning=lora", "optim.lr=2e-4"])
    assert unset.sha256 == given.sha256
    assert (
        unset.config.resolution(LEARNING_RATE_KEY).chosen == 2e-4 and given.config.resolution(LEARNING_RATE_KEY) is None
    )


def test_begun_run_keeps_its_rate_when_the_table_changes(tmp_path, monkeypatch):
    run_dir = begun(tmp_path / "run", "tuning=lora")
    new = rates.UsualRate(7e-4, 1e-4, 1e-3, "a new paper")
    monkeypatch.setitem(rates.RATE_BY_METHOD, "lora", new)
    words = [*BASE, "tuning=lora"]
    assert compose_config(words).config.optim.lr == 7e-4
    # The same command, and one that starts another run from the checkpoint.
    write_run_config(compose_config([*words, f"run.dir={run_dir}"]), run_dir)
    assert load_frozen_config(run_dir / "config.yaml").optim.lr == 2e-4
    branch = compose_config([*words, f"run.resume={run_dir}/checkpoints/step-000005"], check=False).config
    assert branch.optim.lr == 2e-4 and "as this run began" in str(branch.resolution(LEARNING_RATE_KEY))
    # Another method has no rate to keep.
    assert rate("tuning=ia3", f"run.resume={run_dir}/checkpoints/step-000005") == 5e-3
    with pytest.raises(ConfigError, match=r"optim.lr: 0.0002 there, 0.001 here"):
        write_run_config(compose_config([*words, "optim.lr=1e-3", f"run.dir={run_dir}"]), run_dir)


def test_run_with_a_typed_rate_is_not_taken_up_by_a_command_without_it(tmp_path):
    run_dir = begun(tmp_path / "run", "tuning=lora", "optim.lr=1e-3")
    with pytest.raises(ConfigError, match=r"optim.lr: 0.001 there, 0.0002 here"):
        write_run_config(compose_config([*BASE, "tuning=lora", f"run.dir={run_dir}"]), run_dir)


def test_run_of_the_version_with_one_rate_an_optimizer_goes_on_with_it(tmp_path, monkeypatch):
    """That version wrote 2e-5 for LoRA, and for a method that has no usual rate today, and noted neither."""
    for method in (["tuning=lora"], ["tuning=peft", "tuning.type=waveft"]):
        run_dir = tmp_path / method[-1]
        with monkeypatch.context() as earlier:
            earlier.setattr(learning_rate, "usual_learning_rate", lambda *_: rates.UsualRate(2e-5, 1e-5, 5e-5, ""))
            one = compose_config([*BASE, *method, f"run.dir={run_dir}"])
        del one.config.substitutions[LEARNING_RATE_KEY]
        write_run_config(one, run_dir)
        (run_dir / "checkpoints" / "step-000005").mkdir(parents=True)
        write_run_config(compose_config([*BASE, *method, f"run.dir={run_dir}"]), run_dir)
        assert load_frozen_config(run_dir / "config.yaml").optim.lr == 2e-5


def test_points_of_a_comparison_name_the_rates_that_differ():
    plan = plan_points([*BASE, "tuning=full,lora"])
    assert [plan.learning_rate_remark(point) for point in plan.points] == ["(optim.lr=2e-05)", "(optim.lr=0.0002)"]
    for words in (["strategy=single,ddp"], ["tuning=full,lora", "optim.lr=1e-4,2e-4"]):
        plan = plan_points([*BASE, *words])
        assert not any(plan.learning_rate_remark(point) for point in plan.points), words


def test_few_steps_and_rates_far_above_the_usual_one_are_noted():
    def lines(steps, *words):
        return rate_lines(learning_rate_of(compose_config([*BASE, *words], check=False).config, steps), steps)

    assert lines(100, "tuning=lora") == ["learning rate: 0.0002 after 3 steps of warm-up, then cosine"]
    assert lines(20, "tuning=lora", "optim.lr=4e-3") == lines(20, "tuning=lora", "optim.lr=4e-3")[:1]
    assert ["only 19 steps" in line for line in lines(19)] == [False, True]
    [_, note] = lines(100, "tuning=lora", "optim.lr=10")
    assert "optim.lr=10 is 50,000 times the usual rate" in note
    # 30 times the usual rate of LoRA with grpo, and advised for small models.
    assert len(lines(100, "tuning=lora", "objective=grpo", "optim.lr=3e-4")) == 1
    # Without a usual rate there is nothing to compare with.
    assert len(lines(100, "tuning=peft", "tuning.type=waveft", "optim.lr=10")) == 1


def test_verbs_that_do_not_train_need_no_rate(capsys):
    assert main(["prepare", "model.path=m", "data.path=d.jsonl", "tuning=peft", "tuning.type=waveft"]) != 0
    assert "optim.lr" not in capsys.readouterr().err
