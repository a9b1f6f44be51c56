"""Virtual tokens, LLaMA-Adapter and bottleneck adapters: what they compute, document by document, and their exports."""

import pytest
import torch
import torch.nn.functional as F

from strategies.base import Precision
from strategies.errors import ConfigError
from strategies.parameters import named_parameters
from tests.helpers.building import collate, samples
from tests.helpers.covering import chosen, values
from tests.helpers.exports import LABELS, export, logits_of, trained
from tests.helpers.methods import ADDED
from trainer.build.step_module import build_step_module
from trainer.data.config import Layout
from trainer.export.verify import probe_ids, reference_logits
from trainer.model.config import ModelConfig
from trainer.model.loading import load_tokenizer
from trainer.objectives.causal import sequence_logps, summed_loss
from trainer.objectives.classification import ClassificationConfig
from trainer.objectives.sft import SftConfig
from trainer.tuning import bottleneck, virtual
from trainer.tuning.base import FullConfig
from trainer.tuning.check import check_positions
from trainer.tuning.config import (
    AdaptionPromptConfig,
    BottleneckConfig,
    PrefixConfig,
    PrefixInit,
    PromptConfig,
    PromptInit,
)

EXACT = 1e-5
VIRTUAL = [name for name in ADDED if name.startswith(("pr", "p_"))]
CLASSIFIERS = [
    (kind, name)
    for kind in ("llama", "gpt2", "distilbert")
    for name in ("prompt", "p_tuning lstm", "bottleneck", "bottleneck pfeiffer")
]
CAUSAL = [
    *((kind, name) for kind in ("llama", "gpt2") for name in ADDED),
    *((kind, name) for kind in ("mistral", "gemma", "gemma3_text", "phi3", "qwen3") for name in ("prompt", "prefix")),
    *(("falcon", name) for name in ("prompt", "bottleneck")),
    *(("qwen2", name) for name in ("prefix", "bottleneck pfeiffer")),
]
CONTINUED = [
    (kind, name)
    for kind in ("llama", "gpt2", "qwen3")
    for name in ("prompt", "p_tuning mlp", "prefix", "prefix projection", "bottleneck")
]


def plain(base, directory=None, *, classify=False):
    """The base under plain transformers; with an export, under plain peft or the documented loader."""
    import transformers
    from peft import PeftModel

    kind = "AutoModelForSequenceClassification" if classify else "AutoModelForCausalLM"
    model = getattr(transformers, kind).from_pretrained(base, **({"num_labels": len(LABELS)} if classify else {}))
    if directory is not None and (directory / bottleneck.CONFIG_FILE).exists():
        model = bottleneck.load(model, directory)
    elif directory is not None:
        model = PeftModel.from_pretrained(model, str(directory))
    return model.eval()


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT * float(expected.abs().max()))


def nll(model, sample):
    """Summed loss of one document alone, and the logits of its own tokens."""
    logits = logits_of(model, sample.input_ids.tolist())[-len(sample.input_ids) :]
    targets = torch.tensor(sample.input_ids[1:].tolist())
    losses = F.cross_entropy(logits[:-1], targets, reduction="none")
    return losses[torch.from_numpy(sample.supervised[1:])].sum()


@pytest.mark.parametrize(("architecture", "name"), chosen(CAUSAL, values))
def test_own_adapters_compute_a_batch_as_plain_peft_each_document_alone(architecture, name, bases, runtime, tmp_path):
    base = bases(architecture)
    parts = trained(base, ADDED[name], runtime)
    engine, built, _ = parts
    documents = samples(4, uneven=False)
    batch = collate(documents, built.layout, 2)
    adapted = plain(base, export(parts, base, tmp_path / "x", runtime, verify=True))
    expected = torch.stack([nll(adapted, document) for document in documents])
    unadapted = torch.stack([nll(plain(base), document) for document in documents])
    with engine.inference() as step:
        assert_close(summed_loss(step.model, batch)[0], expected.sum())
        assert_close(-sequence_logps(step.model, batch)[0], expected)
        assert (expected - unadapted).abs().max() > 1e-3 * expected.max(), "the adapter changes nothing"
        with built.tuning.reference(step.model):
            assert_close(-sequence_logps(step.model, batch)[0], unadapted)
        assert_close(-sequence_logps(step.model, batch)[0], expected)


@pytest.mark.parametrize(("architecture", "name"), chosen(CLASSIFIERS, values))
def test_own_adapters_classify_each_document_as_plain_peft_alone(architecture, name, bases, runtime, tmp_path):
    base = bases(architecture)
    parts = trained(base, ADDED[name], runtime, objective=ClassificationConfig())
    engine = parts[0]
    facts = {"label_names": LABELS, "objective": "classification"}
    adapted = plain(base, export(parts, base, tmp_path / "x", runtime, verify=True, facts=facts), classify=True)
    adapted.config.pad_token_id = 2
    documents = samples(4, uneven=False)
    batch = collate(documents, Layout.padded, 2)
    expected = torch.cat([logits_of(adapted, document.input_ids.tolist()) for document in documents])
    with engine.inference() as step:  # asked as the objective asks, through the wrapper
        found = step.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert_close(found, expected)


@pytest.mark.parametrize("name", VIRTUAL)
def test_virtual_tokens_refuse_a_row_of_several_documents(name, bases, runtime):
    engine, _, _ = trained(bases("llama"), ADDED[name], runtime, steps=0)
    packed = collate(samples(3, uneven=False), Layout.padding_free, 2)
    with pytest.raises(ValueError, match="a padding-free row holds several"):
        engine.forward(packed, last=True)
    with pytest.raises(ConfigError, match="needs a row for each document"):
        build("llama", ADDED[name], bases, layout=Layout.padding_free)


def build(architecture, tuning, bases, *, layout=Layout.auto, objective=None):

    model = ModelConfig(path=str(bases(architecture)))
    return build_step_module(
        model,
        objective_config=objective or SftConfig(),
        tuning_config=tuning,
        layout=layout,
        tokenizer=load_tokenizer(model),
        num_labels=len(LABELS),
        half_on_gpu=False,
    )


@pytest.mark.parametrize(
    ("architecture", "tuning", "advice"),
    [
        ("falcon", PrefixConfig(), "use tuning=prompt"),
        ("distilbert", PrefixConfig(), "use tuning=prompt"),
        ("mistral", PrefixConfig(num_virtual_tokens=16), "use at most 15"),
        ("gemma", AdaptionPromptConfig(), "use tuning=prefix"),
        ("llama", AdaptionPromptConfig(adapter_layers=3), "use at most 2"),
        ("llama", BottleneckConfig(attention="self_attn.out"), "self_attn.o_proj"),
    ],
)
def test_own_adapters_that_an_architecture_cannot_have_are_refused_with_those_it_can(
    architecture, tuning, advice, bases
):
    objective = ClassificationConfig() if architecture == "distilbert" else None
    with pytest.raises(ConfigError, match=advice):
        build(architecture, tuning, bases, objective=objective)


def test_documents_that_leave_no_room_for_virtual_tokens_are_refused():
    check_positions(PromptConfig(num_virtual_tokens=12), 500, 512, has_rotary_positions=False)
    check_positions(FullConfig(), 512, 512, has_rotary_positions=False)
    check_positions(FullConfig(), 513, None, has_rotary_positions=False)  # positions without an end
    with pytest.raises(ConfigError, match=r"longest document takes 513 tokens.*512 positions.*data\.max_length=512"):
        check_positions(FullConfig(), 513, 512, has_rotary_positions=False)
    with pytest.raises(ConfigError, match=r"set data\.max_length=499"):
        check_positions(PromptConfig(num_virtual_tokens=13), 500, 512, has_rotary_positions=False)


def test_a_prompt_starts_at_the_text_or_at_words_of_the_vocabulary(bases, runtime):
    base = bases("llama")
    words = dict(plain(base).named_parameters())["model.embed_tokens.weight"]
    name = "prompt_encoder.default.embedding.weight"
    for text, size in (("What is it about?", 3), ("yes", 7)):
        config = PromptConfig(num_virtual_tokens=size, init=PromptInit.text, init_text=text)
        engine, _, tokenizer = trained(base, config, runtime, steps=0)
        ids = tokenizer(text)["input_ids"]
        assert torch.equal(dict(named_parameters(engine.step_module))[name], words[(ids * 7)[:size]])
    sampled = [
        dict(named_parameters(trained(base, config, runtime, steps=0)[0].step_module))[name]
        for config in (PromptConfig(num_virtual_tokens=6, init=PromptInit.sampled),) * 2
    ]
    assert torch.equal(*sampled)
    matches = (sampled[0][:, None] == words[None]).all(-1)
    assert matches.any(1).all() and len(set(matches.float().argmax(1).tolist())) > 1


def greedy(model, ids, num):
    """Continue by `num` most likely tokens, each from the whole text anew."""
    for _ in range(num):
        ids = [*ids, int(logits_of(model, ids)[-1].argmax())]
    return ids


@pytest.mark.parametrize(("architecture", "name"), chosen(CONTINUED, values))
def test_own_adapters_generate_as_the_forward_pass_of_plain_peft_says(architecture, name, bases, runtime, tmp_path):
    """peft's own generation loses virtual tokens from the cache; `virtual.load` keeps them, as does the tuned model."""
    base = bases(architecture)
    parts = trained(base, ADDED[name], runtime)
    directory = export(parts, base, tmp_path / "x", runtime)
    ids = probe_ids(parts[2])
    expected = greedy(plain(base, directory), ids, 12)
    assert expected != greedy(plain(base), ids, 12)
    given = torch.tensor([[2, 2, *ids], ids + ids[:2]])  # the first padded on its left, as generation wants it
    mask = torch.ones_like(given)
    mask[0, :2] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask, "eos_token_id": None}
    loaded = plain(base, directory) if name == "bottleneck" else virtual.load(plain(base), directory)
    with parts[0].inference() as step:
        if parts[1].layout is Layout.padding_free:
            step.model.set_attn_implementation("sdpa")
        for model in (step.model, loaded):
            for cached in (True, False):
                found = model.generate(given, use_cache=cached, **settings)
                assert found[0, 2:].tolist() == expected
                assert found[1].tolist() == greedy(plain(base, directory), ids + ids[:2], 12)


@pytest.mark.parametrize("name", ADDED)
def test_in_half_precision_an_export_still_verifies(name, bases, runtime, tmp_path):
    base = bases("llama")
    parts = trained(base, ADDED[name], runtime, precision=Precision.bf16)
    assert export(parts, base, tmp_path / "x", runtime, verify=True)
    for _, parameter in named_parameters(parts[0].step_module):
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)


@pytest.mark.parametrize("name", ADDED)
def test_a_fold_is_refused_when_an_old_run_is_exported(name, bases, runtime, tmp_path):
    base = bases("llama")
    with pytest.raises(ConfigError, match=r"use export\.merge=false"):
        export(trained(base, ADDED[name], runtime, steps=0), base, tmp_path / "x", runtime, merge=True)


def test_bottleneck_adapter_of_another_model_is_refused(bases, runtime, tmp_path):
    base = bases("llama")
    directory = export(trained(base, ADDED["bottleneck"], runtime), base, tmp_path / "x", runtime)
    with pytest.raises(ConfigError, match="does not fit this model"):
        bottleneck.load(plain(bases("gpt2")), directory)


@pytest.mark.parametrize("projection", [False, True])
def test_tokens_of_a_prefix_that_starts_at_zero_learn_different_things(bases, runtime, projection):
    """Tokens that start equal get equal gradients: twenty of them would stay twenty copies of one."""
    config = PrefixConfig(num_virtual_tokens=4, init=PrefixInit.zero, projection=projection)
    engine, built, _ = trained(bases("llama"), config, runtime, steps=3)
    encoder = engine.step_module.model.get_submodule(virtual.ENCODER_MODULE)
    with torch.no_grad():
        tokens = encoder(torch.arange(4)[None])[0]
    values = tokens.view(4, built.base_on_meta.config.num_hidden_layers, 2, -1)[:, :, 1]
    for first in range(4):
        for second in range(first):
            assert float((values[first] - values[second]).abs().max()) > 1e-6


def test_a_prefix_starts_nearer_to_its_base_at_zero_than_at_random(bases, runtime):
    """Values of zero take a part of the attention and add nothing; random ones add noise to every layer."""
    base = bases("llama")
    distance = {}
    for init in PrefixInit:
        engine, built, tokenizer = trained(base, PrefixConfig(num_virtual_tokens=4, init=init), runtime, steps=0)
        ids = probe_ids(tokenizer)
        logits = reference_logits(engine, built, ids, runtime)
        distance[init] = float((logits - logits_of(plain(base), ids)).square().mean())
        (prefix,) = [value for _, value in named_parameters(engine.step_module) if value.requires_grad]
        values = prefix.view(4, built.base_on_meta.config.num_hidden_layers, 2, -1)[:, :, 1]
        assert bool(values.any()) == (init is PrefixInit.random)
    assert 0 < distance[PrefixInit.zero] < distance[PrefixInit.random], distance


def test_probing_sees_the_virtual_tokens(bases, runtime):
    """What verification compares is the tuned model, not the base inside its wrapper."""
    base = bases("llama")
    engine, built, tokenizer = trained(base, ADDED["prefix"], runtime)
    ids = probe_ids(tokenizer)
    found = reference_logits(engine, built, ids, runtime)
    assert found.shape[0] == len(ids)
    assert (found - logits_of(plain(base), ids)).abs().max() > 1e-3
