"""Planning what is recomputed: what is counted on meta is what real tensors take, and the least that fits is chosen."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from strategies import activation_plan, runtime
from strategies.activation import is_kept_op
from strategies.activation_plan import ActivationBytes, choose_recomputation
from strategies.base import ActivationCheckpointing, Precision, SingleConfig
from strategies.errors import ConfigError
from strategies.pinned_memory import pinned_bytes
from strategies.single import load_in_full
from tests.helpers.building import (
    GLOBAL_BATCH,
    data_set,
    model_dir,
    pair_set,
    rated_set,
    replay_set,
    run_config,
    samples,
    take_steps,
    trainer_for,
)
from tests.helpers.stores import write
from trainer.build.parts import build_engine, build_model, largest_micro_batch
from trainer.build.recomputation import (
    check_host_memory_for_inputs,
    counted_activations,
    longest_micro_batch,
    num_tokens_of_longest_micro_batch,
)
from trainer.config.validate import config_problems
from trainer.data.prepare import PreparedData
from trainer.data.store.sequences import Sample, TokenDataset
from trainer.model.config import Quantisation
from trainer.model.loading import load_tokenizer
from trainer.objectives.classification import ClassificationConfig
from trainer.objectives.kto import KtoConfig
from trainer.objectives.preference import DpoConfig
from trainer.objectives.sft import ForgettingConfig, SftConfig

NONE, SELECTIVE, FULL = (ActivationCheckpointing(name) for name in ("none", "selective", "full"))


@pytest.fixture(scope="module")
def here():
    yield runtime.join_job("cpu", timeout_s=60, threads=1)
    runtime.leave_job()


def saved_bytes(step_module, batch):
    """What autograd really keeps of `batch`, counted by storage, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in [*step_module.parameters(), *step_module.buffers()]}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # kept, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step_module(batch)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_counted_on_meta_as_saved_for_real(tmp_path, here, architecture, tuning):
    data = data_set(tmp_path, uneven=False)
    config = run_config(model_dir(tmp_path, architecture), "single", tuning, micro=4)
    built, source = build_model(config, load_tokenizer(config.model), data, half_on_gpu=False)
    found = counted_activations(built, largest_micro_batch(config, data), Precision.fp32)
    batch = longest_micro_batch(built, largest_micro_batch(config, data))
    load_in_full(built.step_module, source, Precision.fp32, here)
    kept_bytes = sum(found.bytes_by_block_if_none) + found.bytes_outside_blocks
    assert kept_bytes == pytest.approx(saved_bytes(built.step_module, batch), rel=1e-3)
    by_mode = (found.bytes_by_block_if_none, found.bytes_by_block_if_selective, found.bytes_by_block_if_full)
    assert all(f < s < n for n, s, f in zip(*by_mode, strict=True))


def test_every_attention_kernel_is_kept_by_selective_checkpointing():
    """Also those that exist only once they are imported; a sum is not."""
    import torch.nn.attention.varlen

    ops = torch.ops
    assert is_kept_op(ops.torch_attn._varlen_attn.default) and is_kept_op(
        ops.aten._scaled_dot_product_flash_attention.default
    )
    assert is_kept_op(ops.aten.mm.default) and not is_kept_op(ops.aten.add.Tensor)


def test_the_least_that_fits_is_chosen():
    found = ActivationBytes(
        bytes_by_block_if_none=[100.0] * 3,
        bytes_by_block_if_selective=[40.0] * 3,
        bytes_by_block_if_full=[10.0] * 3,
        bytes_outside_blocks=50.0,
        transient_bytes=5.0,
    )
    assert choose_recomputation(found, 355.0) == ([NONE] * 3, True)
    # A recomputed block stands there whole once more: the first step down saves nothing here, the second does.
    assert choose_recomputation(found, 354.0) == ([SELECTIVE, SELECTIVE, NONE], True)
    assert choose_recomputation(found, 275.0) == ([SELECTIVE] * 3, True)
    assert choose_recomputation(found, 245.0) == ([FULL, SELECTIVE, SELECTIVE], True)
    assert choose_recomputation(found, 185.0) == ([FULL] * 3, True)
    assert choose_recomputation(found, 184.0) == ([FULL] * 3, False)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_recomputation_plan_leaves_losses_and_norms_as_they_are(tmp_path, here, monkeypatch, tuning):
    """With a budget between all and nothing, blocks differ; losses and norms do not."""
    data = data_set(tmp_path, uneven=True)
    config = run_config(model_dir(tmp_path), "single", tuning, micro=GLOBAL_BATCH, steps=3)
    plain = take_steps(trainer_for(config, data, here), 3)
    plans = [[NONE, NONE], [SELECTIVE, NONE], [FULL, SELECTIVE]]
    auto = replace(config, strategy=SingleConfig(activation_checkpointing=ActivationCheckpointing.auto, memory_gib=1.0))
    for plan in plans:
        monkeypatch.setattr("trainer.build.recomputation.choose_recomputation", lambda *_, plan=plan: (plan, True))
        trainer = trainer_for(auto, data, here)
        blocks = trainer.engine.step_module.shard_units()
        assert [block.gradient_checkpointing for block in blocks] == [mode is not NONE for mode in plan]
        for (loss, norm), (right_loss, right_norm) in zip(take_steps(trainer, 3), plain, strict=True):
            assert loss == pytest.approx(right_loss, rel=1e-6) and norm == pytest.approx(right_norm, rel=1e-6)


def test_recomputation_plan_is_recorded_and_autograd_keeps_what_it_says(tmp_path, here):
    """A budget that nothing fits: every block recomputes, and what autograd keeps is what the plan said."""
    data = data_set(tmp_path, uneven=False)
    tight = SingleConfig(activation_checkpointing=ActivationCheckpointing.auto, memory_gib=1e-6)
    config = run_config(model_dir(tmp_path), tight, "full", micro=4)
    engine, built, _ = build_engine(config, load_tokenizer(config.model), data, Precision.fp32, here)
    note = built.substitutions["strategy.activation_checkpointing"]
    assert "full in 2 of 2 blocks" in note and "more than there is" in note
    found = activation_plan.count_activations(
        built.step_module, longest_micro_batch(built, largest_micro_batch(config, data)), Precision.fp32
    )
    batch = longest_micro_batch(built, largest_micro_batch(config, data))
    # Checkpointing also keeps what all blocks share: rotary tables and positions.
    recomputed = found.bytes_outside_blocks + sum(found.bytes_by_block_if_full)
    assert saved_bytes(engine.step_module, batch) < recomputed + 0.25 * sum(found.bytes_by_block_if_none)


def test_a_plan_by_block_keeps_inputs_on_the_host(tmp_path, here, monkeypatch):
    """Of the blocks that recompute, and of no other."""
    monkeypatch.setattr("strategies.host_inputs.is_on_host", lambda _: False)
    data = data_set(tmp_path, uneven=True)
    config = run_config(model_dir(tmp_path), "single", "full", micro=GLOBAL_BATCH, steps=3)
    plain = take_steps(trainer_for(config, data, here), 3)
    auto = SingleConfig(activation_checkpointing=ActivationCheckpointing.auto, memory_gib=1.0, offload_activations=True)
    for plan, kept in (([NONE, FULL], 1), ([SELECTIVE, FULL], 2), ([NONE, NONE], None)):
        monkeypatch.setattr("trainer.build.recomputation.choose_recomputation", lambda *_, plan=plan: (plan, True))
        trainer = trainer_for(replace(config, strategy=auto), data, here)
        for (loss, norm), (right_loss, right_norm) in zip(take_steps(trainer, 3), plain, strict=True):
            assert loss == pytest.approx(right_loss, rel=1e-6) and norm == pytest.approx(right_norm, rel=1e-6)
        host_inputs = trainer.engine.step_module.plan.host_inputs
        assert (host_inputs and host_inputs.peak.num_tensors) == kept
        assert host_inputs is None or host_inputs.num_live_tensors == host_inputs.live_bytes == 0


def test_inputs_on_the_host_are_no_activations_of_the_device():
    found = ActivationBytes(
        bytes_by_block_if_none=[100.0] * 3,
        bytes_by_block_if_selective=[40.0] * 3,
        bytes_by_block_if_full=[10.0] * 3,
        bytes_outside_blocks=50.0,
        transient_bytes=5.0,
    )
    assert found.with_inputs_on_host() == replace(
        found, bytes_by_block_if_selective=[30.0] * 3, bytes_by_block_if_full=[0.0] * 3
    )


def test_inputs_that_do_not_fit_the_host_are_refused(tmp_path, monkeypatch):
    """Two blocks, each input rounded up to a power of two: on a GPU, before weights are read."""
    data = data_set(tmp_path, uneven=False)
    strategy = SingleConfig(activation_checkpointing=FULL, offload_activations=True)
    config = run_config(model_dir(tmp_path), strategy, "full", micro=4)
    built, _ = build_model(config, load_tokenizer(config.model), data, half_on_gpu=False)
    work = largest_micro_batch(config, data)
    on_gpu = runtime.Runtime(0, 8, 0, 8, torch.device("cuda"), None)
    one = pinned_bytes(num_tokens_of_longest_micro_batch(built, work) * 32 * 2)
    least = 8 * (2 * one + 3 * 2**30)
    for memory, fits in ((least, True), (least - 1, False)):
        monkeypatch.setattr("trainer.build.recomputation.usable_host_memory_bytes", lambda memory=memory: memory)
        with nullcontext() if fits else pytest.raises(ConfigError, match="2 blocks keep"):
            check_host_memory_for_inputs(built, work, strategy, Precision.bf16, on_gpu)


@pytest.mark.parametrize(("size", "pinned"), [(0, 0), (1, 1), (4096, 4096), (4097, 8192), (2**30 + 1, 2**31)])
def test_pinned_memory_is_rounded_up_to_a_power_of_two(size, pinned):
    assert pinned_bytes(size) == pinned


def test_a_budget_without_a_plan_is_a_problem(tmp_path):
    config = run_config(model_dir(tmp_path), SingleConfig(memory_gib=4.0), "full", micro=4)
    (problem,) = (line for line in config_problems(config) if "memory_gib" in line)
    assert problem.startswith("strategy.memory_gib=4:") and "activation_checkpointing=auto" in problem


KEPT = SftConfig(forgetting=ForgettingConfig(kl_weight=0.5))


@pytest.mark.parametrize(
    ("objective", "make", "tuning", "quantisation"),
    [
        (ClassificationConfig(), "labelled", "full", "none"),
        (DpoConfig(), "pairs", "lora", "none"),
        (KtoConfig(), "rated", "lora", "none"),
        (KtoConfig(), "rated", "lora", "nf4"),
        (KtoConfig(), "rated", "full", "none"),
        (KEPT, "replay", "lora", "int8"),
    ],
)
def test_recomputation_is_counted_for_other_objectives_and_quantised_bases(
    tmp_path, objective, make, tuning, quantisation
):
    """A classifier on padded rows, answers beside a reference, replayed documents; also on a quantised base."""
    if quantisation != "none":
        pytest.importorskip("bitsandbytes")
    data = {"labelled": labelled_set, "pairs": pair_set, "rated": rated_set, "replay": replay_set}[make](tmp_path)
    config = run_config(model_dir(tmp_path), "single", tuning, micro=4, objective=objective)
    config.model.quantisation = Quantisation(quantisation)
    built, _ = build_model(config, load_tokenizer(config.model), data, half_on_gpu=False)
    found = counted_activations(built, largest_micro_batch(config, data), Precision.bf16)
    assert len(found.bytes_by_block_if_none) == 2
    by_mode = (found.bytes_by_block_if_none, found.bytes_by_block_if_full)
    assert all(n > f > 0 for n, f in zip(*by_mode, strict=True)), by_mode


def labelled_set(root):
    made = [Sample(s.input_ids, s.supervised, {"label": i % 3}) for i, s in enumerate(samples(48, uneven=False))]
    write(root / "labelled", made, lambda s: {"loss": 1}, {"fingerprint": "labelled"})
    opened = TokenDataset.open(root / "labelled")
    return PreparedData(train=opened, evaluation=opened, directory=root, report={}, label_names=["a", "b", "c"])
