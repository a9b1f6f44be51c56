"""Rows that ranks share: refused before data is read where the model or the settings do not allow it, and what is told."""

from dataclasses import replace

import pytest
import transformers

from launch.cluster.submission import refuse_unshared_model
from strategies.errors import ConfigError
from tests.helpers.building import model_dir, run_config
from tests.models.tiny import tiny_config
from trainer.build.parallel import check_parallel
from trainer.build.sequence import LayerHeads, attention_heads_of, sequence_parallel_notes
from trainer.config.parallel import ParallelConfig
from trainer.model import sequence_proof
from trainer.objectives.base import TeacherConfig
from trainer.objectives.classification import ClassificationConfig
from trainer.objectives.distillation import DistillationConfig
from trainer.planner.variants import PlanConfig, list_long_row_variants
from trainer.tuning.check import SettingsBesideTuning, tuning_combination_problems
from trainer.tuning.config import AdaptionPromptConfig, PrefixConfig, PromptConfig


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tiny models, and proofs of this module alone."""
    return tmp_path_factory.mktemp("sequence")


@pytest.fixture(autouse=True)
def cache(root, monkeypatch):
    monkeypatch.setenv("SHARDTUNE_CACHE", str(root / "cache"))


def config_of(model, degree, **changes):
    return run_config(model, "fsdp2", "full", micro=1, parallel=ParallelConfig(sequence=degree), **changes)


def other_model(root, model_type):
    """The configuration alone of a model of another architecture."""
    directory = root / f"other-{model_type}"
    if not directory.exists():
        tiny_config(model_type).save_pretrained(directory)
    return directory


def test_a_model_whose_rows_can_be_shared_is_let_through(root):
    check_parallel(config_of(model_dir(root), 4))
    check_parallel(config_of(model_dir(root), 2, objective=ClassificationConfig()))


def test_more_ranks_than_query_heads_are_refused_with_the_model_s_number(root):
    with pytest.raises(ConfigError, match=r"parallel\.sequence=8: model\.path=.*llama has 4 query heads.*=4 or less"):
        check_parallel(config_of(model_dir(root), 8))


def test_the_teacher_s_heads_count_as_the_model_s_do(root):
    teacher = root / "few-heads"
    settings = tiny_config("llama")
    settings.num_attention_heads = settings.num_key_value_heads = 2
    settings.save_pretrained(teacher)
    objective = DistillationConfig(teacher=TeacherConfig(path=str(teacher)))
    with pytest.raises(ConfigError, match=r"objective\.teacher\.path=.*few-heads has 2 query heads"):
        check_parallel(config_of(model_dir(root), 4, objective=objective))


@pytest.mark.parametrize("model_type", ["llama4_text", "mamba"])
def test_an_architecture_that_is_not_proven_is_refused_with_the_proof_s_reason(root, model_type):
    with pytest.raises(ConfigError, match=rf"cannot share rows of .*\({model_type}\): .*; set parallel\.sequence=1"):
        check_parallel(config_of(other_model(root, model_type), 2))


def test_submitting_asks_the_same_where_the_model_is_here(root):
    config = config_of(other_model(root, "llama4_text"), 2)
    with pytest.raises(ConfigError, match=sequence_proof.TOKENS_MEET_OUTSIDE_ATTENTION):
        refuse_unshared_model(config)
    refuse_unshared_model(replace(config, model=replace(config.model, path="some/model-of-the-hub")))
    distillation = DistillationConfig(teacher=TeacherConfig(path="some/teacher-of-the-hub"))
    refuse_unshared_model(config_of(model_dir(root), 2, objective=distillation))
    refuse_unshared_model(replace(config, parallel=ParallelConfig()))


def test_a_plan_offers_no_shared_rows_that_the_run_would_refuse(root):
    config = replace(config_of(other_model(root, "llama4_text"), 1), parallel=ParallelConfig())
    possible, refused = list_long_row_variants(config, PlanConfig(), set(), 8, {})
    assert not possible and any(sequence_proof.TOKENS_MEET_OUTSIDE_ATTENTION in reason for _, reason in refused)


def test_encoder_classifiers_are_refused_before_data_is_read(root):
    with pytest.raises(ConfigError, match="does not score the last token"):
        check_parallel(config_of(other_model(root, "bert"), 2, objective=ClassificationConfig()))


@pytest.mark.parametrize("tuning", [PrefixConfig(), PromptConfig(), AdaptionPromptConfig()])
def test_methods_with_rows_of_their_own_are_refused_when_composed(tuning):
    config = config_of("model", 2)
    rest = {"strategy": config.strategy, "precision": config.precision, "data": config.data}
    facts = SettingsBesideTuning(**rest, merges_adapter=False, sequence_ranks=2)
    assert [
        line
        for line in tuning_combination_problems(tuning, facts)
        if line.startswith("parallel.sequence=2 with tuning=")
    ]
    facts = replace(facts, sequence_ranks=1)
    assert not [line for line in tuning_combination_problems(tuning, facts) if "parallel" in line]


def test_heads_of_latent_attention_are_as_wide_as_queries_and_values_are():
    config = transformers.DeepseekV3Config()
    assert (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim) == (128, 64, 128)
    assert attention_heads_of(config) == LayerHeads(num_query_heads=128, num_key_value_heads=128, head_dim=160)


def test_bytes_of_the_exchange_are_those_of_the_formula():
    """By the rows of docs: Llama 8B, 32,768 tokens in bf16: 160, 120, 70 and 45 MiB that a rank sends in a layer."""
    heads = LayerHeads(num_query_heads=32, num_key_value_heads=8, head_dim=128)
    sent = [heads.max_all_to_all_elements(32768, ranks) * 2 / 2**20 for ranks in (2, 4, 8, 16)]
    assert sent == [160, 120, 70, 45]


def test_heads_that_divide_badly_and_groups_across_hosts_are_told(root):
    settings = tiny_config("llama")
    settings.num_attention_heads = 28
    settings.num_key_value_heads = 4
    assert attention_heads_of(settings).head_imbalance(8) == pytest.approx(32 / 28)
    config = config_of(model_dir(root), 8)
    told = sequence_parallel_notes(config.parallel.sequence, settings, config.precision, ranks_per_host=4, tokens=1024)
    assert len(told) == 2
    assert told[0].startswith("28 query heads do not divide well by 8: the busiest rank has 1.14 times")
    assert told[1].startswith("groups of 8 ranks cross hosts of 4: a rank sends up to ")
    assert (
        len(
            sequence_parallel_notes(config.parallel.sequence, settings, config.precision, ranks_per_host=8, tokens=1024)
        )
        == 1
    )
    settings.num_attention_heads = 32
    assert (
        sequence_parallel_notes(config.parallel.sequence, settings, config.precision, ranks_per_host=8, tokens=1024)
        == []
    )
