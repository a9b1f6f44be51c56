"""Models whose step is simulated although it is not that of a plain decoder: two sides, a tower for images, long RoPE."""

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from strategies.base import ActivationCheckpointing, SingleConfig
from strategies.runtime import SIMULATED
from strategies.simulation import fake_tensors
from tests.helpers.building import run_config
from trainer.build.sequence import attention_heads_of
from trainer.evaluation.full_weights import kv_cache_bytes_upper_bound
from trainer.model.flash import head_sizes
from trainer.objectives.base import TeacherConfig
from trainer.objectives.distillation import DistillationConfig
from trainer.objectives.registry import data_spec_of
from trainer.objectives.seq2seq import Seq2seqConfig
from trainer.planner.simulation import simulate_depth, simulate_run

NOTHING_RECOMPUTED = SingleConfig(activation_checkpointing=ActivationCheckpointing.none)


def run_of(path, settings, **changes):
    """A run on one GPU of a model with these transformers `settings`, whose config.json is written to `path`."""
    settings.save_pretrained(path)
    return run_config(path, NOTHING_RECOMPUTED, "full", micro=2, batch={"global": 2, "micro": 2}, **changes)


def test_a_step_of_an_encoder_decoder_model_has_prompts_and_answers(tmp_path):
    settings = transformers.T5Config(
        d_model=64, d_ff=256, d_kv=16, num_heads=4, num_layers=2, vocab_size=128, decoder_start_token_id=0
    )
    settings.architectures = ["T5ForConditionalGeneration"]
    config = run_of(tmp_path, settings, objective=Seq2seqConfig(max_target=12))
    spec = data_spec_of(config.objective)
    assert spec.longest_sequence(40) == 52
    assert spec.placeholder(52).answer_begin() == 40
    assert spec.placeholder(9).answer_begin() == 1, "a short document has a prompt, too"

    step = simulate_run(config, [52, 52])
    model = transformers.AutoModelForSeq2SeqLM.from_config(settings)
    with FlopCounterMode(display=False) as counter:
        prompts = torch.ones(2, 40, dtype=torch.long)
        model(input_ids=prompts, labels=torch.ones(2, 12, dtype=torch.long)).loss.backward()
    assert step.flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_blocks_of_a_tower_for_images_do_not_count_as_blocks_of_the_text(tmp_path):
    kinds = ["sliding_attention", "full_attention"] * 9
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = {"num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 18, "layer_types": kinds, "vocab_size": 128}
    settings = transformers.Gemma3Config(
        text_config={**sizes, **text, "sliding_window": 16},
        vision_config={**sizes, "num_hidden_layers": 5, "image_size": 28, "patch_size": 14},
    )
    settings.architectures = ["Gemma3ForConditionalGeneration"]
    config = run_of(tmp_path, settings)
    # Models of 8 and 10 blocks stand for this one of 18.
    extrapolated = simulate_depth(config, [40, 24])
    assert extrapolated == simulate_depth(config, [40, 24], exact=True)
    assert extrapolated.peak_phase.model_part in ("head", "after", *range(18))


def test_blocks_of_a_teacher_do_not_count_as_blocks_of_the_student(tmp_path):
    """They did, from 0: the first blocks of the student took the places of the teacher's, where such a step may hold most."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 128, "pad_token_id": 0}
    teacher, student = (transformers.LlamaConfig(**sizes, num_hidden_layers=layers) for layers in (3, 2))
    for settings in (teacher, student):
        settings.architectures = ["LlamaForCausalLM"]
    teacher.save_pretrained(tmp_path / "teacher")
    objective = DistillationConfig(teacher=TeacherConfig(path=str(tmp_path / "teacher")))
    step = simulate_run(run_of(tmp_path / "student", student, objective=objective), [40, 24])
    places = {phase.model_part for phase in step.peak_by_phase}
    assert "teacher" in places
    assert {place for place in places if isinstance(place, int)} == {0, 1}


def test_layers_may_have_heads_of_their_own(tmp_path):
    """As in Gemma 4, whose configuration raises an error if it is asked for the head size of all layers."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    kinds = ["sliding_attention", "full_attention"]
    text = {"num_hidden_layers": 2, "layer_types": kinds, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128}
    wide = {"global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
    per_layer = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 128, "sliding_window": 16}
    vision = {**sizes, "num_key_value_heads": 2, "num_hidden_layers": 1, "head_dim": 16}
    settings = transformers.Gemma4Config(text_config={**sizes, **text, **wide, **per_layer}, vision_config=vision)
    settings.architectures = ["Gemma4ForConditionalGeneration"]
    assert head_sizes(settings) == [16, 32]
    heads = attention_heads_of(settings)
    assert (heads.num_query_heads, heads.num_key_value_heads, heads.head_dim) == (2, 1, 32)
    assert kv_cache_bytes_upper_bound(settings, rows=1, tokens=1, bytes_per_number=2) == 2 * 2 * 2 * 32 * 2
    assert simulate_run(run_of(tmp_path, settings), [40, 24]).flops > 0


def test_numbers_of_a_model_lie_where_it_asks_for_them():
    """torch makes them on the CPU, with which the model's own tensors could not be multiplied."""
    with fake_tensors(SIMULATED):
        own = torch.zeros(2, device=SIMULATED)
        on_device = [
            torch.tensor([1, 2], device=SIMULATED),
            torch.tensor(data=[1, 2], device=SIMULATED),
            torch.as_tensor([1.0, 2.0], device=SIMULATED),
            own.new_tensor([1.0, 2.0]),
        ]
        assert {made.device for made in on_device} == {SIMULATED}
        assert torch.tensor(data=[1, 2]).device == torch.device("cpu"), "nothing was asked for"


def test_a_step_with_long_rope_takes_what_one_with_plain_rope_takes(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    steps = []
    for rope in (
        {"rope_type": "default"},
        {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
    ):
        scaled = {"original_max_position_embeddings": 32} if rope["rope_type"] == "longrope" else {}
        settings = transformers.Phi3Config(
            **sizes,
            vocab_size=128,
            pad_token_id=0,
            max_position_embeddings=128,
            rope_parameters={"rope_theta": 10000.0, **rope, **scaled},
            **scaled,
        )
        settings.architectures = ["Phi3ForCausalLM"]
        steps.append(simulate_run(run_of(tmp_path / rope["rope_type"], settings), [40, 24]))
    plain, long = (step.phase_and_peak[1].total_bytes for step in steps)
    assert long == pytest.approx(plain, rel=0.01)
