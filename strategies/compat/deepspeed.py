"""What DeepSpeed keeps for itself, and what is put in the place of its functions.

Read in DeepSpeed 0.19.8. Nothing here imports DeepSpeed before it is called: most strategies run without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from strategies.compat.process_groups import living_groups

# -- what is put in the place of its functions -------------------------------------------------------------------------


def silence_deepspeed_memory_reports() -> None:
    """Let `BF16_Optimizer` not print what memory is in use: `see_memory_usage` prints, whatever the level of its logger."""
    from deepspeed.runtime import bf16_optimizer

    bf16_optimizer.see_memory_usage = lambda *_args, **_kwargs: None


def disable_shared_memory_op() -> None:
    """Let DeepSpeed not compile its op for collectives on a CPU, which needs a C++ compiler; no setting says so."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def restore_torch_linear() -> None:
    """Give torch its linear function back, which an earlier DeepSpeed engine of this process may have replaced for good.

    `zero.Init` puts its own in the place of `torch.nn.functional.linear` and leaves it there; what was there before is in
    `InsertPostInitMethodToModuleSubClasses.linear_bk`.
    """
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Replaced

    torch.nn.functional.linear = getattr(Replaced, "linear_bk", torch.nn.functional.linear)


def replace_backend(replacement: Callable[[Any], Any]) -> None:
    """Put an object of our own in the place of the backend to which DeepSpeed's collectives go (`comm.cdb`).

    `replacement`: called with the backend of now; returns the new one. `init_distributed` takes no object, but the name of a
    backend that torch knows.
    """
    from deepspeed.comm import comm

    comm.cdb = replacement(comm.cdb)


def replace_stage3_functions(
    *, reduce_scatter: Callable[..., Any], gathered_handle: type, compare_integers: Callable[[Any], None]
) -> None:
    """Replace three functions and classes that DeepSpeed's stage 3 uses, which no setting can replace.

    `reduce_scatter`: reduces and scatters a list of gradients. `gathered_handle`: the class of handles of an all-gather of many
    parameters. `compare_integers`: checks that all ranks have the same numbers.
    """
    from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3

    stage3.reduce_scatter_coalesced = reduce_scatter
    partition_parameters.AllGatherCoalescedHandle = gathered_handle  # type: ignore[misc, assignment]  # replaced on purpose
    # Each of these modules has imported the function, and calls it by a name of its own.
    modules: tuple[Any, ...] = (partition_parameters, partitioned_param_coordinator, stage3)
    for module in modules:
        module.assert_ints_same_as_other_ranks = compare_integers


# -- process groups that it remembers ----------------------------------------------------------------------------------


def forget_deepspeed_groups(*, also_existing: bool = False) -> None:
    """Let DeepSpeed forget process groups that an earlier run of this process has destroyed, before a new engine is made.

    `also_existing`: also groups that were not destroyed, as a simulation needs after another one. DeepSpeed's own
    `destroy_process_group` calls `groups._release_process_group_references` for it; a run that destroys its groups through torch
    does not.
    """
    from deepspeed.utils import groups

    remembered = groups._WORLD_GROUP
    if also_existing or (remembered is not None and remembered not in living_groups()):
        groups._release_process_group_references()


def forget_backend() -> None:
    """Let DeepSpeed form its backend anew with its next engine (`comm.cdb`)."""
    from deepspeed.comm import comm

    comm.cdb = None


# -- what its optimizers keep ------------------------------------------------------------------------------------------

grad_norm_in_step: Callable[[Any], Any] = attrgetter("_global_grad_norm")
"""`grad_norm_in_step(zero_optimizer)`: the norm of the step that is being taken.

The engine's public `get_global_grad_norm` has it when the step is over.
"""

fp32_fragment: Callable[[Any], Any] = attrgetter("_hp_mapping")
"""`fp32_fragment(parameter)`: which part of a parameter's fp32 master this rank has, and where; None if it has none.

The public `safe_get_full_fp32_param` gathers the whole from all ranks.
"""

_TENSORS_BY_KIND = {
    "parameters": ("bit16_groups_flat", "bf16_groups_flat", "fp16_partitioned_groups_flat"),
    "optimizer": (
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
        "fp32_partitioned_groups_flat",
    ),
    "gradients": (
        "averaged_gradients",
        "fp32_groups_gradients_flat",
        "fp32_groups_gradient_flat_partition",
        "grad_partitions_flat_buffer",
        "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition",
        "temp_grad_gpu_buffer",
        "averaged_gradients",
    ),
    "communication": ("ipg_buckets", "_DeepSpeedZeroOptimizer_Stage3__ipg_bucket_flat_buffer", "ipg_buffer"),
}
"""Attributes of the optimizers of the three stages, by what they hold; each stage has some of them."""


def zero_optimizer_tensors(zero_optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """List the tensors that DeepSpeed's ZeRO optimizer keeps as (kind, tensor), to count memory by kind.

    `kind` is `parameters`, `optimizer`, `gradients` or `communication`. The state of the inner optimizer (torch's own) is left
    out. DeepSpeed has no public access to them.
    """
    for kind, names in _TENSORS_BY_KIND.items():
        for name in names:
            for tensor in _tensors_in(getattr(zero_optimizer, name, None)):
                yield kind, tensor


def _tensors_in(collection: Any) -> Iterator[Tensor]:
    """Yield the tensors in what an attribute of DeepSpeed's optimizer holds: a tensor, nested collections, a gradient bucket.

    None for an attribute that the optimizer does not have; it has no tensors.
    """
    if torch.is_tensor(collection):
        yield collection
    elif isinstance(collection, dict):
        for entry in collection.values():
            yield from _tensors_in(entry)
    elif isinstance(collection, list | tuple):
        for entry in collection:
            yield from _tensors_in(entry)
    elif hasattr(collection, "buffer"):  # a bucket
        yield from _tensors_in(collection.buffer)
