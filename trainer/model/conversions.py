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
from enum import StrEnum
from typing import Any, NamedTuple

from torch import Tensor

from strategies.errors import ConfigError
from trainer.model.compat import (
    NO_RULES,
    ConversionRules,
    conversion_rules,
    dequantizing_quantizer,
    ignored_in_checkpoints,
    in_loading_order,
    keeps_rows_apart,
    quantisation_settings,
    stacking_dimension,
)
from trainer.model.files import SafetensorsFiles

RECOMPUTED_NAME_REGEX = re.compile(r"(inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids|version)$")
"""Stored tensors that are no weights: every loader computes them anew."""
READABLE_QUANTISATIONS = ("fp8", "mxfp4")
"""Published kinds of quantised weights that are read (and trained on as the numbers they stand for)."""


ONLY_RENAMED = ""
"""The key in `ConversionGroup.source_names` of a tensor that no pattern collected, since it is only renamed."""


class RowSource(StrEnum):
    """What must be read for some rows (along dimension 0) of a parameter that is made of stored tensors."""

    own_rows = "own_rows"
    """The same rows of the one stored tensor, which needs no conversion."""
    one_tensor_a_row = "one_tensor_a_row"
    """A stored tensor for each row: experts that are stored one by one, and stacked in the model."""
    same_rows_of_each = "same_rows_of_each"
    """The same rows of each stored tensor: halves of a matrix that are joined along its columns."""
    everything = "everything"
    """All stored tensors, since the conversion may mix rows."""


@dataclass(slots=True)
class ConversionGroup:
    """Tensors that become one other tensor, or several at once: stored ones that become parameters, or the way back.

    Such as `...experts.0.w1.weight`, `...experts.1.w1.weight`, ..., which become `...experts.gate_up_proj`.
    """

    first_result_name: str
    """The first tensor that the group makes, by which transformers knows the group."""
    converter: Any = None
    """transformers' own `WeightConverter`; None where a tensor is only renamed."""
    source_names: dict[str, list[str]] = field(default_factory=dict)
    """Tensors that the group takes, by the converter's pattern for their names (or `ONLY_RENAMED`), in the order in which they
    are joined."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of what the group makes, by name in the model."""
    row_source: RowSource = RowSource.everything

    @property
    def renamed_source(self) -> str:
        """The stored name of the one tensor of a group that is only renamed (its `converter` is None)."""
        (stored_name,) = self.source_names[ONLY_RENAMED]
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
    """Makes the stored tensors (its results) of the members (its sources); None where nothing but the name changes."""
    stored_name: Callable[[str], str] = _unchanged
    """The name in the files of what the conversion makes."""


class _StoredTarget(NamedTuple):
    """What a parameter or buffer of the model becomes in the files, by the rules for the way back."""

    first_stored_name: str
    """Its stored name without the prefix of the files, if it is only renamed; else the first tensor that its group makes."""
    pattern: str | None
    """The pattern of the conversion that takes it; None if it is only renamed."""


class _GroupedTensors(NamedTuple):
    """The stored tensors of a checkpoint, sorted by what is made of them."""

    rules: ConversionRules
    """transformers' rules, which have noted which of them were used."""
    group_by_first_result: dict[str, ConversionGroup]
    unused_names: list[str]
    """Stored tensors that the model has no parameter for."""


class Conversions:
    """Translates between a model's parameters and the tensors in a checkpoint's files: names, shapes and values, both ways."""

    def __init__(self, meta_model: Any, files: SafetensorsFiles) -> None:
        """Sort the stored tensors by the parameters that they become.

        `meta_model`: the model as transformers builds it, on the meta device, not tuned and never changed after. Reads only
        headers of files.
        """
        self.meta_model = meta_model
        self.files = files
        self.quantizer = dequantizer(meta_model.config, str(files.directory))
        self._rules, group_by_first_result, self.unused = self._group_stored_tensors(self.quantizer)
        self.groups: dict[str, ConversionGroup] = {}
        """By the name of each parameter and buffer that the files hold."""
        self._last_converted: tuple[str, dict[str, Tensor]] = ("", {})
        """(first result of a group, all its results by name): of the last group that was converted as a whole."""
        for group in group_by_first_result.values():
            self._set_shapes_and_row_source(group)
            for name in group.shapes:
                self.groups.setdefault(name, group)

    # -- from the files ------------------------------------------------------------------------------------------

    def _group_stored_tensors(self, quantizer: Any) -> _GroupedTensors:
        """Sort the tensors of the checkpoint's files by the parameter that is made of them, as transformers' loader does.

        A tensor that is only renamed is a group by itself. Tensors that a conversion joins are one group:
        `...experts.0.w1.weight`, `...experts.1.w1.weight`, ... become `...experts.gate_up_proj`.

        `quantizer`: transformers' object that reads a quantised checkpoint, whose dequantisation adds rules; None: without
        those.
        """
        rules = conversion_rules(self.meta_model, quantizer)
        # A pattern is the part of stored names that a conversion looks for, such as `.experts.*.w1.weight`.
        converter_by_pattern = rules.converter_by_pattern()
        state = self.meta_model.state_dict()
        prefix = self.meta_model.base_model_prefix
        group_by_first_result: dict[str, ConversionGroup] = {}
        unused_names: list[str] = []
        for stored_name in in_loading_order(self.files.names()):
            name, pattern = rules.name_in_model(stored_name, state, prefix)
            if name not in state and stored_name in state:
                # A rule for other checkpoints renamed what has the model's own name already.
                # Without rules only the prefix of the base model ("model.") is added or removed, where that gives a name of the
                # model.
                name, pattern = NO_RULES.name_in_model(stored_name, state, prefix)
            # `pattern`: that of the conversion; None if the tensor is taken as it is.
            if name not in state:
                unused_names.append(stored_name)
            elif pattern is not None:
                new_group = ConversionGroup(name, converter_by_pattern[pattern])
                group = group_by_first_result.setdefault(name, new_group)
                group.source_names.setdefault(pattern, []).append(stored_name)
            elif name not in group_by_first_result:
                group_by_first_result[name] = ConversionGroup(name, None, {ONLY_RENAMED: [stored_name]})
        return _GroupedTensors(rules, group_by_first_result, unused_names)

    def _set_shapes_and_row_source(self, group: ConversionGroup) -> None:
        """Find out what shapes a group of stored tensors gives, and how much must be read for some rows of it.

        Sets `shapes` and `row_source` of the group. The conversion runs on meta tensors, so that no values are read from the
        files.
        """
        if group.converter is None:
            self._set_only_renamed(group, self.files.shape(group.renamed_source))
            return
        meta_tensors = self._read_sources(group, self.files.on_meta)
        all_tensors = [tensor for tensors in meta_tensors.values() for tensor in tensors]
        # With a quantizer, one operation alone is the dequantisation.
        only_dequantises = self.quantizer is not None and len(group.converter.operations) == 1
        if only_dequantises and len(all_tensors) == 1 and all_tensors[0].is_floating_point():
            # Stored in full precision among quantised ones: there is nothing to dequantise.
            self._set_only_renamed(group, tuple(all_tensors[0].shape))
            return
        converted = self._convert(group, meta_tensors)
        group.shapes = {name: tuple(tensor.shape) for name, tensor in converted.items()}
        # A group that makes several parameters at once keeps `RowSource.everything`.
        if len(converted) == 1 and group.first_result_name in converted:
            dimensions = converted[group.first_result_name].dim()
            group.row_source = _row_source_of(group.converter.operations, list(meta_tensors.values()), dimensions)

    @staticmethod
    def _set_only_renamed(group: ConversionGroup, shape: tuple[int, ...]) -> None:
        """Set `shapes` and `row_source` of a group whose one stored tensor, of this `shape`, needs no conversion."""
        group.shapes = {group.first_result_name: shape}
        group.row_source = RowSource.own_rows

    @staticmethod
    def _read_sources(group: ConversionGroup, read: Callable[[str], Tensor]) -> dict[str, list[Tensor]]:
        """Get the tensors that a conversion takes, as lists by pattern, in the order in which it joins them.

        `read`: gives the tensor of a name, be it from the files, on the meta device or out of a dict.
        """
        tensors = {}
        for pattern, names in group.source_names.items():
            tensors[pattern] = [read(name) for name in names]
        return tensors

    def _convert(self, group: ConversionGroup, tensors_by_pattern: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """Run transformers' own conversion of a group; returns the tensors that it makes, by name.

        `tensors_by_pattern`: those that the group takes, whole or the same rows of each, as lists by the pattern of their
        names.

        Raises ConfigError if the conversion fails.
        """
        # The converter itself holds what it is to convert, by pattern.
        for pattern, tensors in tensors_by_pattern.items():
            group.converter.collected_tensors[pattern] = list(tensors)
        try:
            converted = group.converter.convert(
                group.first_result_name, model=self.meta_model, config=self.meta_model.config
            )
        except Exception as error:
            group.converter.collected_tensors.clear()  # else they would be part of the next call
            examples = ", ".join(names[0] for names in group.source_names.values() if names)
            raise ConfigError(
                f"model.path={self.files.directory}: {group.first_result_name} cannot be made of {examples} ...: "
                f"{str(error)[:300]}"
            ) from error
        # Some operations give a list of one tensor.
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in converted.items()}

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows `[first, last)` along dimension 0 of the model's parameter `name`, made from the checkpoint's tensors.

        A rank that holds some rows of a sharded parameter calls this, so only these rows are read where the conversion allows
        it. Else all tensors of the group are converted, and kept for the next call. That is so if the conversion may mix rows,
        as in blocks of quantised numbers.
        """
        group = self.groups[name]
        if group.row_source is RowSource.own_rows:
            return self.files.rows(_only_source(group), first, last)
        # Expert i is row i of the parameter, and a file tensor for each pattern (gate and up projection, say).
        if group.row_source is RowSource.one_tensor_a_row:
            tensors = {}
            for pattern, stored_names in group.source_names.items():
                tensors[pattern] = [self.files.rows(stored_name) for stored_name in stored_names[first:last]]
            return self._convert(group, tensors)[name]
        if group.row_source is RowSource.same_rows_of_each:
            tensors = self._read_sources(group, lambda stored_name: self.files.rows(stored_name, first, last))
            return self._convert(group, tensors)[name]
        if self._last_converted[0] != group.first_result_name:
            self._last_converted = ("", {})  # free the group before: two at once would take twice the memory
            tensors = self._read_sources(group, self.files.rows)
            self._last_converted = group.first_result_name, self._convert(group, tensors)
        _, converted = self._last_converted
        return converted[name][first:last]

    def read_slice(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` of a flattened parameter, for a rank that holds this range of it."""
        group = self.groups[name]
        if group.row_source is RowSource.own_rows:
            return self.files.read_slice(_only_source(group), start, stop)
        row_size = math.prod(group.shapes[name][1:])
        # The rows that contain the range; the division is rounded up for the last one.
        first, last = start // row_size, -(-stop // row_size)
        rows = self.rows(name, first, last).reshape(-1)
        return rows[start - first * row_size : stop - first * row_size]

    def close(self) -> None:
        """Close the files, and free the group that was converted last."""
        self._last_converted = ("", {})
        self.files.close()

    # -- and back ------------------------------------------------------------------------------------------------

    def stored_groups(self, names: Iterable[str]) -> list[StoredGroup]:
        """Plan how parameters and buffers are written as the checkpoint stores them: groups of them are converted together.

        The groups come in the order in which they are complete, so that an export writes each as soon as it has all values. A
        parameter that is only renamed is a group by itself. Parameters that become stored tensors together are a group once all
        have come; a group that lacks one is left out.

        `names`: of the model, in the order in which their values come. Reads no values. Only those of transformers' rules are
        reversed that were used when the names were read.
        """
        rules = self._rules
        if self.quantizer is not None:  # an export is stored in full precision: by the rules without a quantisation
            rules = self._group_stored_tensors(None).rules
        reverse_rules = rules.reversed()
        converter_by_pattern = reverse_rules.converter_by_pattern()
        target_by_name = self._stored_targets(reverse_rules)
        prefix = self._stored_prefix(target_by_name)
        members_by_group: dict[str, set[str]] = {}  # a group goes by the first tensor that it makes
        for name, target in target_by_name.items():
            if target.pattern is not None:
                members_by_group.setdefault(target.first_stored_name, set()).add(name)

        def stored_name(converted_name: str) -> str:
            return prefix + reverse_rules.renamed(converted_name)

        groups: list[StoredGroup] = []
        arrived_by_group: dict[str, set[str]] = {}  # the members of incomplete groups that have come so far
        for name in names:
            first_stored_name, pattern = target_by_name.get(name, _StoredTarget(name, pattern=None))
            if pattern is None:
                groups.append(StoredGroup([name], prefix + first_stored_name))
                continue
            arrived = arrived_by_group.setdefault(first_stored_name, set())
            arrived.add(name)
            # `arrived` is a subset of the members: a proper one as long as some are missing.
            is_complete = not arrived < members_by_group[first_stored_name]
            if not is_complete:
                continue
            # Converters join tensors by position, in the loader's order.
            members = in_loading_order(arrived_by_group.pop(first_stored_name))
            # On the way back the model's parameters are the sources, and the stored tensors are what is made of them.
            conversion = ConversionGroup(first_stored_name, converter_by_pattern[pattern])
            for member in members:
                conversion.source_names.setdefault(str(target_by_name[member].pattern), []).append(member)
            groups.append(StoredGroup(members, first_stored_name, conversion, stored_name))
        return groups

    def _stored_targets(self, reverse_rules: ConversionRules) -> dict[str, _StoredTarget]:
        """For each parameter and buffer of the model: what it becomes in the files, by the reversed rules.

        For `experts.gate_up_proj` of a checkpoint with one tensor an expert: the first of these tensors, and the pattern of the
        conversion.
        """
        target_by_name = {}
        for name in in_loading_order(self.meta_model.state_dict()):
            first_stored_name, pattern = reverse_rules.converted_name(name)
            if pattern is None:
                first_stored_name = reverse_rules.renamed(name)
            target_by_name[name] = _StoredTarget(first_stored_name, pattern)
        return target_by_name

    def convert_back(self, group: StoredGroup, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn the parameters of one group back into the checkpoint's tensors, {stored name: tensor}, in the order of writing.

        The experts of a layer, one parameter in the model, become a stored tensor each. Weights that were quantised in the
        files come out in full precision.

        `group`: one of `stored_groups`. `tensors`: at least the group's members, by name in the model.
        """
        if group.conversion is None:  # only renamed
            (member,) = group.members
            return {group.name: tensors[member]}
        members_by_pattern = self._read_sources(group.conversion, tensors.__getitem__)
        converted = self._convert(group.conversion, members_by_pattern)
        return {group.stored_name(name): tensor for name, tensor in converted.items()}

    def _stored_prefix(self, target_by_name: dict[str, _StoredTarget]) -> str:
        """What names in the files begin with if the model is a part of a larger one: "language_model." for Llama 4; else "".

        transformers' loader removes this prefix, and the reversed rules do not put it back. It is found by tensors that are
        only renamed: the stored `language_model.model.norm.weight` is `model.norm.weight` by the reversed rules. Also "" if these
        tensors disagree.
        """
        prefixes = set()
        for name, target in target_by_name.items():
            group = self.groups.get(name)
            is_only_renamed = group is not None and group.converter is None
            if group is None or not is_only_renamed:
                continue
            stored_name = group.renamed_source
            has_prefix = stored_name.endswith(f".{target.first_stored_name}")
            prefixes.add(stored_name.removesuffix(target.first_stored_name) if has_prefix else "")
        return prefixes.pop() if len(prefixes) == 1 else ""

    def carried(self) -> list[str]:
        """Stored weights that the architecture ignores on purpose (`mtp.*`), and that a whole export keeps untouched."""
        if self.quantizer is not None:  # their neighbours' scales would be read without a quantisation to go by
            return []
        ignored = [re.compile(pattern) for pattern in ignored_in_checkpoints(self.meta_model)]
        return [stored for stored in self.left_out() if any(pattern.search(stored) for pattern in ignored)]

    def left_out(self) -> list[str]:
        """Stored weights that do not take part in training."""
        return [stored for stored in self.unused if not RECOMPUTED_NAME_REGEX.search(stored)]


def _row_source_of(operations: list[Any], tensors_by_pattern: list[list[Tensor]], dimensions: int) -> RowSource:
    """How much must be read for some rows of a parameter: decided by whether each step of its conversion keeps rows separate.

    `operations`: of transformers' conversion, in order. `tensors_by_pattern`: the stored tensors, on meta, in one list for each
    pattern. `dimensions`: number of dimensions of the parameter.
    """
    operations = list(operations)
    if type(operations[0]).__name__ == "Fp8Dequantize":  # it needs whole tensors, whose scales are of blocks of rows
        if not any(stacking_dimension(operation) is not None for operation in operations):
            return RowSource.everything
        operations = operations[1:]
    # Tensors that are stacked along dimension 0 become one row each: row i is stored tensor i.
    stacks_rows = bool(operations) and stacking_dimension(operations[0]) == 0
    if stacks_rows:
        operations = operations[1:]
    if not all(keeps_rows_apart(operation, dimensions) for operation in operations):
        return RowSource.everything
    if stacks_rows:
        return RowSource.one_tensor_a_row
    # One stored tensor for each pattern, with the parameter's rows: halves that are joined along columns.
    if all(len(tensors) == 1 and tensors[0].dim() == dimensions for tensors in tensors_by_pattern):
        return RowSource.same_rows_of_each
    return RowSource.everything


def _only_source(group: ConversionGroup) -> str:
    """The first stored name of a group, which is read directly."""
    return next(iter(group.source_names.values()))[0]


def dequantizer(hf_config: Any, path: str) -> Any:
    """transformers' object that makes plain numbers of quantised weights as they are read; None for an unquantised checkpoint.

    `hf_config`: its `quantization_config` is the dictionary of config.json, or transformers' object of it. `path`: of the
    model, for messages. Raises ConfigError for a kind of quantisation that is not in `READABLE_QUANTISATIONS`.
    """
    settings = getattr(hf_config, "quantization_config", None)
    if settings is None:
        return None
    try:
        if isinstance(settings, dict):  # as in config.json; transformers may have made its object of it already
            settings = quantisation_settings(dict(settings))
    except Exception as error:  # an unknown method, or fields that a known one lacks
        raise ConfigError(
            f"model.path={path}: the quantization_config of its config.json cannot be read "
            f"({' '.join(str(error).split())[:160]}); take the model's unquantised checkpoint"
        ) from error
    if not hasattr(settings, "quant_method"):
        raise ConfigError(
            f"model.path={path}: config.json has quantization_config={settings!r:.80}, which names no method; mend it there"
        )
    # `quant_method` is an enum of transformers, or a text.
    kind = str(getattr(settings.quant_method, "value", settings.quant_method))
    if kind not in READABLE_QUANTISATIONS:
        raise ConfigError(
            f"model.path={path}: its weights are stored as {kind}; {' and '.join(READABLE_QUANTISATIONS)} "
            "checkpoints are read as the numbers "
            "they stand for, others are not: take the model's unquantised checkpoint (with model.quantisation=nf4 for QLoRA)"
        )
    # Otherwise the quantizer would keep the weights in few bits, for kernels that compute with those.
    settings.dequantize = True
    return dequantizing_quantizer(settings)
