"""Which architectures may be cut along the sequence: the proof, what it must find, and what it cannot see."""

from contextlib import nullcontext

import pytest
import torch
import transformers

from strategies.parameters import meta_context
from tests.models.sweep import read
from tests.models.tiny import tiny_config
from trainer.data.batches.collate import concatenated_batch
from trainer.data.config import Layout
from trainer.data.store.sequences import Sample
from trainer.model import attention, experts, flex, rotary, sequence_proof
from trainer.model.architecture import transformers_class
from trainer.model.config import ModelConfig, ModelKind
from trainer.objectives import forward_path
from trainer.objectives.causal import FORWARD_PATHS, FUSED_PATH, states_at_targets
from trainer.objectives.layout_choice import build_causal_model

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LENGTHS = (5, 23, 14)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Findings of this test alone."""
    attention.register()
    flex.register()
    experts.register()
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path))


def problem_of(config, path=FUSED_PATH):
    """What the proof says of an architecture, whatever layout it trains in."""
    with meta_context():
        plain = transformers_class(ModelKind.causal, config).from_config(config, attn_implementation="eager")
    return forward_path._first_runnable_proof(config, plain)._sequence_problem(path, "")


def arranged(config, layout=Layout.auto):
    """The arrangement that a run would take."""
    model = ModelConfig(path="model")
    return build_causal_model(model, config, layout, needs_padding=False, half_on_gpu=False)[1]


@pytest.mark.parametrize("model_type", ["gpt_oss", "gemma3_text", "deepseek_v3", "gpt2"])
def test_sequence_may_be_cut_where_tokens_meet_in_attention_alone(model_type):
    """Sinks and experts; windows and soft caps; latent attention; a table of learned positions."""
    assert problem_of(tiny_config(model_type)) is None


@pytest.mark.parametrize("model_type", ["llama4_text", "qwen3_next", "falcon_h1", "lfm2", "jamba", "kimi_linear"])
def test_sequence_may_not_be_cut_where_tokens_meet_elsewhere(model_type):
    """Positions counted from the slice's first token, recurrences, convolutions."""
    assert problem_of(tiny_config(model_type), FORWARD_PATHS[1]).startswith("its tokens meet outside attention")


@pytest.mark.parametrize(
    ("model_type", "reason"), [("mamba", "interface"), ("nemotron", "not told how the row is cut")]
)
def test_sequence_may_not_be_cut_where_attention_cannot_be_exchanged(model_type, reason):
    assert reason in problem_of(tiny_config(model_type), FORWARD_PATHS[1])


def convolved(forward):
    """A feed-forward part that mixes each token with the one before it by a convolution."""

    def changed(self, hidden):
        kernel = torch.tensor([[[0.5, 1.0]]], dtype=hidden.dtype).repeat(hidden.shape[-1], 1, 1)
        padded = torch.nn.functional.pad(hidden.transpose(1, 2), (1, 0))
        mixed = torch.nn.functional.conv1d(padded, kernel, groups=hidden.shape[-1])
        return forward(self, mixed.transpose(1, 2))

    return changed


def shifted(forward):
    """A feed-forward part that takes half of each token from the one before it."""
    return lambda self, hidden: forward(self, (hidden + hidden.roll(1, dims=1)) / 2)


def counted_from_the_slice(forward):
    """A rotary embedding that counts positions itself: right for documents in one row, which it turns all alike."""
    return lambda self, hidden, position_ids: forward(self, hidden, torch.arange(hidden.shape[1])[None])


def scaled_by_the_slice(forward):
    """Attention whose scale depends on the number of tokens that it is given."""

    def changed(self, hidden_states, **kwargs):
        self.scaling = 1 / hidden_states.shape[1]
        return forward(self, hidden_states, **kwargs)

    return changed


@pytest.mark.parametrize(
    ("part", "planted", "reason"),
    [
        ("MLP", convolved, "meet outside attention"),
        ("MLP", shifted, "meet outside attention"),
        ("RotaryEmbedding", counted_from_the_slice, "meet outside attention"),
        ("Attention", scaled_by_the_slice, "depend on the slice's length"),
    ],
)
def test_sequence_proof_finds_what_is_planted(part, planted, reason, monkeypatch):
    cls = getattr(transformers.models.llama.modeling_llama, f"Llama{part}")
    monkeypatch.setattr(cls, "forward", planted(cls.forward))
    assert reason in problem_of(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))


def test_sequence_problem_reaches_the_arrangement_of_a_run():
    llama = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    assert arranged(llama).sequence_problem is None
    assert arranged(llama, Layout.padded).sequence_problem == "its rows are padded"
    assert "meet outside attention" in arranged(tiny_config("llama4_text")).sequence_problem


def test_table_of_models_says_of_each_padding_free_type_whether_it_may_be_cut():
    refused = {}
    for model_type, row in read()["types"].items():
        outcome = row.get("full", {}).get("outcome")
        assert (row.get("sequence") is None) == (outcome is None), model_type
        if outcome == "padding-free" and row["sequence"] != "proven":
            refused[model_type] = row["sequence"]
        assert outcome != "padded" or row["sequence"] == "padded"
    assert refused == dict.fromkeys(("llama4", "llama4_text"), sequence_proof.TOKENS_MEET_OUTSIDE_ATTENTION)


def documents(width=96):
    draw = torch.Generator().manual_seed(3)
    samples = []
    for length in LENGTHS:
        ids = torch.randint(4, width, (length,), generator=draw).numpy()
        samples.append(Sample(ids, ids > 0))
    return concatenated_batch(samples)


def slices_of(config):
    """What `sequence_problem` says of a model on documents longer than its copy would have: rotary types by length."""
    found = sequence_proof.register_token_local_attention()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=sequence_proof.TOKEN_LOCAL_ATTENTION, dtype=torch.float64
    )

    def forward(inputs):
        rows = torch.arange(inputs["input_ids"].numel())
        return states_at_targets(model, inputs | {"target_rows": rows, "targets": torch.zeros_like(rows)})[1]

    return sequence_proof.sequence_problem(forward, documents(), found)


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
BY_LENGTH = {
    "longrope": lambda: transformers.Phi3Config(
        **SIZES,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters=LONG | {"original_max_position_embeddings": 16},
        pad_token_id=0,
    ),
    "dynamic": lambda: transformers.LlamaConfig(
        **SIZES,
        num_key_value_heads=2,
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    ),
}


@pytest.mark.parametrize("kind", list(BY_LENGTH))
@pytest.mark.parametrize("seen", [True, False])
def test_rotary_types_by_length_go_by_the_longest_document_of_the_whole_row(kind, seen, monkeypatch):
    """The longest document has 23 tokens, the frequencies change at 16, and a slice may have only the first of them."""
    if not seen:
        monkeypatch.setattr(rotary, "frequencies_of_whole_row", lambda *_: nullcontext())
    assert (slices_of(BY_LENGTH[kind]()) is None) is seen


def test_rotary_embedding_inside_a_block_is_refused_if_it_goes_by_length(monkeypatch):
    """A recomputed block would call it when the whole row is no longer known."""
    config = BY_LENGTH["dynamic"]()
    with meta_context():
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert rotary.whole_row_problem(model) is None
    model.model.layers[1].self_attn.rotary_emb = model.model.rotary_emb
    assert "inside its blocks" in rotary.whole_row_problem(model)


FLEXED = {
    "windows": lambda: transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8),
    "plain": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
}


def masks_of(config, inputs, monkeypatch):
    """The masks that a model hands to flex attention, as squares of the whole row, by call."""
    squares = []

    def look(module, query, key, value, attention_mask, **kwargs):
        from torch.nn.attention.flex_attention import create_mask

        length = sum(LENGTHS)
        squares.append(create_mask(attention_mask.mask_mod, 1, None, length, length, device="cpu")[0, 0])
        assert attention_mask.seq_lengths == (length, length)
        return query.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, flex.FLEX_ATTENTION, look)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=flex.FLEX_ATTENTION)
    rows = torch.arange(inputs["input_ids"].numel())
    with torch.no_grad():
        states_at_targets(model, inputs | {"target_rows": rows, "targets": torch.zeros_like(rows)})
    return squares


@pytest.mark.parametrize("kind", list(FLEXED))
def test_flex_masks_of_a_slice_are_those_of_the_whole_row(kind, monkeypatch):
    row = documents()
    whole = masks_of(FLEXED[kind](), row, monkeypatch)
    start, stop = 9, 30  # from within the second document to within the third
    inputs = row | {"row_slices": [0, start, stop, sum(LENGTHS)]}
    for name in sequence_proof.ROW_INPUTS:
        inputs[name] = row[name][:, start:stop]
    cut = masks_of(FLEXED[kind](), inputs, monkeypatch)
    assert len(cut) == len(whole) == SIZES["num_hidden_layers"]
    assert all(torch.equal(mine, expected) for mine, expected in zip(cut, whole, strict=True))
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    place = torch.arange(sum(LENGTHS))
    distance = place[:, None] - place
    expected = (document[:, None] == document) & (distance >= 0)
    if kind == "windows":
        expected &= distance < 8
    assert torch.equal(whole[0], expected)
