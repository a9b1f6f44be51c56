"""Ranks that share each row of documents (`parallel.sequence`) against one process. Part of the parity job (`job.py`).

Rows are packed and uneven: documents begin anywhere, borders of slices fall into documents, and some ranks hold no target.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM

from strategies import runtime as processes
from strategies.base import ActivationCheckpointing, Precision, StrategyName, ZeroConfig
from strategies.communication_counters import ALL_TO_ALL, count_communication
from strategies.sequence import SumOverGroup, sequence_group_of, with_sequence_parallelism
from tests.helpers.building import (
    GLOBAL_BATCH,
    STRATEGIES,
    data_set,
    model_dir,
    pair_set,
    rated_set,
    replay_set,
    run_config,
    samples,
    take_steps,
    trainer_for,
)
from tests.helpers.objectives import variants_of
from tests.helpers.stores import write
from tests.parity.base import Curve, Job
from tests.parity.teachers import objective_of
from trainer.config.parallel import ParallelConfig
from trainer.config.run import RunConfig
from trainer.data.batches.collate import Collator
from trainer.data.batches.cutting import RowCut, sequence_cut
from trainer.data.batches.loader import EvalShare, StepBatch, eval_batches
from trainer.data.config import DataConfig
from trainer.data.prepare import PreparedData
from trainer.data.store.sequences import TokenDataset
from trainer.evaluation.by_position import with_position_groups
from trainer.evaluation.loss import LossEvaluator
from trainer.loop import Trainer
from trainer.model.attention import varlen_attention
from trainer.model.config import Quantisation
from trainer.model.sequence_attention import head_shares, over_slices
from trainer.objectives import preference, step_totals
from trainer.objectives.pretrain import PretrainConfig
from trainer.objectives.sft import SftConfig, SftDataSpec

STEPS = 3
PREFERENCES = variants_of("dpo", "orpo", "simpo")
SHARDING = {**STRATEGIES, "zero3": ZeroConfig(name=StrategyName.zero3, stage=3, persistence_threshold=0)}


SAME_STEPS = ("plain", "full", "selective", "auto", "accumulation")
"""Features with which one process takes the same steps."""


@dataclass(frozen=True, slots=True)
class Case:
    """One run on ranks of which `degree` share each row."""

    objective: str = "sft"
    tuning: str = "full"
    architecture: str = "llama"
    strategy: str = "fsdp2"
    degree: int = 2
    feature: str = "plain"
    """`plain`, a mode of recomputation, `accumulation`, `packing`, `short` (rows with fewer tokens than ranks), `routers` (with
    losses for them), `short routers`, `noise` on embeddings, `nf4` (a quantised base), `bf16`."""

    @property
    def oracle(self) -> tuple[str, ...]:
        """What the run of one process has in common with it."""
        run = "documents" if self.feature in SAME_STEPS else self.feature
        return self.objective, self.tuning, self.architecture, run


def assert_rows_are_shared(batch: StepBatch, runtime: processes.Runtime) -> None:
    """Ranks of a group hold slices of the same rows. Of other rows they would exchange heads, silently if lengths agree."""
    local = []
    for micro_batch in batch.micro_batches:
        # Borders, counts and ids are those of the whole row: alike for all who share it.
        local.append((micro_batch["document_bounds"], micro_batch["row_slices"], micro_batch["num_sequences"]))
        local.append(micro_batch["row_input_ids"].tolist())
    by_rank = processes.gather_objects(local, runtime)
    first = runtime.dp_rank * runtime.sequence_size
    assert by_rank[first : first + runtime.sequence_size] == [local] * runtime.sequence_size


def compare(job: Job, *case: Any) -> dict[str, Curve]:
    """Loss, gradient norm and metrics of each step: of all ranks, and of `single`, which takes whole rows."""
    asked = Case(*case)
    config, data = _run_of(job, asked)
    runtime = with_sequence_parallelism(job.runtime, asked.degree)
    found = curve(trainer_for(config, data, runtime), runtime.world_size)
    lone = replace(config, parallel=ParallelConfig())
    expected = job.oracle(asked.oracle, lambda: curve(job.lone_trainer(lone, data), 1), elsewhere=[])
    return {"found": found, "expected": expected}


def _run_of(job: Job, case: Case) -> tuple[RunConfig, PreparedData]:
    """The settings of a case, and its data."""
    made = job.first_here(lambda: (model_dir(job.root, case.architecture), data_of(job.root, case)))
    model, data = made
    readers = job.runtime.world_size // case.degree
    accumulation = 2 if case.feature in ("accumulation", "packing") else 1
    if case.feature.startswith("short"):
        accumulation = GLOBAL_BATCH // readers  # a document a row
    config = run_config(
        model,
        _strategy_of(case),
        case.tuning,
        micro=GLOBAL_BATCH // (readers * accumulation),
        steps=STEPS,
        objective=objective_by_name(case.objective, job.root),
        parallel=ParallelConfig(sequence=case.degree),
        data=DataConfig(packing=case.feature == "packing", max_length=64),
    )
    if case.degree == 3:
        # Adam's first step is as long for a gradient of 1e-7, which is rounding, as for one of 1e-2. In these uneven rows a
        # few elements have such a gradient, and every strategy drifts from one process by 2e-5 in two steps.
        config.optim.eps = 1e-5
    if case.feature == "bf16":
        config.precision = Precision.bf16
    if case.feature == "noise":
        config.model.neftune_alpha = 5.0
    if case.feature == "nf4":
        config.model.quantisation = Quantisation.nf4
    if case.feature.endswith("routers"):
        config.model.router_aux_loss = 0.5
        config.model.router_z_loss = 0.1
    return config, data


def _strategy_of(case: Case) -> Any:
    """The strategy, with the recomputation that the case asks for."""
    modes = {"full": ActivationCheckpointing.full, "selective": ActivationCheckpointing.selective}
    strategy = SHARDING[case.strategy]
    if case.feature in modes:
        return replace(strategy, activation_checkpointing=modes[case.feature])
    if case.feature == "auto":
        # So little memory that some blocks recompute and some do not.
        return replace(strategy, activation_checkpointing=ActivationCheckpointing.auto, memory_gib=0.004)
    return strategy


def objective_by_name(name: str, root: Path) -> Any:
    """The settings of an objective by its short name."""
    if name in PREFERENCES:
        return PREFERENCES[name]
    if name in ("sft", "pretrain", "smoothed"):
        return {"sft": SftConfig(), "pretrain": PretrainConfig(), "smoothed": SftConfig(label_smoothing=0.2)}[name]
    return objective_of(name, root)


def data_of(root: Path, case: Case) -> PreparedData:
    """Documents of the objective's kind."""
    model_dir(root, "qwen3")  # the teacher of distillation
    if case.feature.startswith("short"):
        return short_set(root)
    name = case.objective.removeprefix("weighed_")
    makers = {"kto": rated_set, "replay": replay_set, "held": replay_set}
    if name in PREFERENCES:
        return pair_set(root)
    weighted = {"weighted": True} if case.objective.startswith("weighed_") else {}
    return makers.get(name, partial(data_set, uneven=True))(root, **weighted)


def short_set(root: Path, *, num: int = 48) -> PreparedData:
    """Documents of one to three tokens, taken one at a time: fewer than there are ranks in a group."""
    directory = root / f"short-{num}"
    if not (directory / "manifest.json").exists():
        short = []
        for index, sample in enumerate(samples(num, uneven=False)):
            length = 1 + index % 3
            short.append(replace(sample, input_ids=sample.input_ids[:length], supervised=sample.supervised[:length]))
        write(directory, short, SftDataSpec().counts, {"fingerprint": "short"})
    opened = TokenDataset.open(directory)
    return PreparedData(train=opened, evaluation=opened, directory=directory, report={}, label_names=None)


def curve(trainer: Trainer, world: int, first_step: int = 0, steps: int = STEPS) -> Curve:
    """Loss, gradient norm and the objective's metrics of some steps. All `world` ranks must call, or one that is alone."""
    names = ("loss", *trainer.engine.step_module.objective.metrics)
    rows = []
    trainer.loader.collator.keeps_row_ids = True
    for batch in trainer.loader.steps(first_step * GLOBAL_BATCH, steps):
        if trainer.engine.runtime.sequence_size > 1:
            assert_rows_are_shared(batch, trainer.engine.runtime)
        record = trainer.train_step(batch)
        sums = [record.local_sums[name].double() for name in names]
        if world > 1:
            sums = [processes.sum_over_ranks(value) for value in sums]
        loss, *others = (float(value) / (record.counts["loss"] or 1) for value in sums)
        rows.append([loss, float(record.result.grad_norm), *others])
    return rows


# -- faults that a test must notice -----------------------------------------------------------------------------------


def _scaled_by_readers(degree: int) -> Any:
    """The loss times the number of readers, as if gradients were averaged over them."""
    right = step_totals.pop_loss
    return mock.patch.object(step_totals, "pop_loss", lambda terms, scale, world: right(terms, scale, world) / degree)


def _identity_as_adjoint(_: int) -> Any:
    """The gradient of a sum over the group is this rank's alone."""
    return mock.patch.object(SumOverGroup, "backward", staticmethod(lambda ctx, grad: (grad, None)))


def _owner_left_out(_: int) -> Any:
    """Every rank of a group counts its pairs."""
    return mock.patch.object(preference, "counted_here", lambda batch: 1.0)


def _local_positions(_: int) -> Any:
    """Each slice counts its tokens from 0."""
    right = Collator.cut

    def cut(self: Collator, batch: Any, cut: Any) -> Any:
        slices = right(self, batch, cut)
        return slices | {"position_ids": torch.arange(slices["input_ids"].shape[1])[None]}

    return mock.patch.object(Collator, "cut", cut)


FAULTS: dict[str, tuple[str, Any]] = {
    "scaled by readers": ("sft", _scaled_by_readers),
    "identity as adjoint": ("dpo", _identity_as_adjoint),
    "owner left out": ("dpo", _owner_left_out),
    "local positions": ("sft", _local_positions),
}
"""Faults by name: an objective that shows it, and what plants it."""


def planted(job: Job, fault: str) -> dict[str, Curve]:
    """The curves of a case with a planted fault."""
    objective, plant = FAULTS[fault]
    case = Case(objective, degree=2)
    lone = compare(job, objective)["expected"]
    with plant(case.degree):
        found = compare(job, objective)["found"]
    return {"found": found, "expected": lone}


# -- more than curves -------------------------------------------------------------------------------------------------


def resumed(job: Job) -> dict[str, Curve]:
    """Two steps each with a group of 1, 2, 4 and 1 ranks, under another strategy each time, out of the state saved before."""
    config, data = _run_of(job, Case("sft", "lora"))
    rows: Curve = []
    path = None
    for number, (degree, strategy) in enumerate([(1, "fsdp2"), (2, "zero2"), (4, "zero3"), (1, "ddp")]):
        readers = job.runtime.world_size // degree
        micro = {"global": GLOBAL_BATCH, "micro": GLOBAL_BATCH // readers}
        changed = replace(config, strategy=SHARDING[strategy], parallel=ParallelConfig(sequence=degree), batch=micro)
        trainer = trainer_for(changed, data, with_sequence_parallelism(job.runtime, degree))
        if path is not None:
            trainer.progress = trainer.engine.load(path)
        rows += [list(row) for row in take_steps(trainer, 2)]
        assert trainer.progress.step == 2 * (number + 1)
        path = job.saved(trainer)
    lone = replace(config, parallel=ParallelConfig())
    expected = job.oracle("resumed sequences", lambda: job.lone(lone, 8, data), elsewhere=[])
    return {"found": rows, "expected": expected}


def evaluated(job: Job) -> list[dict[str, float]]:
    """Held-out loss, also by position, and accuracy with a group of 1, 2 and 4 ranks; batches of several documents.

    `batch <number>` is the summed loss of a micro-batch, in the order of the documents.
    """
    config, data = _run_of(job, Case())
    held_out = data.evaluation
    assert held_out is not None
    values = []
    for degree in (1, 2, 4):
        runtime = with_sequence_parallelism(job.runtime, degree)
        readers = runtime.dp_size
        changed = replace(
            config, parallel=ParallelConfig(sequence=degree), batch={"global": 16, "micro": 16 // readers}
        )
        trainer = trainer_for(changed, data, runtime)
        share = EvalShare(5, runtime.dp_rank, readers, cut=sequence_cut(runtime))
        whole_batches = partial(eval_batches, held_out, share, trainer.loader.collator, "cpu")
        batches = partial(with_position_groups, whole_batches, [4, 8, 16, 1024])
        count = int(held_out.counts["loss"].sum())
        evaluator = LossEvaluator(batches, loss_denominator=count, ranks_per_row=degree)
        batch_sums: list[float] = []
        evaluator.on_batch_sums = lambda sums, kept=batch_sums: kept.extend(sums["eval/loss"])
        metrics = dict(evaluator.run(trainer.engine))
        # Fewer readers have fewer turns without a micro-batch, which sum to 0.
        metrics |= {f"batch {number}": batch_sum for number, batch_sum in enumerate(batch_sums) if batch_sum}
        values.append(metrics)
    return values


def order(job: Job) -> list[list[list[int]]]:
    """The sequences of the first steps, sorted, with a group of 1, 2 and 4 ranks."""
    config, data = _run_of(job, Case())
    found = []
    for degree in (1, 2, 4):
        runtime = with_sequence_parallelism(job.runtime, degree)
        changed = replace(
            config, parallel=ParallelConfig(sequence=degree), batch={"global": 16, "micro": 16 // runtime.dp_size}
        )
        loader = trainer_for(changed, data, runtime).loader
        steps = []
        for step in range(STEPS):
            sequences: list[int] = []
            for micro_batches in loader.plan(step * GLOBAL_BATCH):
                for micro_batch in micro_batches:
                    sequences += micro_batch
            steps.append(sorted(sequences))
        found.append(steps)
    return found


def exchanged_bytes(job: Job, degree: int) -> dict[str, int]:
    """Bytes that this rank's exchanges of one step are counted with, and what the formula of one layer gives."""
    config, data = _run_of(job, Case(degree=degree))
    runtime = with_sequence_parallelism(job.runtime, degree)
    trainer = trainer_for(config, data, runtime)
    model = trainer.engine.step_module.model.config
    head = model.hidden_size // model.num_attention_heads
    (batch,) = trainer.loader.steps(0, 1)
    shares = head_shares(model.num_attention_heads, model.num_key_value_heads, degree)
    expected = 0
    for micro_batch in batch.micro_batches:
        row_slices = micro_batch["row_slices"]
        local = row_slices[runtime.sequence_rank + 1] - row_slices[runtime.sequence_rank]
        for by_rank, all_heads in ((shares.query_heads, model.num_attention_heads), (shares.key_value_heads, None)):
            first, end = by_rank[runtime.sequence_rank]
            sent_heads = all_heads or sum(last - begin for begin, last in by_rank)
            # A call is counted by the larger of what is sent and what arrives, this rank's own part included.
            tensor = max(local * sent_heads, row_slices[-1] * (end - first)) * head
            # Queries and the output, or keys and values; each in the forward and in the backward pass.
            expected += 2 * 2 * tensor * 4 * model.num_hidden_layers
    with count_communication() as totals:
        trainer.train_step(batch)
    return {"counted": totals.bytes_by_collective[ALL_TO_ALL], "expected": expected}


def attention(job: Job, heads: int, key_value_heads: int, degree: int, kind: str) -> list[float]:
    """The largest differences of the output and of the gradients of q, k and v from attention over the whole row, in float64."""
    runtime = with_sequence_parallelism(job.runtime, degree)
    generator = torch.Generator().manual_seed(3)
    bounds = [0, 5, 6, 23]
    num_tokens = bounds[-1]
    key_width = 6
    value_width = 4 if kind == "narrow values" else key_width

    def drawn(num_heads: int, width: int) -> torch.Tensor:
        return torch.randn(1, num_heads, num_tokens, width, generator=generator, dtype=torch.float64)

    whole = [drawn(heads, key_width), drawn(key_value_heads, key_width), drawn(key_value_heads, value_width)]
    weights = torch.randn(1, num_tokens, heads, value_width, generator=generator, dtype=torch.float64)
    settings: dict[str, Any] = {"cu_seq_lens_q": torch.tensor(bounds, dtype=torch.int32), "document_bounds": bounds}
    if kind == "sinks":
        settings["s_aux"] = torch.randn(heads, generator=generator, dtype=torch.float64)
    if kind == "window":
        settings["sliding_window"] = 3
    module = torch.nn.Module()

    rows = [tensor.clone().requires_grad_() for tensor in whole]
    output, _ = varlen_attention(module, *rows, None, **settings)
    (output * weights).sum().backward()

    row_slices = RowCut(0, degree).borders(num_tokens)
    start, stop = RowCut(runtime.sequence_rank, degree).span(num_tokens)
    slices = [tensor[:, :, start:stop].clone().requires_grad_() for tensor in whole]
    local, _ = over_slices(varlen_attention)(module, *slices, None, row_slices=row_slices, **settings)
    (local * weights[:, start:stop]).sum().backward()

    differences = [float((local - output[:, start:stop]).abs().max())]
    for local_tensor, row_tensor in zip(slices, rows, strict=True):
        assert local_tensor.grad is not None and row_tensor.grad is not None
        differences.append(float((local_tensor.grad - row_tensor.grad[:, :, start:stop]).abs().max()))
    by_rank = processes.gather_objects(differences, runtime)
    return [max(column) for column in zip(*by_rank, strict=True)]


def beside_deepspeed(job: Job, degree: int) -> list[float]:
    """The largest differences from DeepSpeed's own Ulysses, which needs even heads and even slices: output, q, k and v."""
    from deepspeed import comm
    from deepspeed.sequence.layer import DistributedAttention

    comm.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    runtime = with_sequence_parallelism(job.runtime, degree)
    generator = torch.Generator().manual_seed(5)
    num_tokens = 24
    row = [torch.randn(1, 4, num_tokens, 6, generator=generator, dtype=torch.float64) for _ in range(3)]
    row_slices = RowCut(0, degree).borders(num_tokens)
    start, stop = RowCut(runtime.sequence_rank, degree).span(num_tokens)
    weights = torch.randn(1, stop - start, 4, 6, generator=generator, dtype=torch.float64)

    def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention over one document, in DeepSpeed's order `[1, T, heads, D]`."""
        by_head = [tensor.transpose(1, 2) for tensor in (query, key, value)]
        return torch.nn.functional.scaled_dot_product_attention(*by_head, is_causal=True).transpose(1, 2)

    theirs = [tensor[:, :, start:stop].transpose(1, 2).contiguous().requires_grad_() for tensor in row]
    their_output = DistributedAttention(causal, sequence_group_of(row_slices), scatter_idx=2, gather_idx=1)(*theirs, 0)
    (their_output * weights).sum().backward()

    ours = [tensor[:, :, start:stop].clone().requires_grad_() for tensor in row]
    bounds = [0, num_tokens]
    settings: dict[str, Any] = {"cu_seq_lens_q": torch.tensor(bounds, dtype=torch.int32), "document_bounds": bounds}
    our_output, _ = over_slices(varlen_attention)(torch.nn.Module(), *ours, None, row_slices=row_slices, **settings)
    (our_output * weights).sum().backward()

    differences = [float((our_output - their_output).abs().max())]
    for tensor, their_tensor in zip(ours, theirs, strict=True):
        assert tensor.grad is not None and their_tensor.grad is not None
        differences.append(float((tensor.grad - their_tensor.grad.transpose(1, 2)).abs().max()))
    by_rank = processes.gather_objects(differences, runtime)
    return [max(column) for column in zip(*by_rank, strict=True)]


def beside_transformers(job: Job) -> dict[str, float]:
    """The loss of the first step on shared rows, and that of plain transformers, document by document."""
    config, data = _run_of(job, Case(degree=4))
    shared = compare(job, "sft", "full", "llama", "fsdp2", 4)["found"][0][0]
    if not job.runtime.is_main:
        return {}
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).eval()
    loader = job.lone_trainer(replace(config, parallel=ParallelConfig()), data).loader
    (micro_batches,) = loader.plan(0)
    loss_sum = 0.0
    num_targets = 0
    for sequences in micro_batches:
        for sequence in sequences:
            sample = data.train.sample(sequence)
            ids = torch.from_numpy(sample.input_ids.astype("int64"))[None]
            is_target = torch.from_numpy(sample.supervised[1:])
            with torch.no_grad():
                logits = model(ids).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            loss_sum += float(losses[is_target].double().sum())
            num_targets += int(is_target.sum())
    return {"shared": shared, "transformers": loss_sum / num_targets}
