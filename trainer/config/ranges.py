"""The range of every numeric setting, and what to do about a value outside."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of one number; `above` and `below` exclude the bound itself."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        """Whether a finite `value` lies inside."""
        return math.isfinite(value) and self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        bounds = [("at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below)]
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound)) or "finite"


COUNT, POSITIVE, SHARE = Range(least=0), Range(least=1), Range(least=0, most=1)

RANGES: dict[str, tuple[Range, str]] = {
    "run.seed": (COUNT, "the default is 42"),
    "run.threads": (COUNT, "0 divides the cores by the ranks of the host"),
    "run.lease_s": (POSITIVE, "a minute or more on network file systems; 120 is usual"),
    "run.timeout_s": (POSITIVE, "minutes rather than seconds: 600 is usual"),
    "model.router_aux_loss": (COUNT, "null follows the model's config; 0.001 to 0.01 as a rule"),
    "model.router_z_loss": (COUNT, "0 leaves it out; 0.001 as a rule"),
    "model.dropout": (Range(least=0, below=1), "0 keeps every strategy on the same curve"),
    "data.eval_share": (Range(least=0, most=0.5), "0.05 holds out one document in twenty"),
    "data.max_length": (Range(least=2), "a next-token target needs two tokens; 2048 is usual"),
    "data.test_share": (Range(least=0, most=0.5), "0.05 holds out one document in twenty"),
    "data.max_bad_share": (SHARE, "0 fails on the first bad row, 0.01 bears one in a hundred"),
    "data.max_documents": (POSITIVE, "null takes all"),
    "data.workers": (COUNT, "0 takes the cores this job may use"),
    "data.sources.*.weight": (COUNT, "0 leaves the source out; null for all sources mixes nothing"),
    "data.filters.min_characters": (COUNT, "0 is no bound"),
    "data.filters.max_characters": (POSITIVE, "null is no bound"),
    "data.filters.min_completion_characters": (COUNT, "0 is no bound"),
    "data.duplicates.threshold": (Range(least=0.3, most=1), "0.8 as a rule; lower finds looser copies and costs time"),
    "data.privacy.min_score": (SHARE, "0.5 as a rule; 0.35 also takes numbers that only look right"),
    "data.privacy.scan_documents": (COUNT, "0 scans all"),
    "data.balance.temperature": (Range(least=1), "1 is natural, 2 to 5 flattens"),
    "data.balance.cap": (POSITIVE, "null is no cap"),
    "data.balance.max_repeats": (POSITIVE, "up to 4 loses little as a rule"),
    "data.min_supervised_share": (SHARE, "0 switches the check off"),
    "batch.global": (POSITIVE, "documents a step, 32 to 256 as a rule"),
    "batch.micro": (POSITIVE, "1 uses the least memory"),
    "budget.steps": (POSITIVE, "the number of optimizer steps"),
    "budget.epochs": (Range(above=0), "1 is one pass over the data"),
    "budget.tokens": (POSITIVE, "training tokens, all ranks together"),
    "tuning.rank": (POSITIVE, "8 to 64 as a rule"),
    "tuning.init_rank": (Range(least=2), "12 as a rule"),
    "tuning.target_rank": (POSITIVE, "two thirds of tuning.init_rank as a rule"),
    "tuning.initial_share": (Range(least=0, below=1), "0.1 as a rule"),
    "tuning.final_share": (Range(least=0, below=1), "0.3 as a rule"),
    "tuning.delta_t": (POSITIVE, "1 to 100 as a rule"),
    "tuning.beta1": (Range(above=0, below=1), "0.85 in the paper"),
    "tuning.beta2": (Range(above=0, below=1), "0.85 in the paper"),
    "tuning.orth_reg_weight": (COUNT, "0.1 to 0.5 as a rule, 0 leaves it out"),
    "tuning.alpha": (Range(above=0), "twice tuning.rank as a rule"),
    "tuning.dropout": (Range(least=0, below=1), "0 keeps every strategy on the same curve"),
    "tuning.lr_ratio": (Range(above=0), "1 is plain LoRA, 16 as a rule for LoRA+"),
    "tuning.d_initial": (Range(above=0), "0.1 as a rule; at 0 nothing would be learned"),
    "tuning.projection_seed": (COUNT, "the default is 0"),
    "tuning.decompose_factor": (COUNT, "0 takes the most even split, 8 or 16 are usual"),
    "tuning.block_size": (Range(least=2), "4 (boft) or 32 (oft) as a rule"),
    "tuning.num_factors": (POSITIVE, "1 or 2 as a rule"),
    "tuning.neumann_terms": (COUNT, "5 as a rule, 0 solves exactly"),
    "tuning.num_virtual_tokens": (POSITIVE, "8 to 100 as a rule"),
    "tuning.encoder_hidden_size": (COUNT, "0 takes the model's own width"),
    "tuning.encoder_layers": (POSITIVE, "2 as a rule"),
    "tuning.adapter_len": (POSITIVE, "10 in the paper"),
    "tuning.adapter_layers": (COUNT, "0 takes every layer"),
    "tuning.size": (POSITIVE, "8 to 256 as a rule"),
    "strategy.memory_gib": (Range(above=0), "null takes what the device has"),
    "strategy.bucket_mib": (POSITIVE, "25 (ddp) to 200 (zero) as a rule"),
    "strategy.replicate": (COUNT, "0 means one replica a host, or 2 on one host"),
    "strategy.stage": (Range(least=1, most=3), "chosen with strategy=zero1, zero2 or zero3"),
    "strategy.persistence_threshold": (COUNT, "0 shards every parameter"),
    "strategy.prefetch_mib": (COUNT, "0 gathers nothing ahead"),
    "objective.beta": (Range(above=0), "0.1 for dpo, kto and orpo, 2 for simpo"),
    "objective.max_target": (Range(least=2), "an answer and its end need two tokens; 128 to 256 suit summaries"),
    "objective.gamma": (COUNT, "half of objective.beta as a rule"),
    "objective.label_smoothing": (Range(least=0, below=0.5), "0 trusts every pair"),
    "objective.sft_weight": (COUNT, "0 leaves it out; 0.1 to 1 as a rule"),
    "objective.desirable_weight": (Range(above=0), "1 as a rule; raise that of the rarer verdict"),
    "objective.undesirable_weight": (Range(above=0), "1 as a rule; raise that of the rarer verdict"),
    "objective.temperature": (Range(above=0), "1 to 4 as a rule"),
    "objective.interpolation": (Range(above=0, below=1), "0.5 as a rule; objective.divergence has both ends"),
    "objective.forgetting.kl_weight": (COUNT, "0 leaves it out; 0.1 to 1 as a rule"),
    "objective.centre": (COUNT, "0 leaves it out; 0.01 as a rule"),
    "optim.lr": (Range(above=0), "about 2e-5 for full tuning, 2e-4 for LoRA"),
    "optim.weight_decay": (COUNT, "0 to 0.1 as a rule"),
    "optim.eps": (Range(above=0), "1e-8 as a rule"),
    "optim.layer_decay": (Range(above=0, most=1), "1 is off, 0.8 to 0.95 as a rule"),
    "optim.groups.*.lr_factor": (COUNT, "1 keeps the common rate, 0 stands still"),
    "optim.groups.*.weight_decay": (COUNT, "null keeps the common rule"),
    "optim.momentum": (Range(least=0, below=1), "0.9 (sgd) or 0.95 (muon) as a rule"),
    "optim.iterations": (Range(least=1, most=20), "5 in the paper"),
    "optim.decay_exponent": (SHARE, "0.8 in the paper"),
    "optim.clip_threshold": (Range(least=1), "1 in the paper"),
    "optim.eps_scale": (Range(above=0), "0.001 in the paper"),
    "optim.min_8bit_elements": (COUNT, "4096 as a rule"),
    "optim.max_grad_norm": (COUNT, "0 switches clipping off"),
    "optim.max_skipped_steps": (POSITIVE, "10 as a rule"),
    "guards.window": (Range(least=10, most=1000), "100 as a rule"),
    "guards.threshold": (Range(above=0), "6 to 10 as a rule; lower finds more, false alarms too"),
    "guards.max_rollbacks": (POSITIVE, "5 as a rule; many mean that the samples are not the cause"),
    "schedule.warmup_steps": (COUNT, "0 takes schedule.warmup_share"),
    "schedule.warmup_share": (SHARE, "0.03 as a rule"),
    "schedule.decay_share": (SHARE, "0.2 as a rule"),
    "schedule.min_factor": (SHARE, "0 ends at a rate of zero"),
    "evaluation.every_steps": (COUNT, "0 evaluates only at the end"),
    "evaluation.batch": (POSITIVE, "8 as a rule"),
    "evaluation.max_documents": (POSITIVE, "null takes all"),
    "evaluation.patience": (COUNT, "0 never stops early"),
    "evaluation.generate.samples": (COUNT, "0 generates nothing; 50 to 500 as a rule"),
    "evaluation.generate.max_new_tokens": (POSITIVE, "as long as the answers: 64 to 256 for summaries"),
    "evaluation.generate.beams": (POSITIVE, "1 is greedy; 4 is usual for summaries and translation"),
    "evaluation.min_delta": (COUNT, "0 counts any improvement"),
    "checkpoint.every_steps": (COUNT, "0 goes by time (checkpoint.every_minutes)"),
    "checkpoint.every_minutes": (COUNT, "null goes by what a save costs, 0 writes the last one only"),
    "checkpoint.mtbf_h": (Range(above=0), "24 as a rule; fewer for many nodes or a spot market"),
    "checkpoint.max_failures": (COUNT, "0 ends the run at the first"),
    "checkpoint.keep": (POSITIVE, "2 survives a checkpoint that was damaged"),
    "export.max_shard_gib": (Range(above=0), "5 as a rule"),
    "logging.every_steps": (POSITIVE, "10 as a rule"),
    "logging.reference_tflops": (Range(above=0), "null takes what is known of the device"),
    "launcher.processes": (POSITIVE, "one a GPU"),
    "launcher.nodes": (POSITIVE, "the number of hosts"),
    "launcher.node_rank": (COUNT, "0 on the host that launcher.rdzv names"),
    "launcher.gpus_per_node": (COUNT, "0 for CPU nodes"),
    "launcher.array_limit": (POSITIVE, "null runs all at a time"),
    "launcher.cpus_per_task": (POSITIVE, "null leaves it to the cluster"),
    "launcher.signal_lead_s": (POSITIVE, "a step plus two saves, at least 60"),
}
"""Every numeric setting, with what to do about a value outside."""
