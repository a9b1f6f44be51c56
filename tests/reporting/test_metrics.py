"""What a meter makes of steps: sums and maxima over ranks in one reduction, medians over intervals, and known cards."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from strategies.base import StepResult
from strategies.runtime import Runtime, peak_memory_gib_by_metric
from trainer.reporting import gpu_meters, metrics, step_times
from trainer.reporting.gpu_peaks import PEAK_TFLOPS
from trainer.reporting.metrics import Meter, StepRecord
from trainer.reporting.reference_speed import reference_tflops
from trainer.reporting.run_record import PredictedCost, Receipt, RunRecord, Sharding
from trainer.reporting.step_times import STEP_PARTS
from trainer.session.run_facts import start_screen_text


def rank(number=0, world=1, device="cpu"):
    return Runtime(number, world, number, world, torch.device(device), None)


def step(number, *, loss=8.0, tokens=100, wait=0.5):
    result = StepResult(grad_norm=torch.tensor(1.0), skipped=torch.tensor(float(number == 2)))
    sums = {"loss": torch.tensor(loss), "accuracy": torch.tensor(3.0)}
    return StepRecord(number, 1e-3, tokens, 50, tokens * number, 50, {"loss": 16}, sums, result, 60, wait)


def flushed(number, peaks, monkeypatch, reduce):
    monkeypatch.setattr(metrics, "peak_memory_gib_by_metric", lambda device: peaks)
    monkeypatch.setattr(metrics, "sum_over_ranks", reduce)
    meter = Meter(rank(number, 2), 1.0, None, ("accuracy",))
    meter.add(step(1, loss=8.0 + number, wait=0.5 + number))
    meter.add(step(2))
    return meter.flush()


def test_memory_is_the_largest_of_all_ranks_and_costs_no_second_reduction(monkeypatch):
    sent = []
    peaks = [{"memory_gib": 3.0, "memory_reserved_gib": 9.0}, {"memory_gib": 5.0, "memory_reserved_gib": 6.0}]

    def note(values):
        sent.append(values.clone())
        return values

    for number in (0, 1):
        flushed(number, peaks[number], monkeypatch, note)
    assert len(sent) == 2
    for number in (0, 1):  # now as both would hear it
        first, second = flushed(number, peaks[number], monkeypatch, lambda _: sent[0] + sent[1])
        for row in (first, second):
            assert (row["memory_gib"], row["memory_reserved_gib"]) == (5.0, 9.0)
        assert first["loss"] == 17.0 / 16 and first["accuracy"] == 6.0 / 16
        assert first["data_wait_s"] == 1.0 and second["data_wait_s"] == 0.5
        assert "skipped" not in first and second["skipped"] == 1


def test_metrics_of_gpus_of_all_hosts_need_no_further_reduction(monkeypatch):
    """Two ranks, each the first of its host; the driver of the second does not tell its power."""
    figures = [(50, 2**31, 300_000, 60), (90, 2**32, None, 70)]
    asked = ("utilization", "device_memory_used", "power_draw", "temperature")
    sent, names = [], ["gpu/0/utilization_percent", "gpu/0/memory_gib", "gpu/0/power_w", "gpu/0/temperature_c"]

    def flushed(number, reduce):
        for name, figure in zip(asked, figures[number], strict=True):
            monkeypatch.setattr(torch.cuda, name, lambda device, figure=figure: figure + device.index)
        monkeypatch.setattr(metrics, "sum_over_ranks", reduce)
        monkeypatch.setattr(metrics, "peak_memory_gib_by_metric", lambda device: {"memory_gib": 1.0})
        meter = Meter(rank(number, 2), 1.0, None)
        meter.gpu_watcher = gpu_meters.GpuWatcher(torch.device("cuda:0"))
        meter.gpu_watcher.sample()
        meter.gpu_watcher.sample()
        meter.add(step(1))
        meter.add(step(2))
        return meter.flush(), meter

    for number in (0, 1):
        flushed(number, lambda values: sent.append(values.clone()) or values)
    for number in (0, 1):
        (first, second), meter = flushed(number, lambda _: sent[0] + sent[1])
        assert [second[name] for name in names] == [50, 2, 300, 60]
        assert second["gpu/1/utilization_percent"] == 90 and second["gpu/1/memory_gib"] == 4
        assert "gpu/1/power_w" not in second and not any(name.startswith("gpu/") for name in first)
        assert [each.tokens for each in meter.times_by_rank] == [60, 60]
        assert all(math.isnan(value) for value in meter.gpu_watcher.means())  # nothing was seen since


def test_gpu_driver_without_figures_is_asked_once_and_one_that_fails_later_again(monkeypatch):
    monkeypatch.setattr(gpu_meters, "MEASURE_EVERY_S", 0)
    nothing, something = [math.nan] * len(gpu_meters.GPU_FIGURE_NAMES), [50, math.nan, math.nan, math.nan]
    looks = iter([nothing, something])
    gpu_meters.GpuWatcher(torch.device("cuda:0"), lambda _: next(looks)).run()
    assert next(looks) is something
    looks = iter([something, nothing, something])
    with pytest.raises(StopIteration):  # it goes on for as long as there is something to look at
        gpu_meters.GpuWatcher(torch.device("cuda:0"), lambda _: next(looks)).run()


def test_gpu_memory_peaks_tell_allocated_from_reserved(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**31)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 2**32)
    assert peak_memory_gib_by_metric(torch.device("cuda:0")) == {"memory_gib": 2.0, "memory_reserved_gib": 4.0}
    assert peak_memory_gib_by_metric(torch.device("cpu")).keys() == {"memory_gib"}


def test_the_speed_of_a_run_is_a_median_that_forgets_the_first_interval(monkeypatch):
    clock = iter([0.0, 10.0, 10.0, 11.0, 11.0, 12.0, 12.0, 16.0, 16.0])
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(clock)))  # of nobody else here
    meter = Meter(rank(), 2e9, 1.0)
    assert meter.median_speeds() == {}
    meter._interval_began_at = 0.0
    meter.restart_clock()
    seen = []
    for number, tokens in enumerate([100, 100, 120, 100], 1):
        meter.add(step(number, tokens=tokens))
        seen.append(meter.flush()[0]["tokens_per_s"])
        if number == 1:
            assert meter.median_speeds()["tokens_per_s"] == 10.0  # all there is
    assert seen == [10.0, 100.0, 120.0, 25.0]
    speed = meter.median_speeds()
    usual = {"intervals": 3, "tokens_per_s": 100.0, "tokens_per_s_per_rank": 100.0, "mfu": pytest.approx(0.2)}
    assert speed == usual | {"step_s": 1.0, "supervised_tokens_per_s": 50.0}


@pytest.mark.parametrize(
    ("name", "figure"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H20", 148.0),  # not a H200, whose name begins with its own
        ("NVIDIA H200", 989.4),
        ("NVIDIA A10G", 70.0),  # not an A10
        ("NVIDIA A10", 125.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),  # a part of a card
        ("NVIDIA Z9000", None),
    ],
)
def test_cards_go_by_their_exact_names(name, figure, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found, source = reference_tflops(None, torch.device("cuda:0"))
    assert found == figure and name in source
    assert reference_tflops(5.0, torch.device("cuda:0")) == (5.0, "logging.reference_tflops")
    if figure is None:
        assert "set logging.reference_tflops" in source
        meter = Meter(rank(), 1.0, found)
        meter.add(step(1))
        assert "mfu" not in meter.flush()[0]


def test_peak_flops_of_geforce_cards_are_twice_the_plain_ones():
    """Independent of the table: cores x 2 x boost clock (GHz) x 2, from the cards' own pages."""
    cards = {"5090": (21760, 2.407), "4090": (16384, 2.52), "4070": (5888, 2.475), "3090": (10496, 1.695)}
    for card, (cores, clock) in cards.items():
        assert PEAK_TFLOPS[f"NVIDIA GeForce RTX {card}"] == pytest.approx(cores * 2 * clock * 2 / 1000, rel=0.01)


def test_start_screen_names_an_unknown_card_and_too_little_memory():
    record = RunRecord(
        global_batch=1,
        micro_batch=1,
        accumulation=1,
        world_size=1,
        tokens_per_step=1,
        total_steps=1,
        epochs=12.5,
        precision="bf16",
        attention="varlen",
        layout="padded",
        sharding=Sharding(parameters=10, trainable_parameters=5, exchange="nccl", held_per_rank=[10]),
        reference_tflops_source=reference_tflops_of("NVIDIA Z9000"),
        advice="set precision=fp32",
        receipt=Receipt(predicted=PredictedCost(memory_gib=79.5, device_gib=80.0)),
    )
    text = start_screen_text(record)
    assert "warning" not in text and "1 tokens a step, 1 steps, 12.50 epochs" in text
    assert "each document is used about 12.5 times in one step: batch.global=" in text
    assert "times in one step" not in start_screen_text(replace(record, epochs=0.9))
    record.receipt.predicted.memory_gib = 80.5
    text = start_screen_text(record)
    assert "warning: a rank is estimated to need 80.50 GiB, and has 80.00" in text
    assert "\nadvice: set precision=fp32" in text
    assert text.count("no MFU: the peak of NVIDIA Z9000 is not known: set logging.reference_tflops") == 1


def test_a_cpu_has_an_mfu_where_the_setting_gives_its_peak():
    """What it measures of itself at the start gave 117 to 360 % on a busy machine."""
    peak, source = reference_tflops(None, torch.device("cpu"))
    measured = RunRecord(device="cpu", reference_tflops=peak, reference_tflops_source=source)
    assert peak > 0 and measured.mfu_tflops is None
    assert "no MFU: the peak of a CPU is not known: set logging.reference_tflops" in start_screen_text(
        with_sizes(measured)
    )
    peak, source = reference_tflops(0.5, torch.device("cpu"))
    given = replace(measured, reference_tflops=peak, reference_tflops_source=source)
    assert given.mfu_tflops == 0.5 and "MFU against 0.50 TFLOP/s" in start_screen_text(with_sizes(given))
    card = RunRecord(device="cuda:0", reference_tflops=125.0, reference_tflops_source="data sheet")
    assert card.mfu_tflops == 125.0


def with_sizes(record):
    """The record with what its start screen needs besides."""
    sharding = Sharding(parameters=10, trainable_parameters=5, exchange="gloo", held_per_rank=[10])
    sizes = {"global_batch": 1, "micro_batch": 1, "accumulation": 1, "world_size": 1, "tokens_per_step": 1}
    return replace(record, sharding=sharding, total_steps=1, receipt=Receipt(predicted=PredictedCost()), **sizes)


def reference_tflops_of(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_name", lambda device: name)
        return reference_tflops(None, SimpleNamespace(type="cuda"))[1]


class Engine:
    """Counts in its own clock: a forward pass takes 1 s, a backward pass 2, the update 4."""

    world_size = 2

    def __init__(self, clock):
        self.clock = clock

    def forward(self, batch, *, last):
        self.clock[0] += 1
        return {"loss": batch["loss"], "last": last}

    def backward(self, loss, *, last):
        self.clock[0] += 2

    def step(self, lr_factor, limit=None):
        self.clock[0] += 4
        return lr_factor if limit is None else limit


def test_step_times_are_measured_for_each_part(monkeypatch):
    """Micro-batches of a step are added up; each row has its own step's, a mean over ranks."""
    clock = [0.0]
    monkeypatch.setattr(step_times, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(metrics, "sum_over_ranks", lambda values: values * 2)  # the other rank's are the same
    meter = Meter(rank(0, 2), 1.0, None, ("accuracy",))
    engine = meter.wrap_with_timing(Engine(clock))
    assert engine.world_size == 2
    assert engine.forward({"loss": 3}, last=False) == {"loss": 3, "last": False}
    engine.backward(1, last=False)
    engine.forward({"loss": 3}, last=True)
    engine.backward(1, last=True)
    assert engine.step(0.5) == 0.5
    engine.forward({"loss": 3}, last=True)
    engine.backward(1, last=True)
    assert engine.step(0.5, 2.0) == 2.0
    meter.add(step(1))
    meter.add(step(2))
    first, second = meter.flush()
    assert [first[part] for part in STEP_PARTS] == [2, 4, 4]
    assert [second[part] for part in STEP_PARTS] == [1, 2, 4]
    assert first["loss"] == 1.0 and first["data_wait_s"] == 0.5
