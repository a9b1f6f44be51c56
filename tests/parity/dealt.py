"""Experts distributed over ranks (`parallel.experts`) against one process. Part of the parity job (`job.py`)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from strategies import expert_counts, expert_parallelism, fsdp2
from strategies import runtime as processes
from strategies.base import ActivationCheckpointing, Precision
from strategies.communication_counters import ALL_GATHER, count_communication
from strategies.errors import ReplicasDiffer
from strategies.expert_share import expert_share_of_parameter
from strategies.parameters import named_parameters
from strategies.sequence import with_sequence_parallelism
from strategies.sharding_report import sharding_record
from tests.helpers import writing
from tests.helpers.building import GLOBAL_BATCH, model_dir, run_config, take_steps, trainer_for
from tests.parity.base import Curve, Job, values_of
from tests.parity.sequences import SHARDING, curve, data_of, objective_by_name
from tests.parity.sequences import Case as RowsCase
from trainer.config.parallel import ParallelConfig
from trainer.config.run import RunConfig
from trainer.data.batches.loader import EvalShare, eval_batches
from trainer.data.config import DataConfig
from trainer.data.prepare import PreparedData
from trainer.evaluation import full_weights
from trainer.evaluation.base import DecodingConfig
from trainer.evaluation.generate import AnswerGenerator
from trainer.evaluation.loss import LossEvaluator
from trainer.model import expert_exchange, experts
from trainer.model.config import ModelConfig, Quantisation
from trainer.model.loading import load_generation_config, load_tokenizer
from trainer.monitors.replicas import ReplicaCheck, replicated_parameters
from trainer.tuning.base import FullConfig, LoraConfig

EXPERTS = 8
COUNT_NAMES = {"qwen3_moe": "num_experts", "mixtral": "num_local_experts", "gpt_oss": "num_local_experts"}
TUNINGS = {
    "full": FullConfig(),
    "lora": LoraConfig(rank=4),
    "lora on experts": LoraConfig(rank=4, experts=True, router=True),
    "lora on experts alone": LoraConfig(rank=3, experts=True, targets=[]),
}
SAME_STEPS = ("plain", "full", "selective", "auto", "accumulation", "no wait", "chunks", "chunks selective", "host")
"""Features with which one process takes the same steps."""


@dataclass(frozen=True, slots=True)
class Case:
    """One run on four ranks, with experts distributed over `experts` of them, and rows shared by `sequence`."""

    objective: str = "sft"
    tuning: str = "full"
    architecture: str = "qwen3_moe"
    strategy: str = "fsdp2"
    experts: int = 2
    sequence: int = 1
    feature: str = "plain"
    """`plain`, a mode of recomputation, `accumulation`, `no wait` (gradients are reduced in each micro-batch), `routers` (with
    losses for them), `chunks` (few rows at a time), `host` (parameters on the host), `packing`, `ema`, `mixture teacher`,
    `bf16`, and how the base is quantised."""

    @property
    def oracle(self) -> tuple[str, ...]:
        """What the run of one process has in common with it."""
        run = "documents" if self.feature in SAME_STEPS else self.feature
        return "dealt", self.objective, self.tuning, self.architecture, run


def compare(job: Job, *case: Any) -> dict[str, Any]:
    """Loss, gradient norm and metrics of each step: of all ranks, and of `single`, which has all experts.

    Only with averaged weights, of which the curves say nothing: `average apart`, the largest difference of an average after the
    last step, and `average lag`, the largest difference of an average from the weight itself.
    """
    asked = Case(*case)
    config, data = run_of(job, asked)
    trainer = trainer_for(config, data, with_sequence_parallelism(job.runtime, asked.sequence))
    with in_chunks() if asked.feature.startswith("chunks") else nullcontext():
        found = curve(trainer, job.runtime.world_size)
    expected, averages, lag = _of_one_process(job, asked, config, data)
    compared: dict[str, Any] = {"found": found, "expected": expected}
    if config.optim.ema_decay:
        compared["average apart"] = job.gathered_apart(trainer, averages, of=set(averages))
        compared["average lag"] = lag
    return compared


def _of_one_process(
    job: Job, case: Case, config: RunConfig, data: PreparedData
) -> tuple[Curve, dict[str, torch.Tensor], float]:
    """(the curve of `single`; its averaged weights; the largest difference of an average from its weight).

    No averages and 0.0 if the run averages none.
    """
    lone = replace(config, parallel=ParallelConfig())

    def made() -> tuple[Curve, dict[str, torch.Tensor], float]:
        trainer = job.lone_trainer(lone, data)
        found = curve(trainer, 1)
        if not config.optim.ema_decay:
            return found, {}, 0.0
        weights = values_of(trainer)
        with trainer.engine.inference():
            averages = values_of(trainer)
        lag = max(float((averages[name] - weight).abs().max()) for name, weight in weights.items())
        return found, averages, lag

    return job.oracle(case.oracle, made, elsewhere=([], {}, 0.0))


def run_of(job: Job, case: Case) -> tuple[RunConfig, PreparedData]:
    """The settings of a case, and its data."""
    overrides = {COUNT_NAMES[case.architecture]: EXPERTS}
    rows = RowsCase(case.objective, feature=case.feature)
    made = job.first_here(
        lambda: (model_dir(job.root / "dealt", case.architecture, **overrides), data_of(job.root, rows))
    )
    model, data = made
    accumulation = 2 if case.feature in ("accumulation", "packing", "no wait", "routers") else 1
    readers = job.runtime.world_size // case.sequence
    config = run_config(
        model,
        _strategy_of(case),
        "full",
        micro=GLOBAL_BATCH // (readers * accumulation),
        steps=3,
        objective=objective_by_name(case.objective, job.root),
        parallel=ParallelConfig(experts=case.experts, sequence=case.sequence),
        data=DataConfig(packing=case.feature == "packing", max_length=64),
    )
    config.tuning = TUNINGS[case.tuning]
    if case.feature == "mixture teacher":
        config.objective.teacher.path = str(model)
    if case.feature == "bf16":
        config.precision = Precision.bf16
    if case.feature in ("nf4", "fp4", "int8"):
        config.model.quantisation = Quantisation(case.feature)
    if case.objective == "held" and case.tuning == "full":
        # Adam's first step is as long for a gradient that is only rounding as for one of 1e-2, and the KL to the model before
        # training has such gradients. Without expert parallelism the norm of the third step drifts by 7e-6, too.
        config.optim.eps = 1e-5
    if case.feature == "ema":
        config.optim.ema_decay = 0.9
        # Averages are compared element by element, and move with every element whose gradient is only rounding.
        config.optim.eps = 1e-5
    if case.feature in ("routers", "routers at once"):
        config.model.router_aux_loss = 0.5
        config.model.router_z_loss = 0.1
    return config, data


def _strategy_of(case: Case) -> Any:
    """The strategy, with what the case asks of it."""
    strategy = SHARDING[case.strategy]
    modes = {"full": ActivationCheckpointing.full, "selective": ActivationCheckpointing.selective}
    mode = modes.get(case.feature.removeprefix("chunks "))
    if mode is not None:
        return replace(strategy, activation_checkpointing=mode)
    if case.feature == "auto":
        # So little memory that some blocks recompute and some do not.
        return replace(strategy, activation_checkpointing=ActivationCheckpointing.auto, memory_gib=0.004)
    if case.feature == "no wait":
        return replace(strategy, defer_sync=False)
    if case.feature == "host":
        return replace(strategy, cpu_offload=True)
    return strategy


@contextmanager
def in_chunks(chunk: int = 64) -> Iterator[None]:
    """Experts compute `chunk` rows at a time, and again in the backward pass."""
    with (
        mock.patch.object(expert_exchange, "MIN_CHUNK_ROWS", chunk),
        mock.patch.object(expert_exchange, "MAX_KEPT_RATIO", 0),
    ):
        yield


# -- faults that a test must notice -----------------------------------------------------------------------------------


def _factor_by_the_mesh() -> Any:
    """Gradients of experts are divided by the ranks that share them, as torch would by itself."""
    right = expert_parallelism.shard_experts

    def shard(module: Any, ranks: int, **settings: Any) -> None:
        right(module, settings["mesh"].size(), **settings)

    return mock.patch.object(fsdp2, "shard_experts", shard)


def _weighted_by_the_receiver() -> Any:
    """The router's weights go with the rows, and no gradient comes back to them."""
    right = expert_exchange.expert_parallel_forward

    def exchanged(module: Any, share: Any, hidden: Any, chosen: Any, weights: Any, low_rank: Any) -> Any:
        return right(module, share, hidden, chosen, weights.detach(), low_rank)

    return mock.patch.object(experts, "expert_parallel_forward", exchanged)


def _counts_over_ranks() -> Any:
    """Each rank takes the counts of all ranks together for those of every one of them."""
    right = expert_counts.ExchangedRowCounts.row_counts

    def row_counts(self: Any, chosen: Any, rows: int) -> Any:
        counts = right(self, chosen, rows)
        by_expert = counts.received_by_expert.sum(dim=0, keepdim=True).expand_as(counts.received_by_expert)
        # As many rows in all, so that nothing but the result can tell.
        ids = torch.arange(by_expert.shape[1]).repeat(self.num_ranks).repeat_interleave(by_expert.reshape(-1))
        ids = ids[: sum(counts.received_from_rank)]
        mistaken = torch.zeros_like(counts.received_by_expert)
        mistaken[0] = torch.bincount(ids, minlength=by_expert.shape[1])
        return replace(counts, received_by_expert=mistaken)

    return mock.patch.object(expert_counts.ExchangedRowCounts, "row_counts", row_counts)


FAULTS: dict[str, Any] = {
    "factor by the mesh": _factor_by_the_mesh,
    "weighted by the receiver": _weighted_by_the_receiver,
    "counts over ranks": _counts_over_ranks,
}
"""What plants a fault, by its name."""


def planted(job: Job, fault: str) -> dict[str, Curve]:
    """The curves of a case with a planted fault."""
    expected, _, _ = _of_one_process(job, Case(), *run_of(job, Case()))
    with FAULTS[fault]():
        found = compare(job)["found"]
    return {"found": found, "expected": expected}


# -- more than curves -------------------------------------------------------------------------------------------------


def crowded(job: Job, ranks: int) -> dict[str, Any]:
    """Curves of a model whose router sends every token to the same two experts, and the share of rows at the busiest rank."""

    def made() -> Path:
        path = model_dir(job.root / "crowded", "gpt_oss", num_local_experts=EXPERTS)
        file = path / "model.safetensors"
        if not (path / "crowded").exists():
            tensors = load_file(file)
            for name in tensors:
                if name.endswith(".router.bias"):
                    tensors[name][:2] += 100.0
            save_file(tensors, file, {"format": "pt"})
            (path / "crowded").touch()
        return path

    config, data = run_of(job, Case(architecture="gpt_oss", experts=ranks))
    config.model = ModelConfig(path=str(job.first_here(made)))
    received: list[int] = []
    right = expert_counts.ExchangedRowCounts.row_counts

    def row_counts(self: Any, chosen: Any, rows: int) -> Any:
        counts = right(self, chosen, rows)
        received.append(sum(counts.received_from_rank))
        return counts

    with mock.patch.object(expert_counts.ExchangedRowCounts, "row_counts", row_counts):
        found = curve(trainer_for(config, data, job.runtime), job.runtime.world_size)
    lone = replace(config, parallel=ParallelConfig())
    expected = job.oracle("crowded", lambda: curve(job.lone_trainer(lone, data), 1), elsewhere=[])
    return {"found": found, "expected": expected, "received": processes.gather_objects(sum(received), job.runtime)}


RESUMED = {
    "full": ((1, "fsdp2"), (2, "hsdp"), (4, "fsdp2")),
    "lora on experts": ((4, "fsdp2"), (1, "zero2"), (2, "fsdp2"), (1, "ddp"), (2, "hsdp")),
}
"""By tuning method: ranks over which experts are distributed, and the strategy, of one run after the other."""


def resumed(job: Job, tuning: str) -> dict[str, Any]:
    """Two steps each with experts on other numbers of ranks, each out of the state saved before; and what is exported.

    `apart`: the largest difference of a gathered parameter before the first step from that of one process.
    """
    config, data = run_of(job, Case(tuning=tuning))
    lone = replace(config, parallel=ParallelConfig())
    start = job.oracle(("values", tuning), lambda: values_of(job.lone_trainer(lone, data)), elsewhere={})
    rows: Curve = []
    path = None
    apart = 0.0
    for ranks, strategy in RESUMED[tuning]:
        changed = replace(config, strategy=SHARDING[strategy], parallel=ParallelConfig(experts=ranks))
        trainer = trainer_for(changed, data, with_sequence_parallelism(job.runtime, 1))
        apart = max(apart, job.gathered_apart(trainer, start, of=set(start)))
        if path is not None:
            trainer.progress = trainer.engine.load(path)
        rows += [list(row) for row in take_steps(trainer, 2)]
        path = job.saved(trainer)
    expected = job.oracle(("resumed", tuning), lambda: job.lone(lone, 2 * len(RESUMED[tuning]), data), elsewhere=[])
    return {"found": rows, "expected": expected, "apart": apart}


def gathered_bytes(job: Job, feature: str) -> dict[str, int]:
    """Bytes that a step of LoRA gathers with experts on 1, 2 and 4 ranks, and those of all experts; receipts, too."""
    sizes: dict[str, Any] = {}
    for ranks in (1, 2, 4):
        config, data = run_of(job, Case(tuning="lora", experts=ranks, feature=feature))
        trainer = trainer_for(config, data, job.runtime)
        (batch,) = trainer.loader.steps(0, 1)
        trainer.train_step(batch)  # what is left gathered at the end of a step is so from here on
        with count_communication() as totals:
            trainer.train_step(batch)
        sizes[str(ranks)] = totals.bytes_by_collective[ALL_GATHER]
        record = sharding_record(trainer.engine, job.runtime)
        assert sum(record["held_per_rank"]) == record["parameters"], ranks
        sizes[f"parameters {ranks}"] = record["parameters"]
    experts_bytes = 0
    for name, parameter in named_parameters(trainer.engine.step_module):
        if expert_share_of_parameter(trainer.engine.step_module, name) is not None:
            experts_bytes += 4 * parameter.numel() * parameter.element_size()  # each of the four has a quarter
    return sizes | {"experts": experts_bytes}


ENDS = [10, 58, 71]
"""Tokens that end an answer, of which the model writes some soon."""


def evaluated(job: Job, ranks: int, how: str) -> dict[str, Any]:
    """Held-out loss and accuracy, answers and likelihoods, with experts distributed over `ranks` ranks.

    Some ranks have fewer answers to write than others, and shorter ones. `how`: weights are `gathered` once, or `by block`.
    """
    config, data = run_of(job, Case())
    held_out = data.evaluation
    assert held_out is not None
    trainer = trainer_for(replace(config, parallel=ParallelConfig(experts=ranks)), data, job.runtime)
    share = EvalShare(5, job.runtime.dp_rank, job.runtime.dp_size, cut=None)
    batches = partial(eval_batches, held_out, share, trainer.loader.collator, "cpu")
    evaluator = LossEvaluator(batches, loss_denominator=int(held_out.counts["loss"].sum()), ranks_per_row=1)
    metrics = dict(evaluator.run(trainer.engine))

    generation = load_generation_config(config.model, None, None)
    generation.eos_token_id = ENDS
    writer = AnswerGenerator(load_tokenizer(config.model), generation, job.runtime, batch=1)
    prompts = writing.prompts(7)
    usable = full_weights.USABLE_MEMORY_SHARE if how == "gathered" else 0.0
    with mock.patch.object(full_weights, "USABLE_MEMORY_SHARE", usable):
        answers = writer.generate_answers(trainer.engine, prompts, DecodingConfig(max_new_tokens=6))
        pairs = [(prompts[number], prompts[number - 1][:6]) for number in range(7)]
        scores = [one.logprob for one in writer.likelihoods(trainer.engine, pairs)]
    return {"metrics": metrics, "answers": [answer.ids for answer in answers], "scores": scores}


def flipped(job: Job) -> list[str]:
    """What the check of replicas says of distributed experts under hsdp: before and after a bit of one rank's is flipped."""
    config, data = run_of(job, Case(strategy="hsdp"))
    trainer = trainer_for(config, data, job.runtime)
    take_steps(trainer, 1)
    check = ReplicaCheck(1, job.runtime)
    said = []
    for step in (1, 2):
        if step == 2 and job.runtime.rank == 3:
            _, tensor, _ = next(one for one in replicated_parameters(trainer.engine) if ".experts." in one[0])
            tensor.view(-1)[0] += 1.0
        try:
            check.check_replicas(trainer.engine, step)
            said.append("alike")
        except ReplicasDiffer as error:
            said.append(str(error))
    return said
