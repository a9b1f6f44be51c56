"""Experts distributed over ranks: refused before data is read where the model or the settings do not allow it."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from launch.cluster.submission import refuse_unshared_model
from launch.evaluate.plan import _set_evaluation_defaults
from launch.evaluate.reward_trial import _settle_choices_for_reward_trial as settled_trial
from strategies.base import Precision
from strategies.errors import ConfigError
from strategies.expert_parallelism import keep_one_rank_of_experts_on_meta
from strategies.expert_share import expert_share_of_parameter
from strategies.parameters import named_parameters
from strategies.runtime import Runtime
from tests.helpers.building import STRATEGIES, data_set, model_dir, run_config
from tests.helpers.reward_models import save_reward_model
from tests.helpers.tokenizers import tiny_tokenizer
from tests.models.tiny import tiny_config
from trainer.build.experts import expert_parallelism_lines, expert_parallelism_problems, plan_expert_parallelism
from trainer.build.gradient_sync import plan_gradient_reduction
from trainer.build.parallel import check_parallel
from trainer.build.parts import build_model, largest_micro_batch
from trainer.build.recomputation import activation_peak_bytes, expected_activation_bytes, model_state_bytes
from trainer.config.parallel import ParallelConfig, parallel_for_evaluation
from trainer.config.sharding import sharding_problems
from trainer.model.config import Quantisation
from trainer.model.loading import load_tokenizer
from trainer.objectives.base import TeacherConfig
from trainer.objectives.distillation import DistillationConfig
from trainer.objectives.grpo_config import GrpoConfig
from trainer.objectives.rollouts import RewardEntry
from trainer.optim.config import AdafactorConfig, MuonConfig
from trainer.planner.communication_volume import _expert_parallel_bytes
from trainer.session.run_facts import model_flops_per_token
from trainer.tuning.base import LoraConfig
from trainer.tuning.expert_parts import expert_modules_by_name


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
    (problem,) = expert_parallelism_problems(config_of(mixture(root), 4, objective=objective))
    assert "objective.teacher.path=" in problem and "6 experts" in problem
    dense = DistillationConfig(teacher=TeacherConfig(path=str(model_dir(root))))
    assert not expert_parallelism_problems(config_of(mixture(root), 4, objective=dense))


def test_a_reward_model_s_experts_are_dealt_as_the_model_s_are(root):
    scorer = save_reward_model(root / "scorer", tiny_tokenizer(), num_experts=6)
    objective = GrpoConfig(rewards={"judge": RewardEntry(path=str(scorer))})
    config = config_of(mixture(root), 4, objective=objective)
    (problem,) = expert_parallelism_problems(config)
    assert f"objective.rewards.judge.path={scorer} has 6 experts" in problem
    assert not expert_parallelism_problems(config, scores_answers=False), "an evaluation reads no reward models"


@pytest.mark.parametrize("beside", ("teacher", "reward_models.judge"))
def test_shares_are_found_in_models_beside_the_trained_one(beside):
    step = nn.Module()
    step.model = nn.Linear(2, 2)
    step.teacher = nn.ModuleDict({"experts": nn.Linear(2, 2)})
    step.reward_models = nn.ModuleDict({"judge": nn.ModuleDict({"experts": nn.Linear(2, 2)})})
    experts = step.get_submodule(f"{beside}.experts")
    experts.expert_share = share = object()
    found = {
        name: expert_share_of_parameter(step, name) for name, _ in named_parameters(step, include_frozen_models=True)
    }
    assert [name for name, held in found.items() if held is share] == [
        f"{beside}.experts.{key}" for key in ("weight", "bias")
    ]


def test_experts_that_transformers_computes_itself_are_refused(root):
    config = config_of(mixture(root), 2)
    config.model.trust_remote_code = True
    with pytest.raises(ConfigError, match=r"loaded with trust_remote_code=true.*set parallel\.experts=1"):
        check_parallel(config)


def test_the_estimate_of_memory_counts_the_experts_of_a_rank(root):
    """Of what is gathered: two blocks at a time, and the gradients that wait for the last micro-batch."""
    config = config_of(mixture(root), 4)
    data = data_set(root / "estimate", uneven=False)
    built, _ = build_model(config, load_tokenizer(config.model), data, half_on_gpu=False)
    ranks = Runtime(3, 8, 3, 8, torch.device("cpu"), None)
    step = built.step_module
    state = {1: model_state_bytes(built, config.strategy, Precision.bf16, ranks)}
    assert expert_parallelism_lines(built, Precision.bf16, 8) == []
    plan_expert_parallelism(built, config, ranks)
    holds, sends = expert_parallelism_lines(built, Precision.bf16, 8)
    assert holds == (
        "experts: 2 layers of 8 are distributed over 4 ranks (parallel.experts); "
        "each rank holds 2 of a layer, which 2 ranks shard"
    )
    # There and back, forward and backward, in bf16; a quarter stays on the rank.
    of_token = 4 * built.config.num_experts_per_tok * built.config.hidden_size * 2 * 3 / 4 / 1000
    assert f"its {built.config.num_experts_per_tok} experts and back: about {of_token:.1f} kB to and from" in sends
    state[4] = model_state_bytes(built, config.strategy, Precision.bf16, ranks)
    modules = expert_modules_by_name(step)
    row_counts = sum(parameter.numel() for parameter in next(iter(modules.values())).parameters())
    assert state[1] - state[4] == 2 * 2 * row_counts * 3 / 4

    work = largest_micro_batch(config, data)
    activations = activation_peak_bytes(built, work, config.strategy.activation_checkpointing, Precision.bf16)
    trained = sum(parameter.numel() for parameter in step.parameters())
    of_rank = trained - len(modules) * row_counts * 3 / 4
    built.activation_bytes = activations
    need = (
        state[4] + expected_activation_bytes(built, work, config.strategy, Precision.bf16) + 4 * (of_rank - trained / 8)
    )
    for slack in (1.01, 0.99):
        strategy = replace(config.strategy, defer_sync=None, memory_gib=slack * need / 2**30)
        plan_gradient_reduction(built, work, strategy, Precision.bf16, ranks, micro_batches=2)
        assert step.plan.defer_sync is (slack > 1)


@pytest.mark.parametrize(
    ("strategy", "degree", "ranks_of_replica", "expected"),
    [
        ("fsdp2", 8, 8, 8),
        ("fsdp2", 8, 4, 4),
        ("fsdp2", 4, 6, 2),
        ("hsdp", 4, 2, 2),
        ("hsdp", 2, 1, 1),
        ("ddp", 2, 2, 1),
    ],
)
def test_evaluations_deal_experts_over_as_many_ranks_as_can_be(strategy, degree, ranks_of_replica, expected):
    training = ParallelConfig(experts=degree, sequence=2)
    assert parallel_for_evaluation(training, STRATEGIES[strategy], ranks_of_replica) == ParallelConfig(experts=expected)


@pytest.mark.parametrize("quantised", (None, Quantisation.int8))
def test_arithmetic_of_a_token_does_not_depend_on_how_experts_are_dealt(root, quantised):
    """It is counted when experts are distributed already, and MFU goes by it."""
    config = config_of(mixture(root), 4)
    if quantised is not None:
        config.model.quantisation = quantised
        config.tuning = LoraConfig(rank=2)
    data = data_set(root / "arithmetic", uneven=False)
    built, _ = build_model(config, load_tokenizer(config.model), data, half_on_gpu=False)
    flops = model_flops_per_token(built, 10.0, 0.5)
    plan_expert_parallelism(built, config, Runtime(3, 8, 3, 8, torch.device("cpu"), None))
    keep_one_rank_of_experts_on_meta(built.step_module)
    assert model_flops_per_token(built, 10.0, 0.5) == flops


@pytest.mark.parametrize(("ranks", "expected"), [(8, 4), (4, 2), (2, 1), (1, 1)])
def test_a_run_under_hsdp_is_evaluated_on_fewer_ranks(root, ranks, expected):
    """Of which half are a replica. One rank alone shards nothing."""
    config = config_of(mixture(root), 4, "hsdp", ranks=ranks)
    _set_evaluation_defaults(config, SimpleNamespace(settings=[], split="test"))
    assert config.parallel == ParallelConfig(experts=expected)
    assert not [line for line in sharding_problems(config, ranks) if "experts" in line]


def test_the_bytes_that_a_step_exchanges_leave_reward_models_out(root):
    """They score between two steps."""
    config = config_of(mixture(root), 4)
    data = data_set(root / "exchanged", uneven=False)
    built, _ = build_model(config, load_tokenizer(config.model), data, half_on_gpu=False)
    step = built.step_module
    ranks = Runtime(3, 8, 3, 8, torch.device("cpu"), None)
    found = []
    for _ in range(2):
        plan_expert_parallelism(built, config, ranks)
        found.append(
            (
                len(step.plan.expert_parallel_modules),
                _expert_parallel_bytes(built, config.strategy, Precision.bf16, 100.0),
            )
        )
        step.add_reward_model("judge", copy.deepcopy(built.base_on_meta), set())
    assert found[1] == (2 * found[0][0], found[0][1])


def test_a_trial_of_rewards_says_that_its_ranks_are_too_few(root):
    """A run of eight ranks may be tried on one machine, whose ranks cannot share as theirs did."""
    with pytest.raises(ConfigError, match=r"parallel\.experts=8: must divide the number of ranks, 2, .*; set one of 2"):
        settled_trial(config_of(mixture(root), 8, ranks=2))
    settled_trial(config_of(mixture(root), 2, ranks=2))


def test_submitting_asks_the_same_where_the_model_is_here(root):
    with pytest.raises(ConfigError, match="no experts"):
        refuse_unshared_model(config_of(model_dir(root), 2))
