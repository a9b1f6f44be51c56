"""Who takes part in which comparison, and how closely each must agree with the bare loop's loss."""

from __future__ import annotations

from dataclasses import dataclass, replace

SAME = 1e-4
"""Largest relative difference of the final loss where a trainer sees the same batches and does the same arithmetic."""
OTHER = 0.05
"""The same where batches, labels or drawn adapters differ; says only that the trainer learns the same thing."""
BF16 = 5e-3
"""The same where both compute in bf16 and round at other places."""


@dataclass(frozen=True, slots=True)
class Case:
    """One trainer in one comparison."""

    name: str
    script: str
    """`peers/train_<script>.py`."""
    environment: str | None
    """Name in `environments.PACKAGES`; None for the environment that runs this driver."""
    options: tuple[str, ...] = ()
    tolerance: float = SAME


@dataclass(frozen=True, slots=True)
class Group:
    """One comparison: everyone in it does the same work."""

    name: str
    title: str
    cases: tuple[Case, ...]


OURS = Case("shardtune", "shardtune", None)
BARE = Case("bare loop", "bare", None)
BY_HAND = "oneDNN by hand"
"""In the name of who is given, by one line of code, the library that shardtune chooses itself; no way it has of its own."""
BARE_ONEDNN = replace(BARE, name=f"bare loop, {BY_HAND}", options=("--matmul=onednn",))
TORCHTUNE = Case("torchtune", "torchtune", "torchtune")
LITGPT = Case("LitGPT (no clipping)", "litgpt", "litgpt", tolerance=OTHER)
AXOLOTL = Case("axolotl", "axolotl", "axolotl")
HF = Case("transformers Trainer", "hf", "trl")
FACTORY = Case("LLaMA-Factory", "llamafactory", "llamafactory", tolerance=OTHER)
TRL = Case("TRL", "trl", "trl")
DEFAULTS = (OURS, BARE, BARE_ONEDNN, TORCHTUNE, LITGPT, AXOLOTL, HF, FACTORY, TRL)
FLATTENING = replace(HF, name="transformers Trainer, flattening", options=("--layout=flattening",))
FLATTENING_ONEDNN = replace(
    FLATTENING, name=f"{FLATTENING.name}, {BY_HAND}", options=(*FLATTENING.options, "--matmul=onednn")
)
SAMPLE_PACKING = replace(AXOLOTL, name="axolotl, sample_packing", options=("--layout=packed",), tolerance=OTHER)
NEAT = replace(FACTORY, name="LLaMA-Factory, neat_packing", options=("--layout=neat",))
PACKED = (
    OURS,
    replace(OURS, name="shardtune, packs", options=("--layout=packed",), tolerance=OTHER),
    BARE,
    BARE_ONEDNN,
    SAMPLE_PACKING,
    FLATTENING,
    FLATTENING_ONEDNN,
    NEAT,
    replace(TRL, name="TRL, packing (bfd)", options=("--layout=bfd",), tolerance=OTHER),
    replace(TRL, name="TRL, padding_free", options=("--layout=padding_free",)),
    replace(TORCHTUNE, name="torchtune, packed", options=("--layout=packed",), tolerance=OTHER),
)


def changed(cases: tuple[Case, ...], *options: str, tolerance: float = 0.0) -> tuple[Case, ...]:
    """The cases with further options, none held closer than `tolerance`."""
    return tuple(replace(c, options=(*c.options, *options), tolerance=max(c.tolerance, tolerance)) for c in cases)


GROUPS = (
    Group("full", "Full fine-tuning, fp32, default settings of each trainer", DEFAULTS),
    Group("packed", "Full fine-tuning, fp32, without padding", PACKED),
    Group("lora", "LoRA, fp32, default settings of each trainer", changed(DEFAULTS, "--tuning=lora", tolerance=OTHER)),
    Group(
        "lora-packed",
        "LoRA, fp32, without padding",
        changed((OURS, BARE, SAMPLE_PACKING, FLATTENING, NEAT), "--tuning=lora", tolerance=OTHER),
    ),
    Group(
        "bf16",
        "Full fine-tuning, bf16",
        changed((OURS, BARE, NEAT, FLATTENING, HF), "--precision=bf16", tolerance=BF16),
    ),
    Group(
        "lora-bf16",
        "LoRA, bf16",
        changed((OURS, BARE, FLATTENING, HF), "--precision=bf16", "--tuning=lora", tolerance=OTHER),
    ),
)
ON_GPU = (OURS, BARE, HF, TRL)
GPU_GROUPS = (
    Group(
        "gpu-full",
        "Full fine-tuning, bf16, one GPU",
        changed(ON_GPU, "--precision=bf16", tolerance=BF16),
    ),
    Group(
        "gpu-lora",
        "LoRA, bf16, one GPU",
        changed(ON_GPU, "--precision=bf16", "--tuning=lora", tolerance=OTHER),
    ),
)
