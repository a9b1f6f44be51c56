"""DeepSpeed ZeRO 1, 2 and 3 behind the engine interface."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from strategies.activation import apply_checkpointing_and_compile
from strategies.base import (
    FullParameters,
    OptimizerFactory,
    ParameterSource,
    Precision,
    Progress,
    StepResult,
    UpdateFilter,
    ZeroConfig,
    plan_of,
)
from strategies.compat.deepspeed import forget_deepspeed_groups, restore_torch_linear
from strategies.compat.modules import disable_device_moves
from strategies.deepspeed_library import (
    DeviceClipping,
    UpdateGate,
    free_deepspeed_engine,
    gradient_norm_over_ranks,
    import_deepspeed,
    route_collectives_through,
    set_deepspeed_device,
)
from strategies.ema import WeightAverage
from strategies.errors import ConfigError
from strategies.full_params import ZeroFullParameters
from strategies.host_memory import HostMemory, open_host_memory
from strategies.inference import InferencePasses
from strategies.parameters import (
    COMPUTE_DTYPE,
    allocate_on_device,
    load_full_parameters,
    named_parameters,
    set_parameter_dtypes,
    trainable_parameters,
)
from strategies.runtime import Runtime, set_group_timeouts
from strategies.saving import FlatRange, RankState
from strategies.state import StateHeader, load_state
from strategies.zero_config import deepspeed_config, steps_on_device
from strategies.zero_load import gather_modules_of_plan_as_one, load_partitioned
from strategies.zero_masters import Fp32Masters


class ZeroEngine(InferencePasses):
    """Drives a DeepSpeed engine through the `Engine` interface: accumulation, skipping and state are decided here."""

    host_memory: HostMemory | None = None

    def __init__(self, step_module: nn.Module, engine: Any, config: ZeroConfig, runtime: Runtime) -> None:
        """Wrap a DeepSpeed engine so that the training loop drives it as it drives the engines of other strategies.

        `engine`: DeepSpeed's own, which holds `step_module` and its optimizer. `config`: the ZeRO settings of the run.
        """
        self.step_module = step_module
        self.engine = engine
        self.config = config
        self.runtime = runtime
        self.rank = runtime.rank
        self.world_size = runtime.world_size
        self.trainable: list[tuple[str, Any]] = list(trainable_parameters(step_module))
        self.base_learning_rates = [group["lr"] for group in engine.optimizer.param_groups]
        self.device_clipping: DeviceClipping | None = None
        """Clips gradients and skips updates on the device; None if DeepSpeed does so itself."""
        self.update_gate = UpdateGate(engine.optimizer, runtime.device)
        self._num_updates = torch.zeros((), device=runtime.device)
        """Updates that were applied, of the whole run, 0-d; the inner optimizer has a count of its own for bias correction."""
        self.masters = Fp32Masters(engine, config.stage, runtime.rank, self.trainable)
        # Both are of the fp32 master weights; the strategy sets them if the run keeps them.
        self.weight_average = None
        self.initial_weights = None
        if config.stage == 3:
            self.full_parameters: FullParameters = ZeroFullParameters(step_module, engine.optimizer.parameter_offload)
        else:
            self.full_parameters = FullParameters()

    def forward(self, batch: dict[str, Any], *, last: bool) -> dict[str, Tensor]:
        self.engine.set_gradient_accumulation_boundary(last)
        return self.engine(batch)

    def close(self) -> None:
        """Free parameters, gradients and optimizer state. See `Engine.close`."""
        free_deepspeed_engine(self.engine)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        # The loss is divided already (`strategies/base.py`), so DeepSpeed must not divide by the accumulation steps again.
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr_factor: float, update_filter: UpdateFilter | None = None) -> StepResult:
        """Clip, update and zero; then update the average. See `Engine.step`."""
        step_result = self._step(lr_factor, update_filter)
        if self.weight_average is not None:
            self.weight_average.update(self._num_updates, 1 - step_result.skipped)
        return step_result

    def _step(self, lr_factor: float, update_filter: UpdateFilter | None) -> StepResult:
        """Clip gradients, update weights and zero gradients, without the moving average.

        `lr_factor`: by which each parameter group's own rate is multiplied. The update is skipped if a gradient is not finite, or
        if `update_filter`, called with the gradient norm, says so. All ranks must call.
        """
        for group, base_lr in zip(self.engine.optimizer.param_groups, self.base_learning_rates, strict=True):
            group["lr"] = base_lr * lr_factor
        if self.device_clipping is not None:
            return self._step_decided_on_device(self.device_clipping, update_filter)
        return self._step_decided_on_host(update_filter)

    def _step_decided_on_device(self, clipping: DeviceClipping, update_filter: UpdateFilter | None) -> StepResult:
        """Take DeepSpeed's step; the device decides whether to skip the update, and the host does not wait.

        `clipping`: our clipping, which DeepSpeed's inner optimizer calls before it updates.
        """
        clipping.begin_step(update_filter)
        self.engine.step()
        is_applied = clipping.decide_update()
        self._num_updates += is_applied
        return StepResult(grad_norm=clipping.gradient_norm(), skipped=(~is_applied).float())

    def _step_decided_on_host(self, update_filter: UpdateFilter | None) -> StepResult:
        """Take DeepSpeed's step; the host waits for the norm, and decides: DeepSpeed on overflow, our gate by the filter."""
        self.update_gate.begin_step(update_filter)
        self.engine.step()
        is_skipped = bool(self.engine.optimizer.overflow) or bool(self.update_gate.is_skipped)
        self._num_updates += not is_skipped
        device = self.runtime.device
        engine_norm = self.engine.get_global_grad_norm()
        if engine_norm is None:  # DeepSpeed found an overflow and has computed no norm
            engine_norm = float("nan")
        norm = torch.as_tensor(engine_norm, dtype=torch.float32, device=device)
        return StepResult(grad_norm=norm, skipped=torch.tensor(float(is_skipped), device=device))

    # -- training state ------------------------------------------------------------------------------------------

    def _flat_masters(self) -> list[Tensor]:
        return self.masters.flat_masters()

    def _flat_ranges(self) -> Iterator[FlatRange]:
        return self.masters.flat_ranges(self.weight_average)

    def _ensure_moments(self) -> None:
        """Create the optimizer's moments before they are saved or loaded, since an optimizer creates them only in its first step.

        So DeepSpeed's inner optimizer takes a step with zero gradients at learning rate 0. Its state is the moments of each flat
        master (fp32 weights of several parameters, one after the other), such as `exp_avg`, and the count of updates, which
        becomes 0. Nothing is done if there is state.
        """
        inner_optimizer = self.engine.optimizer.optimizer
        if inner_optimizer.state:
            return
        groups = inner_optimizer.param_groups
        original_lrs = [group["lr"] for group in groups]
        original_parameters = [group["params"] for group in groups]
        flat_masters = self._flat_masters()
        for group in groups:
            group["lr"] = 0.0
        # Under stage 3 the groups do not contain the flat tensors: DeepSpeed passes them one at a time in each step. The state
        # belongs to the flat tensors, so they replace the groups' parameters for this step.
        parameter_ids = {id(parameter) for parameters in original_parameters for parameter in parameters}
        if parameter_ids != {id(flat_master) for flat_master in flat_masters}:
            for group in groups:
                group["params"] = []
            groups[0]["params"] = list(flat_masters)
        for flat_master in flat_masters:
            flat_master.grad = torch.zeros_like(flat_master)
        inner_optimizer.step()
        for flat_master in flat_masters:
            flat_master.grad = None
        self._set_update_count(0)
        for group, lr, parameters_of_group in zip(groups, original_lrs, original_parameters, strict=True):
            group["lr"] = lr
            group["params"] = parameters_of_group

    def _set_update_count(self, updates: int) -> None:
        """Set the inner optimizer's count of applied updates, which bias correction uses, if it has one."""
        inner_optimizer = self.engine.optimizer.optimizer
        for flat_master in self._flat_masters():
            state = inner_optimizer.state.get(flat_master, {})
            if "step" in state:
                state["step"].fill_(updates)

    def _loss_scaler(self) -> Any:
        """DeepSpeed's dynamic loss scaler (fp16); None if there is none."""
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        return scaler if getattr(scaler, "dynamic", False) else None

    def state(self, progress: Progress) -> RankState:
        """Collect this rank's part of the training state of now, ready to be written as a checkpoint. All ranks must call.

        That is its ranges of the fp32 master weights, with moments and averages, and a header: `progress` of the run, and counts.
        The tensors are views of the live ones: write them, or copy them, before the next step.
        """
        self._ensure_moments()  # an optimizer has no moments before its first step, and a checkpoint needs them
        scaler = self._loss_scaler()
        header = StateHeader(
            progress=progress,
            optimizer_steps=int(self._num_updates),
            world_size=self.runtime.world_size,
            strategy=str(self.config.name),
            loss_scale=None if scaler is None else float(scaler.cur_scale),
        )
        return RankState(self._flat_ranges(), header.json(), self.runtime)

    @torch.no_grad()
    def load(self, path: Path) -> Progress:
        """Resume: read the training state in the directory `path`, whatever strategy and world size wrote it.

        Returns how far the run was. Raises on every rank: ConfigError if the state is another run's, StorageError if it cannot be
        read. All ranks must call.
        """
        # The state is read into the tensors of the flat ranges, in place, so the optimizer's moments must exist before.
        self._ensure_moments()
        state_header = load_state(path, self._flat_ranges(), self.runtime)
        self._num_updates.fill_(state_header.optimizer_steps)  # our count, and DeepSpeed's inner optimizer's own
        self._set_update_count(state_header.optimizer_steps)
        loss_scaler = self._loss_scaler()
        if state_header.loss_scale is not None and loss_scaler is not None:
            loss_scaler.cur_scale = state_header.loss_scale
        # The forward pass uses copies of the fp32 masters, which have new values now.
        self.refresh_compute_copies()
        return state_header.progress

    def _after_weight_change(self) -> None:
        self.refresh_compute_copies()

    @torch.no_grad()
    def refresh_compute_copies(self) -> None:
        """Make the forward pass use the current fp32 weights (masters), after they changed outside a step, as by a loaded state.

        It computes with parameters of the compute type, into which the masters are copied here. All ranks must call.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

        # Under stages 1 and 2 each rank has full parameters, and parts of the masters.
        is_sharded = self.config.stage == 3
        if is_sharded:
            # An earlier forward pass may have left old values gathered.
            self.engine.optimizer.parameter_offload.partition_all_parameters()
        for _, parameter in self.trainable:
            if is_sharded:
                shard = parameter.ds_tensor
                shard.data.copy_(safe_get_local_fp32_param(parameter).to(shard.dtype))
            else:
                parameter.data.copy_(safe_get_full_fp32_param(parameter).view_as(parameter))

    @torch.no_grad()
    def load_exact_masters(self, source: ParameterSource) -> None:
        """Give the fp32 master weights their exact initial values, since DeepSpeed cloned them from rounded bf16 or fp16 copies.

        `source`: the model's files, or random numbers. Each rank reads the elements that it holds.
        """
        full_shapes = {name: _full_shape(parameter) for name, parameter in self.trainable}
        for flat_range in self._flat_ranges():
            master = flat_range.tensors_by_key["weight"]
            if master.numel():
                name = flat_range.name
                start = flat_range.start
                master.copy_(source.read_slice(name, full_shapes[name], start, start + master.numel()))

    def gather_full_parameters(self, *, trainable_only: bool) -> Iterator[tuple[str, Tensor | None]]:
        """Gather the full parameters onto rank 0, one by one: (plain name, full parameter on the CPU; None elsewhere).

        Parameters that train come from their fp32 masters, averaged if the run has an average. All ranks must exhaust it.
        """
        with self._averaged_weights_in_model():
            yield from self._gather_current_weights(trainable_only=trainable_only)

    def _gather_current_weights(self, *, trainable_only: bool) -> Iterator[tuple[str, Tensor | None]]:
        """Gather the weights that are in the model now onto rank 0, one by one, as `gather_full_parameters`.

        Parameters that train come from their fp32 masters. `trainable_only`: without the others. All ranks must exhaust the
        iterator: each step is a collective.
        """
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        is_main = self.runtime.is_main
        trainable_ids = {id(parameter) for _, parameter in self.trainable}
        for name, parameter in named_parameters(self.step_module):
            if id(parameter) in trainable_ids:
                # A collective: every rank must call it, although only rank 0 keeps the result.
                master = safe_get_full_fp32_param(parameter).view(_full_shape(parameter))
                yield name, master.cpu() if is_main else None
            elif trainable_only:
                continue
            elif self.config.stage == 3:
                with deepspeed.zero.GatheredParameters([parameter]):
                    full = parameter.detach().cpu().clone() if is_main else None
                yield name, full
            else:
                yield name, parameter.detach().cpu() if is_main else None


def _full_shape(parameter: Any) -> torch.Size:
    """The shape of the full parameter. Under stage 3 the parameter itself is empty, and its shape is in `ds_shape`."""
    return getattr(parameter, "ds_shape", parameter.shape)


class ZeroStrategy:
    """Builds a DeepSpeed engine. Under stage 3 it partitions block by block, so that no rank ever holds the full model."""

    def __init__(self, config: ZeroConfig, precision: Precision, runtime: Runtime) -> None:
        self.config = config
        self.precision = precision
        self.runtime = runtime
        self.on_cpu = runtime.kind == "cpu"
        if self.on_cpu and precision is Precision.fp16:
            raise ConfigError(
                f"precision=fp16 with strategy={config.name}: DeepSpeed has no fp16 on CPUs; use bf16 or fp32"
            )

    def prepare(
        self,
        step_module: nn.Module,
        *,
        source: ParameterSource,
        make_optimizer: OptimizerFactory,
        max_grad_norm: float,
    ) -> ZeroEngine:
        """Turn a model on meta into a DeepSpeed engine: load its weights (partitioned for stage 3), build the optimizer.

        `source`: where weights come from. `make_optimizer`: builds the optimizer of (plain name, parameter) pairs that train.
        `max_grad_norm`: to which the gradients' global norm is clipped; 0 does not clip. All ranks must call.
        """
        deepspeed = import_deepspeed(on_cpu=self.on_cpu or self.runtime.simulated)
        set_deepspeed_device(self.runtime)
        forget_deepspeed_groups()
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        compute_dtype = COMPUTE_DTYPE[self.precision]
        set_parameter_dtypes(step_module, trainable=compute_dtype, frozen=compute_dtype)
        apply_checkpointing_and_compile(step_module, self.config)
        num_trained = sum(parameter.numel() for _, parameter in trainable_parameters(step_module))
        deepspeed_settings_with = partial(
            deepspeed_config,
            self.config,
            precision=self.precision,
            max_grad_norm=max_grad_norm,
            on_cpu=self.on_cpu,
            trained_per_rank=num_trained // self.runtime.world_size,
        )
        if self.config.stage == 3:
            self._load_partitioned_parameters(step_module, source, deepspeed_settings_with(), compute_dtype)
        else:
            allocate_on_device(step_module, self.runtime.device)
            load_full_parameters(step_module, source, self.runtime)

        # Whether steps are decided on the device depends on the optimizer, and the optimizer on the partitioned parameters:
        # the settings are made again.
        optimizer = make_optimizer(trainable_parameters(step_module))
        clips_on_device = steps_on_device(self.config, self.precision, optimizer)
        settings = deepspeed_settings_with(clips_on_device=clips_on_device)
        host_memory = open_host_memory(self.runtime)
        route_collectives_through(host_memory)
        if self.runtime.simulated:
            disable_device_moves(step_module)
        engine, *_ = deepspeed.initialize(model=step_module, optimizer=optimizer, config=settings)
        set_group_timeouts(self.runtime)
        # DeepSpeed's own norm is slow on a CPU, and would make the host wait for a GPU.
        if (self.on_cpu or clips_on_device) and hasattr(engine.optimizer, "get_grad_norm_direct"):
            engine.optimizer.get_grad_norm_direct = partial(gradient_norm_over_ranks, device=self.runtime.device)

        zero_engine = ZeroEngine(step_module, engine, self.config, self.runtime)
        if clips_on_device:
            zero_engine.device_clipping = DeviceClipping(engine.optimizer, max_grad_norm, self.runtime.device)
        zero_engine.host_memory = host_memory
        if self.precision is not Precision.fp32:
            zero_engine.load_exact_masters(source)
        ema_decay = plan_of(step_module).ema_decay
        if ema_decay:
            zero_engine.weight_average = WeightAverage(ema_decay, zero_engine._flat_masters())
        if plan_of(step_module).keeps_initial_weights:
            zero_engine.initial_weights = WeightAverage(1.0, zero_engine._flat_masters())
        return zero_engine

    def _load_partitioned_parameters(
        self,
        step_module: nn.Module,
        source: ParameterSource,
        deepspeed_settings: dict[str, Any],
        compute_dtype: torch.dtype,
    ) -> None:
        """Under stage 3: let DeepSpeed partition the parameters over the ranks, and load this rank's part of each.

        `source`: where weights come from. `compute_dtype`: the type in which the parameters are stored and computed with. All
        ranks must call.
        """
        if not deepspeed_settings["zero_optimization"]["memory_efficient_linear"]:
            # An earlier engine of this process may have had the setting, which replaces torch's linear function for good.
            restore_torch_linear()
        # A fused LoRA layer computes with the parameters of its submodules. DeepSpeed gathers parameters only while their own
        # module runs, so no layer may be fused.
        for module in step_module.modules():
            if getattr(module, "is_fusion_enabled", False):
                module.is_fusion_enabled = False  # type: ignore[assignment]
        gather_modules_of_plan_as_one(step_module)
        offload_to_nvme = self.config.offload_parameters == "nvme"
        load_partitioned(
            step_module, source, deepspeed_settings, compute_dtype, self.runtime, offload_to_nvme=offload_to_nvme
        )
