"""The weights of a whole model as an engine's gathered parameters give them, tensor by tensor: the oracle of exports.

This is how exports were written before they were read out of checkpoints. It makes no plan, and knows no processes.
"""

import json
import math

from strategies.compat.modules import persistent_buffers
from trainer.model.conversions import ConversionGroup, _StoredTarget, in_loading_order
from trainer.tuning.adapter_files import AdapterMerger


def write_gathered(engine, built, base, directory, *, dtype, max_bytes):
    """Write the weights of an engine of one rank, and their index, into the new `directory`."""
    directory.mkdir(parents=True)
    reader = built.base_weights(base)

    def all_tensors():
        yield from stored_again(reader.conversions, whole_model(engine, built, reader))
        for name in reader.conversions.carried():
            yield name, reader.conversions.files.rows(name)

    write_tensors(all_tensors(), directory, dtype=dtype, max_bytes=max_bytes)


def whole_model(engine, built, base):
    """The whole model under its base names, adapters merged in; frozen values from the base."""
    tuning, model = built.tuning, built.step_module.model
    trainable_names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    merger = None
    if tuning.adapter:
        merger = AdapterMerger(tuning, model, dict(engine.gather_full_parameters(trainable_only=True)), base)
    for name, tensor in engine.gather_full_parameters(trainable_only=False):
        if tuning.is_added_parameter(name):
            continue
        if name in trainable_names:
            yield tuning.base_name(name), tensor
            continue
        weight = base_or_live_value(base, tuning.base_name(name), tensor)
        if merger is not None:
            weight = merger.merged_tensor(name, weight)
        if weight is not None:
            yield tuning.base_name(name), weight
    for name, buffer in persistent_buffers(model):
        if not tuning.is_added_parameter(name):
            yield tuning.base_name(name), buffer.detach().cpu()


def base_or_live_value(base, name, live):
    if name in base.quantised_shapes:
        return base.full_tensor(name)
    if base.name_in_checkpoint(name) is None or base.shape(name) != tuple(live.shape):
        return live
    return base.read_slice(name, 0, math.prod(live.shape)).view(live.shape)


def stored_again(conversions, tensors):
    """Parameters under the names and in the shapes of the files, group by group as they are complete."""
    rules = (
        conversions._rules if conversions.quantizer is None else conversions._group_stored_tensors(None).rules
    ).reversed()
    converter_of = rules.converter_by_pattern()
    places, members_of_group = {}, {}
    for name in in_loading_order(conversions.meta_model.state_dict()):
        key, pattern = rules.converted_name(name)
        if pattern is None:
            key = rules.renamed(name)
        else:
            members_of_group.setdefault(key, set()).add(name)
        places[name] = key, pattern
    prefix = conversions._stored_prefix({name: _StoredTarget(*place) for name, place in places.items()})
    incomplete = {}
    for name, tensor in tensors:
        key, pattern = places.get(name, (name, None))
        if pattern is None:
            yield prefix + key, tensor
            continue
        incomplete.setdefault(key, {})[name] = tensor
        if incomplete[key].keys() < members_of_group[key]:
            continue
        members = incomplete.pop(key)
        tensors_by_pattern = {}
        for member in in_loading_order(members):
            tensors_by_pattern.setdefault(str(places[member][1]), []).append(members[member])
        group = ConversionGroup(key, converter_of[pattern])
        for stored, converted in conversions._convert(group, tensors_by_pattern).items():
            yield prefix + rules.renamed(stored), converted


def write_tensors(tensors, directory, *, dtype, max_bytes):
    """Stream tensors into numbered files of at most `max_bytes` (or one tensor) and an index."""
    from safetensors.torch import save_file

    files, pending, pending_bytes, total_bytes = [], {}, 0, 0

    def write_pending():
        files.append(list(pending))
        save_file(pending, directory / f"part-{len(files)}", {"format": "pt"})
        pending.clear()

    for name, tensor in tensors:
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        if pending and pending_bytes + tensor.nbytes > max_bytes:
            write_pending()
            pending_bytes = 0
        pending[name] = tensor.contiguous().clone()
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    write_pending()
    if len(files) == 1:
        (directory / "part-1").rename(directory / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        (directory / f"part-{number}").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
