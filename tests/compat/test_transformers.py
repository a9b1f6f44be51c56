"""What the project uses of transformers beside its public interface still does what it is used for."""

import pytest
import torch
import transformers
from torch import nn

from strategies.compat.transformers import checkpoint_block
from strategies.parameters import meta_context
from tests.models import tiny
from trainer.data.tokens.compat import render_conversations
from trainer.model import compat
from trainer.tuning.compat import transformers as tuning_compat

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
MIXTRAL = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)


def model_of(config, **settings):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, **settings)


def on_meta(config):
    with meta_context():
        return transformers.AutoModelForCausalLM.from_config(config)


# -- attention and masks


def test_transformers_masks_ask_for_documents_before_searching_for_them(monkeypatch):
    """`create_causal_mask` keeps apart what was declared, although the positions are those of one document."""
    from transformers import masking_utils

    # Put back after the test. An earlier test may have told transformers of other documents, of which there are none now.
    for name in ("find_packed_sequence_indices", "remap_positions_for_packed_sequence"):
        monkeypatch.setattr(masking_utils, name, getattr(masking_utils, name))
    declared = {"documents": None}
    compat.patch_masks_of_packed_rows(lambda positions: declared["documents"], lambda positions: positions)
    config = transformers.LlamaConfig(**SIZES)
    config._attn_implementation = "sdpa"

    def mask():
        positions = torch.arange(5)[None]
        return masking_utils.create_causal_mask(config, torch.zeros(1, 5, 32), None, None, positions)

    assert mask() is None, "one document needs no mask"
    declared["documents"] = torch.tensor([[0, 0, 0, 1, 1]])
    seen = mask()[0, 0]
    seen = seen if seen.dtype == torch.bool else seen == 0
    assert seen.tolist() == [[query >= key and (query < 3) == (key < 3) for key in range(5)] for query in range(5)]


def test_attention_of_a_model_is_read_and_changed_for_a_while():
    model = model_of(transformers.LlamaConfig(**SIZES), attn_implementation="sdpa").eval()
    calls = []

    def attention(module, query, key, value, mask, **_):
        calls.append(module)
        return value.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("compat_test", attention)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with compat.temporary_attention(model.config, "compat_test"):
            assert compat.attention_of(model.config) == "compat_test"
            other = model(input_ids=ids).logits
        assert compat.attention_of(model.config) == "sdpa"
        assert torch.equal(model(input_ids=ids).logits, before)
    assert len(calls) == 2 and not torch.allclose(other, before)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_flex_attention_is_declared_where_transformers_builds_it(kind):
    config = tiny.tiny_config(kind)
    try:
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="flex_attention")
    except ValueError:
        builds = False
    else:
        builds = True
    assert compat.declares_flex_attention(on_meta(tiny.tiny_config(kind)).get_decoder()) is builds


# -- kernels and experts


def test_kernel_packages_are_left_out_for_a_while(monkeypatch):
    import collections  # a package with a function that stands for a kernel

    from transformers.integrations import hub_kernels

    monkeypatch.setattr(collections, "compat_kernel", lambda x: "kernel", raising=False)
    decorate = hub_kernels.use_kernel_func_from_hub_with_fallback("compat_kernel", "collections")
    function = decorate(lambda x: "torch")
    assert function(1) == "kernel"
    with compat.without_kernel_packages():
        assert function(1) == "torch"
    assert function(1) == "kernel"


def test_experts_compute_by_a_function_of_ours_that_falls_back_on_theirs():
    called = []

    def experts(module, hidden, chosen, weights):
        called.append((tuple(hidden.shape), tuple(chosen.shape), tuple(weights.shape)))
        return compat.grouped_experts(module, hidden, chosen, weights)

    compat.register_experts("compat_test", experts)
    ids = torch.arange(7)[None]
    with torch.no_grad():
        ours = model_of(MIXTRAL, experts_implementation="compat_test")(input_ids=ids).logits
        theirs = model_of(MIXTRAL, experts_implementation="grouped_mm")(input_ids=ids).logits
    assert called == [((7, 32), (7, 2), (7, 2))] * 2
    assert torch.equal(ours, theirs)


def test_grouped_products_are_products_group_by_group():
    draw = torch.Generator().manual_seed(1)
    x, weight = torch.randn(8, 16, generator=draw), torch.randn(3, 16, 32, generator=draw)
    offsets = torch.tensor([2, 2, 8], dtype=torch.int32)
    product = tuning_compat.grouped_product(x, weight, offsets)
    assert torch.allclose(product, torch.cat([x[:2] @ weight[0], x[2:] @ weight[2]]), atol=1e-5)
    if tuning_compat.has_grouped_kernel(x, weight, offsets):
        assert torch.equal(nn.functional.grouped_mm(x, weight, offs=offsets), product)


def test_experts_gate_their_own_projections_and_are_on_one_rank():
    experts = next(m for name, m in model_of(MIXTRAL).named_modules() if name.endswith("experts"))
    projections = torch.randn(5, 96, generator=torch.Generator().manual_seed(2))
    gate, up = projections.chunk(2, dim=-1)
    assert torch.allclose(tuning_compat.gated(experts, projections), nn.functional.silu(gate) * up)
    assert not tuning_compat.is_expert_parallel(experts)
    assert hasattr(experts, "_is_expert_parallel"), "transformers marks the modules that it splits otherwise by now"
    experts._is_expert_parallel = True
    assert tuning_compat.is_expert_parallel(experts)


def test_router_logits_have_recorders_that_name_the_routers():
    model = on_meta(MIXTRAL)
    recorders = compat.output_recorders(model.get_decoder(), "router_logits")
    assert recorders and all(hasattr(recorder, "target_class") for recorder in recorders)
    routers = [m for m in model.modules() if isinstance(m, recorders[0].target_class)]
    assert len(routers) == 2 and recorders[0].index is not None
    assert compat.output_recorders(model.get_decoder(), "no such output") == []
    assert compat.output_recorders(model.get_decoder().layers[0], "router_logits") is None


# -- blocks and loading


def test_blocks_are_named_by_their_class():
    model = on_meta(transformers.LlamaConfig(**SIZES))
    names = tuning_compat.block_class_names(model)
    assert [m for m in model.modules() if type(m).__name__ in names] == list(model.model.layers)
    assert tuning_compat.block_class_names(nn.Linear(2, 2)) == set()


def test_cache_is_passed_to_a_recomputed_block():
    """By itself transformers 5.24 takes the cache from a block that it recomputes."""
    model = model_of(transformers.LlamaConfig(**SIZES)).train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    tuning_compat.recompute_with_cache(model.get_decoder())
    layer, seen = model.model.layers[0], []
    layer.self_attn.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["cache"]), with_kwargs=True)
    embedded = model.get_input_embeddings()(torch.arange(6)[None])
    cache = transformers.DynamicCache()
    layer(embedded, position_embeddings=model.model.rotary_emb(embedded, torch.arange(6)[None]), cache=cache)
    assert seen == [cache]


def test_recomputation_of_a_block_is_by_its_own_function():
    model = model_of(transformers.LlamaConfig(**SIZES)).train()
    model.activation_checkpointing_enable()
    called = []
    for number, block in enumerate(model.model.layers):

        def checkpoint(function, *args, number=number):
            called.append(number)
            return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)

        checkpoint_block(block, checkpoint, recomputes=number == 1)
    model(input_ids=torch.arange(6)[None]).logits.sum().backward()
    assert called == [1]


def test_checkpoint_name_of_a_parameter_is_the_one_that_saving_writes(tmp_path):
    from safetensors import safe_open

    model = tiny.tiny_model("laguna")
    model.save_pretrained(tmp_path)
    with safe_open(str(tmp_path / "model.safetensors"), framework="pt") as file:
        stored = set(file.keys())
    shared = [name for name, _ in model.named_parameters() if ".shared_experts." in name]
    names = [tuning_compat.published_name(model, name) for name in shared]
    assert names and set(names) <= stored and not set(names) & set(shared)
    assert tuning_compat.published_name(model, "lm_head.weight") == "lm_head.weight"


def test_a_row_that_loading_sets_to_zero_is_known(tmp_path):
    for kind, expected in (("youtu", True), ("llama", False)):
        model = tiny.tiny_model(kind)
        row = model.get_input_embeddings().padding_idx
        row = 2 if row is None else row
        assert compat.zeroes_loaded_embedding(model, row) is expected
        with torch.no_grad():
            model.get_input_embeddings().weight[row] = 1.0
        model.save_pretrained(tmp_path / kind)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        assert (not loaded.get_input_embeddings().weight[row].any()) is expected


def test_modules_kept_in_float32_are_those_that_loading_keeps(tmp_path):
    model = transformers.AutoModelForSeq2SeqLM.from_config(tiny.tiny_config("t5"))
    kept = compat.names_kept_in_float32(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16)
    wide = {name for name, p in loaded.named_parameters() if p.dtype == torch.float32}
    assert kept and wide == {name for name, _ in loaded.named_parameters() if kept & set(name.split("."))}


def test_stored_tensors_that_are_ignored_are_loaded_without_a_word(tmp_path):
    from safetensors.torch import load_file, save_file

    model = model_of(transformers.LlamaConfig(**SIZES))
    assert compat.ignored_in_checkpoints(model) == []
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "mtp.weight": torch.zeros(2)}, file, {"format": "pt"})

    def unexpected(model_class):
        _, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
        return set(report["unexpected_keys"])

    class Ignoring(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            compat.ignore_in_checkpoints(self, {r"^mtp\."})

    assert unexpected(transformers.LlamaForCausalLM) == {"mtp.weight"}
    assert unexpected(Ignoring) == set()
    assert compat.ignored_in_checkpoints(Ignoring(model.config)) == [r"^mtp\."]


# -- rules between a checkpoint and a model


def test_checkpoint_experts_become_one_parameter_and_are_split_again():
    """Names, order and operations, as `from_pretrained` and `save_pretrained` apply them, one stored tensor after the other."""
    model = on_meta(MIXTRAL)
    state = model.state_dict()
    rules = compat.conversion_rules(model, None)
    stored = [f"model.layers.0.block_sparse_moe.experts.{n}.w1.weight" for n in (10, 2, 1)]
    assert compat.in_loading_order(stored) == stored[::-1]
    name, pattern = rules.name_in_model(stored[0], state, model.base_model_prefix)
    assert name == "model.layers.0.mlp.experts.gate_up_proj" and name in state
    converter = rules.converter_by_pattern()[pattern]
    operations = converter.operations
    assert compat.stacking_dimension(operations[0]) == 0
    assert [compat.keeps_rows_apart(operation, 3) for operation in operations[1:]] == [True]
    assert not compat.keeps_rows_apart(operations[1], 1) and not compat.keeps_rows_apart(object(), 3)
    assert compat.stacking_dimension(operations[1]) is None
    for projection in ("w1", "w3"):
        key = f"model.layers.0.block_sparse_moe.experts.0.{projection}.weight"
        _, source = rules.name_in_model(key, state, model.base_model_prefix)
        converter.collected_tensors[source] = [torch.full((48, 32), float(n)) for n in range(4)]
    made = converter.convert(name, model=model, config=model.config)[name]
    made = made[0] if isinstance(made, list) else made
    assert made.shape == (4, 96, 32) and made[3].eq(3).all()
    back = rules.reversed()
    key, source = back.converted_name(name)
    assert source is not None and back.converter_by_pattern()[source] is not converter
    unchanged, source = back.converted_name("lm_head.weight")
    assert source is None and back.renamed(unchanged) == "lm_head.weight"
    router, source = rules.name_in_model("model.layers.0.block_sparse_moe.gate.weight", state, model.base_model_prefix)
    assert source is None and router in state
    assert rules.reversed().renamed(router) == "model.layers.0.block_sparse_moe.gate.weight"


def test_without_rules_a_name_only_gets_or_loses_the_prefix_of_the_model():
    state = {"model.norm.weight": torch.zeros(1)}
    assert compat.NO_RULES.name_in_model("norm.weight", state, "model") == ("model.norm.weight", None)


def test_blocks_of_eight_bits_are_read_as_numbers():
    settings = compat.quantisation_settings({"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert str(getattr(settings.quant_method, "value", settings.quant_method)) == "fp8"
    settings.dequantize = True
    quantizer = compat.dequantizing_quantizer(settings)
    rules = compat.conversion_rules(on_meta(transformers.LlamaConfig(**SIZES)), quantizer)
    assert any(
        type(operation).__name__ == "Fp8Dequantize" for rule in rules.converters for operation in rule.operations
    )
    with pytest.raises(ValueError, match="quant"):
        compat.quantisation_settings({"quant_method": "no such method"})


def test_conversations_are_rendered_with_the_spans_of_generation_blocks():
    template = (
        "{% for message in messages %}{{ message['role'] }}: {% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    chat = [{"role": "user", "content": "hello "}, {"role": "assistant", "content": "there"}]
    texts, spans = render_conversations([chat, chat[:1]], template, return_assistant_tokens_mask=True, eos_token="</s>")
    assert texts == ["user: hello assistant: there</s>", "user: hello "]
    assert [[texts[0][slice(*map(int, span))] for span in spans[0]], list(spans[1])] == [["there</s>"], []]
    assert render_conversations([chat[:1]], template)[1] == [[]]


def test_flash_attention_is_the_function_that_transformers_registers():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = ALL_ATTENTION_FUNCTIONS["flash_attention_2"]
    assert compat.flash_attention_function() in (before, getattr(before, "__wrapped__", None))


# -- classes


def test_text_part_of_a_larger_model_gets_its_class_and_others_stay_as_they_are():
    text = tiny.tiny_config("mllama_text_model").get_text_config()
    compat.register_causal_class_of_text_config(type(text))
    assert compat.needs_own_class(type(text))
    assert type(model_of(text)).__name__ == "MllamaForCausalLM"
    for other in (MIXTRAL, transformers.CLIPTextConfig()):
        compat.register_causal_class_of_text_config(type(other))
        assert not compat.needs_own_class(type(other))


def test_larger_models_stand_beside_their_text_part():
    assert compat.language_model_types_of_architecture(transformers.CONFIG_MAPPING["qwen3_vl_text"]) == ["qwen3_vl"]
    assert compat.language_model_types_of_architecture(type(MIXTRAL)) == []


@pytest.mark.parametrize(("name", "expected"), [("jamba without attention", False), ("jamba", True), ("mamba", True)])
def test_model_writes_with_a_cache_if_its_class_can_count_the_tokens_in_it(name, expected):
    model = tiny.tiny_model(name)
    assert compat.can_generate_with_cache(model) is expected
    ids = torch.arange(20, 30)[None]
    written = model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=2, use_cache=expected)
    assert written.shape == (1, 12)
