"""The table of recipes: which model is tuned how, on which cards. `docs/make_recipes.py` makes files and pages of it.

A recipe names a published shape (`trainer/model/shapes`), a task, a tuning method, a strategy and cards. What a task sets stands
in `TASKS`, once for all models. Learning rates are those of `trainer/optim/rates.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Task:
    """What recipes of a task have in common."""

    does: str
    """The end of the sentence "<model> learns ..."."""
    rows: str
    """What a row of the data has."""
    data_path: str
    objective: str = "sft"
    schedule: str = "cosine"
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the file beside those of every recipe, as nested keys."""


TASKS = {
    "instruction": Task(
        "to follow instructions",
        "a prompt and a response, or a conversation",
        "train.jsonl",
    ),
    "pretrain": Task(
        "the language of a domain, by continued pre-training on plain text",
        "a text",
        "texts.jsonl",
        objective="pretrain",
        settings={"data": {"over_length": "split", "packing": True}},
    ),
    "tools": Task(
        "to call tools",
        "a conversation with `tools` and `tool_calls`",
        "calls.jsonl",
    ),
    "thoughts": Task(
        "to reason before it answers: the loss is computed on the reasoning and the answer",
        "a conversation whose answers have `reasoning_content`, or begin with `<think>`",
        "thoughts.jsonl",
        settings={"data": {"learn": {"reasoning": "learn"}}},
    ),
    "classification": Task(
        "to give each document one label",
        "a text and a label",
        "labelled.csv",
        objective="classification",
        settings={"data": {"format": "labelled"}, "budget": {"epochs": 3}, "evaluation": {"watch": "eval/accuracy"}},
    ),
    "dpo": Task(
        "to prefer the chosen answers to the rejected ones (DPO)",
        "a prompt, a chosen and a rejected answer",
        "preferences.jsonl",
        objective="dpo",
        settings={"data": {"format": "preference"}},
    ),
    "kto": Task(
        "from answers that people rated as good or bad (KTO)",
        "a prompt, an answer and a label that is true or false",
        "marks.jsonl",
        objective="kto",
        settings={"data": {"format": "thumbs"}},
    ),
    "orpo": Task(
        "to generate the chosen answers and to prefer them, in one run without a reference model (ORPO)",
        "a prompt, a chosen and a rejected answer",
        "preferences.jsonl",
        objective="orpo",
        settings={"data": {"format": "preference"}},
    ),
    "distil": Task(
        "to predict each token like a larger model, the teacher (distillation)",
        "a prompt and a response",
        "train.jsonl",
        objective="distillation",
    ),
    "long": Task(
        "from documents of up to 131,072 tokens; the GPUs of a host share each document (sequence parallelism)",
        "a conversation or a prompt and a response",
        "books.jsonl",
        settings={"evaluation": {"batch": 1}},
    ),
    "experts": Task(
        "to follow instructions, with adapters also on its experts, which are distributed over the GPUs of a host",
        "a prompt and a response, or a conversation",
        "train.jsonl",
    ),
    "grpo": Task(
        "by reinforcement learning: its answers to problems are rewarded if the final result is right (GRPO)",
        "a problem and its answer",
        "problems.jsonl",
        objective="grpo",
        settings={
            "data": {"format": "prompt"},
            "objective": {
                "group_size": 8,
                "rewards": {"right": {"kind": "maths"}},
                "rollout": {"max_new_tokens": 1024},
            },
            "budget": {"steps": 300},
        },
        schedule="constant",
    ),
    "rloo": Task(
        "by reinforcement learning: the reward of each answer is compared with that of the other answers (RLOO)",
        "a problem and its answer",
        "problems.jsonl",
        objective="rloo",
        settings={
            "data": {"format": "prompt"},
            "objective": {
                "group_size": 8,
                "rewards": {"right": {"kind": "maths"}},
                "rollout": {"max_new_tokens": 512},
            },
            "budget": {"steps": 300},
        },
        schedule="constant",
    ),
    "summarisation": Task(
        "to generate summaries",
        "a prompt (the text) and a response (its summary)",
        "articles.jsonl",
        objective="seq2seq",
        settings={
            "objective": {"prefix": "summarize: ", "max_target": 128},
            "budget": {"epochs": 3},
            "evaluation": {"watch": "eval/rougeL", "generate": {"samples": 100, "max_new_tokens": 128}},
        },
    ),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """One recipe: a row of the table."""

    model: str
    """Name of its shape."""
    task: str
    method: str
    """`full`, `lora` or `qlora`, which is LoRA on a base in 4 bits."""
    strategy: str
    card: str
    """A file of conf/hardware."""
    gpus: int
    """Of a host."""
    length: int
    """`data.max_length`, tokens."""
    batch: tuple[int, int]
    """`batch.global` and `batch.micro`."""
    nodes: int = 1
    recompute: str = "full"
    settings: dict[str, Any] = field(default_factory=dict)
    """What only this recipe sets, as nested keys."""

    @property
    def name(self) -> str:
        """The name of its file: what is special is named, the task or, for instructions, the method."""
        what = self.method if self.task == "instruction" else self.task
        return f"{self.model}_{what}_{self.strategy}"


def instruct(*row: Any, **more: Any) -> Recipe:
    """A recipe that tunes on instructions: (model, method, strategy, card, gpus, length, batch)."""
    return Recipe(row[0], "instruction", *row[1:], **more)


OFF = {"recompute": "none"}
RECIPES = [
    # Llama
    instruct("llama3_2_1b", "lora", "single", "rtx4090", 1, 2048, (32, 4)),
    instruct("llama3_2_1b", "full", "zero2", "l40s", 4, 2048, (64, 4)),
    Recipe("llama3_2_1b", "classification", "lora", "single", "l4", 1, 512, (32, 8)),
    instruct("llama3_2_3b", "qlora", "single", "l4", 1, 2048, (16, 1)),
    instruct("llama3_2_3b", "lora", "zero2", "a10g", 4, 2048, (64, 1)),
    instruct("llama3_8b", "full", "fsdp2", "h100_80g", 8, 4096, (64, 1)),
    Recipe("llama3_8b", "tools", "lora", "fsdp2", "a10g", 4, 4096, (32, 1)),
    Recipe("llama3_8b", "dpo", "lora", "fsdp2", "a100_80g", 4, 2048, (64, 2)),
    instruct("llama3_3_70b", "lora", "fsdp2", "h100_80g", 8, 4096, (64, 1)),
    instruct("llama3_3_70b", "qlora", "fsdp2", "l40s", 4, 2048, (32, 1)),
    instruct("llama3_3_70b", "full", "fsdp2", "h100_80g", 8, 4096, (128, 1), nodes=4),
    instruct("llama3_405b", "lora", "fsdp2", "h100_80g", 8, 4096, (64, 1), nodes=4),
    instruct("llama4_scout", "lora", "fsdp2", "h200", 8, 4096, (64, 1)),
    instruct("llama2_13b", "lora", "fsdp2", "a10g", 4, 2048, (64, 1)),
    # Qwen
    instruct("qwen2_5_0_5b", "full", "zero1", "rtx4090", 2, 2048, (64, 2)),
    Recipe("qwen2_5_0_5b", "pretrain", "full", "ddp", "a100_80g", 2, 2048, (64, 8), **OFF),
    instruct("qwen2_5_1_5b", "lora", "single", "rtx4090", 1, 2048, (32, 4)),
    instruct("qwen2_5_3b", "full", "fsdp2", "a100_80g", 2, 4096, (64, 2)),
    instruct("qwen2_5_7b", "lora", "fsdp2", "a10g", 4, 2048, (64, 1)),
    Recipe("qwen2_5_7b", "kto", "lora", "fsdp2", "l40s", 4, 2048, (64, 1)),
    instruct("qwen2_5_14b", "qlora", "single", "rtx4090", 1, 2048, (16, 1)),
    instruct("qwen2_5_32b", "lora", "fsdp2", "h100_80g", 4, 4096, (64, 1)),
    instruct("qwen2_5_72b", "qlora", "fsdp2", "l40s", 8, 2048, (64, 1)),
    instruct("qwen3_0_6b", "full", "single", "rtx4090", 1, 2048, (32, 2)),
    Recipe(
        "qwen3_0_6b",
        "distil",
        "full",
        "fsdp2",
        "a100_80g",
        2,
        2048,
        (64, 2),
        settings={"objective": {"teacher": {"path": "Qwen/Qwen3-8B"}, "sft_weight": 0.1}},
    ),
    Recipe("qwen3_1_7b", "thoughts", "lora", "single", "a10g", 1, 4096, (32, 1)),
    instruct("qwen3_4b", "lora", "single", "l40s", 1, 4096, (32, 2)),
    Recipe(
        "qwen3_4b",
        "grpo",
        "lora",
        "fsdp2",
        "h100_80g",
        4,
        512,
        (128, 4),
    ),
    instruct("qwen3_8b", "lora", "hsdp", "l40s", 4, 4096, (64, 1), nodes=2),
    Recipe("qwen3_8b", "tools", "lora", "fsdp2", "l40s", 2, 4096, (32, 1)),
    Recipe(
        "qwen3_8b",
        "long",
        "lora",
        "fsdp2",
        "h100_80g",
        8,
        131072,
        (8, 1),
        settings={
            "model": {"positions": 131072, "rope": {"type": "yarn"}},
            "parallel": {"sequence": 8},
            "strategy": {"mlp_tokens": 8192},
        },
    ),
    instruct("qwen3_14b", "lora", "zero3", "a100_80g", 4, 4096, (64, 1)),
    instruct("qwen3_32b", "lora", "fsdp2", "a100_80g", 8, 4096, (64, 1)),
    Recipe(
        "qwen3_30b_a3b",
        "experts",
        "lora",
        "fsdp2",
        "h100_80g",
        8,
        4096,
        (64, 1),
        settings={"parallel": {"experts": 8}, "tuning": {"experts": True}},
    ),
    instruct(
        "qwen3_235b_a22b",
        "lora",
        "fsdp2",
        "h200",
        8,
        4096,
        (64, 1),
        nodes=2,
        settings={"parallel": {"experts": 8}},
    ),
    instruct("qwen3_next_80b_a3b", "lora", "fsdp2", "h200", 8, 4096, (64, 1)),
    instruct("qwen3_5_0_8b", "lora", "single", "rtx4090", 1, 2048, (32, 2)),
    instruct("qwen3_5_9b", "lora", "fsdp2", "a100_80g", 2, 4096, (32, 1)),
    instruct("qwen3_5_35b_a3b", "lora", "fsdp2", "h100_80g", 8, 4096, (64, 1)),
    # Gemma
    instruct("gemma2_2b", "full", "fsdp2", "l40s", 4, 2048, (64, 1)),
    instruct("gemma2_9b", "lora", "fsdp2", "a10g", 4, 2048, (64, 1)),
    instruct("gemma2_27b", "qlora", "single", "a100_80g", 1, 4096, (16, 1)),
    instruct("gemma3_1b", "lora", "single", "l4", 1, 2048, (32, 2)),
    instruct("gemma3_4b", "lora", "single", "l40s", 1, 2048, (32, 2)),
    instruct("gemma3_12b", "qlora", "single", "l40s", 1, 2048, (16, 1)),
    instruct("gemma3_27b", "lora", "fsdp2", "a100_80g", 4, 4096, (64, 1)),
    instruct("gemma4_26b_a4b", "lora", "fsdp2", "a100_80g", 4, 4096, (64, 1)),
    instruct("gemma4_31b", "lora", "fsdp2", "h100_80g", 4, 4096, (64, 1)),
    # gpt-oss
    instruct("gpt_oss_20b", "lora", "fsdp2", "a100_80g", 4, 4096, (64, 1)),
    instruct("gpt_oss_120b", "lora", "fsdp2", "h200", 8, 4096, (64, 1)),
    # Mistral
    instruct("mistral_7b", "lora", "fsdp2", "rtx4090", 2, 2048, (32, 1)),
    instruct("mistral_7b", "full", "zero3", "a100_80g", 8, 4096, (64, 1)),
    Recipe("mistral_7b", "orpo", "lora", "fsdp2", "l40s", 4, 2048, (64, 1)),
    instruct("mistral_nemo_12b", "qlora", "single", "rtx4090", 1, 2048, (16, 1)),
    instruct("mistral_large_123b", "qlora", "fsdp2", "a100_80g", 8, 2048, (32, 1)),
    instruct("mixtral_8x7b", "lora", "fsdp2", "a100_80g", 8, 4096, (64, 1)),
    instruct("mixtral_8x22b", "lora", "fsdp2", "h200", 8, 4096, (64, 1)),
    # Phi
    instruct("phi3_mini", "qlora", "single", "l4", 1, 2048, (16, 1)),
    instruct("phi4_mini", "lora", "single", "rtx4090", 1, 2048, (16, 1)),
    instruct("phi4", "lora", "fsdp2", "a10g", 4, 2048, (64, 1)),
    Recipe("phi4", "thoughts", "lora", "fsdp2", "h100_80g", 4, 8192, (32, 1)),
    # GLM
    instruct("glm4_9b", "lora", "fsdp2", "a10g", 4, 2048, (64, 1)),
    Recipe("glm4_9b", "tools", "lora", "fsdp2", "l40s", 4, 8192, (32, 1)),
    instruct("glm4_5_air", "lora", "fsdp2", "h200", 8, 4096, (64, 1)),
    # DeepSeek
    instruct("deepseek_v2_lite", "lora", "fsdp2", "a100_80g", 2, 4096, (32, 1)),
    # SmolLM
    instruct("smollm2_135m", "full", "single", "l4", 1, 1024, (32, 8), **OFF),
    Recipe("smollm2_360m", "pretrain", "full", "ddp", "rtx4090", 2, 2048, (64, 2), **OFF),
    instruct("smollm2_1_7b", "lora", "single", "rtx4090", 1, 2048, (32, 2)),
    instruct("smollm3_3b", "lora", "ddp", "rtx4090", 2, 2048, (32, 1)),
    Recipe("smollm3_3b", "thoughts", "lora", "single", "l40s", 1, 8192, (32, 1)),
    # Granite
    instruct("granite3_8b", "lora", "fsdp2", "a10g", 4, 2048, (64, 1)),
    Recipe("granite3_8b", "tools", "lora", "fsdp2", "l40s", 2, 4096, (32, 1)),
    # OLMo
    instruct("olmo2_7b", "lora", "fsdp2", "a10g", 4, 2048, (64, 1)),
    Recipe("olmo2_13b", "pretrain", "full", "fsdp2", "h100_80g", 8, 4096, (128, 1)),
    Recipe(
        "olmo3_7b",
        "rloo",
        "lora",
        "fsdp2",
        "h100_80g",
        4,
        512,
        (128, 2),
    ),
    instruct("olmo3_32b", "qlora", "single", "h100_80g", 1, 2048, (16, 1)),
    # Falcon
    instruct("falcon3_1b", "full", "zero2", "l40s", 4, 2048, (64, 2)),
    instruct("falcon3_7b", "lora", "fsdp2", "a10g", 4, 2048, (64, 1)),
    instruct("falcon3_10b", "qlora", "single", "rtx4090", 1, 2048, (16, 1)),
    # LFM
    instruct("lfm2_350m", "full", "single", "l4", 1, 2048, (32, 2)),
    # Encoders
    Recipe("bert_base", "classification", "full", "single", "l4", 1, 256, (32, 32), **OFF),
    Recipe("bert_large", "classification", "full", "single", "l4", 1, 512, (32, 8), **OFF),
    Recipe("modernbert_base", "classification", "full", "single", "l4", 1, 1024, (32, 8), **OFF),
    # T5
    Recipe("t5_base", "summarisation", "full", "single", "rtx4090", 1, 512, (64, 16), **OFF),
]
WANTED = {
    "Flan-T5": "its configuration does not say whether the output head shares the weights of the embeddings",
    "Gemma 3 270M": "we have no complete configuration",
    "Gemma 4 E2B, E4B and 12B": "our configurations lack the audio encoder that the published models have",
    "GLM 4 32B": "the layer sizes that we found do not give the published number of parameters",
    "Granite 3.3 2B, Granite 4": "we found single sizes, but no complete configuration",
    "LFM2 700M, 1.2B and 2.6B": "we have only the configuration of the 350M model",
    "Llama 4 Maverick": "the published number of parameters is too rough to check our layer sizes",
    "Ministral 3, Mistral Small": "we have no complete configuration",
    "ModernBERT large, DeBERTa, RoBERTa": "we have no configuration with a named source",
    "Qwen3.5 2B, 4B, 27B and 122B-A10B": "we have no complete configuration: the number of linear-attention heads is missing",
}
"""Families and sizes without a recipe, and why."""
