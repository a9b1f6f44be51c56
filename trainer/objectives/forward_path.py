"""The way of a batch through a causal model to the loss, and the proof that it is right for this architecture.

Fast ways exist that not every architecture allows: documents one after another in a row without padding, and the loss
computed by the head itself, a chunk of rows at a time. Whether a model allows them is proven, not tabled. On a small
random copy of its own configuration, with every kind of layer and documents longer than its windows, our way on
documents together must give the loss and the gradients of the stock model, in eager attention, on each document
alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strategies.cache_dir import cache_directory
from strategies.hardware import gpu_of
from trainer.data.batches.collate import Collator, to_device
from trainer.data.config import Layout
from trainer.data.store.sequences import Sample
from trainer.losses.fuse import fuse_head
from trainer.model.architecture import auto_class, set_dropout, text_settings
from trainer.model.compat import without_kernel_packages
from trainer.model.config import ModelKind
from trainer.model.kernels import kernel_versions
from trainer.model.shrink import VOCABULARY, NotShrinkable, lost_kinds, small_copies
from trainer.objectives.causal import WAYS, CausalWay, plain_model, summed_loss

TOLERANCE = 1e-5
"""Largest difference of losses, and of gradients by their norm, relative; computed in float64 where the model can."""
MOST_ROUNDING = 1e-4
"""Largest difference of gradients that may be rounding, where the stock model's own in float32 are as far from those in float64:
some models (xLSTM) compute parts in float32 whatever they are told, and magnify what is rounded there."""
HALF = 0.1
"""The same for kernels that exist in half precision only: masks that are ignored change gradients by half and more."""
MOST_ELEMENTS = 20_000_000
"""Elements of a small copy at most: beyond them its configuration has sizes that are not known by name."""
EDITION = 5
"""Goes up when what is proven, or how, changes: older findings are then not taken."""


@dataclass(frozen=True, slots=True)
class Passage:
    """What was found out about an architecture in an attention."""

    padding_free: CausalWay | None = None
    """The way that is right for documents one after another in one row; None: not proven."""
    padded: CausalWay | None = None
    """The way that is right for one document a row; None: not proven."""
    stock: str = "sdpa"
    """The attention in which one document a row is right."""
    causal: bool = True
    """Whether no token sees what follows it."""
    random: bool = False
    """Whether training draws something at random, as some routers draw experts."""
    tried: bool = True
    """Whether a small copy could be made and run at all; of what could not, nothing is known."""
    reason: str = ""
    """Why something is not proven."""

    def of(self, layout: Layout) -> CausalWay | None:
        """The way in a layout."""
        return self.padding_free if layout is Layout.padding_free else self.padded


def passage_of(config: Any, build: Callable[[], nn.Module], attention: str, *, on_gpu: bool) -> Passage:
    """What is proven of an architecture, from this host's cache or found out now, in about a second.

    `config`: transformers' configuration; `build` makes its model on meta; `attention`: the kernel for documents in one row.
    """
    settings = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    # Hosts with other cards may share the cache, and packages come and go.
    where = [repr(gpu_of(torch.device("cuda"))), kernel_versions()] if on_gpu else False
    known = {"config": settings, "attention": attention, "gpu": where, "edition": EDITION}
    known |= {name: version(name) for name in ("torch", "transformers")}
    key = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:32]
    file = cache_directory() / "proofs" / f"{key}.json"
    try:
        return _read(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        found = _prove(config, build, attention, on_gpu=on_gpu)
    if not found.tried:  # for a reason that may pass
        return found
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f"{file.name}.{os.getpid()}")
        aside.write_text(json.dumps(asdict(found)), encoding="utf-8")
        aside.replace(file)
    except OSError:  # it is only found out again
        pass
    return found


def _read(stored: dict[str, Any]) -> Passage:
    ways = {key: None if stored[key] is None else CausalWay(**stored[key]) for key in ("padding_free", "padded")}
    return Passage(**stored | ways)


def _prove(config: Any, build: Callable[[], nn.Module], attention: str, *, on_gpu: bool) -> Passage:
    state = torch.random.get_rng_state(), torch.get_default_dtype()
    try:
        torch.default_generator.manual_seed(0)  # of the CPU alone: a GPU's is not ours to change
        return _proof_of(config, build()).passage(attention, on_gpu=on_gpu)
    except NotShrinkable as error:
        return Passage(tried=False, reason=str(error))
    except Exception as error:  # noqa: BLE001 - an architecture may fail in any way; what it cannot do is not proven
        return Passage(tried=False, reason=f"its small copy fails: {_said(error)}")
    finally:
        torch.random.set_rng_state(state[0])
        torch.set_default_dtype(state[1])


def _proof_of(config: Any, plain: Any) -> _Proof:
    """The proof of the first small copy that can be run. Raises what the first of them met, where none can."""
    first: Exception | None = None
    with without_kernel_packages():
        for small in small_copies(config, plain):
            for dtype in (torch.float64, torch.float32):  # of some the code fixes a type
                try:
                    return _Proof(config, plain, small, dtype)
                except NotShrinkable as error:
                    first = first or error
                    break
                except Exception as error:  # noqa: BLE001 - an architecture may fail in any way
                    first = first or error
    raise first or NotShrinkable("it has no settings to make smaller")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:120]}"


class _Proof:
    """The stock model, small and random, and what it says of some documents."""

    def __init__(self, config: Any, plain: Any, small: Any, dtype: torch.dtype) -> None:
        """`small`: a small copy of `config`, of which `plain` is the model on meta."""
        self.dtype = dtype
        self.auto = auto_class(ModelKind.causal, config)
        self.config = small
        set_dropout(self.config, 0.0)
        self.vocabulary = min(text_settings(self.config).vocab_size, VOCABULARY)
        self._check(config, plain)
        stock = self._build("eager", dtype)
        with torch.no_grad():
            for parameter in stock.parameters():  # nothing may be without effect, as biases of zero are
                parameter.add_(torch.randn_like(parameter) * 0.02)
        generator = np.random.default_rng(0)
        self.documents = [
            Sample(generator.integers(4, self.vocabulary, length).astype(np.int32), generator.random(length) < 0.7)
            for length in (5, 23, 14)
        ]
        self.weights = {name: value.clone() for name, value in stock.state_dict().items()}
        self.causal = self._is_causal(stock.eval())
        self.random = self._is_random(stock)
        self.loss, self.gradients = self._expected(stock.eval())
        self._rounding: float | None = None

    def _build(self, attention: str, dtype: torch.dtype) -> Any:
        options = {"attn_implementation": attention, "experts_implementation": "eager", "dtype": dtype}
        return self.auto.from_config(copy.deepcopy(self.config), **options)

    def _check(self, config: Any, plain: Any) -> None:
        """Raise NotShrinkable for a copy that is not small, or has not every kind of layer."""
        with torch.device("meta"):
            small = self._build("eager", torch.float32)
        size = sum(p.numel() for p in small.parameters())
        if size > MOST_ELEMENTS:
            raise NotShrinkable(f"a small copy would have {size:,} elements")
        if lost := lost_kinds(config, plain, self.config, small):
            raise NotShrinkable(f"a small copy lacks {lost} of its kinds of layers")

    def _is_causal(self, stock: Any) -> bool:
        ids = torch.from_numpy(self.documents[1].input_ids.astype(np.int64))[None]
        other = ids.clone()
        other[0, -1] = (other[0, -1] - 3) % (self.vocabulary - 4) + 4
        with torch.no_grad():
            one, two = (stock(input_ids=x, use_cache=False).logits[0, :-1] for x in (ids, other))
        if not one.isfinite().all():
            raise NotShrinkable("a small copy with random weights computes what is no number")
        return bool(torch.allclose(one, two, rtol=TOLERANCE, atol=TOLERANCE))

    def _is_random(self, stock: Any) -> bool:
        ids = torch.from_numpy(self.documents[1].input_ids.astype(np.int64))[None]
        with torch.no_grad():
            evaluated = stock(input_ids=ids, use_cache=False).logits
            stock.train()
            drawn = [stock(input_ids=ids, use_cache=False).logits for _ in range(2)]
        return any(not torch.allclose(logits, evaluated, rtol=TOLERANCE, atol=TOLERANCE) for logits in drawn)

    def _expected(self, stock: Any) -> tuple[Tensor, dict[str, Tensor]]:
        total = torch.zeros((), dtype=torch.float64)
        for document in self.documents:
            ids = torch.from_numpy(document.input_ids.astype(np.int64))
            targets = torch.where(torch.from_numpy(document.supervised[1:]), ids[1:], -100)
            logits = stock(input_ids=ids[None], use_cache=False).logits[0, :-1]
            total = total + F.cross_entropy(logits.double(), targets, reduction="sum")
        total.backward()
        return total.detach(), _gradients(stock)

    def passage(self, attention: str, *, on_gpu: bool) -> Passage:
        """What is right, by trial."""
        free, reason = self._first(Layout.padding_free, attention, on_gpu=on_gpu)
        for stock in ("sdpa", "eager"):
            padded, why = self._first(Layout.padded, stock, on_gpu=False)
            if padded is not None:
                break
        reason = reason or why
        return Passage(free, padded, stock=stock, causal=self.causal, random=self.random, reason=reason)

    def _first(self, layout: Layout, attention: str, *, on_gpu: bool) -> tuple[CausalWay | None, str]:
        """The fastest way that is right, or why the first of them is not."""
        reasons = []
        for way in WAYS if layout is Layout.padded else [w for w in WAYS if w.positions]:
            for dtype in (torch.bfloat16,) if on_gpu else (self.dtype, torch.float32):
                try:
                    reason = self._difference(layout, way, attention, dtype)
                except torch.OutOfMemoryError:  # of a GPU that others fill: that may pass
                    raise
                except Exception as error:  # noqa: BLE001 - as above
                    reason = _said(error)
                if not reason:
                    return way, ""
                reasons.append(reason)
        return None, reasons[0]

    def _difference(self, layout: Layout, way: CausalWay, attention: str, dtype: torch.dtype) -> str:
        """How our way differs from the stock model; empty where it does not."""
        if dtype is not torch.bfloat16:
            with without_kernel_packages():
                return self._found(layout, way, attention, dtype)
        return self._found(layout, way, attention, dtype)

    def _found(self, layout: Layout, way: CausalWay, attention: str, dtype: torch.dtype) -> str:
        half = dtype is torch.bfloat16
        tolerance = HALF if half else TOLERANCE
        model = self._build(attention, dtype)
        model.load_state_dict(self.weights)
        model.way = way
        if way.fused:
            fuse_head(model, self.config)
        model.train(not self.random)
        if half:
            model = model.to("cuda")
        loss = torch.zeros((), dtype=torch.float64)
        for documents in ([d] for d in self.documents) if way.alone else [self.documents]:
            batch = Collator(layout, 0)(documents)
            summed, _ = summed_loss(model, to_device(batch, torch.device("cuda")) if half else batch)
            summed.backward()
            loss = loss + summed.detach().cpu()
        off = abs(float(loss) - float(self.loss)) / float(self.loss)
        if not off <= tolerance:
            return f"the loss differs by {off:.1e} from that of the documents in separate rows"
        off = self._apart(_gradients(plain_model(model)))
        if off <= tolerance or (off <= MOST_ROUNDING and off <= self._own_rounding()):
            return ""
        return f"gradients differ by {off:.1e} from those of the documents in separate rows"

    def _apart(self, found: dict[str, Tensor]) -> float:
        """How far gradients are from the stock model's, by the norm of all."""
        norm = torch.stack([g.norm() for g in self.gradients.values()]).norm()
        apart = [(found[n].double().cpu() - g).norm() if n in found else g.norm() for n, g in self.gradients.items()]
        return float(torch.stack(apart).norm() / norm)

    def _own_rounding(self) -> float:
        """How far the stock model's own gradients in float32 are from those in float64; 0 where it knows no float64."""
        if self._rounding is None:
            self._rounding = 0.0
            if self.dtype is torch.float64:
                stock = self._build("eager", torch.float32)
                stock.load_state_dict(self.weights)
                self._rounding = self._apart(self._expected(stock.eval())[1])
        return self._rounding


def fails_on_tokens(plain: Any) -> str:
    """What a model (on meta) itself says against tokens and nothing else, as one that reads another's states; or empty.

    What comes of having no values is no answer.
    """
    try:
        plain.train()(input_ids=torch.zeros(1, 23, dtype=torch.int64, device="meta"), use_cache=False)
    except (ValueError, TypeError) as error:
        return _said(error).rstrip(".")
    except Exception:  # noqa: BLE001 - a model may look at values in any way
        return ""
    return ""


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
