"""What routers add to the loss is what plain transformers adds, over the whole step; and tokens of experts are counted."""

import copy
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from strategies import runtime as processes
from strategies.base import ActivationCheckpointing, SingleConfig
from strategies.errors import ConfigError
from strategies.parameters import named_parameters
from tests.helpers.building import built_trainer, data_set, model_dir, pair_set, run_config, samples
from tests.helpers.covering import EVERYTHING, chosen, values
from tests.helpers.stores import write
from tests.models import job
from tests.models import stock as oracles
from tests.models.gradients import Differs
from tests.models.tiny import causal_types, tiny_model
from trainer.data.config import Layout
from trainer.data.prepare import PreparedData
from trainer.data.store.sequences import LABEL, Sample, TokenDataset
from trainer.model.balance import BALANCE_LOSS_FUNCTION_NAME, RouterLosses, router_losses_of_run
from trainer.model.config import ModelConfig, ModelKind
from trainer.model.experts import EXPERTS_FUNCTION, register
from trainer.model.routing import (
    ADDED_LOSS,
    RoutingRecord,
    enable_token_counts,
    hook_router_logits,
    recorded_routers,
    recording_routing,
)
from trainer.objectives import routed as routed_module
from trainer.objectives.causal import HF_PATH
from trainer.objectives.classification import ClassificationConfig
from trainer.objectives.preference import DpoConfig
from trainer.objectives.routed import AddedLosses, install_added_losses
from trainer.objectives.sft import SftConfig
from trainer.reporting.expert_load import expert_load_by_layer, expert_metrics
from trainer.tuning.base import LoraConfig
from trainer.tuning.config import PromptConfig
from trainer.tuning.full import Full

GLOBAL = 8
BALANCE, Z = 0.5, 0.05
CLASSES = (
    *(
        "dbrx",
        "deepseek_v4",
        "ernie4_5_moe",
        "flex_olmo",
        "gpt_oss",
        "granitemoe",
        "granitemoe_swa",
        "granitemoehybrid",
    ),
    *("granitemoeshared", "jamba", "jetmoe", "laguna", "lara_mini", "mellum", "minimax", "minimax_m2", "mixtral"),
    *(
        "minimax_m3_vl_text",
        "olmoe",
        "phimoe",
        "qwen2_moe",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_moe",
        "qwen3_next",
    ),
    *("qwen4_exp", "qwen4_exp_text"),
)
"""Every causal architecture of transformers whose class has a balancing loss and whose tiny copy has experts."""
SOME = ("jetmoe", "laguna", "granitemoehybrid")
"""Of which attention is routed too; that chooses by a bias; whose experts stand beside a state-space layer."""
MODELS = {
    "mixtral": {"num_local_experts": 5},
    "gpt_oss": {"num_local_experts": 5},
    "qwen3_moe": {"num_experts": 5},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("routed")


@pytest.fixture(scope="module")
def runtime():
    before = dict(os.environ)
    yield processes.join_job("cpu", timeout_s=60)
    processes.leave_job()
    os.environ.clear()
    os.environ.update(before)


def documents(data):
    """The documents of the first step, in one padded batch."""
    return [data.train.sample(number) for number in range(len(data.train))]


def stock(path, samples, *, z):
    """Loss and gradients of plain transformers on all documents at once."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    width = max(len(s.input_ids) for s in samples)
    ids, mask, labels = (torch.full((len(samples), width), fill) for fill in (0, 0, -100))
    for row, sample in enumerate(samples):
        n = len(sample.input_ids)
        ids[row, :n], mask[row, :n] = torch.from_numpy(sample.input_ids.astype(np.int64)), 1
        labels[row, :n] = torch.where(torch.from_numpy(sample.supervised.copy()), ids[row, :n], -100)
    model.router_aux_loss_coef = BALANCE
    seen = []
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(lambda _m, _a, out: seen.append((out[0], out[2])))
    out = model(input_ids=ids, attention_mask=mask, labels=labels, output_router_logits=True)
    loss = out.loss
    kept = mask.view(-1).bool()
    z_loss = torch.stack([logits[kept].logsumexp(-1).square().mean() for logits, _ in seen]).mean()
    if z:
        loss = loss + Z * z_loss
    loss.backward()
    counts = torch.stack([torch.bincount(chosen[kept].view(-1), minlength=5) for _, chosen in seen])
    return {
        "plain": float(out.loss.detach() - BALANCE * out.aux_loss.detach()),
        "balance": float(out.aux_loss.detach()),
        "z": float(z_loss.detach()),
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "counts": counts,
    }


def stepped(root, runtime, model, *, micro, layout, checkpointing="none", **words):
    """One step: its row, its gradients, and what made it."""
    data = data_set(root, uneven=True, num=GLOBAL)
    strategy = SingleConfig(activation_checkpointing=ActivationCheckpointing(checkpointing))
    config = run_config(model, strategy, "full", micro=micro, steps=1)
    config = replace(
        config,
        model=ModelConfig(path=str(model), **words),
        data=replace(config.data, layout=Layout(layout)),
        batch={"global": GLOBAL, "micro": micro},
    )
    trainer, built = built_trainer(config, data, runtime)
    gradients, update = {}, trainer.engine.step

    def noted(*given):
        gradients.update({name: p.grad.clone() for name, p in named_parameters(trainer.engine.step_module)})
        return update(*given)

    trainer.engine.step = noted
    (batch,) = trainer.loader.steps(0, 1)
    trainer.meter.add(trainer.train_step(batch))
    (row,) = trainer.meter.flush()
    return row, gradients, trainer, built


CASES = [
    (name, *way)
    for name in MODELS
    for way in ((GLOBAL, "padding_free", "none"), (2, "padded", "full"), (4, "padding_free", "selective"))
]


@pytest.mark.parametrize(("name", "micro", "layout", "checkpointing"), chosen(CASES, values))
def test_a_step_is_that_of_plain_transformers_on_the_whole_batch(root, runtime, name, micro, layout, checkpointing):
    model = model_dir(root, name, output_router_logits=True, router_aux_loss_coef=BALANCE, **MODELS[name])
    data = data_set(root, uneven=True, num=GLOBAL)
    expected = stock(model, documents(data), z=True)
    row, gradients, trainer, _ = stepped(
        root, runtime, model, micro=micro, layout=layout, checkpointing=checkpointing, router_z_loss=Z
    )
    assert row["loss"] == pytest.approx(expected["plain"], rel=1e-5)
    assert row["router/balance_loss"] == pytest.approx(expected["balance"], rel=1e-5)
    assert row["router/z_loss"] == pytest.approx(expected["z"], rel=1e-5)
    for key, gradient in expected["gradients"].items():
        found = gradients[key]
        assert float((found - gradient).norm()) <= 1e-5 * float(gradient.norm()), key
    assert torch.equal(trainer.meter.expert_tokens.long(), expected["counts"])
    share = expected["counts"].double()
    assert row["experts/max_over_mean"] == float((share.amax(1) / share.mean(1)).max())
    assert row["experts/unused"] == float((share == 0).double().mean())


def labelled(root):
    """Documents with one of three labels."""
    directory = root / "labelled"
    if not (directory / "manifest.json").exists():
        made = [Sample(s.input_ids, s.supervised, {LABEL: i % 3}) for i, s in enumerate(samples(GLOBAL, uneven=False))]
        write(directory, made, lambda s: {"loss": 1}, {"fingerprint": "labelled"})
    opened = TokenDataset.open(directory)
    return PreparedData(train=opened, evaluation=None, directory=directory, report={}, label_names=["a", "b", "c"])


OTHERS = {
    "labels": (ClassificationConfig(), LoraConfig(rank=4), labelled),
    "pairs beside the adapter off": (DpoConfig(), LoraConfig(rank=4), lambda root: pair_set(root, num=GLOBAL)),
    "virtual tokens": (
        SftConfig(),
        PromptConfig(num_virtual_tokens=3),
        lambda root: data_set(root, uneven=True, num=GLOBAL),
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_router_loss_is_the_same_however_a_step_is_cut_for_every_objective_and_method(root, runtime, case):
    """Each of them runs the model in a way of its own, also in the pass that only looks at routers."""
    objective, tuning, made = OTHERS[case]
    model = model_dir(root / "others", "mixtral")
    rows = []
    for micro in (GLOBAL, 2):
        config = run_config(model, SingleConfig(), "lora", micro=micro, steps=1)
        config = replace(
            config,
            model=ModelConfig(path=str(model), router_aux_loss=BALANCE, router_z_loss=Z),
            batch={"global": GLOBAL, "micro": micro},
            objective=objective,
            tuning=tuning,
        )
        data = made(root)
        trainer, _ = built_trainer(config, data, runtime)
        (batch,) = trainer.loader.steps(0, 1)
        trainer.meter.add(trainer.train_step(batch))
        (row,) = trainer.meter.flush()
        rows.append([row[key] for key in ("loss", "grad_norm", "router/balance_loss", "router/z_loss")])
        assert trainer.meter.expert_tokens.sum(1).tolist() == [2 * int(data.train.lengths.sum())] * 2
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)


def test_every_class_with_a_balancing_loss_is_known():
    if not EVERYTHING:
        pytest.skip("imports every model of transformers: SHARDTUNE_TEST_ALL")
    having = set()
    for model_type in causal_types():
        model = tiny_model(model_type)
        if hasattr(sys.modules[type(model).__module__], BALANCE_LOSS_FUNCTION_NAME) and recorded_routers(model):
            having.add(model_type)
    assert having == set(CLASSES)


@pytest.mark.parametrize("model_type", CLASSES if EVERYTHING else SOME)
def test_the_loss_is_that_of_every_class(model_type):
    model = tiny_model(model_type)
    losses, routers, _ = router_losses_of_run(
        ModelConfig(path="m", router_aux_loss=1.0), model.config, model, ModelKind.causal
    )
    hook_router_logits(model, routers)
    ids, mask = torch.randint(10, 300, (3, 12)), torch.ones(3, 12, dtype=torch.int64)
    mask[1, 7:] = mask[2, 4:] = 0
    with recording_routing(RoutingRecord(mask)) as seen:
        expected = model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    found = losses.terms(seen, losses.tokens_by_expert(seen), int(mask.sum()))[ADDED_LOSS]
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_router_loss_follows_the_config_of_the_model_unless_it_is_set(root, runtime):
    asked = model_dir(root / "asked", "mixtral", output_router_logits=True, router_aux_loss_coef=BALANCE)
    silent = model_dir(root / "silent", "mixtral", router_aux_loss_coef=BALANCE)

    def weight(path, **words):
        settings = transformers.AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            plain = transformers.AutoModelForCausalLM.from_config(settings)
        return router_losses_of_run(ModelConfig(path=str(path), **words), settings, plain, ModelKind.causal)[
            0
        ].balance_weight

    assert [weight(asked), weight(asked, router_aux_loss=0.0), weight(asked, router_aux_loss=0.2)] == [BALANCE, 0, 0.2]
    assert [weight(silent), weight(silent, router_aux_loss=0.2)] == [0, 0.2]


def refused(settings, kind=ModelKind.causal, **words):
    auto = transformers.AutoModelForCausalLM if kind is ModelKind.causal else transformers.AutoModelForSeq2SeqLM
    with torch.device("meta"):
        plain = auto.from_config(settings)
    return router_losses_of_run(ModelConfig(path="m", **words), settings, plain, kind)


SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_router_loss_of_a_model_without_one_is_refused_or_noted():
    dense = transformers.LlamaConfig(**SIZES)
    with pytest.raises(ConfigError, match=r"model.router_z_loss=0.1: a llama has no router"):
        refused(dense, router_z_loss=0.1)
    biased = transformers.DeepseekV3Config(
        **SIZES, n_routed_experts=8, first_k_dense_replace=1, n_group=1, topk_group=1, num_experts_per_tok=2
    )
    with pytest.raises(ConfigError, match=r"no balancing loss in transformers \(it is balanced by a bias"):
        refused(biased, router_aux_loss=0.1)
    assert refused(biased, router_z_loss=0.1)[0] == RouterLosses(z_weight=0.1)
    other = transformers.DogeConfig(**SIZES, is_moe=True, num_experts=16, output_router_logits=True)
    losses, _, notes = refused(other)
    assert not losses and "a doge has a balancing loss of its own" in notes["model.router_aux_loss"]
    with pytest.raises(ConfigError, match=r"model.router_aux_loss=0.1: a doge has"):
        refused(other, router_aux_loss=0.1)
    with pytest.raises(
        ConfigError, match=r"router_z_loss=0.1: .* in causal models and classifiers, and a t5 is an enc"
    ):
        refused(transformers.T5Config(**SIZES), kind=ModelKind.encoder_decoder, router_z_loss=0.1)
    silent = transformers.LlamaConfig(**SIZES, output_router_logits=True)
    assert "a llama has no router" in refused(silent)[2]["model.router_aux_loss"]
    assert not refused(silent, router_aux_loss=0.0)[2] and not refused(dense)[2]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_z_loss_of_the_output_is_that_of_the_models_own_loss(root, runtime, tuning, monkeypatch):
    """Bamba's, of documents padded to one length, whole and with a frozen head; without it the gradients are others."""
    made = job.Job(root, runtime)
    directory = root / "bamba"
    job.made("bamba", directory, 0)
    oracle = oracles.compute(directory, made.samples)
    made._trained(directory, tuning, oracle)
    trainer, built = built_trainer(made._config(directory, "single", tuning), made.data, runtime)
    assert built.step_module.added_losses.start_lines(2) == [
        "logits: z-loss times 0.02, the mean over tokens, as the model's configuration asks"
    ]
    (batch,) = trainer.loader.steps(0, 1)
    trainer.meter.add(trainer.train_step(batch))
    (row,) = trainer.meter.flush()
    assert row["loss"] == pytest.approx(oracle.loss, rel=1e-5) and row["logits/z_loss"] > 0
    monkeypatch.setattr(routed_module, "logit_z_weight", lambda _: 0.0)
    with pytest.raises(Differs):
        made._trained(directory, tuning, oracle)


def test_z_loss_that_cannot_be_added_is_noted():
    model = tiny_model("bamba")
    model.forward_path = HF_PATH
    found, notes = install_added_losses(
        ModelConfig(path="m"), model.config, model, Full().apply(model), ModelKind.causal
    )
    assert found is None and "0 instead of 0.02" in notes["model.z_loss_coefficient"]


def test_router_counts_leave_out_recomputed_blocks_references_and_evaluations():
    """Only a pass with gradients, seen from its beginning to its end."""
    register()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4),
        experts_implementation=EXPERTS_FUNCTION,
    ).train()
    experts = enable_token_counts(model)
    hook_router_logits(model, {"model.layers.0.mlp.gate": 0, "model.layers.1.mlp.gate": 0})
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.arange(12)[None]
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    with recording_routing(RoutingRecord(None, tokens)) as seen:
        with torch.no_grad():
            model(input_ids=ids)
        out = model(input_ids=ids).logits
    out.sum().backward()  # the blocks are computed again
    assert experts == (4, 4) and len(seen.logits) == 2
    assert tokens.sum(1).tolist() == [24, 24]
    routed = AddedLosses(RouterLosses(balance_weight=1.0, top_k=2), experts)
    with torch.no_grad():
        assert routed.with_added_terms(
            model, lambda: {"loss": model(input_ids=ids).logits.sum()}, {"input_ids": ids}
        ).keys() == {"loss"}


def test_router_counts_leave_out_padding_and_virtual_tokens():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert RoutingRecord(mask).token_mask(6).tolist() == [True, True, False, True, False, False]
    assert RoutingRecord(mask).token_mask(10).tolist() == [
        False,
        False,
        True,
        True,
        False,
        False,
        False,
        True,
        False,
        False,
    ]
    assert RoutingRecord(None).token_mask(6) is None
    seen = RoutingRecord(mask)
    assert seen.token_mask(6) is seen.token_mask(6), "it is the same for every layer"


def test_load_of_layers_with_unlike_numbers_of_experts():
    tokens = torch.tensor([[6, 2, 0, 4], [5, 1, -2, -2]])
    assert expert_load_by_layer(tokens) == [
        {"max_over_mean": 2.0, "unused": 0.25},
        {"max_over_mean": 5 / 3, "unused": 0.0},
    ]
    assert expert_metrics(tokens) == {"experts/max_over_mean": 2.0, "experts/unused": 1 / 6}


def test_load_of_the_ranks_over_which_experts_are_dealt():
    """Two ranks of two experts each: of 12 tokens 8 arrive at the busiest; a layer of two experts has one for each rank."""
    tokens = torch.tensor([[5, 3, 4, 0], [2, 4, -1, -1]])
    assert [layer["rank_max_over_mean"] for layer in expert_load_by_layer(tokens, 2)] == [8 / 6, 4 / 3]
    even = torch.tensor([[6, 0, 0, 6]])
    assert expert_metrics(even, 2)["experts/rank_max_over_mean"] == 1.0
    assert "experts/rank_max_over_mean" not in expert_metrics(even)


def test_router_biases_that_balance_experts_stay_as_loaded_and_are_noted():
    model = tiny_model("laguna")  # which holds them as parameters
    tuned = Full().apply(copy.deepcopy(model))
    found, notes = install_added_losses(
        ModelConfig(path="m", router_z_loss=0.1), model.config, model, tuned, ModelKind.causal
    )
    assert not notes and found is not None
    free = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert {name for name, _ in tuned.named_parameters()} - free == {"model.layers.1.mlp.gate.e_score_correction_bias"}
    said = found.start_lines(accumulation=2)
    assert any("biases that balance their experts stay as they were loaded" in line for line in said)
    assert any("z-loss times 0.1" in line for line in said) and not any("balancing loss" in line for line in said)
    balanced = AddedLosses(RouterLosses(balance_weight=0.01, top_k=2), ())
    assert (
        "forward pass of its own" in balanced.start_lines(2)[0]
        and "forward pass of its own" not in balanced.start_lines(1)[0]
    )
