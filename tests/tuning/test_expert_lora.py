"""LoRA on experts and routers against plain peft on the same adapter, without a copy of the adapted weights."""

import copy

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from launch.config.compose import compose_config
from strategies.errors import ConfigError
from tests.model.test_experts import CONFIGS as SIZES_OF
from tests.model.test_experts import SIZES
from trainer.model import experts
from trainer.tuning.adapter import Adapter
from trainer.tuning.base import LoraConfig
from trainer.tuning.expert_lora import use_low_rank_forward

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS = {
    **SIZES_OF,  # mixtral and qwen3_moe, and gpt_oss with biases and matrices the other way round
    "qwen2_moe": lambda: (
        transformers.Qwen2MoeConfig(  # a shared expert and a dense layer, whose names peft takes for experts'
            **SIZES, **EXPERTS, shared_expert_intermediate_size=16, mlp_only_layers=[0]
        )
    ),
    "jamba": lambda: transformers.JambaConfig(  # a linear layer as its router
        **SIZES, num_experts=4, num_experts_per_tok=2, attn_layer_period=1, attn_layer_offset=0, expert_layer_offset=0
    ),
    "nemotron_h": lambda: transformers.NemotronHConfig(  # experts without a gate; a router that others read
        **SIZES,
        layers_block_type=["moe", "attention"],
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
    ),
}


def plain_model(architecture, how=None):
    experts.register()
    torch.manual_seed(0)
    config = CONFIGS[architecture]()
    model = transformers.AutoModelForCausalLM.from_config(
        config, experts_implementation=how or experts.EXPERTS_FUNCTION
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and ("gate" in name or "router" in name):
                parameter.mul_(20)  # decided: no rounding chooses an expert
    return model


def adapted(architecture, how=None, **settings):
    """What this project adapts, with peft's own forward pass, and every matrix away from its start."""
    settings = {"rank": 3, "alpha": 6.0, "experts": True, "router": True, **settings}
    tuned = Adapter(LoraConfig(**settings)).apply(plain_model(architecture, how))
    generator = torch.Generator().manual_seed(2)
    for owner in tuned.modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None and parameter.requires_grad:  # added on meta, as in a run
                values = torch.randn(parameter.shape, generator=generator) * 0.1
                owner._parameters[key] = torch.nn.Parameter(values)
    return tuned.train()


def step(model, autocast=False):
    ids = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(params=CONFIGS)
def pair(request):
    """One adapted model with peft's forward pass and transformers' loop over experts, and with ours."""
    stock, ours = adapted(request.param, "eager"), adapted(request.param)
    assert use_low_rank_forward(ours) > 0
    assert list(ours.state_dict()) == list(stock.state_dict())
    return stock, ours


def test_loss_and_gradients_are_pefts(pair):
    stock, ours = pair
    (expected, right), (found, grads) = step(stock), step(ours)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert grads.keys() == right.keys()
    for name, grad in grads.items():
        assert right[name].abs().max() > 0, name
        assert torch.allclose(grad, right[name], rtol=1e-4, atol=1e-6), name
    assert float(step(copy.deepcopy(ours))[0]) == float(found)


def test_expert_lora_under_autocast_rounds_no_more_than_peft(pair):
    stock, ours = pair
    loss, exact = step(copy.deepcopy(ours))
    (_, right), (found, grads) = step(stock, autocast=True), step(ours, autocast=True)
    assert float(found) == pytest.approx(float(loss), rel=1e-2) and float(found) != float(loss)
    assert {grad.dtype for grad in grads.values()} == {torch.float32}

    def away(some):
        return sum(float((some[name] - exact[name]).square().sum()) for name in exact) ** 0.5

    assert away(grads) < 1.25 * away(right) < 0.2 * sum(float(g.square().sum()) for g in exact.values()) ** 0.5


def test_a_disabled_adapter_is_the_base(pair):
    _, ours = pair
    ids = torch.arange(10)[None]
    with torch.no_grad():
        with_it = ours(input_ids=ids).logits
        with ours.disable_adapter():
            assert torch.allclose(ours(input_ids=ids).logits, ours.unload()(input_ids=ids).logits, atol=1e-6)
            assert not torch.allclose(ours.get_base_model()(input_ids=ids).logits, with_it, atol=1e-3)


class Sizes(TorchDispatchMode):
    """Counts tensors that operations make, views aside, by their number of elements."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in held:
                self.made.append(tensor.numel())
        return out


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_expert_lora_makes_nothing_of_the_size_of_the_weights(architecture):
    """Two tokens, so that activations are far smaller than the weights of an expert module."""
    counts = {}
    for how in ("peft", "ours"):
        tuned = adapted(architecture)
        if how == "ours":
            use_low_rank_forward(tuned)
        ids = torch.tensor([[5, 9]])
        with Sizes() as seen:
            tuned.get_base_model().model(input_ids=ids)[0].sum().backward()
        counts[how] = sum(numel >= 4 * 32 * 48 for numel in seen.made)
    assert counts["ours"] == 0 and counts["peft"] > 0


def test_expert_lora_loop_of_old_devices_computes_the_same(monkeypatch):
    """Where grouped products are missing, they are made expert by expert."""
    from transformers.integrations import moe

    tuned = adapted("mixtral")
    use_low_rank_forward(tuned)
    expected, right = step(copy.deepcopy(tuned))
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)
    found, grads = step(tuned)
    assert torch.allclose(found, expected, rtol=1e-6)
    assert all(torch.allclose(grads[name], right[name], rtol=1e-4, atol=1e-6) for name in right)


def test_expert_lora_parts_are_chosen_separately():
    def parts(**settings):
        names = [n for n, p in adapted("qwen2_moe", **settings).named_parameters() if p.requires_grad]
        kinds = (".experts.", ".gate.", ".self_attn.", ".shared_expert.")
        return {kind for kind in kinds if any(kind in name for name in names)}

    off = {"experts": False, "router": False}
    assert parts(**off) == {".self_attn.", ".shared_expert."}
    assert parts(**off, targets=["q_proj", "v_proj"]) == {".self_attn."}
    assert parts(router=False, targets=[]) == {".experts."}
    assert parts(experts=False, targets=[]) == {".gate."}
    assert parts(targets=r".*self_attn\.q_proj") == {".experts.", ".gate.", ".self_attn."}
    assert parts() == {".experts.", ".gate.", ".self_attn.", ".shared_expert."}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], r".*q_proj"])
@pytest.mark.parametrize("router", [True, False])
def test_a_router_that_is_a_linear_layer_is_a_choice_too(targets, router):
    tuned = adapted("jamba", router=router, experts=False, targets=targets)
    names = [n for n, p in tuned.named_parameters() if p.requires_grad]
    assert any(".router." in name for name in names) is router
    assert any(".q_proj." in name for name in names)


@pytest.mark.parametrize(
    ("config", "settings", "part"),
    [
        ("LlamaConfig", {"experts": True}, "LlamaForCausalLM has no experts"),
        ("LlamaConfig", {"router": True}, "has no router"),
        ("Llama4TextConfig", {"experts": True}, "in a way of its own"),
    ],
)
def test_expert_lora_refuses_what_a_model_does_not_have(config, settings, part):
    sizes = {k: v for k, v in SIZES.items() if k != "head_dim"}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes))
    with pytest.raises(ConfigError, match=part):
        Adapter(LoraConfig(**settings)).apply(model)


@pytest.mark.parametrize(
    ("typed", "part"),
    [
        ("tuning.experts=true tuning.dropout=0.1", "no input of its own"),
        ("tuning.router=true tuning.dora=true", "peft has no DoRA"),
        ("tuning.experts=true tuning.init=pissa", "only the weights of layers"),
        ("tuning.targets=[]", "must be all-linear"),
    ],
)
def test_expert_lora_refuses_settings_that_do_not_go_together_when_composing(tmp_path, typed, part):
    words = ["model.path=x", f"data.path={tmp_path}", "tuning=lora", "run.device=cpu"]
    with pytest.raises(ConfigError, match=part):
        compose_config([*words, *typed.split()])


def test_expert_lora_on_experts_alone_composes(tmp_path):
    words = [f"data.path={tmp_path}", "model.path=x", "tuning=lora", "tuning.experts=true", "tuning.targets=[]"]
    assert compose_config([*words, "run.device=cpu"], check=False).config.tuning.targets == []


def test_expert_lora_is_merged_at_export_unless_set_otherwise(tmp_path):
    words = [f"data.path={tmp_path}", "model.path=x", "tuning=lora", "run.device=cpu"]
    plain = compose_config(words, check=False).config
    merged = compose_config([*words, "tuning.experts=true"], check=False).config
    asked = compose_config([*words, "tuning.router=true", "export.merge=false"], check=False).config
    assert plain.export.merge is False and "export.merge" not in plain.substitutions
    assert merged.export.merge is True and "serving engines" in merged.substitutions["export.merge"]
    assert asked.export.merge is False and "export.merge" not in asked.substitutions
