"""Experts dealt over ranks: refused before data is read where the model or the settings do not allow it."""

from dataclasses import replace

import pytest

from launch.cluster.submission import refuse_unshared_model
from strategies.errors import ConfigError
from tests.helpers.building import STRATEGIES, model_dir, run_config
from tests.models.tiny import tiny_config
from trainer.build.experts import expert_problems
from trainer.build.parallel import check_parallel
from trainer.config.parallel import ParallelConfig
from trainer.config.sharding import problems as sharding_problems
from trainer.objectives.base import TeacherConfig
from trainer.objectives.distillation import DistillationConfig
from trainer.optim.config import AdafactorConfig, MuonConfig


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tiny models of this module alone."""
    return tmp_path_factory.mktemp("experts")


def config_of(model, degree, strategy="fsdp2", ranks=0, **changes):
    config = run_config(model, strategy, "full", micro=1, parallel=ParallelConfig(experts=degree), **changes)
    config.launcher.processes = ranks
    return config


def mixture(root, experts=8):
    return model_dir(root / f"of-{experts}", "qwen3_moe", num_experts=experts)


def other_model(root, model_type):
    """The configuration alone of a model of another architecture."""
    directory = root / f"other-{model_type}"
    if not directory.exists():
        tiny_config(model_type).save_pretrained(directory)
    return directory


def problem_of(config, world):
    """The one problem of the settings that speaks of experts."""
    (problem,) = [line for line in sharding_problems(config, world) if "parallel.experts" in line]
    return problem


@pytest.mark.parametrize("strategy", ("single", "ddp", "zero1", "zero2", "zero3"))
def test_strategies_that_deal_no_experts_are_refused_with_those_that_do(root, strategy):
    problem = problem_of(config_of(mixture(root), 2, strategy), 1 if strategy == "single" else 4)
    assert f"parallel.experts=2 with strategy={strategy}: " in problem
    assert problem.endswith("use strategy=fsdp2 or hsdp, or set parallel.experts=1")


@pytest.mark.parametrize("optim", (AdafactorConfig(), MuonConfig()))
def test_optimizers_of_whole_matrices_are_refused(root, optim):
    problem = problem_of(config_of(mixture(root), 2, optim=optim), 4)
    assert f"optim={optim.name}" in problem and "optim=adamw" in problem


def test_compiled_blocks_are_refused(root):
    compiled = replace(STRATEGIES["fsdp2"], compile=True)
    assert "strategy.compile=false" in problem_of(config_of(mixture(root), 2, compiled), 4)


@pytest.mark.parametrize(
    ("strategy", "degree", "world", "remedy"),
    [
        ("fsdp2", 3, 8, "the number of ranks, 8, so that every group is whole; set one of 2, 4, 8"),
        ("hsdp", 8, 8, "the ranks of a replica, 4, so that every group is whole; set one of 2, 4, or strategy=fsdp2"),
        (
            "hsdp",
            2,
            2,
            "the ranks of a replica, 1, so that every group is whole; set parallel.experts=1, or strategy=fsdp2",
        ),
        ("hsdp", 3, 12, None),
    ],
)
def test_groups_must_be_whole(root, strategy, degree, world, remedy):
    problems = [
        line for line in sharding_problems(config_of(mixture(root), degree, strategy), world) if "experts" in line
    ]
    if remedy is None:
        assert not problems
    else:
        assert problems == [f"parallel.experts={degree}: must divide {remedy}"]


@pytest.mark.parametrize("architecture", ("qwen3_moe", "mixtral", "gpt_oss"))
def test_mixtures_whose_experts_can_be_dealt_are_let_through(root, architecture):
    check_parallel(config_of(model_dir(root / architecture, architecture), 2, ranks=4))


@pytest.mark.parametrize(
    ("experts", "degree", "ranks", "match"),
    [
        (6, 4, 4, r"must divide the experts of a layer, and model\.path=.* has 6 experts; set parallel\.experts=2$"),
        (
            4,
            2,
            8,
            r"8 ranks would share the 4 experts .*; set parallel\.experts=2 or 4 with strategy=hsdp strategy\.replicate=2",
        ),
        (5, 2, 4, r"has 5 experts; set parallel\.experts=1"),
    ],
)
def test_experts_that_do_not_divide_are_refused_with_what_fits(root, experts, degree, ranks, match):
    with pytest.raises(ConfigError, match=match):
        check_parallel(config_of(mixture(root, experts), degree, ranks=ranks))


def test_models_without_experts_are_refused(root):
    with pytest.raises(
        ConfigError, match=r"parallel\.experts=2: model\.path=.* has no experts .*; set parallel\.experts=1"
    ):
        check_parallel(config_of(model_dir(root), 2))


@pytest.mark.parametrize("model_type", ("llama4_text", "muse_spark"))
def test_experts_that_compute_in_a_way_of_their_own_are_refused(root, model_type):
    if model_type == "muse_spark":
        pytest.importorskip("transformers.models.muse_spark")
    with pytest.raises(ConfigError, match=r"set parallel\.experts=1"):
        check_parallel(config_of(other_model(root, model_type), 2))


def test_a_teacher_s_experts_are_dealt_as_the_model_s_are(root):
    objective = DistillationConfig(teacher=TeacherConfig(path=str(mixture(root, 6))))
    (problem,) = expert_problems(config_of(mixture(root), 4, objective=objective))
    assert "objective.teacher.path=" in problem and "6 experts" in problem
    dense = DistillationConfig(teacher=TeacherConfig(path=str(model_dir(root))))
    assert not expert_problems(config_of(mixture(root), 4, objective=dense))


def test_submitting_asks_the_same_where_the_model_is_here(root):
    with pytest.raises(ConfigError, match="no experts"):
        refuse_unshared_model(config_of(model_dir(root), 2))
