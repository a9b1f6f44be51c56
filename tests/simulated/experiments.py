"""Experiment files composed as a user types them, for models of the published sizes: a config.json without weights."""

import re
from pathlib import Path

import transformers

from launch.config.choices import CONF_DIR
from launch.config.compose import compose
from trainer.config.parallel import readers_of
from trainer.planner.depth_extrapolation import ExtrapolatedStep
from trainer.planner.simulation import simulate_depth

LLAMA3_8B = transformers.LlamaConfig(
    architectures=["LlamaForCausalLM"],
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=131072,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    pad_token_id=0,
)
LONG_ROWS = ("llama3_8b_1m_lora_fsdp2", "llama3_8b_1m_full_fsdp2", "llama3_8b_3m_lora_fsdp2")
"""Experiments whose ranks share rows of a million tokens and more."""
DEEPSEEK_V3 = transformers.DeepseekV3Config(
    architectures=["DeepseekV3ForCausalLM"],
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    first_k_dense_replace=3,
    num_attention_heads=128,
    num_key_value_heads=128,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    qk_nope_head_dim=128,
    v_head_dim=128,
    vocab_size=129280,
    max_position_embeddings=163840,
    pad_token_id=0,
)
DEALT_EXPERTS = ("deepseek_v3_lora_fsdp2",)
"""Experiments whose experts are dealt over ranks."""
MODELS = {
    "llama2_7b_lora_fsdp2": transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
        pad_token_id=0,
    ),
    "qwen3_30b_a3b_lora_fsdp2": transformers.Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        vocab_size=151936,
        max_position_embeddings=40960,
        pad_token_id=0,
    ),
    **dict.fromkeys(LONG_ROWS, LLAMA3_8B),
    **dict.fromkeys(DEALT_EXPERTS, DEEPSEEK_V3),
}
"""By the experiment that trains them, as their authors published them."""


def simulated_experiment(name: str, place: Path, *more: str) -> ExtrapolatedStep:
    """The last rank's step of one full micro-batch, the model at its full depth; with `more` words."""
    MODELS[name].save_pretrained(place / name)
    words = [f"experiment={name}", f"model.path={place / name}", "data.path=train.jsonl", "precision=bf16", *more]
    config = compose(words, check=False).config
    text = (CONF_DIR / "experiment" / f"{name}.yaml").read_text()
    world = int(re.search(r"^# Hardware: (\d+) GPUs", text, re.MULTILINE)[1])
    config.launcher.processes = world
    config.batch["global"] = config.batch["micro"] * readers_of(config, world)
    lengths = [config.data.max_length] * config.batch["micro"]
    return simulate_depth(config, lengths, rank=world - 1, world_size=world, local_world_size=world)
