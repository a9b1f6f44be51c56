"""Converts the tensors of a checkpoint into those of a model and back, by transformers' own rules.

A checkpoint and a model of one architecture may differ: experts stored one by one are one 3-d parameter, heads are
renamed, projections joined or split, blocks of 8 or 4 bits stand for numbers. transformers keeps these rules as
renames and operations on tensors; this module alone applies them. If an operation keeps rows separate, a rank's rows
are made from the sources' rows. Any other operation is applied to one parameter's sources whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
from trainer.model.files import SafetensorsFiles

RECOMPUTED_NAME_REGEX = re.compile(r"(inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids|version)$")
"""Stored tensors that are no weights: every loader computes them anew."""
READABLE_QUANTISATIONS = ("fp8", "mxfp4")
"""Published kinds of quantised weights that are read (and trained on as the numbers they stand for)."""


ONLY_RENAMED = ""
"""The key in `ConversionGroup.sources` of a stored tensor that no pattern collected, since it is only renamed."""


@dataclass(slots=True)
class ConversionGroup:
    """Stored tensors that become one parameter, or several at once."""

    filed_under: str
    """The parameter under which transformers files the group."""
    converter: Any = None
    """transformers' own `WeightConverter`; None where a tensor is only renamed."""
    sources: dict[str, list[str]] = field(default_factory=dict)
    """Stored names by the pattern that collected them (or `ONLY_RENAMED`), in the order in which they are joined."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of what the group makes, by name in the model."""
    row_source: str = "whole"
    """What rows of the result are made of: `direct` the tensor's own rows, `list` as many of its tensors, `rows` the same
    rows of each source, `whole` everything."""

    @property
    def renamed_source(self) -> str:
        """The stored name of the one tensor of a group that is only renamed (its `converter` is None)."""
        (stored_name,) = self.sources[ONLY_RENAMED]
        return stored_name


def _unchanged(name: str) -> str:
    return name


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """Parameters of a model that become one stored tensor, or several at once."""

    members: list[str]
    """Names in the model."""
    name: str
    """The name that the stored tensor has if nothing but the name changes; else what transformers files the group under."""
    conversion: ConversionGroup | None = None
    """What makes the stored tensors of the members; None where nothing but the name changes."""
    stored_name: Callable[[str], str] = _unchanged
    """The name in the files of what the conversion makes."""


class _StoredPlace(NamedTuple):
    """What a parameter or buffer of the model becomes in the files."""

    key: str
    """Its stored name without the prefix of the files, if it is only renamed; else the key of the group that converts it."""
    pattern: str | None
    """The pattern of the conversion that takes it; None if it is only renamed."""


class Conversions:
    """The names and shapes of a model in terms of a checkpoint's files."""

    def __init__(self, plain: Any, files: SafetensorsFiles) -> None:
        """`plain`: the architecture as transformers builds it, on the meta device, not tuned and never changed after."""
        self.plain = plain
        self.files = files
        self.quantizer = dequantizer(plain.config, str(files.directory))
        self._rules, firsts, self.unused = self._group_stored_tensors(self.quantizer)
        """Of these rules some were used, which they note; `unused`: stored names without a place in the model."""
        self.groups: dict[str, ConversionGroup] = {}
        """By the name of each parameter and buffer that the files hold."""
        self._last_converted: tuple[str, dict[str, Tensor]] = ("", {})
        for group in firsts.values():
            self._plan_group(group)
            for name in group.shapes:
                self.groups.setdefault(name, group)

    # -- from the files ------------------------------------------------------------------------------------------

    def _group_stored_tensors(self, quantizer: Any) -> tuple[ConversionRules, dict[str, ConversionGroup], list[str]]:
        """Sort the stored tensors by what is made of them, as transformers' loader does: (rules, groups, the rest).

        A group holds the stored tensors that are converted together, by the first parameter made of them. The rest are names of
        stored tensors that the model has no parameter for.
        """
        rules = conversion_rules(self.plain, quantizer)
        converter_of = rules.converter_of()
        state = self.plain.state_dict()
        prefix = self.plain.base_model_prefix
        firsts: dict[str, ConversionGroup] = {}
        unused: list[str] = []
        for stored in in_loading_order(self.files.names()):
            name, pattern = rules.name_in_model(stored, state, prefix)
            if name not in state and stored in state:
                name, pattern = NO_RULES.name_in_model(stored, state, prefix)
            # `pattern`: that of the conversion; None if the tensor is taken as it is.
            if name not in state:
                unused.append(stored)
            elif pattern is not None:
                group = firsts.setdefault(name, ConversionGroup(name, converter_of[pattern]))
                group.sources.setdefault(pattern, []).append(stored)
            elif name not in firsts:
                firsts[name] = ConversionGroup(name, None, {ONLY_RENAMED: [stored]})
        return rules, firsts, unused

    def _plan_group(self, group: ConversionGroup) -> None:
        """Set `shapes` and `row_source` of a group: what it makes, and what has to be read for some rows of it.

        The conversion is run on meta tensors, so that nothing is read but shapes.
        """
        if group.converter is None:
            self._read_directly(group, self.files.shape(group.renamed_source))
            return
        meta_tensors = self._read_sources(group, self.files.on_meta)
        all_tensors = [tensor for tensors in meta_tensors.values() for tensor in tensors]
        dequantises = self.quantizer is not None and len(group.converter.operations) == 1
        if dequantises and len(all_tensors) == 1 and all_tensors[0].is_floating_point():
            # Stored in full precision among quantised ones.
            self._read_directly(group, tuple(all_tensors[0].shape))
            return
        converted = self._convert(group, meta_tensors)
        group.shapes = {name: tuple(tensor.shape) for name, tensor in converted.items()}
        if len(converted) == 1 and group.filed_under in converted:
            dimensions = converted[group.filed_under].dim()
            group.row_source = _rows_of(group.converter.operations, list(meta_tensors.values()), dimensions)

    @staticmethod
    def _read_directly(group: ConversionGroup, shape: tuple[int, ...]) -> None:
        group.shapes = {group.filed_under: shape}
        group.row_source = "direct"

    @staticmethod
    def _read_sources(group: ConversionGroup, read: Callable[[str], Tensor]) -> dict[str, list[Tensor]]:
        """The stored tensors of a group, by the pattern that collected them."""
        tensors = {}
        for pattern, names in group.sources.items():
            tensors[pattern] = [read(name) for name in names]
        return tensors

    def _convert(self, group: ConversionGroup, tensors: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """Convert a group's tensors by transformers' own converter. `tensors`: by the converter's patterns.

        Returns the parameters made of them, by name in the model. Raises ConfigError if the conversion fails.
        """
        # The converter itself holds what it is to convert, by pattern.
        for pattern, sources in tensors.items():
            group.converter.collected_tensors[pattern] = list(sources)
        try:
            converted = group.converter.convert(group.filed_under, model=self.plain, config=self.plain.config)
        except Exception as error:
            group.converter.collected_tensors.clear()  # else they would be part of the next call
            examples = ", ".join(names[0] for names in group.sources.values() if names)
            raise ConfigError(
                f"model.path={self.files.directory}: {group.filed_under} cannot be made of {examples} ...: "
                f"{str(error)[:300]}"
            ) from error
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in converted.items()}

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows `[first, last)` along dimension 0 of the model's parameter `name`, converted; reads only the rows if it can.

        By the group's `row_source`: `direct`, `list` and `rows` read no others; `whole` converts all, and keeps the last group.
        """
        group = self.groups[name]
        if group.row_source == "direct":
            return self.files.rows(_only_source(group), first, last)
        if group.row_source == "list":  # a row of the parameter is a tensor of the files
            sources = {}
            for pattern, names in group.sources.items():
                sources[pattern] = [self.files.rows(stored) for stored in names[first:last]]
            return self._convert(group, sources)[name]
        if group.row_source == "rows":
            sources = self._read_sources(group, lambda stored: self.files.rows(stored, first, last))
            return self._convert(group, sources)[name]
        if self._last_converted[0] != group.filed_under:
            self._last_converted = ("", {})  # free the group before: two at once would take twice the memory
            self._last_converted = group.filed_under, self._convert(group, self._read_sources(group, self.files.rows))
        _, converted = self._last_converted
        return converted[name][first:last]

    def read_slice(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` of a flattened parameter."""
        group = self.groups[name]
        if group.row_source == "direct":
            return self.files.read_slice(_only_source(group), start, stop)
        row_size = math.prod(group.shapes[name][1:])
        first, last = start // row_size, -(-stop // row_size)
        rows = self.rows(name, first, last).reshape(-1)
        return rows[start - first * row_size : stop - first * row_size]

    def close(self) -> None:
        """Close the files, and free the group that was converted last."""
        self._last_converted = ("", {})
        self.files.close()

    # -- and back ------------------------------------------------------------------------------------------------

    def stored_groups(self, names: Iterable[str]) -> list[StoredGroup]:
        """The groups in which parameters and buffers become stored tensors again, in the order in which they are complete.

        A tensor that is only renamed is a group of its own. Tensors that are converted together are a group once all of them have
        come; a group that lacks one is left out. `names`: of the model, in the order in which their values come. Reads no values.
        Only transforms that were used on the way in are taken back.
        """
        rules = self._rules
        if self.quantizer is not None:  # an export is stored in full precision: by the rules without a quantisation
            rules, _, _ = self._group_stored_tensors(None)
        reverse_rules = rules.reversed()
        converter_by_pattern = reverse_rules.converter_of()
        place_by_name = self._stored_places(reverse_rules)
        members_by_key: dict[str, set[str]] = {}
        for name, place in place_by_name.items():
            if place.pattern is not None:
                members_by_key.setdefault(place.key, set()).add(name)
        prefix = self._stored_prefix(place_by_name)

        def stored_name(converted_name: str) -> str:
            return prefix + reverse_rules.renamed(converted_name)

        groups: list[StoredGroup] = []
        arrived_by_key: dict[str, set[str]] = {}  # the members of incomplete groups that have come so far
        for name in names:
            key, pattern = place_by_name.get(name, _StoredPlace(name, pattern=None))
            if pattern is None:
                groups.append(StoredGroup([name], prefix + key))
                continue
            arrived = arrived_by_key.setdefault(key, set())
            arrived.add(name)
            is_complete = not arrived < members_by_key[key]
            if not is_complete:
                continue
            # Converters join tensors by position, in the loader's order.
            members = in_loading_order(arrived_by_key.pop(key))
            conversion = ConversionGroup(key, converter_by_pattern[pattern])
            for member in members:
                conversion.sources.setdefault(str(place_by_name[member].pattern), []).append(member)
            groups.append(StoredGroup(members, key, conversion, stored_name))
        return groups

    def _stored_places(self, reverse_rules: ConversionRules) -> dict[str, _StoredPlace]:
        """What each parameter and buffer becomes in the files by the reversed rules, by its name in the model."""
        place_by_name = {}
        for name in in_loading_order(self.plain.state_dict()):
            key, pattern = reverse_rules.converted_name(name)
            if pattern is None:
                key = reverse_rules.renamed(name)
            place_by_name[name] = _StoredPlace(key, pattern)
        return place_by_name

    def convert_back(self, group: StoredGroup, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The stored tensors of a group by stored name, in the order in which they are written.

        `tensors`: the group's members by name in the model. Full precision, if the files were quantised.
        """
        if group.conversion is None:
            (member,) = group.members
            return {group.name: tensors[member]}
        sources = self._read_sources(group.conversion, tensors.__getitem__)
        converted = self._convert(group.conversion, sources)
        return {group.stored_name(name): tensor for name, tensor in converted.items()}

    def _stored_prefix(self, place_by_name: dict[str, _StoredPlace]) -> str:
        """What the files' names begin with if the model is a part of theirs: `language_model.` of Llama 4; else empty.

        Found by tensors that are only renamed: what stands before the name that the rules give them. Empty if they disagree.
        """
        prefixes = set()
        for name, place in place_by_name.items():
            group = self.groups.get(name)
            if group is None or group.converter is not None:
                continue
            stored_name = group.renamed_source
            has_prefix = stored_name.endswith(f".{place.key}")
            prefixes.add(stored_name.removesuffix(place.key) if has_prefix else "")
        return prefixes.pop() if len(prefixes) == 1 else ""

    def carried(self) -> list[str]:
        """Stored weights that the architecture ignores on purpose (`mtp.*`), and that a whole export keeps untouched."""
        if self.quantizer is not None:  # their neighbours' scales would be read without a quantisation to go by
            return []
        ignored = [re.compile(pattern) for pattern in ignored_in_checkpoints(self.plain)]
        return [stored for stored in self.left_out() if any(pattern.search(stored) for pattern in ignored)]

    def left_out(self) -> list[str]:
        """Stored weights that do not take part in training."""
        return [stored for stored in self.unused if not RECOMPUTED_NAME_REGEX.search(stored)]


def _rows_of(operations: list[Any], sources: list[list[Tensor]], dimensions: int) -> str:
    """How rows of a parameter can be made from stored tensors, which decides how much has to be read for some rows:

    - `list`: the tensors are stacked along the rows: as many tensors as rows.
    - `rows`: the conversion leaves rows as they are: the same rows of each tensor.
    - `whole`: else, everything.

    `operations`: transformers' conversion, in order. `sources`: the stored tensors, on meta. `dimensions`: of the parameter.
    """
    operations = list(operations)
    if type(operations[0]).__name__ == "Fp8Dequantize":  # works tensor by tensor
        if not any(stacking_dimension(operation) is not None for operation in operations):
            return "whole"
        operations = operations[1:]
    stacks_rows = bool(operations) and stacking_dimension(operations[0]) == 0
    if stacks_rows:
        operations = operations[1:]
    if not all(keeps_rows_apart(operation, dimensions) for operation in operations):
        return "whole"
    if stacks_rows:
        return "list"
    if all(len(tensors) == 1 and tensors[0].dim() == dimensions for tensors in sources):
        return "rows"
    return "whole"


def _only_source(group: ConversionGroup) -> str:
    """The first stored name of a group, which is read directly."""
    return next(iter(group.sources.values()))[0]


def dequantizer(config: Any, path: str) -> Any:
    """transformers' quantizer that turns a quantised checkpoint into plain numbers as it is read; None if it is not quantised.

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
    if kind not in READABLE_QUANTISATIONS:
        raise ConfigError(
            f"model.path={path}: its weights are stored as {kind}; {' and '.join(READABLE_QUANTISATIONS)} "
            "checkpoints are read as the numbers "
            "they stand for, others are not: take the model's unquantised checkpoint (with model.quantisation=nf4 for QLoRA)"
        )
    settings.dequantize = True
    return reading_quantizer(settings)
