"""Adapters that exist: going on from one, folding some into the base, and several as one; beside plain peft's numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file

from launch.config.compose import compose_config
from launch.export import combine
from launch.main import main
from strategies.errors import ConfigError
from strategies.parameters import named_parameters
from tests.helpers.adapters import plain_adapter
from tests.helpers.exports import assert_same_logits, export, logits_of, plain_base, trained
from tests.helpers.methods import ADAPTERS
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer
from trainer.export.verify import probe_ids, reference_logits
from trainer.tuning.base import FullConfig, LoraConfig
from trainer.tuning.config import Ia3Config
from trainer.tuning.initial_adapter import adopt_adapter_settings

STARTS = ["lora", "lora patterns", "ia3", "vera", "oft", "loha", "lokr", "boft", "ln", "peft road", "peft miss"]


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """Adapter directories of plain peft, by case of `ADAPTERS` or by name."""
    root = tmp_path_factory.mktemp("adapters")

    def make(name, **options):
        class_name, known = ADAPTERS.get(name, (None, "LoraConfig", {}))[1:]
        return plain_adapter(base, root / name.replace(" ", "-"), class_name, **{**known, **options})

    return make


def peft_logits(base, directories, ids):
    """Logits of the plain model with each adapter merged by plain peft, one after the other."""
    from peft import PeftModel

    model = plain_base(base)
    for directory in directories:
        model = PeftModel.from_pretrained(model, str(directory)).merge_and_unload()
    return logits_of(model.eval(), ids)


def started(config, directory):
    import dataclasses

    return dataclasses.replace(config, from_=str(directory))


@pytest.mark.parametrize("name", STARTS)
def test_a_run_starts_where_the_adapter_of_plain_peft_stopped(name, base, made, runtime, tmp_path):
    directory = made(name)
    parts = trained(base, started(ADAPTERS[name][0], directory), runtime, steps=0)
    ids = probe_ids(parts[2])
    expected = peft_logits(base, [directory], ids)
    assert (logits_of(plain_base(base), ids) - expected).abs().max() > 1e-3 * expected.abs().max()
    assert_same_logits(reference_logits(parts[0], parts[1], ids, runtime), expected)
    again = export(parts, base, tmp_path / "again", runtime, verify=True)
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (again, directory))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_modules_trained_in_full_go_on_too(base, made, runtime):
    directory = made("with head", r=4, lora_alpha=32, modules_to_save=["lm_head"])
    config = LoraConfig(rank=4, modules_to_save=["lm_head"], from_=str(directory))
    engine, built, tokenizer = trained(base, config, runtime, steps=0)
    ids = probe_ids(tokenizer)
    assert_same_logits(reference_logits(engine, built, ids, runtime), peft_logits(base, [directory], ids))
    assert [n for n, p in named_parameters(engine.step_module) if p.requires_grad and "lm_head" in n]


def test_adapter_settings_left_alone_follow_the_adapter(made):
    directory = made("lora small", r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=True)
    config = LoraConfig(from_=str(directory))
    taken = adopt_adapter_settings(config, {"tuning.from_"})
    assert (config.rank, config.alpha, config.rslora) == (2, 6.0, True)
    assert config.targets == ["q_proj", "v_proj"]
    assert set(taken) == {"tuning.rank", "tuning.alpha", "tuning.rslora", "tuning.targets"}


@pytest.fixture
def words(base, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "train.jsonl").write_text("{}\n")
    return [f"model.path={base}", "data.path=train.jsonl", "budget.steps=1", "run.device=cpu"]


def test_adapter_checkpoint_setting_is_tuning_from(words, made):
    directory = made("lora small", r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=True)
    composed = compose_config([*words, "tuning=lora", f"tuning.from={directory}"])
    assert composed.config.tuning.from_ == str(directory)
    assert composed.config.tuning.rank == 2
    assert "tuning.rank" in composed.config.substitutions
    assert compose_config([*words, "tuning=lora", f"tuning.from_={directory}"]).sha256 == composed.sha256
    assert compose_config([*words, "tuning=lora", "tuning.rank=2"]).sha256 != composed.sha256


@pytest.mark.parametrize(
    ("typed", "part"),
    [
        ("tuning=lora tuning.rank=8", "was made with tuning.rank=2, not 8"),
        ("tuning=ia3", "was made by lora, not by ia3"),
        ("tuning=lora tuning.init=pissa", "the values come from tuning.from"),
        ("tuning=full", "needs tuning="),
    ],
)
def test_adapter_settings_that_differ_are_refused_with_both_values(words, made, typed, part):
    directory = made("lora small", r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=True)
    with pytest.raises(ConfigError) as caught:
        compose_config([*words, *typed.split(), f"tuning.from={directory}"])
    assert part in str(caught.value)


def test_a_directory_without_an_adapter_is_refused(words, tmp_path):
    for key in ("tuning.from", "model.adapters"):
        value = f"[{tmp_path}]" if key == "model.adapters" else tmp_path
        with pytest.raises(ConfigError, match="holds no adapter_config"):
            compose_config([*words, "tuning=lora", f"{key}={value}"])


def test_adapter_of_other_modules_is_refused_when_the_model_is_built(base, made, runtime):
    directory = made("lora small", r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=True)
    config = LoraConfig(rank=2, alpha=6.0, rslora=True, targets=["q_proj", "k_proj"], from_=str(directory))
    with pytest.raises(ConfigError, match=r"missing in the file: .*k_proj.*in the file only: .*v_proj"):
        trained(base, config, runtime, steps=0)


def test_adapter_settings_not_compared_when_composing_are_compared_at_the_build(base, made, runtime):
    directory = made("with bias", r=4, lora_alpha=32, lora_bias=True)
    with pytest.raises(ConfigError, match=r"lora_bias=True in its adapter_config.json, False here"):
        trained(base, LoraConfig(rank=4, from_=str(directory)), runtime, steps=0)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_folded_adapters_are_the_base(base, made, runtime, tuning, tmp_path):
    directories = [made("lora"), made("ia3")]
    config = LoraConfig(rank=4) if tuning == "lora" else FullConfig()
    parts = trained(base, config, runtime, steps=0, adapters=[str(path) for path in directories])
    ids = probe_ids(parts[2])
    expected = peft_logits(base, directories, ids)
    assert (peft_logits(base, directories[:1], ids) - expected).abs().max() > 1e-3 * expected.abs().max()
    assert_same_logits(reference_logits(parts[0], parts[1], ids, runtime), expected)
    whole = export(parts, base, tmp_path / "whole", runtime, merge=True, verify=True)
    assert_same_logits(logits_of(plain_base(whole), ids), expected)


def test_adapter_on_folded_adapters_is_not_exported_alone(words, made):
    with pytest.raises(ConfigError, match=r"export.merge=true"):
        compose_config([*words, "tuning=lora", f"model.adapters=[{made('lora')}]"])
    compose_config([*words, "tuning=lora", f"model.adapters=[{made('lora')}]", "export.merge=true"])
    for method in ("prefix", "prompt", "p_tuning", "adaption_prompt", "bottleneck"):  # these cannot be merged at all
        with pytest.raises(ConfigError, match=r"does not belong to model.path alone; write the merged base once"):
            compose_config([*words, f"tuning={method}", f"model.adapters=[{made('lora')}]"])


def test_adapter_that_cannot_be_folded_is_refused(base, made, words, runtime, tmp_path):
    beft = made("peft beft")
    with pytest.raises(ConfigError, match="was made by beft, which cannot be merged"):
        compose_config([*words, "tuning=lora", "export.merge=true", f"model.adapters=[{beft}]"])
    settings = json.loads((made("lora") / "adapter_config.json").read_text())
    other = tmp_path / "prompts"
    other.mkdir()
    (other / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": "PROMPT_TUNING"}))
    (other / "adapter_model.safetensors").write_bytes((made("lora") / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match="was made by prompt_tuning, which is not proven"):
        compose_config([*words, "tuning=lora", "export.merge=true", f"model.adapters=[{other}]"])


def test_a_shared_weight_and_a_trained_bias_are_not_folded(runtime, tmp_path):
    path = tmp_path / "tied"
    tiny_model_dir(path, "llama_tied", pad_token_id=2, attention_bias=True)
    tiny_tokenizer().save_pretrained(path)
    shared = plain_adapter(path, tmp_path / "embeddings", r=2, target_modules=["embed_tokens"])
    with pytest.raises(ConfigError, match=r"which .* shares"):
        trained(path, LoraConfig(rank=4), runtime, steps=0, adapters=[str(shared)])
    biased = plain_adapter(path, tmp_path / "biased", r=2, target_modules=["q_proj"], bias="lora_only")
    with pytest.raises(ConfigError, match=r"holds .*q_proj.bias, which is no part of an adapter"):
        trained(path, LoraConfig(rank=4), runtime, steps=0, adapters=[str(biased)])


def update(directory):
    """The update of each layer of a plain LoRA directory, by name."""
    tensors = load_file(directory / "adapter_model.safetensors")
    settings = json.loads((directory / "adapter_config.json").read_text())
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            tensors[key.replace("lora_A", "lora_B")] @ value * settings["lora_alpha"] / settings["r"]
        )
        for key, value in tensors.items()
        if ".lora_A." in key
    }


def test_cat_is_the_weighted_sum_of_the_updates(base, made, tmp_path):
    first, second = made("lora"), made("lora other", r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], seed=5)
    words = [f"adapters=[{first},{second}]", "weights=[0.75,0.5]", f"base={base}"]
    assert main(["export", *words, f"to={tmp_path / 'merged'}"]) == 0
    found, before = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", base))
    one, two = update(first), update(second)
    for key, value in before.items():
        layer = key.removesuffix(".weight")
        expected = value + 0.75 * one.get(layer, 0) + 0.5 * two.get(layer, 0)
        torch.testing.assert_close(found[key], expected, rtol=1e-5, atol=1e-6)
    assert len(one) > len(two) > 0
    assert main(["export", *words, f"to={tmp_path / 'adapter'}", "merge=false"]) == 0
    ids = probe_ids(tiny_tokenizer())
    assert_same_logits(peft_logits(base, [tmp_path / "adapter"], ids), logits_of(plain_base(tmp_path / "merged"), ids))
    assert not (tmp_path / "adapter" / "parts").exists()


@pytest.mark.parametrize("how", ["linear", "ties", "dare_linear", "dare_ties"])
def test_adapter_combinations_other_than_cat_are_those_of_peft(base, made, tmp_path, how):
    from peft import PeftModel

    first, second = made("lora"), made("lora third", r=4, lora_alpha=32, seed=6)
    assert (
        main(["export", f"adapters=[{first},{second}]", f"base={base}", f"combine={how}", f"to={tmp_path / 'm'}"]) == 0
    )
    model = PeftModel.from_pretrained(plain_base(base), str(first), adapter_name="a")
    model.load_adapter(str(second), adapter_name="b")
    torch.manual_seed(0)  # of the entries that dare drops
    density = {} if how == "linear" else {"density": 0.5}
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", combination_type=how, **density)
    model.set_adapter("c")
    ids = probe_ids(tiny_tokenizer())
    expected = logits_of(model.eval(), ids)
    assert (peft_logits(base, [first], ids) - expected).abs().max() > 1e-3 * expected.abs().max()
    assert_same_logits(logits_of(plain_base(tmp_path / "m"), ids), expected)


@pytest.mark.parametrize(
    ("typed", "part"),
    [
        ("combine=linaer", "did you mean linear?"),
        ("combine=ties", "needs adapters of one rank"),
        ("weights=[1]", "1 for 2 adapters"),
        ("density=2", "must be above 0 and at most 1"),
        ("wieghts=[1,1]", "did you mean weights=?"),
        ("merge=maybe", "must be true or false"),
    ],
)
def test_words_that_cannot_be_used(base, made, tmp_path, typed, part):
    second = made("lora other", r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], seed=5)
    with pytest.raises(ConfigError) as caught:
        combine.combine_adapters_command(
            [f"adapters=[{made('lora')},{second}]", f"to={tmp_path / 'x'}", *typed.split()]
        )
    assert part in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_only_lora_is_combined(base, made, tmp_path):
    with pytest.raises(ConfigError, match="was made by ia3; only LoRA"):
        combine.combine_adapters_command([f"adapters=[{made('lora')},{made('ia3')}]", f"to={tmp_path / 'x'}"])
    assert Ia3Config().name == "ia3"
