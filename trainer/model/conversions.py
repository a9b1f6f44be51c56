"""Converts the tensors of a checkpoint into those of a model and back, by transformers' own rules.

A checkpoint and a model of one architecture may differ: experts stored one by one are one 3-d parameter, heads are
renamed, projections joined or split, blocks of 8 or 4 bits stand for numbers. transformers keeps these rules as
renames and operations on tensors; this module alone applies them. If an operation keeps rows separate, a rank's rows
are made from the sources' rows. Any other operation is applied to one parameter's sources whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from strategies.errors import ConfigError
from trainer.model.compat import (
    NO_RULES,
    ConversionRules,
    conversion_rules,
    ignored_in_checkpoints,
    in_loading_order,
    keeps_rows_apart,
    quantisation_settings,
    reading_quantizer,
    stacking_dimension,
)
from trainer.model.files import Files

RECOMPUTED = re.compile(r"(inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids|version)$")
"""Stored tensors that are no weights: every loader computes them anew."""
READABLE = ("fp8", "mxfp4")
"""Published kinds of quantised weights that are read (and trained on as the numbers they stand for)."""


@dataclass(slots=True)
class ConversionGroup:
    """Stored tensors that become one parameter, or several at once."""

    first: str
    """The parameter under which transformers files the group."""
    converter: Any = None
    """transformers' own `WeightConverter`; None where a tensor is only renamed."""
    sources: dict[str, list[str]] = field(default_factory=dict)
    """Stored names by the pattern that collected them, in the order in which they are joined."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of what the group makes, by name in the model."""
    rows: str = "whole"
    """What rows of the result are made of: `direct` the tensor's own rows, `list` as many of its tensors, `rows` the same
    rows of each source, `whole` everything."""


class Conversions:
    """The names and shapes of a model in terms of a checkpoint's files."""

    def __init__(self, plain: Any, files: Files) -> None:
        """`plain`: the architecture as transformers builds it, on the meta device, not tuned and never changed after."""
        self.plain, self.files = plain, files
        self.quantizer = dequantizer(plain.config, str(files.directory))
        self._rules, firsts, self.unused = self._places(self.quantizer)
        """Of these rules some were used, which they note; `unused`: stored names without a place in the model."""
        self.groups: dict[str, ConversionGroup] = {}
        """By the name of each parameter and buffer that the files hold."""
        self._last: tuple[str, dict[str, Tensor]] = ("", {})
        for group in firsts.values():
            self._settle(group)
            for name in group.shapes:
                self.groups.setdefault(name, group)

    # -- from the files ------------------------------------------------------------------------------------------

    def _places(self, quantizer: Any) -> tuple[ConversionRules, dict[str, ConversionGroup], list[str]]:
        """Every stored tensor's place, as transformers' loader finds it: (rules, groups by first name, the rest)."""
        rules = conversion_rules(self.plain, quantizer)
        converter_of = rules.converter_of()
        state, prefix = self.plain.state_dict(), self.plain.base_model_prefix
        firsts: dict[str, ConversionGroup] = {}
        unused: list[str] = []
        for stored in in_loading_order(self.files.names()):
            name, pattern = rules.name_in_model(stored, state, prefix)
            if name not in state and stored in state:
                name, pattern = NO_RULES.name_in_model(stored, state, prefix)
            if name not in state:
                unused.append(stored)
            elif pattern is not None:
                group = firsts.setdefault(name, ConversionGroup(name, converter_of[pattern]))
                group.sources.setdefault(pattern, []).append(stored)
            elif name not in firsts:
                firsts[name] = ConversionGroup(name, None, {"": [stored]})
        return rules, firsts, unused

    def _settle(self, group: ConversionGroup) -> None:
        """Find out what a group makes and how its rows can be read."""
        if group.converter is None:
            group.shapes, group.rows = {group.first: self.files.shape(group.sources[""][0])}, "direct"
            return
        meta = {p: [self.files.on_meta(s) for s in stored] for p, stored in group.sources.items()}
        alone = [t for tensors in meta.values() for t in tensors]
        dequantises = self.quantizer is not None and len(group.converter.operations) == 1
        if dequantises and len(alone) == 1 and alone[0].is_floating_point():  # stored as it is among quantised ones
            group.shapes, group.rows = {group.first: tuple(alone[0].shape)}, "direct"
            return
        made = self._convert(group, meta)
        group.shapes = {name: tuple(t.shape) for name, t in made.items()}
        if len(made) == 1 and group.first in made:
            group.rows = _rows_of(group.converter.operations, [list(m) for m in meta.values()], made[group.first].dim())

    def _convert(self, group: ConversionGroup, tensors: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """transformers' own conversion of a group's tensors, by pattern; results by name in the model."""
        for pattern, found in tensors.items():
            group.converter.collected_tensors[pattern] = list(found)
        try:
            made = group.converter.convert(group.first, model=self.plain, config=self.plain.config)
        except Exception as error:
            group.converter.collected_tensors.clear()
            stored = ", ".join(name for names in group.sources.values() for name in names[:1])
            raise ConfigError(
                f"model.path={self.files.directory}: {group.first} cannot be made of {stored} ...: {str(error)[:300]}"
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows `[first, last)` along dimension 0 of a parameter."""
        group, read = self.groups[name], self.files.rows
        if group.rows == "direct":
            return read(next(iter(group.sources.values()))[0], first, last)
        if group.rows == "list":
            some = {p: [read(s) for s in stored[first:last]] for p, stored in group.sources.items()}
            return self._convert(group, some)[name]
        if group.rows == "rows":
            some = {p: [read(s, first, last) for s in stored] for p, stored in group.sources.items()}
            return self._convert(group, some)[name]
        if self._last[0] != group.first:
            self._last = ("", {})  # not two groups at once
            whole = {p: [read(s) for s in stored] for p, stored in group.sources.items()}
            self._last = group.first, self._convert(group, whole)
        return self._last[1][name][first:last]

    def run(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` of a flattened parameter."""
        group = self.groups[name]
        if group.rows == "direct":
            return self.files.run(next(iter(group.sources.values()))[0], start, stop)
        row = math.prod(group.shapes[name][1:])
        first, last = start // row, -(-stop // row)
        return self.rows(name, first, last).reshape(-1)[start - first * row : stop - first * row]

    def close(self) -> None:
        """Let go of files and of what was made last."""
        self._last = ("", {})
        self.files.close()

    # -- and back ------------------------------------------------------------------------------------------------

    def stored_again(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Parameters under the names and in the shapes that the files have, full precision where those were quantised.

        A group is held until it is whole. Only transforms that were used on the way in are taken back.
        """
        rules = self._rules if self.quantizer is None else self._places(None)[0]
        back = rules.reversed()
        converter_of = back.converter_of()
        places: dict[str, tuple[str, str | None]] = {}
        waiting: dict[str, set[str]] = {}
        for name in in_loading_order(self.plain.state_dict()):
            key, pattern = back.converted_name(name)
            if pattern is None:
                key = back.renamed(name)
            else:
                waiting.setdefault(key, set()).add(name)
            places[name] = key, pattern
        held: dict[str, dict[str, Tensor]] = {}
        part = self._part(places)
        for name, tensor in tensors:
            key, pattern = places.get(name, (name, None))
            if pattern is None:
                yield part + key, tensor
                continue
            held.setdefault(key, {})[name] = tensor
            if held[key].keys() < waiting[key]:
                continue
            group = ConversionGroup(key, converter_of[pattern])
            members = held.pop(key)
            collected: dict[str, list[Tensor]] = {}
            for member in in_loading_order(members):
                collected.setdefault(str(places[member][1]), []).append(members[member])
            for stored, value in self._convert(group, collected).items():
                yield part + back.renamed(stored), value

    def _part(self, places: dict[str, tuple[str, str | None]]) -> str:
        """What the files' names begin with where the model is a part of theirs: `language_model.` of Llama 4; else empty."""
        begun = set()
        for name, (key, _) in places.items():
            group = self.groups.get(name)
            if group is not None and group.converter is None:
                stored = group.sources[""][0]
                begun.add(stored.removesuffix(key) if stored.endswith(f".{key}") else "")
        return begun.pop() if len(begun) == 1 else ""

    def carried(self) -> list[str]:
        """Stored weights that the architecture ignores on purpose (`mtp.*`), and that a whole export keeps untouched."""
        if self.quantizer is not None:  # their neighbours' scales would be read without a quantisation to go by
            return []
        ignored = [re.compile(p) for p in ignored_in_checkpoints(self.plain)]
        return [s for s in self.left_out() if any(p.search(s) for p in ignored)]

    def left_out(self) -> list[str]:
        """Stored weights that do not take part in training."""
        return [stored for stored in self.unused if not RECOMPUTED.search(stored)]


def _rows_of(operations: list[Any], sources: list[list[Tensor]], dimensions: int) -> str:
    """How rows of a result can be made: see `ConversionGroup.rows`."""
    operations = list(operations)
    if type(operations[0]).__name__ == "Fp8Dequantize":  # tensor by tensor
        if not any(stacking_dimension(operation) is not None for operation in operations):
            return "whole"
        operations = operations[1:]
    merged = bool(operations) and stacking_dimension(operations[0]) == 0
    after_stacking = operations[1:] if merged else operations
    if not all(keeps_rows_apart(operation, dimensions) for operation in after_stacking):
        return "whole"
    if merged:
        return "list"
    return "rows" if all(len(tensors) == 1 and tensors[0].dim() == dimensions for tensors in sources) else "whole"


def dequantizer(config: Any, path: str) -> Any:
    """transformers' quantizer that turns a published checkpoint's blocks into numbers; None where it holds numbers.

    Raises ConfigError for kinds that cannot be trained on as numbers.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    try:
        settings = quantisation_settings(dict(settings)) if isinstance(settings, dict) else settings
    except Exception as error:  # an unknown method, or fields that a known one lacks
        raise ConfigError(
            f"model.path={path}: the quantization_config of its config.json cannot be read "
            f"({' '.join(str(error).split())[:160]}); take the model's unquantised checkpoint"
        ) from error
    if not hasattr(settings, "quant_method"):
        raise ConfigError(
            f"model.path={path}: config.json has quantization_config={settings!r:.80}, which names no method; mend it there"
        )
    kind = str(getattr(settings.quant_method, "value", settings.quant_method))
    if kind not in READABLE:
        raise ConfigError(
            f"model.path={path}: its weights are stored as {kind}; {' and '.join(READABLE)} checkpoints are read as the numbers "
            "they stand for, others are not: take the model's unquantised checkpoint (with model.quantisation=nf4 for QLoRA)"
        )
    settings.dequantize = True
    return reading_quantizer(settings)
