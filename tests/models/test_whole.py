"""What is proven of a model of its published size is what is proven of a tiny one, and what the table says."""

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from strategies.parameters import meta_context
from tests.helpers.covering import chosen
from tests.models import sweep
from tests.models.own import EXCLUDED, VARIANTS
from tests.models.tiny import KINDS
from tests.models.whole import LARGEST, LEFT_OUT
from trainer.model import attention, kept_layers
from trainer.model.architecture import transformers_class
from trainer.model.config import ModelKind
from trainer.model.kept_layers import KeptLayers
from trainer.model.shrink import SMALL_WINDOW_TOKENS, NotShrinkable, small_copies
from trainer.objectives import forward_path

TABLE = sweep.read()["types"]
WHOLE = {**{t: (t, LEFT_OUT.get(t, {})) for t in TABLE if t not in EXCLUDED and t not in VARIANTS}, **LARGEST}
WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size", "index_topk")


def marks(name):
    """Each kind of layer with what came of it; and all of the largest that keep layers which are far apart."""
    row = TABLE[WHOLE[name][0]]
    far = {name} if name.startswith(("Gemma", "Llama-4", "GLM")) else set()
    return {*row["kinds"], row["full"]["outcome"], *far}


def built(name):
    """The configuration of a whole size, and its model on meta."""
    model_type, own = WHOLE[name]
    if "an encoder's class" in TABLE[model_type]["kinds"]:
        own = own | {"is_decoder": True}
    config = CONFIG_MAPPING[model_type](**own)
    with meta_context():
        return config, transformers_class(ModelKind.causal, config).from_config(
            config, attn_implementation="eager", dtype=torch.float32
        )


@pytest.fixture(scope="module", params=chosen(WHOLE, marks))
def whole(request):
    """A whole size: its name, configuration and model."""
    return request.param, *built(request.param)


def test_published_model_size_is_proven_as_its_tiny_model(whole):
    attention.register()
    name, config, plain = whole
    row = TABLE[WHOLE[name][0]]["full"]
    found = forward_path._prove_paths(config, lambda: plain, attention.VARLEN_ATTENTION, on_gpu=False)
    assert found.tried, found.reason
    assert found.causal == (row["outcome"] != "refused")
    if found.causal:
        free = found.padding_free is not None
        assert ("padding-free" if free else "padded", attention.VARLEN_ATTENTION if free else found.stock) == (
            row["outcome"],
            row["attention"],
        )


def test_the_small_copy_has_each_kind_that_settings_name_and_short_windows(whole):
    _, config, plain = whole
    small = next(small_copies(config, plain)).get_text_config().to_dict()
    large = config.get_text_config().to_dict()
    for names in KINDS:
        assert set(map(str, large.get(names) or ())) <= set(map(str, small.get(names) or ())), names
    assert all((small.get(window) or 0) <= SMALL_WINDOW_TOKENS for window in WINDOWS)


@pytest.fixture(scope="module")
def gemma():
    """Whose last layers share the keys of others."""
    return built("Gemma-4, keys shared by the last layers")


def test_shrunk_model_that_lacks_a_kind_of_layer_is_refused(gemma, monkeypatch):
    config, plain = gemma
    monkeypatch.setattr("trainer.model.shrink.layer_choices", lambda *_: iter([KeptLayers((0, 1), 35)]))
    with pytest.raises(NotShrinkable, match=r"a small copy lacks [1-9] of its kinds of layers"):
        forward_path._first_runnable_proof(config, plain)


def test_where_names_do_not_do_widths_are_divided(monkeypatch):
    """As of an architecture that is not in transformers: its own copy, by other names, would not fit together."""
    attention.register()
    config, plain = built("Mixtral-8x22B")
    monkeypatch.setattr("trainer.model.shrink._sizes_by_name", lambda made, full: made | {"num_key_value_heads": 3})
    found = forward_path._prove_paths(config, lambda: plain, attention.VARLEN_ATTENTION, on_gpu=False)
    assert found.padding_free is not None, found.reason


def test_shrunk_model_settings_of_layers_follow_the_kept_layers():
    kept = KeptLayers((0, 5, 9), 10)
    settings = {
        "num_hidden_layers": 10,
        "layer_types": list("abcdefghij"),
        "num_kv_shared_layers": 2,
        "first_k_dense_replace": 3,
        "cross_attention_layers": [2, 5, 8],
        "ple_layer_ids": [6, 10],
        "per_layer_config": {"05": {"head_dim": 512}, "7": {"head_dim": 256}},
        "n_embd": 10,
    }
    assert kept.settings_of_kept_layers(settings) == {
        "num_hidden_layers": 3,
        "layer_types": ["a", "f", "j"],
        "num_kv_shared_layers": 1,
        "first_k_dense_replace": 1,
        "cross_attention_layers": [1],
        "ple_layer_ids": [2, 3],
        "per_layer_config": {"1": {"head_dim": 512}},
    }


def test_layers_that_lie_in_several_lists_are_seen_together():
    parts = torch.nn.Module()
    for name, size in (("first", 2), ("then", 3)):
        lists = [torch.nn.TransformerEncoderLayer(8, 2, norm_first=name == "then", device="meta") for _ in range(size)]
        parts.add_module(name, torch.nn.ModuleList(lists))
    kinds = kept_layers.layer_kinds(parts, 5)
    assert [kind == kinds[0] for kind in kinds] == [True, True, False, False, False]
