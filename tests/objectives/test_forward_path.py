"""What is proven of an architecture, and that the proof can fail."""

import copy
import json

import pytest
import torch
import transformers

from strategies.errors import ConfigError
from strategies.hardware import Gpu
from strategies.parameters import meta_context
from tests.models.tiny import tiny_config
from trainer.data.config import Layout
from trainer.model import attention
from trainer.model.config import Attention, ModelConfig
from trainer.objectives import forward_path
from trainer.objectives.causal import FORWARD_PATHS, FUSED_PATH, ForwardPath
from trainer.objectives.layout_choice import build_causal_model

SIZES = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
WINDOWED = {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 4096, "intermediate_size": 11008}
ENCODER = {**SIZES, "intermediate_size": 64}
XMOD = {**ENCODER, "is_decoder": True, "pad_token_id": 1}
CONFIGS = {
    "mistral": lambda: transformers.MistralConfig(**SIZES, **WINDOWED),
    "gpt_oss": lambda: transformers.GptOssConfig(**SIZES, **WINDOWED, num_local_experts=8),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_key_value_heads=2),
    "bloom": lambda: transformers.BloomConfig(vocab_size=96, hidden_size=48, n_layer=2, n_head=4),
    "bert": lambda: transformers.BertConfig(**ENCODER, is_decoder=True),
    "roberta": lambda: transformers.RobertaConfig(**ENCODER, is_decoder=True, pad_token_id=1),
    "prophetnet": lambda: transformers.ProphetNetConfig(
        vocab_size=96, hidden_size=48, num_decoder_layers=2, num_decoder_attention_heads=4, decoder_ffn_dim=64
    ),
    "encoder": lambda: transformers.BertConfig(**ENCODER),
    "xlstm": lambda: tiny_config("xlstm"),
    "llama4": lambda: tiny_config("llama4_text"),
    "cpmant": lambda: tiny_config("cpmant"),
    "xmod": lambda: transformers.XmodConfig(**XMOD),
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Findings of this test alone."""
    attention.register()
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path))
    return tmp_path


def arranged(kind, **settings):
    model = ModelConfig(path=kind, **settings)
    return build_causal_model(model, CONFIGS[kind](), Layout.auto, needs_padding=False, half_on_gpu=False)


@pytest.mark.parametrize("kind", ["mistral", "gpt_oss", "mixtral"])
def test_forward_path_with_windows_sinks_and_experts_is_proven_in_one_row(kind):
    model, found = arranged(kind)
    assert (found.layout, found.attention, model.forward_path) == (
        Layout.padding_free,
        attention.VARLEN_ATTENTION,
        FUSED_PATH,
    )


AS_IN_ROWS = {
    "_chunk_bounds": lambda bounds, size: bounds,
    "_scaled_by_document_position": lambda module, query, bounds: query,
}


@pytest.mark.parametrize("broken", [None, *AS_IN_ROWS])
def test_forward_path_with_chunks_and_scales_by_position_is_that_of_documents(broken, monkeypatch):
    """Llama 4's: without what the kernel does about either, documents in one row are found out."""
    if broken:
        monkeypatch.setattr(attention, broken, AS_IN_ROWS[broken])
    model, found = arranged("llama4")
    assert found.layout is (Layout.padded if broken else Layout.padding_free)
    assert model.forward_path == FORWARD_PATHS[1]


def test_distances_that_run_through_a_row_need_padded_rows():
    _, found = arranged("bloom")
    assert found.layout is Layout.padded
    assert "bloom is not proven padding-free: the loss differs by" in found.notes["data.layout"]


@pytest.mark.parametrize(("kind", "way"), [("bert", FORWARD_PATHS[1]), ("roberta", FORWARD_PATHS[2])])
def test_forward_path_of_several_head_layers_or_own_positions_is_left_to_the_model(kind, way):
    model, found = arranged(kind)
    assert model.forward_path == way
    assert "own forward pass" in found.notes["model.head"]


def test_forward_path_of_a_model_that_padding_changes_takes_one_document_at_a_time():
    """Its head makes several predictions of each token, of which one are the logits."""
    model, found = arranged("prophetnet")
    assert (found.layout, found.attention) == (Layout.padded, "eager")
    assert model.forward_path == ForwardPath(fused=False, positions=False, alone=True)


@pytest.mark.parametrize(("off", "own", "right"), [(4e-5, 5e-5, True), (6e-5, 5e-5, False), (2e-4, 1e-3, False)])
def test_a_difference_is_rounding_only_where_the_stock_model_rounds_as_much(off, own, right, monkeypatch):
    monkeypatch.setattr(forward_path._Proof, "_gradient_distance", lambda *_: off)
    monkeypatch.setattr(forward_path._Proof, "_hf_rounding", lambda _: own)
    if right:
        assert arranged("mistral")[1].layout is Layout.padding_free
    else:
        with pytest.raises(ConfigError, match="gradients differ by"):
            arranged("mistral")


def test_a_model_that_magnifies_rounding_takes_several_documents_a_batch():
    """Some of its parts are in float32 always: its own gradients in float32 are 5e-5 from those in float64."""
    model, found = arranged("xlstm")
    assert (found.layout, model.forward_path) == (Layout.padded, FORWARD_PATHS[1])


def test_forward_path_of_tokens_that_see_ahead_is_refused_with_what_helps():
    with pytest.raises(ConfigError, match=r"see what follows.*is_decoder to true.*classification"):
        arranged("encoder")
    with pytest.raises(ConfigError, match=r"teach nothing; take a causal model$"):
        arranged("cpmant")  # it has neither


def test_forward_path_of_a_model_that_lacks_a_setting_works_once_it_is_set(monkeypatch):
    """Published ones have no default language, and plain transformers asks for it."""
    with pytest.raises(ConfigError, match=r"Input language unknown.*set what it lacks in its config\.json"):
        arranged("xmod")
    monkeypatch.setitem(CONFIGS, "xmod", lambda: transformers.XmodConfig(**XMOD, default_language="en_XX"))
    assert arranged("xmod")[1].layout is Layout.padded


def test_forward_path_proof_finds_an_attention_that_ignores_the_window(monkeypatch):
    real = attention.varlen_attention

    def blind(*args, sliding_window=None, **rest):
        return real(*args, **rest)

    monkeypatch.setattr(attention, "varlen_attention", blind)
    attention.register()
    try:
        assert arranged("mistral")[1].layout is Layout.padded
        with pytest.raises(ConfigError, match=r"model.attention=varlen.*not proven"):
            arranged("mistral", attention=Attention.varlen)
    finally:
        monkeypatch.undo()
        attention.register()


def test_forward_path_proof_finds_an_unknown_factor_on_the_logits(monkeypatch):
    config = transformers.GraniteConfig(**SIZES, num_key_value_heads=2, logits_scaling=8.0)
    with meta_context():
        plain = transformers.AutoModelForCausalLM.from_config(config)
    assert (
        forward_path._prove_paths(config, lambda: plain, attention.VARLEN_ATTENTION, on_gpu=False).padding_free
        == FUSED_PATH
    )
    monkeypatch.setattr("trainer.losses.fuse.head_transform", lambda _config: (None, 1.0))
    found = forward_path._prove_paths(config, lambda: plain, attention.VARLEN_ATTENTION, on_gpu=False)
    assert found.padding_free == ForwardPath(fused=False, positions=True)


def test_forward_path_proof_is_cached_and_done_again_if_damaged(home, monkeypatch):
    first = arranged("mistral")[1]
    (file,) = (home / "proofs").iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(forward_path, "_prove_paths", None)
        assert arranged("mistral")[1] == first
        elsewhere = CONFIGS["mistral"]()
        elsewhere._name_or_path = "another/directory"
        patched.setitem(CONFIGS, "mistral", lambda: elsewhere)
        assert arranged("mistral")[1] == first
    file.write_text(json.dumps({"padding_free": {"unknown": 1}}))
    assert arranged("mistral")[1] == first


def test_forward_path_of_a_model_that_cannot_be_shrunk_is_not_proven_and_noted(monkeypatch):
    config = transformers.MistralConfig(**SIZES, **WINDOWED)
    assert forward_path._prove_paths(
        config, lambda: torch.nn.Linear(1, 1), attention.VARLEN_ATTENTION, on_gpu=False
    ).causal
    broken = copy.deepcopy(config)
    monkeypatch.setattr(type(broken), "from_dict", classmethod(lambda *_: 1 / 0))
    found = forward_path._prove_paths(broken, lambda: torch.nn.Linear(1, 1), attention.VARLEN_ATTENTION, on_gpu=False)
    assert found.padding_free is None and "takes no small sizes" in found.reason


def test_forward_path_proof_on_a_card_counts_for_that_card_and_its_packages(monkeypatch):
    """One cache may be shared by hosts with several cards: an older one has no bf16 in flex attention, and a newer one has."""
    asked, config = [], CONFIGS["mistral"]()
    card, packages = [Gpu("H100", (9, 0))], [{}]
    monkeypatch.setattr(
        forward_path, "_prove_paths", lambda *_, on_gpu: asked.append(on_gpu) or forward_path.ProvenPaths()
    )
    monkeypatch.setattr(forward_path, "gpu_of_device", lambda _: card[0])
    monkeypatch.setattr(forward_path, "kernel_versions", lambda: packages[0])

    def times(*, on_gpu: bool) -> int:
        forward_path.proven_paths(config, lambda: None, "flex", on_gpu=on_gpu)
        return len(asked)

    assert [times(on_gpu=True), times(on_gpu=True)] == [1, 1]
    card[0] = Gpu("T4", (7, 5))
    assert times(on_gpu=True) == 2
    packages[0] = {"fla": "0.4"}
    assert [times(on_gpu=True), times(on_gpu=False), times(on_gpu=False)] == [3, 4, 4]
    card[0] = Gpu("H100", (9, 0))
    assert times(on_gpu=False) == 4


def test_forward_path_proof_on_a_full_card_is_not_kept(monkeypatch):
    """It was: what another process left no memory for stood as unproven for good."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    config = CONFIGS["mistral"]()
    with meta_context():
        plain = transformers.AutoModelForCausalLM.from_config(config)
    with monkeypatch.context() as busy:
        busy.setattr(forward_path._Proof, "_difference_from_hf", full)
        found = forward_path.proven_paths(config, lambda: plain, attention.VARLEN_ATTENTION, on_gpu=False)
    assert not found.tried and "CUDA out of memory" in found.reason
    assert (
        forward_path.proven_paths(config, lambda: plain, attention.VARLEN_ATTENTION, on_gpu=False).padding_free
        == FUSED_PATH
    )
