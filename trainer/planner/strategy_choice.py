"""`strategy=auto`: the fastest strategy that fits, chosen once and frozen into the configuration.

If the ranks' GPU is in `conf/hardware/`, all strategies are planned on it as by `shardtune plan`, and tried in order
of speed. The rates of other devices are unknown: there the strategy that shards least is taken of those that fit,
because what is sharded must be exchanged. Two real steps of the longest documents, on all ranks, decide. If memory
runs out, the next strategy is tried.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from strategies.base import ActivationCheckpointing, AutoConfig, Precision, StrategyConfig
from strategies.errors import DoesNotFit, OutOfMemory
from strategies.hardware import gpu_of
from strategies.registry import common_settings
from strategies.runtime import Runtime, broadcast_object, gather_objects
from trainer.config.parallel import readers_of
from trainer.config.run import AUTO, STRATEGY, RunConfig, asked_micro
from trainer.config.sharding import problems as sharding_problems
from trainer.config.validate import candidates
from trainer.data.prepare import PreparedData
from trainer.objectives.registry import data_spec_of
from trainer.planner.cost_model import CostModel
from trainer.planner.fit_check import TIMEOUT_SHARE, call_in_process, single_step_config
from trainer.planner.hardware import GIB, Card, card_named
from trainer.planner.lengths import DocumentLengths, sampled_lengths
from trainer.planner.micro_batch import needed_gib, recomputation_modes, simulated_form
from trainer.planner.oom_probe import PROBE_STEPS, TrialDescription, TrialInputs, memory_gib, runs_out_of_memory
from trainer.planner.plan import Choice, PlannedRun, RunVariant, micro_batches, rank_choices
from trainer.reporting.resolution import OutOfMemoryTrial, Resolution

LEAST_SHARDED_FIRST = ("single", "ddp", "zero1", "zero2", "hsdp", "fsdp2", "zero3")
"""From what shards nothing to what shards most."""
PARALLEL_SIMULATIONS = 4
"""Most processes that simulate side by side; each takes about 1 GiB of the host."""


@dataclass(frozen=True, slots=True)
class Devices:
    """What the ranks of a run have."""

    ranks: int
    ranks_per_host: int
    """Ranks of a host."""
    kind: str
    memory_gib: float
    """Of the rank that has least."""
    card: Card | None
    """What is known of it; None where that is nothing, and on CPUs."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A strategy to be tried, and why it is the next."""

    strategy: StrategyConfig
    why: str

    @property
    def name(self) -> str:
        """As it is typed."""
        return str(self.strategy.name)


def settle_strategy(
    config: RunConfig, inputs: TrialInputs, announce: Callable[[str], None], freeze: Callable[[RunConfig], None]
) -> RunConfig:
    """The run with a strategy: that of the configuration, or for `strategy=auto` the one that is chosen here.

    `announce` prints a line for the user. `freeze` writes a choice to the run's directory, so that a later start takes the
    same. All ranks must call; they follow rank 0, which may have read what was chosen before. Raises DoesNotFit on every
    rank if no strategy fits; OutOfMemory if some ranks alone run out, after which a new start may take the next.
    """
    runtime = inputs.runtime
    batch = _batch_for_ranks(config, runtime.world_size)
    earlier = config.resolution(STRATEGY)
    strategy, earlier, batch = broadcast_object((config.strategy, earlier, batch), runtime)
    config = replace(_with_strategy(config, strategy, earlier), batch=batch)
    if not isinstance(strategy, AutoConfig):
        was_open = earlier is not None and (earlier.asked, earlier.chosen) == (AUTO, strategy.name)
        if not was_open or not list(sharding_problems(config, runtime.world_size)):
            return config
        # An earlier start chose it for another number of ranks: choose again.
        config = _with_strategy(config, AutoConfig(**common_settings(strategy)), None)
    devices = devices_of(runtime)
    failed_trials = [] if earlier is None else list(earlier.tried)
    proposals_in_order: Iterator[Proposal] = iter(())
    if runtime.is_main:
        simulating = ": simulating steps" if devices.ranks > 1 else ""
        announce(f"choosing the strategy (strategy=auto){simulating}")
        timeout_s = TIMEOUT_SHARE * runtime.timeout_s
        proposals_in_order = proposals(config, inputs.data, inputs.precision, devices, timeout_s)
    while True:
        ran_out = [trial.choice for trial in failed_trials]
        # Rank 0 alone has proposals. The others learn each one from it, so that all ranks try the same.
        proposal = next((proposal for proposal in proposals_in_order if proposal.name not in ran_out), None)
        proposal = broadcast_object(proposal, runtime)
        if proposal is None:
            raise DoesNotFit(
                f"strategy=auto: a step runs out of memory under every strategy that can run this ({', '.join(ran_out)}); "
                "lower batch.micro or data.max_length, recompute (strategy.activation_checkpointing=full), take more GPUs "
                "or tuning=lora; `shardtune plan` compares them"
            )
        if devices.ranks == 1 or not _proposal_runs_out(config, proposal, inputs):
            break
        announce(f"strategy={proposal.name} runs out of memory; trying the next")
        failed_trials.append(OutOfMemoryTrial(proposal.name))
    reason = proposal.why
    if devices.ranks > 1:
        reason += f"; {PROBE_STEPS} steps of the longest documents held"
    resolution = Resolution(STRATEGY, AUTO, proposal.name, reason, tuple(failed_trials))
    settled_config = _with_strategy(config, proposal.strategy, resolution)
    freeze(settled_config)
    return settled_config


def preview_strategy(config: RunConfig, prepared: PreparedData) -> RunConfig:
    """The run with the strategy that `auto` would try first on devices like those of this host.

    For commands that show a run before it starts, when there are no ranks yet: nothing is tried, the strategy is planned.
    """
    if not isinstance(config.strategy, AutoConfig):
        return config
    device_kind = str(config.run.device)
    ranks_per_host = config.launcher.per_node
    ranks = ranks_per_host * config.launcher.nodes
    if device_kind == "cuda" and not torch.cuda.is_available() and ranks > 1:
        legal = {str(strategy.name): strategy for strategy in candidates(config, ranks)[0]}
        placeholder = legal.get("fsdp2") or next(iter(legal.values()))
        note = (
            f"{AUTO} -> the fastest that fits, on the host with the GPUs; the figures here are for {placeholder.name}"
        )
        return _with_strategy(config, placeholder, note)
    device = torch.device("cuda" if device_kind == "cuda" else "cpu")
    runtime = Runtime(0, ranks, 0, ranks_per_host, device, None)
    devices = Devices(ranks, ranks_per_host, device_kind, memory_gib(runtime), _card(gpu_name(runtime)))
    timeout_s = TIMEOUT_SHARE * config.run.timeout_s
    first = next(proposals(config, prepared, config.precision, devices, timeout_s))
    reason = first.why
    if ranks > 1:
        reason += f"; {PROBE_STEPS} steps of the longest documents will be tried"
    return _with_strategy(config, first.strategy, Resolution(STRATEGY, AUTO, first.name, reason))


def _batch_for_ranks(config: RunConfig, ranks: int) -> dict[str, Any]:
    """`batch`, with `micro` open again if the run itself chose one that is not for so many ranks.

    The steps on trial could not be cut into it. `settle_micro`, which comes after the strategy, chooses it anew.
    """
    batch = config.batch
    if batch["micro"] == AUTO or asked_micro(batch, config.substitutions) != AUTO:
        return batch
    is_divisor = (batch["global"] // readers_of(config, ranks)) % batch["micro"] == 0
    return batch if is_divisor else {**batch, "micro": AUTO}


def _with_strategy(config: RunConfig, strategy: StrategyConfig, note: Resolution | str | None) -> RunConfig:
    substitutions = dict(config.substitutions)
    substitutions.pop(STRATEGY, None)
    if note:
        substitutions[STRATEGY] = note
    return replace(config, strategy=strategy, substitutions=substitutions)


def gpu_name(runtime: Runtime) -> str | None:
    """What the driver calls this rank's card; None for a CPU."""
    gpu = gpu_of(runtime.device)
    return None if gpu is None else gpu.name


def devices_of(runtime: Runtime) -> Devices:
    """What a plan must know of the devices of all ranks; their memory is that of the rank with least. All ranks must call."""
    memory_and_names = gather_objects((memory_gib(runtime), gpu_name(runtime)), runtime)
    names = {name for _, name in memory_and_names}
    card = None
    if len(names) == 1:  # nothing is known of a mix of cards
        card = _card(names.pop())
    least_gib = min(memory for memory, _ in memory_and_names)
    return Devices(runtime.world_size, runtime.local_world_size, runtime.kind, least_gib, card)


def _card(name: str | None) -> Card | None:
    return None if name is None else card_named(name)


def _proposal_runs_out(config: RunConfig, proposal: Proposal, inputs: TrialInputs) -> bool:
    """Try the proposed strategy: whether two real steps run out of memory on all ranks. All ranks must call.

    Steps are of one document a micro-batch if `batch.micro` is `auto` too: it is chosen after the strategy. Raises
    OutOfMemory, which names the strategy, if some ranks run out and others do not.
    """
    micro = 1 if config.batch["micro"] == AUTO else config.batch["micro"]
    trial_config = replace(_with_strategy(config, proposal.strategy, None), batch={**config.batch, "micro": micro})
    remedy = "launcher.retry={out_of_memory: 3} would start with the next; or name a strategy that shards more"
    trial = TrialDescription(STRATEGY, f"strategy={proposal.name}", remedy)
    try:
        return runs_out_of_memory(trial_config, inputs, trial)
    except DoesNotFit as error:
        # Some ranks alone ran out, so the job must end; a new start may try the next strategy.
        raise OutOfMemory(str(error), ran_out_with={STRATEGY: proposal.name}) from error


def proposals(
    config: RunConfig, prepared: PreparedData, precision: Precision, devices: Devices, timeout_s: float
) -> Iterator[Proposal]:
    """Strategies that can run this configuration, in the order in which they are to be tried, each with the reason.

    `timeout_s`: how long one simulation may take. With a card of known speed all are simulated at once and ordered by speed;
    else each is simulated only when it is asked for, the one that shards least first.
    """
    legal = {str(strategy.name): strategy for strategy in candidates(config, devices.ranks)[0]}
    in_order = [legal[name] for name in LEAST_SHARDED_FIRST if name in legal]
    if devices.ranks == 1 or len(in_order) == 1:
        reason = "one rank has nothing to share" if devices.ranks == 1 else "the only one that can run this"
        yield from (Proposal(strategy, reason) for strategy in in_order)
        return
    planner = Planner(config, prepared, precision, devices, timeout_s)
    if planner.rates_known:
        yield from planner.fastest(in_order)
    else:
        yield from planner.least_sharded(in_order)


class Planner:
    """Plans strategies on the devices of a run."""

    def __init__(
        self, config: RunConfig, prepared: PreparedData, precision: Precision, devices: Devices, timeout_s: float
    ) -> None:
        self.config = config
        self.devices = devices
        self.precision = precision
        self.timeout_s = timeout_s
        sequences = data_spec_of(config.objective).sequences_per_document
        samples = sampled_lengths(config, prepared.train, sequences)
        self.lengths: DocumentLengths = samples.lengths(config.data, sequences)
        self.modes = recomputation_modes(config.strategy.activation_checkpointing)
        self.micro: int | None = None if config.batch["micro"] == AUTO else config.batch["micro"]

    @property
    def rates_known(self) -> bool:
        """Whether seconds can be reckoned."""
        card = self.devices.card
        return card is not None and card.tflops(self.precision) > 0

    def least_sharded(self, strategies: list[StrategyConfig]) -> Iterator[Proposal]:
        """Strategies to try where the device's speed is unknown, each with the reason.

        First those that should fit, in the order given; then those that cannot be simulated; last the one that needs least.
        Each is planned with every mode of recomputation that is open, without recomputation first.
        """
        available_gib = self.devices.memory_gib
        unplanned: dict[str, Proposal] = {}
        too_large: list[tuple[float, StrategyConfig]] = []
        for mode in self.modes:
            for strategy in strategies:
                cost_model = self.simulate_cost_model(strategy, mode)
                if isinstance(cost_model, str):
                    unplanned[str(strategy.name)] = Proposal(strategy, f"not planned: {cost_model}")
                    continue
                needed = needed_gib(cost_model, self.micro or 1, self.lengths, available_gib)
                if needed > available_gib:
                    too_large.append((needed, strategy))
                    continue
                memory = f"planned {needed:.2f} of {available_gib:.2f} GiB"
                yield Proposal(strategy, f"{memory}; this device's rates are not known: of what fits it shards least")
        yield from unplanned.values()
        if too_large:
            needed, strategy = min(too_large, key=lambda needed_and_strategy: needed_and_strategy[0])
            yield Proposal(strategy, f"planned {needed:.2f} of {available_gib:.2f} GiB, the least of all")

    def fastest(self, strategies: list[StrategyConfig]) -> Iterator[Proposal]:
        """Strategies to try on a card of known speed, each with the reason.

        First those that should fit, the fastest first; then those that cannot be simulated; last the one that needs least.
        """
        ways = [(strategy, mode) for strategy in strategies for mode in self.modes]
        threads = min(PARALLEL_SIMULATIONS, len(ways), len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(threads) as pool:  # threads that wait for processes
            cost_models = list(pool.map(self.simulate_cost_model, *zip(*ways, strict=True)))
        fitting: list[tuple[StrategyConfig, Choice]] = []
        too_large: list[tuple[StrategyConfig, Choice]] = []
        unplanned: list[Proposal] = []
        for (strategy, mode), cost_model in zip(ways, cost_models, strict=True):
            if isinstance(cost_model, str):
                unplanned.append(Proposal(strategy, f"not planned: {cost_model}"))
                continue
            choice = self._best_choice(strategy, mode, cost_model)
            if choice.fits:
                fitting.append((strategy, choice))
            else:
                too_large.append((strategy, choice))
        assert self.devices.card is not None
        for strategy, choice in sorted(fitting, key=lambda planned: -planned[1].tokens_per_s):
            speed = f"{choice.tokens_per_s:,.0f} tokens/s on {self.devices.card.name}"
            yield Proposal(
                strategy, f"planned {_gib(choice)} GiB and {speed}: the fastest of what fits and was not tried"
            )
        yield from unplanned
        if too_large:
            strategy, choice = max(too_large, key=lambda planned: planned[1].fit.margin)
            yield Proposal(strategy, f"planned {_gib(choice)} GiB, the least of all")

    def simulate_cost_model(self, strategy: StrategyConfig, mode: ActivationCheckpointing) -> CostModel | str:
        """The cost model under a strategy, simulated in a process of its own, or why it cannot be."""
        devices = self.devices
        config = replace(self.config, strategy=strategy, batch={**self.config.batch, "micro": 1}, substitutions={})
        step = replace(single_step_config(config, devices.ranks, mode_if_auto=mode), precision=self.precision)
        length = int(self.lengths.longest[0]) // self.lengths.sequences_per_unit
        arguments = (step, length, (devices.ranks, devices.ranks_per_host), devices.kind)
        cost_model: CostModel | str = call_in_process(simulated_form, arguments, self.timeout_s)
        return cost_model

    def _best_choice(self, strategy: StrategyConfig, mode: ActivationCheckpointing, cost_model: CostModel) -> Choice:
        """What a step takes under this strategy and mode of recomputation, with the best micro-batch for it.

        That is the one in the configuration, or for `auto` the fastest that fits; the smallest if none fits.
        """
        assert self.devices.card is not None
        job = PlannedRun(
            card=replace(self.devices.card, memory_gib=self.devices.memory_gib),
            precision=self.precision,
            nodes=self.devices.ranks // self.devices.ranks_per_host,
            ranks_per_node=self.devices.ranks_per_host,
            global_batch=self.config.batch["global"],
            lengths=self.lengths,
        )
        variant = RunVariant(replace(self.config, strategy=replace(strategy, activation_checkpointing=mode)), ())
        micros = [1] if cost_model.alone else micro_batches(job, self.micro, self.config.parallel.sequence)
        return rank_choices(variant, cost_model, job, micros)[0]


def _gib(choice: Choice) -> str:
    return f"{choice.fit.total / GIB:.2f} of {choice.fit.limit / GIB:.2f}"
