"""Plans a run before it starts: memory, time and price of each way to run it, by simulating its step.

A way is a strategy with its recomputation, offloading and the storage type of its base. Each is simulated once
(`trainer/planner/simulation.py`), in processes of their own, and answers for every micro-batch
(`trainer/planner/cost_model.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from strategies.base import (
    ActivationCheckpointing,
    Fsdp2Config,
    Precision,
    StrategyConfig,
    ZeroConfig,
)
from strategies.errors import ConfigError
from strategies.mesh import replica_count
from strategies.registry import every_strategy
from strategies.tensor_inventory import MemoryKind
from trainer.config.run import RunConfig
from trainer.config.validate import problems_of
from trainer.model.config import ModelKind as ModelKind
from trainer.model.config import Quantisation
from trainer.objectives.registry import family_of
from trainer.planner.cost_model import Form, Taken
from trainer.planner.hardware import Card, Fit, fit, host_gib, room
from trainer.planner.lengths import MOST_MICRO, Lengths, divisors
from trainer.planner.memory_tracker import Highest, Moment
from trainer.planner.peer_memory import LOGITS, Cut, TheirBytes, Theirs, held
from trainer.planner.peer_memory import problems_of as problems_of_theirs
from trainer.planner.speed import Load, Step, step_of
from trainer.tuning.base import TuningName

MODES = (ActivationCheckpointing.none, ActivationCheckpointing.selective, ActivationCheckpointing.full)
ONLY_OF_A_RUN = ("budget: not set", "data.path: not set", "run.device=cuda: no CUDA device")
"""What a run must have and a plan need not."""


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """Settings of a plan."""

    exact: bool = False
    """Simulate whole models in place of two shallow ones: the same answer, as slow as the model is deep."""
    offload: bool = False
    """Look at optimizer state (zero) or parameters (fsdp2, hsdp) in host memory too."""
    quantisation: list[Quantisation] = field(default_factory=list)
    """Further ways to store a frozen base, as in [none,nf4]; empty takes model.quantisation."""
    theirs: list[Theirs] = field(default_factory=list)
    """What another trainer holds in its step, as in [stock_loss,pure_bf16], told beside what this one does."""
    workers: int = 0
    """Processes that simulate; 0 takes one for each core that this job may use."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to run, to be simulated."""

    config: RunConfig
    words: tuple[str, ...]
    """What to type for it, beside what was typed."""
    offload: bool = False

    @property
    def name(self) -> str:
        """Its strategy."""
        return str(self.config.strategy.name)


@dataclass(frozen=True, slots=True)
class Choice:
    """A way with a micro-batch, and what it takes."""

    way: Way
    words: tuple[str, ...]
    micro: int
    accumulation: int
    largest_micro: int
    """The largest micro-batch that fits; 0 where none does."""
    taken: Taken
    fit: Fit
    step: Step
    tokens_per_s: float
    """Of all ranks."""
    host_gib: float
    """Of one node."""
    hours: float | None
    """For the budget."""
    price: float | None
    """US dollars for the budget, all cards."""
    theirs: TheirBytes | None = None
    """The same as another trainer would hold it, where that is asked for."""

    @property
    def fits(self) -> bool:
        """Whether the card holds it."""
        return self.fit.margin >= 0


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """The ranks of a run, and what they are given."""

    card: Card
    precision: Precision
    nodes: int
    per_node: int
    global_batch: int
    lengths: Lengths

    @property
    def world(self) -> int:
        """All ranks."""
        return self.nodes * self.per_node


def ways(
    config: RunConfig, settings: PlanConfig, typed: set[str], world: int | None
) -> tuple[list[Way], list[tuple[Way, str]]]:
    """(ways to look at, those that are ruled out and why) on `world` ranks. What was typed stays; `typed` has the keys.

    Raises ConfigError with all that a run of these words would be refused for in every way, or where no way is left.
    """
    asked = [(way, _problems(way.config, world)) for way in _all(config, settings, typed)]
    always = _theirs_asked(config, settings.theirs)
    always += [problem for problem in asked[0][1] if all(problem in problems for _, problems in asked)]
    if always or all(problems for _, problems in asked):
        raise ConfigError(always or [f"{' '.join(way.words)}: {problems[0]}" for way, problems in asked])
    return [way for way, found in asked if not found], [(way, found[0]) for way, found in asked if found]


def _problems(config: RunConfig, world: int | None) -> list[str]:
    return [problem for problem in problems_of(config, world_size=world) if not problem.startswith(ONLY_OF_A_RUN)]


def _all(config: RunConfig, settings: PlanConfig, typed: set[str]) -> Iterator[Way]:
    asked = config.strategy.activation_checkpointing
    open_ = asked is ActivationCheckpointing.auto or "strategy.activation_checkpointing" not in typed
    modes = MODES if open_ else (asked,)
    stores = settings.quantisation or [config.model.quantisation]
    for strategy in _strategies(config.strategy, typed):
        for store in stores:
            for mode in modes:
                for offload in (False, True) if settings.offload else (False,):
                    chosen = _offloaded(strategy) if offload else strategy
                    if chosen is None:
                        continue
                    chosen = replace(chosen, activation_checkpointing=mode)
                    words = [f"strategy={strategy.name}", f"strategy.activation_checkpointing={mode}"]
                    words += _OFFLOAD[isinstance(strategy, ZeroConfig)] if offload else []
                    words += [f"model.quantisation={store}"] if settings.quantisation else []
                    model = replace(config.model, quantisation=store)
                    yield Way(replace(config, strategy=chosen, model=model), tuple(words), offload)


_OFFLOAD = (["strategy.cpu_offload=true"], ["strategy.offload_optimizer=cpu"])


def _offloaded(strategy: StrategyConfig) -> StrategyConfig | None:
    if isinstance(strategy, Fsdp2Config):
        return replace(strategy, cpu_offload=True)
    return replace(strategy, offload_optimizer="cpu") if isinstance(strategy, ZeroConfig) else None


def _strategies(asked: StrategyConfig, typed: set[str]) -> list[StrategyConfig]:
    """The strategy that was typed, or all of them with the common settings that were."""
    return [asked] if "strategy" in typed else every_strategy(asked)


def micro_batches(job: PlannedRun, typed: int | None) -> list[int]:
    """Micro-batches that divide a rank's part of a step: the one typed, or all divisors; none where ranks have no equal parts."""
    part, over = divmod(job.global_batch, job.world)
    if over:
        return []
    if typed is not None:
        return [typed] if part % typed == 0 else []
    return divisors(part)


def choices(way: Way, form: Form, job: PlannedRun, micros: list[int], theirs: Sequence[Theirs] = ()) -> list[Choice]:
    """What a way takes with each micro-batch, the fastest that fits first; then those that do not, smallest first.

    `theirs`: what another trainer holds, to be told beside.
    """
    made = [_choice(way, form, job, micro) for micro in micros]
    if theirs:
        made = [replace(one, theirs=as_theirs(one, form, job, theirs)) for one in made]
    return sorted(made, key=lambda one: (not one.fits, -one.tokens_per_s if one.fits else one.micro))


def _choice(way: Way, form: Form, job: PlannedRun, micro: int) -> Choice:
    card, accumulation = job.card, job.global_batch // (job.world * micro)
    units = float(micro) if form.rows else job.lengths.most(micro)
    taken, words = form.at(units), [*way.words, f"batch.global={job.global_batch}", f"batch.micro={micro}"]
    if accumulation > 1 and isinstance(way.config.strategy, Fsdp2Config) and way.config.strategy.defer_sync is None:
        # The run would decide by an estimate; the plan knows, and says it.
        later = deferred(
            form, waiting_bytes(form, job.world // replica_count(way.config.strategy, job.world, job.nodes))
        )
        waits = fit(later, later.at(units), card).margin >= 0
        taken, form = (later.at(units), later) if waits else (taken, form)
        words.append(f"strategy.defer_sync={str(waits).lower()}")
    step = step_of(form, _load(form, job, micro, accumulation), card, job.precision, ranks_per_node=job.per_node)
    tokens = job.lengths.mean * job.global_batch
    hours = _hours(way.config, job, step, tokens)
    cost = None if hours is None or card.price_per_hour is None else hours * job.world * card.price_per_hour
    return Choice(
        way=way,
        words=tuple(words),
        micro=micro,
        accumulation=accumulation,
        largest_micro=_largest(form, job),
        taken=taken,
        fit=fit(form, taken, card),
        step=step,
        tokens_per_s=tokens / step.total_s,
        host_gib=host_gib(form, job.per_node),
        hours=hours,
        price=cost,
    )


def as_theirs(choice: Choice, form: Form, job: PlannedRun, theirs: Sequence[Theirs]) -> TheirBytes:
    """The step of a choice as another trainer would hold it."""
    units = float(choice.micro) if form.rows else job.lengths.most(choice.micro)
    tokens = choice.micro * float(job.lengths.longest[0]) if form.rows else units
    strategy, cut = choice.way.config.strategy, Cut()
    if isinstance(strategy, Fsdp2Config):
        shards = job.world // replica_count(strategy, job.world, job.nodes)
        cut = Cut(shards, shards, shards)
    elif isinstance(strategy, ZeroConfig):
        cut = Cut(*(job.world if strategy.stage >= stage else 1 for stage in (3, 2, 1)))
    return held(form, units, tokens * form.vocabulary, theirs, cut)


def _theirs_asked(config: RunConfig, theirs: Sequence[Theirs]) -> list[str]:
    """What is wrong with `plan.theirs` of such a run."""
    found = problems_of_theirs(theirs, full=config.tuning.name is TuningName.full)
    if family_of(config.objective).kind is ModelKind.classifier and (
        losses := [each for each in theirs if each in LOGITS]
    ):
        found.append(
            f"plan.theirs=[{','.join(losses)}]: is of a loss over words; objective={config.objective.name} has none"
        )
    return found


def waiting_bytes(form: Form, among: int) -> int:
    """What gradients take more that wait whole for the last micro-batch: in fp32, beside the shard that is there anyway."""
    return round(4 * form.trained * (1 - 1 / among))


def deferred(form: Form, waiting: int) -> Form:
    """The form with gradients that are reduced in the last micro-batch alone, and are `waiting` bytes more until then.

    What a reduction reads outlives its micro-batch, into the next forward pass: there it is not, then.
    """
    kept = {key: found for key, found in form.exchanged.items() if key[4] != "each" or "reduce" not in key[0]}
    large = form.moments[1]

    def released(moment: Moment) -> int:
        """Of what is in buffers, that of a reduction."""
        first = large.get(replace(moment, micro=0), large[moment])  # where only what is gathered is in buffers
        over = large[moment].kinds.get(MemoryKind.communication, 0) - first.kinds.get(MemoryKind.communication, 0)
        return over if moment.phase == "forward" else 0

    def later(moment: Moment, highest: Highest) -> Highest:
        kinds = highest.kinds
        if kinds:
            kinds = kinds | {MemoryKind.gradients: kinds.get(MemoryKind.gradients, 0) + waiting}
            kinds[MemoryKind.communication] = kinds.get(MemoryKind.communication, 0) - released(moment)
        return Highest(highest.total + more[moment], highest.operation, kinds)

    more = {moment: waiting - released(moment) for moment in large}
    small, large_later = ({m: later(m, h) for m, h in of.items()} for of in form.moments)
    bends = {m: [(one + more[m], two + more[m]) for one, two in of] for m, of in form.bends.items()}
    return replace(form, exchanged=kept, moments=(small, large_later), bends=bends)


def _load(form: Form, job: PlannedRun, micro: int, accumulation: int) -> Load:
    units = float(micro) if form.rows else micro * job.lengths.mean
    return Load(units, micro * job.lengths.mean_squares, accumulation)


def _largest(form: Form, job: PlannedRun) -> int:
    units = form.most(room(form, job.card))
    return int(min(units, MOST_MICRO)) if form.rows else job.lengths.holding(units)


def _hours(config: RunConfig, job: PlannedRun, step: Step, tokens: float) -> float | None:
    """Hours of the budget; None where there is none, or where it is epochs of data that is not there."""
    budget, steps = config.budget, None
    if budget.steps is not None:
        steps = float(budget.steps)
    elif budget.tokens is not None:
        steps = budget.tokens / tokens
    elif budget.epochs is not None and job.lengths.number is not None:
        steps = budget.epochs * job.lengths.number / job.global_batch
    return None if steps is None else steps * step.total_s / 3600
