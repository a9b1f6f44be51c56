"""The oracle of the sweep: plain transformers in eager mode on each document apart, with the model's own loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.models.tiny import VOCABULARY
from trainer.data.store.sequences import Sample

COUNTS_IMAGE = frozenset({"git"})
"""`model_type`s whose own loss fails without an image: it drops as many first logits as an image has places."""
DOCUMENTS = 8
IGNORED = -100


def documents() -> list[Sample]:
    """Documents of 9 to 40 tokens, longer than every window, of which uneven shares are learned."""
    draw = np.random.default_rng(11)
    made = []
    for index in range(DOCUMENTS):
        length = 40 if index == 0 else int(draw.integers(9, 40))
        learned = draw.random(length) < (index % 3 + 1) / 3
        learned[0], learned[-1] = False, True
        made.append(Sample(draw.integers(20, VOCABULARY - 20, length).astype(np.int32), learned))
    return made


@dataclass(slots=True)
class Stock:
    """What plain transformers computes over all documents."""

    loss: float
    """Mean over the supervised tokens, without what the class adds for the size of its logits."""
    gradients: dict[str, Tensor] = field(repr=False)
    """By every name in the plain model; zero where a parameter has none. Of a shared one, what each place adds."""
    shared: dict[str, list[str]]
    """The names of the other places, by each name of a shared parameter."""
    gap: float
    """The smallest distance between the last value chosen and the first not chosen, relative to the larger of them."""
    notes: list[str] = field(default_factory=list)


class Choices(TorchFunctionMode):
    """Watches how clearly `topk` decides: routers, and attention that picks its keys."""

    def __init__(self) -> None:
        super().__init__()
        self.gap = float("inf")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, torch.Tensor.topk):
            self._look(*args, **kwargs)
        return func(*args, **kwargs)

    def _look(self, scores: Tensor, k: int, dim: int = -1, **_: Any) -> None:
        if scores.shape[dim] <= k:
            return
        best = scores.detach().float().topk(k + 1, dim=dim).values.movedim(dim, -1)
        chosen, passed = best[..., k - 1], best[..., k]
        real = passed > torch.finfo(torch.float32).min / 2  # what a mask forbids is not passed over
        if real.any():
            gaps = (chosen - passed) / torch.maximum(chosen.abs(), passed.abs()).clamp_min(1e-30)
            self.gap = min(self.gap, float(gaps[real].min()))


def stock_model(directory: Path) -> Any:
    """The model that plain transformers makes of a directory, in eager mode, fp32; every weight must be there."""
    import transformers

    options: dict[str, Any] = {"attn_implementation": "eager", "dtype": torch.float32, "output_loading_info": True}
    config = transformers.AutoConfig.from_pretrained(directory)
    # A language model that was saved out of a larger one is loaded by its own class.
    is_text_part = "text" in config.model_type and type(config) not in transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING
    auto: Any = getattr(transformers, config.architectures[0]) if is_text_part else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(directory, **options)
    whole = type(config) in transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING
    if info["missing_keys"] and whole:
        # the causal class finds none of the names that the whole model is stored under
        model, info = transformers.AutoModelForMultimodalLM.from_pretrained(directory, **options)
    assert not info["missing_keys"], f"plain transformers misses {sorted(info['missing_keys'])[:3]}"
    return model


def compute(directory: Path, samples: list[Sample], dtype: torch.dtype = torch.float32) -> Stock:
    """Loss and gradients in training mode, one document at a time."""
    model = stock_model(directory).train().to(dtype)
    if dtype is torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # grouped products know no float64
    still = still_row(model)
    shared = untie(model)
    count = sum(int(sample.supervised[1:].sum()) for sample in samples)
    tokens = sum(len(sample.input_ids) for sample in samples)
    total, notes = 0.0, set()
    with Choices() as choices:
        for sample in samples:
            summed, added, note = _summed_loss(model, sample)
            (summed / count + added * len(sample.input_ids) / tokens).backward()
            total += float(summed.detach())
            notes |= note
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach()
        for name, p in model.named_parameters(remove_duplicate=False)
    }
    if still is not None:
        name, row = still
        notes.add(f"row {row} of {name} is zero whenever it is loaded")
        for place in (name, *shared.get(name, ())):
            gradients[place][row] = 0
    return Stock(total / count, gradients, shared, choices.gap, sorted(notes))


def still_row(model: Any) -> tuple[str, int] | None:
    """(name, row) of the token embeddings that transformers has set to zero as it loaded: none is stored so."""
    embeddings = model.get_input_embeddings()
    row = getattr(embeddings, "padding_idx", None)
    if row is None or embeddings.weight[row].any():
        return None
    return next(name for name, p in model.named_parameters() if p is embeddings.weight), row


def untie(model: nn.Module) -> dict[str, list[str]]:
    """Give each place of a shared parameter its own copy; the names of the other places, by each name."""
    places: dict[int, dict[tuple[int, str], list[str]]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, own = name.rpartition(".")
        places.setdefault(id(parameter), {}).setdefault((id(modules[owner]), own), []).append(name)
    shared = {}
    for found in places.values():
        first = [names[0] for names in found.values()]
        for names in list(found.values())[1:]:
            owner, _, own = names[0].rpartition(".")
            setattr(modules[owner], own, nn.Parameter(getattr(modules[owner], own).detach().clone()))
        for names in found.values():
            shared |= {name: [other for other in first if other != names[0]] for name in names if len(first) > 1}
    return shared


def _summed_loss(model: Any, sample: Sample) -> tuple[Tensor, Tensor, set[str]]:
    """The model's own loss on one document times the tokens that it is the mean of, and what is added for its logits.

    Some classes compare each output with the label at its own position: they are given labels moved by one.
    """
    ids = torch.tensor(sample.input_ids.astype(np.int64))[None]
    labels = torch.where(torch.tensor(sample.supervised)[None], ids, IGNORED)
    labels[:, 0] = IGNORED
    moved = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
    count = int((labels != IGNORED).sum())
    if model.config.model_type in COUNTS_IMAGE:
        logits = model(input_ids=ids, use_cache=False).logits[0]
        note = "its own loss leaves out the places of an image"
        return F.cross_entropy(logits, moved[0], reduction="sum"), torch.zeros(()), {note}
    out = model(input_ids=ids, labels=labels, use_cache=False)
    weight = getattr(model.config, "z_loss_coefficient", None) or 0.0
    added = weight * out.logits.logsumexp(-1).square().mean() if weight else torch.zeros(())
    loss = out.loss - added
    logits = out.logits[:, -ids.shape[1] :].detach().float().transpose(1, 2)
    same, following = (float(F.cross_entropy(logits, target)) for target in (labels, moved))
    if abs(float(loss.detach()) - same) < abs(float(loss.detach()) - following):
        return model(input_ids=ids, labels=moved, use_cache=False).loss * count, added, {"does not move labels"}
    return loss * count, added, set()
