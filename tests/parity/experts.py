"""Mixtures of experts under every strategy: part of the parity job (`job.py`).

A token that is almost as fond of one expert as of another goes elsewhere by a rounding, and no comparison would mean
anything: the routers are made decided, the gap is measured, and what the experts got is compared as numbers of tokens.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from strategies.base import ActivationCheckpointing, Fsdp2Config
from strategies.runtime import gather_objects, sum_over_ranks
from tests.helpers.building import model_dir, run_config
from tests.parity.base import Job
from tests.parity.methods import FEWER, STEPS, released_at_once
from tests.parity.plan import SHARDING
from trainer.config.run import RunConfig
from trainer.loop import Trainer
from trainer.model.config import Quantisation
from trainer.model.files import SafetensorsFiles
from trainer.tuning.base import FullConfig, LoraConfig
from trainer.tuning.expert_parts import routers_by_name

EXPERTS = 5
"""Of each layer: ranks hold an uneven number of them."""
ARCHITECTURES = {
    "mixtral": {"num_local_experts": EXPERTS},
    "gpt_oss": {"num_local_experts": EXPERTS},
    "qwen3_moe": {"num_experts": EXPERTS},
}
STRATEGIES = {**SHARDING, "fsdp2, checkpointing": Fsdp2Config(activation_checkpointing=ActivationCheckpointing.full)}
TUNINGS = {
    "full": FullConfig(),
    "lora": LoraConfig(rank=4),
    "lora on all parts": LoraConfig(rank=4, experts=True, router=True),
    "lora on all parts, nf4": LoraConfig(rank=4, experts=True, router=True),
    "lora on experts": LoraConfig(rank=3, experts=True, targets=[]),
}
WORDS = {"lora on all parts, nf4": {"quantisation": Quantisation.nf4}}
"""Further settings of the model."""
LOSSES = {"none": {}, "ahead": {"router_aux_loss": 0.3, "router_z_loss": 0.02}}
LOSSES["at once"] = LOSSES["ahead"]
"""Words for what routers add to the loss. Ahead: in a step of two micro-batches, so that choices are found before them."""
MICRO = {"none": 4, "ahead": 4, "at once": 8}
CASES = [(a, t, s, r) for a in ARCHITECTURES for t in TUNINGS for s in STRATEGIES for r in LOSSES]
DECIDED = 10.0
"""Factor on the routers' weights; more would make gradients grow with every layer, and roundings with them."""
CLEAR = 1e-3
"""How much fonder a router must be of the last expert it takes than of the next: below, a rounding might decide."""
SEEDS = 24


def made_of(job: Job, architecture: str, seed: int) -> Path:
    def made():
        path = model_dir(job.root / f"seed-{seed}", architecture, seed=seed, **ARCHITECTURES[architecture])
        file = path / "model.safetensors"
        if not (path / "decided").exists():
            tensors = load_file(file)
            for name in tensors:
                if name.endswith((".gate.weight", ".router.weight")):
                    tensors[name] = tensors[name] * DECIDED
            save_file(tensors, file, {"format": "pt"})
            (path / "decided").touch()
        return path

    return job.first_here(made)


def marks(case: tuple[str, str, str, str]) -> set[Hashable]:
    """Each value of each axis; each strategy with losses of routers; quantised experts where parameters are gathered."""
    found: set[Hashable] = set(enumerate(case))
    if LOSSES[case[3]]:
        found.add(("losses", case[2]))
    if case[1] in WORDS and case[2] in ("fsdp2", "zero3"):
        found.add(case[1:3])
    return found


def _config(job: Job, case: tuple[str, str, str, str], seed: int) -> RunConfig:
    architecture, tuning, strategy, losses = case
    chosen = STRATEGIES.get(strategy, strategy)
    config = run_config(made_of(job, architecture, seed), chosen, "lora", micro=MICRO[losses], steps=STEPS)
    return replace(
        config, tuning=TUNINGS[tuning], model=replace(config.model, **LOSSES[losses], **WORDS.get(tuning, {}))
    )


class _Watch:
    """Counts, by router, how many tokens each expert got, and the smallest gap between the last chosen and the next."""

    def __init__(self, trainer: Trainer) -> None:
        self.gap = float("inf")
        self.counts: dict[str, torch.Tensor] = {}
        for name, module in routers_by_name(trainer.engine.step_module).items():
            self.counts[name] = torch.zeros(EXPERTS, dtype=torch.int64)
            module.register_forward_hook(partial(self._see, name))

    def _see(self, name: str, router: Any, args: tuple[torch.Tensor], output: tuple[torch.Tensor, ...]) -> None:
        if not torch.is_grad_enabled():  # a look ahead
            return
        (chosen,) = (made for made in output if not made.is_floating_point())
        self.counts[name] += torch.bincount(chosen.reshape(-1), minlength=EXPERTS)
        ordered = output[0].detach().float().sort(dim=-1, descending=True).values  # of the logits
        self.gap = min(self.gap, float((ordered[:, chosen.shape[-1] - 1] - ordered[:, chosen.shape[-1]]).min()))


@contextmanager
def _reading() -> Iterator[list[int]]:
    """Bytes of each read of a checkpoint's tensors."""
    sizes: list[int] = []
    real = SafetensorsFiles.rows

    def noted(files: SafetensorsFiles, *args: Any) -> torch.Tensor:
        tensor = real(files, *args)
        sizes.append(tensor.nbytes)
        return tensor

    with mock.patch.object(SafetensorsFiles, "rows", noted):
        yield sizes


def _steps(trainer: Trainer, total: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """Loss, grad norm and the routers' losses of every step, and the tokens by expert that the run itself counts in it."""
    rows, counted = [], []
    for batch in trainer.loader.steps(trainer.progress.samples, FEWER):
        record = trainer.train_step(batch)
        sums = {name: float(total(value.double())) for name, value in sorted(record.local_sums.items())}
        rows.append([sums["loss"] / record.counts["loss"], float(record.result.grad_norm)])
        rows[-1] += [value for name, value in sums.items() if name.startswith("router/")]
        assert record.expert_tokens is not None
        counted.append(total(record.expert_tokens).tolist())
    return {"curve": rows, "counted": counted}


def _watched(job: Job, config: RunConfig) -> dict[str, Any]:
    with _reading() as sizes:
        trainer = job.lone_trainer(config)
    watch = _Watch(trainer)
    found = _steps(trainer, lambda value: value)
    counts, gap = {name: count.tolist() for name, count in watch.counts.items()}, watch.gap
    far = job.far(trainer, found["curve"], config)
    return {**found, "gap": gap, "counts": counts, "read": sum(sizes), "learned": far}


def decided(job: Job, architecture: str, tuning: str, losses: str) -> tuple[int, dict[str, Any]]:
    """The first seed of a model whose routers never waver, and what a lone process does with it."""

    def found():
        for seed in range(SEEDS):
            run = _watched(job, _config(job, (architecture, tuning, "single", losses), seed))
            if run["gap"] > CLEAR:
                break
        return seed, run

    return job.once(("experts", architecture, tuning, bool(LOSSES[losses])), found)


def lone(job: Job, architecture: str, tuning: str, losses: str) -> dict[str, Any]:
    """The lone process's curve, its narrowest choice, what its experts got, and how far it is from one that learns nothing."""
    return decided(job, architecture, tuning, losses)[1]


def curve(job: Job, *case: str) -> dict[str, Any]:
    """Loss and grad norm of every step, and how many tokens each expert got on all ranks together."""
    with released_at_once():
        seed, _ = decided(job, case[0], case[1], case[3])
        with _reading() as sizes:
            trainer = job.trainer(_config(job, case, seed))  # type: ignore[arg-type]
        watch = _Watch(trainer)
        found = _steps(trainer, sum_over_ranks)
        again = 2 if "checkpointing" in case[2] else 1  # blocks that are computed again ask their router again
        counts = {name: (sum_over_ranks(count) // again).tolist() for name, count in watch.counts.items()}
        return {**found, "counts": counts, "read": gather_objects(sum(sizes), job.runtime)}
