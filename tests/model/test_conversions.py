"""What checkpoints become in a model, against transformers' own loader."""

import copy
import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from strategies.errors import ConfigError
from strategies.parameters import meta_context
from tests.helpers.launching import command_here
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data
from tests.models.tiny import tiny_model
from trainer.model import experts
from trainer.model.architecture import build_plain_model
from trainer.model.config import ModelConfig, ModelKind
from trainer.model.weights import PretrainedWeights

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
}
MERGED = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS = {
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": transformers.Qwen3MoeConfig(**MERGED),
    "gpt_neox": transformers.GPTNeoXConfig(
        **{k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}
    ),
    "llama": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt_oss": transformers.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}
EXPERTS = {"mixtral": "model.layers.0.mlp.experts.gate_up_proj", "qwen3_moe": "model.layers.0.mlp.experts.gate_up_proj"}


def saved(config, directory):
    """A random model of that configuration, as transformers stores it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    return model


def read(directory):
    config = transformers.AutoConfig.from_pretrained(directory)
    with meta_context():
        plain = transformers.AutoModelForCausalLM.from_config(config)
    plain.tie_weights()
    return PretrainedWeights(directory, plain)


def stored_again(checkpoint, tensors):
    """Parameters by name in the model as the files name and shape them."""
    conversions = checkpoint.conversions
    again = {}
    for group in conversions.stored_groups(tensors):
        again |= conversions.convert_back(group, tensors)
    return again


@pytest.mark.parametrize("kind", CONFIGS)
def test_conversion_gives_every_parameter_that_transformers_loads(tmp_path, kind):
    saved(CONFIGS[kind], tmp_path)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    checkpoint = read(tmp_path)
    for name, parameter in expected.named_parameters():
        assert checkpoint.shape(name) == tuple(parameter.shape)
        assert torch.equal(checkpoint.full_tensor(name), parameter.data)
        low, high = parameter.numel() // 3, parameter.numel() // 2 + 1
        assert torch.equal(checkpoint.read_slice(name, low, high), parameter.data.reshape(-1)[low:high])
    assert not checkpoint.conversions.left_out()


@pytest.mark.parametrize("kind", EXPERTS)
def test_conversion_reads_only_the_experts_of_a_rank(tmp_path, kind):
    saved(CONFIGS[kind], tmp_path)
    checkpoint = read(tmp_path)
    shape = checkpoint.shape(EXPERTS[kind])
    checkpoint.conversions.files.bytes_read = 0
    checkpoint.read_slice(EXPERTS[kind], 0, math.prod(shape) // 4)
    assert checkpoint.conversions.files.bytes_read == 4 * math.prod(shape) // 4


@pytest.mark.parametrize("kind", CONFIGS)
def test_conversion_stores_the_tensors_as_they_were_read(tmp_path, kind):
    saved(CONFIGS[kind], tmp_path)
    checkpoint = read(tmp_path)
    names = list(checkpoint.conversions.groups)
    again = stored_again(checkpoint, {name: checkpoint.full_tensor(name) for name in names})
    found = load_file(tmp_path / "model.safetensors")
    assert again.keys() == found.keys()
    assert all(torch.equal(again[name], found[name]) for name in found)


def _as_fp8(directory, block=16):
    """Store a model's projections as block-wise float8, as published checkpoints do."""
    tensors = load_file(directory / "model.safetensors")
    for name, weight in list(tensors.items()):
        if "proj" not in name or weight.dim() != 2:
            continue
        rows, columns = weight.shape
        blocks = weight.view(rows // block, block, columns // block, block)
        scale = blocks.abs().amax(dim=(1, 3)) / 448.0
        tensors[name] = (blocks / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    settings = json.loads((directory / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [block, block],
    }
    (directory / "config.json").write_text(json.dumps(settings))


def _as_mxfp4(directory):
    """Give a gpt-oss its experts as blocks of 4-bit numbers with an exponent each."""
    tensors = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in list(tensors):
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, outer = tensors.pop(name).shape
            packed = (experts, outer, inner // 32, 16)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, packed, generator=generator, dtype=torch.uint8)
            scales = torch.randint(118, 124, packed[:3], generator=generator, dtype=torch.uint8)
            tensors[f"{name}_scales"] = scales
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    settings = json.loads((directory / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (directory / "config.json").write_text(json.dumps(settings))


PUBLISHED = {
    "qwen3_moe": (CONFIGS["qwen3_moe"], _as_fp8, lambda: transformers.FineGrainedFP8Config(dequantize=True)),
    "qwen3": (transformers.Qwen3Config(**SIZES), _as_fp8, lambda: transformers.FineGrainedFP8Config(dequantize=True)),
    "gpt_oss": (
        transformers.GptOssConfig(**SIZES | {"intermediate_size": 32}, num_local_experts=4, num_experts_per_tok=2),
        _as_mxfp4,
        lambda: transformers.Mxfp4Config(dequantize=True),
    ),
}


def test_conversion_stores_the_language_model_as_a_part_of_the_larger_one(tmp_path):
    """Llama 4's is built alone: what is written must still be the whole model's."""
    experts.register()
    tiny_model("llama4").save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with meta_context():
        plain, _ = build_plain_model(ModelKind.causal, config, ModelConfig(path=str(tmp_path)), "eager", "sft")
    checkpoint = PretrainedWeights(tmp_path, plain)
    tensors = {name: checkpoint.full_tensor(name) for name in plain.state_dict() if checkpoint.name_in_checkpoint(name)}
    again = stored_again(checkpoint, tensors)
    assert sorted([*again, *checkpoint.conversions.carried()]) == sorted(checkpoint.conversions.files.names())


@pytest.mark.parametrize("kind", PUBLISHED)
def test_blocks_of_few_bits_are_read_as_numbers_and_stored_as_numbers(tmp_path, kind):
    config, publish, oracle = PUBLISHED[kind]
    stored = tmp_path / "published"
    plain_names = {name for name, _ in saved(config, tmp_path / "plain").named_parameters()}
    as_numbers = load_file(tmp_path / "plain" / "model.safetensors").keys()
    saved(config, stored)
    publish(stored)
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        stored, quantization_config=oracle(), dtype=torch.float32
    )
    checkpoint = read(stored)
    for name, parameter in expected.named_parameters():
        assert torch.equal(checkpoint.full_tensor(name).float(), parameter.data), name
    tensors = {
        name: checkpoint.full_tensor(name) for name in sorted(plain_names) if checkpoint.name_in_checkpoint(name)
    }
    again = stored_again(checkpoint, tensors)
    assert again.keys() == as_numbers and all(t.is_floating_point() for t in again.values())
    (tmp_path / "again").mkdir()
    as_float32 = {name: tensor.float().contiguous() for name, tensor in again.items()}
    save_file(as_float32, tmp_path / "again" / "model.safetensors", {"format": "pt"})
    config.save_pretrained(tmp_path / "again")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(reloaded[name], value.float()) for name, value in tensors.items())


def test_quantised_checkpoint_is_trained_and_its_export_verified_by_the_command(tmp_path):
    config, publish, _ = PUBLISHED["gpt_oss"]
    config = copy.deepcopy(config)
    config.vocab_size = 384
    stored, run = tmp_path / "published", tmp_path / "run"
    saved(config, stored)
    publish(stored)
    tiny_tokenizer().save_pretrained(stored)
    data = write_chat_data(tmp_path / "chat.jsonl", 8)
    words = f"train model.path={stored} data.path={data} tuning=lora precision=bf16 batch.global=2 batch.micro=2 budget.steps=1"
    words += f" run.device=cpu run.dir={run} data.cache_dir={tmp_path / 'cache'} export.merge=true export.verify=true"
    assert command_here(words.split()) == 0
    assert "quantization_config" not in json.loads((run / "export" / "config.json").read_text())
    reloaded, told = transformers.AutoModelForCausalLM.from_pretrained(run / "export", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert all(parameter.is_floating_point() for parameter in reloaded.parameters())


def test_other_quantised_checkpoints_are_refused_by_their_kind(tmp_path):
    saved(CONFIGS["llama"], tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"stored as gptq.*unquantised"):
        read(tmp_path)


def test_weights_that_the_architecture_ignores_are_named_and_carried(tmp_path):
    config = transformers.Qwen3NextConfig(**MERGED, num_local_experts=4, layer_types=["full_attention"] * 2)
    saved(config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {
        "mtp.fc.weight": torch.ones(4, 4),
        "extra.weight": torch.ones(2),
        "model.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    conversions = read(tmp_path).conversions
    assert conversions.carried() == ["mtp.fc.weight"]
    assert conversions.left_out() == ["extra.weight", "mtp.fc.weight"]


def test_weight_files_that_are_none_are_named_for_what_they_are(tmp_path):
    saved(CONFIGS["llama"], tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"cut off.*download it again"):
        read(tmp_path)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ConfigError, match=r"git-lfs left.*git lfs pull"):
        read(tmp_path)
    file.unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"an adapter.*model.adapters"):
        read(tmp_path)


def test_weight_file_too_large_to_be_mapped_is_read(tmp_path, monkeypatch):
    import safetensors

    saved(CONFIGS["llama"], tmp_path)
    real = safetensors.safe_open

    def small(name, framework, backend=None):
        if backend != "pread":
            raise RuntimeError("unable to mmap 141107505424 bytes from file <...>: Cannot allocate memory (12)")
        return real(name, framework=framework, backend=backend)

    monkeypatch.setattr(safetensors, "safe_open", small)
    whole = load_file(tmp_path / "model.safetensors")["model.norm.weight"]
    assert torch.equal(read(tmp_path).full_tensor("model.norm.weight"), whole)
