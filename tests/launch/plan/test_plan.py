"""`shardtune plan`: words, cards, the table, JSON and exit codes; and what the answer is computed from."""

import json
import os
import re
import shlex
import signal
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from launch import main as command
from launch.cluster import long_steps
from launch.config.compose import compose_config, num_launched_ranks
from launch.plan.answer import (
    budget_and_price_lines,
    cards_text,
    format_dollars,
    memory_savings_text,
    refused_variants_by_reason,
)
from launch.plan.cards import SHIPPED_CARD_NAMES
from launch.plan.command import compose_planned_run, read_plan_request
from launch.plan.job import prepare_planned_job
from launch.plan.planned_command import planned_command_lines
from launch.plan.progress import PlanProgress
from strategies.base import Fsdp2Config, Precision, StrategyName
from strategies.errors import ConfigError
from tests.helpers.building import model_dir
from tests.helpers.tokenizers import write_chat_data
from tests.strategies.test_mesh import SHARDS
from trainer.build.parts import prepare_data
from trainer.config.run import RunConfig
from trainer.config.validate import config_problems
from trainer.model.config import Quantisation
from trainer.model.loading import load_tokenizer
from trainer.planner import plan as plan_module
from trainer.planner import sweep
from trainer.planner.cost_model import CollectiveKind, CollectiveTiming, CollectiveTotal, MicroBatchWork
from trainer.planner.lengths import DocumentLengths
from trainer.planner.plan import PlannedJob, candidate_micro_batches, plan_choices
from trainer.planner.simulation import simulate_depth
from trainer.planner.speed import (
    COLLECTIVE_LATENCY_S,
    LINK_EFFICIENCY,
    MicroBatchLoad,
    collective_seconds,
    estimate_step_time,
    ring_bytes_per_s,
)
from trainer.planner.sweep import PlanAnswer
from trainer.planner.variants import PlanConfig, RunVariant, list_variants
from trainer.reporting.gpu_peaks import PEAK_TFLOPS

FIGURES = ("memory_gib", "fp32_tflops", "memory_gb_s", "link_gb_s", "node_gb_s", "host_gb_s", "price_per_hour")
GPUS = ["launcher.nodes=2", "launcher.gpus_per_node=4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_dir(tmp_path_factory.mktemp("plan"))


def plan(capsys, model, *words):
    """(exit code, what was printed)."""
    code = command.main(["plan", f"model.path={model}", "data.max_length=64", *words])
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.mark.parametrize("name", SHIPPED_CARD_NAMES)
def test_plan_card_has_every_figure_that_a_plan_needs(name):
    card = read_plan_request([f"hardware={name}"]).card
    assert card.name in PEAK_TFLOPS
    said = " ".join(card.sources)
    assert card.date and [key for key in FIGURES if key not in said] == []
    assert "bf16" in said or "fp16" in said  # of the figure in trainer/reporting/gpu_peaks.py
    assert card.tflops(card.precision(Precision.auto)) >= card.fp32_tflops
    assert card.node_gb_s > 0 and card.host_gb_s <= card.memory_gb_s


def test_plan_card_figures_can_be_replaced(tmp_path):
    asked = read_plan_request(["hardware=l4", "hardware.price_per_hour=0.5", "plan.offload=true"])
    card, settings = asked.card, asked.settings
    assert card.price_per_hour == 0.5 and settings.offload
    (tmp_path / "mine.yaml").write_text("name: NVIDIA L4\ncapability: [8, 9]\nmemory_gib: 20\n")
    with pytest.raises(ConfigError, match=r"hardware\.memory_gb_s=0: must be above 0"):
        read_plan_request([f"hardware={tmp_path / 'mine.yaml'}"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "hardware: not set; give the card to plan for, one of a100_40g"),
        (["hardware=h1000"], "hardware=h1000: there is no such card; did you mean h100_80g?"),
        (["hardware=A100"], "there is no such card; did you mean a100_40g or a100_80g?"),
        (["hardware=voodoo"], "there is no such card; one of a100_40g, "),
        (["hardware=cpu"], "shardtune train --dry-run, with the same settings, describes the run on this machine"),
        (["hardware=l4", "plan.exacct=true"], "there is no setting plan.exacct; did you mean plan.exact?"),
        (["hardware=l4", "hardware.memory_gib=much"], "hardware.memory_gib=much: "),
        (["hardware=l4", "hardware.name=Voodoo"], "hardware.name=Voodoo: its speed is not known"),
        (["hardware=torn.yaml"], "hardware=torn.yaml: while parsing a flow sequence"),
        (["hardware=list.yaml"], "hardware=list.yaml: the file must hold keys"),
        (["hardware=l4", "plan.quantisation=nf5"], "plan.quantisation=nf5: must be one of none, nf4"),
        (["hardware=l4", "plan.quantisation="], "plan.quantisation=: plan.quantisation needs a value"),
        (["hardware=l4", "plan.expert_imbalance=0.5"], "plan.expert_imbalance=0.5: must be at least 1"),
        (["hardware=l4", "plan.workers=-1"], "plan.workers=-1: must be at least 0"),
        (
            ["hardware=l4", "plan.theirs=[stock_loss,fused_loss]"],
            "a step has one loss; name one of stock_loss, fused_loss",
        ),
        (
            ["hardware=l4", "plan.theirs=[pure_bf16]", "tuning=lora"],
            "is of full tuning; set tuning=full, or leave it out",
        ),
        (
            ["hardware=l4", "plan.theirs=[stock_loss]", "objective=classification"],
            "is of a loss over words; objective=",
        ),
    ],
)
def test_plan_refuses_a_wrong_card_or_wrong_words(capsys, monkeypatch, tmp_path, model, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torn.yaml").write_text("name: [NVIDIA\nmemory_gib: {")
    (tmp_path / "list.yaml").write_text("- memory_gib: 80\n")
    code, out = plan(capsys, model, *words)
    assert code == 64 and said in out


@pytest.mark.parametrize("hardware", [[], ["hardware=h100"], ["hardware=l4"]])
def test_plan_reports_the_mistakes_of_the_run_together_with_a_missing_card(capsys, hardware):
    words = ["plan", "model.path=./missing", "tunning=lora", "optim.lr=fast", "plan.workers=-1", *hardware]
    assert command.main(words) == 64
    said = capsys.readouterr().err
    mistakes = ["tunning=lora: ", "optim.lr=fast: ", "model.path=./missing: does not exist"]
    mistakes += ["plan.workers=-1: ", *["hardware"] * (hardware != ["hardware=l4"])]
    assert f"{len(mistakes)} problems" in said
    assert [said.count(mistake) for mistake in mistakes[:-1]] == [1] * (len(mistakes) - 1)
    assert command.main([*words[:4], "hardware=l4"]) == 64
    assert "3 problems" in capsys.readouterr().err, "without a problem of plan's own arguments, too"


def test_plan_says_what_to_do_in_place_of_a_sweep(capsys, model):
    code, said = plan(capsys, model, "hardware=l4", "-m", "strategy=fsdp2,zero3", "optim.lr=1e-3,1e-4")
    assert code == 64 and "add -m" not in said and "key=value" not in said
    assert said.count("run it once for each") == 3


def test_without_a_model_or_with_a_batch_that_does_not_divide(capsys, model, tmp_path):
    assert command.main(["plan", "hardware=l4"]) == 64
    assert "model.path: not set" in capsys.readouterr().err
    assert command.main(["plan", "hardware=l4", f"model.path={tmp_path}", "data.max_length=64"]) == 64
    said = capsys.readouterr().err
    assert said.count("holds no config.json") == 1 and "simulated" not in said, (
        "said once, before anything is simulated"
    )
    code, out = plan(capsys, model, "hardware=l4", *GPUS, "batch.global=16", "batch.micro=4", "strategy=ddp")
    assert code == 64 and "batch.micro=4 x 8 ranks = 32; set batch.global=32, or batch.micro=1 or 2" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["batch.global=10", "launcher.gpus_per_node=4"], "batch.global=10: must be a multiple of batch.micro=1 x 4"),
        (["batch.global=1", "batch.micro=1", "launcher.gpus_per_node=4"], "batch.global=1: must be a multiple"),
        (["batch.micro=0"], "batch.micro=0: must be at least 1"),
        (["budget.steps=-5"], "budget.steps=-5: must be at least 1"),
        (["budget.steps=5", "budget.epochs=1"], "exactly one of budget.steps, budget.epochs and budget.tokens"),
        (["data.max_length=0"], "data.max_length=0: must be at least 2"),
        (["launcher.gpus_per_node=0"], "launcher.gpus_per_node=0: asks for nodes without GPUs"),
        (["launcher.gpus_per_node=-2"], "launcher.gpus_per_node=-2: must be at least 0"),
        (["launcher.nodes=0"], "launcher.nodes=0: must be at least 1"),
        (["tuning=lora", "tuning.rank=0"], "tuning.rank=0: must be at least 1"),
        (["strategy=single", *GPUS], "strategy=single: runs in one process, not 8"),
        (["run.must_fit=true", "run.resume=nowhere"], "run.resume=nowhere: is not a directory"),
        (["batch.micro=3", "batch.global=4", "data.path={data}"], "batch.global=4: must be a multiple"),
    ],
)
def test_plan_refuses_once_what_train_would_refuse_before_data_is_prepared(
    capsys, monkeypatch, tmp_path, model, words, said
):
    def prepared(*args, **kwargs):
        raise AssertionError("data was prepared")

    monkeypatch.setattr("trainer.build.parts.prepare_data", prepared)
    data = write_chat_data(tmp_path / "chats.jsonl")
    code, out = plan(capsys, model, "hardware=l4", *[word.format(data=data) for word in words])
    assert code == 64 and out.count(said) == 1


def test_plan_looks_at_all_values_of_an_automatic_micro_batch(model):
    card = read_plan_request(["hardware=l4"]).card
    config, typed = compose_planned_run([f"model.path={model}", "batch.micro=auto"], card)
    assert config.batch["micro"] == 1 and "batch.micro" not in typed


def pasted(said):
    """(verb, words) of the command that a plan ends with, as a shell reads them."""
    command_line = re.search(r"^shardtune (?:train|submit) (?:.*\\\n)*.*$", said, re.MULTILINE)
    return shlex.split(command_line[0].replace("\\\n", ""))[1:]


def refused_by_train(verb, *words):
    """(ranks, what its validation says of the words, but for data that is not there)."""
    config = compose_config([*words, *(["launcher=slurm"] if verb == "submit" else [])], check=False).config
    world = num_launched_ranks(config)
    return world, [p for p in config_problems(config, world_size=world) if not p.startswith("data.path: not set")]


def test_where_nothing_fits_ranks_may_share_rows(capsys, tmp_path):
    """Long rows of a wide MLP, on cards that are too small for a whole row, for half of it, and not for a quarter."""
    wide = model_dir(tmp_path, intermediate_size=4096, max_position_embeddings=262144)
    words = ["strategy=fsdp2", "strategy.activation_checkpointing=full", "tuning=lora", "data.max_length=262144"]
    words.append("budget.steps=1")
    asked = ["hardware=l4", "hardware.memory_gib=5", *GPUS, *words, "batch.global=8"]
    code, out = plan(capsys, wide, *asked, "--json")
    answer = json.loads(out[out.index("{") : out.rindex("}") + 1])
    assert code == 0 and "nothing fits: looking at 2 further options, with rows that ranks share" in out
    assert [way["settings"][2] if way["fits"] else way["fits"] for way in answer["options"]] == [
        "parallel.sequence=4",
        False,
        False,
    ]
    assert "has 4 query heads in a layer, so that some rank would have none" in json.dumps(answer)
    assert refused_by_train("submit", f"model.path={wide}", *words, *GPUS, *answer["best"]) == (8, [])
    code, out = plan(capsys, wide, *asked, "parallel.sequence=2")
    assert code == 69 and "further options" not in out, "what was typed stays"


def test_host_memory_that_is_not_there_keeps_a_way_from_fitting(capsys, model):
    """Inputs of blocks wait on the host: pinned memory of all ranks of a node, and their processes."""
    asked = ["hardware=l4", *GPUS, "strategy=fsdp2", "strategy.activation_checkpointing=full", "data.max_length=256"]
    asked += ["strategy.offload_activations=true", "batch.global=8"]
    code, out = plan(capsys, model, *asked, "--json")
    way = json.loads(out[out.index("{") : out.rindex("}") + 1])["options"][0]
    # Two blocks of 256 x 32 values in bf16: 16 KiB each.
    assert code == 0 and way["host_gib"] == pytest.approx(4 * (3 + 2 * 2**14 / 2**30))
    code, out = plan(capsys, model, *asked, "launcher.mem=10G", "parallel.sequence=1")
    assert code == 69 and "takes 12 GiB of a node's 10 GiB of host memory" in " ".join(out.split())


def test_the_words_to_paste_make_a_run(capsys, model):
    """The table is narrow; the words that it ends with are a run of as many ranks; JSON says the same."""
    asked = [
        "hardware=a10g",
        *GPUS,
        "strategy=fsdp2",
        "strategy.activation_checkpointing=full",
        "tuning=lora",
        "tuning.targets=[q_proj,v_proj]",
        "budget.tokens=1000000",
    ]
    code, out = plan(capsys, model, *asked)
    assert code == 0, out
    assert all(len(line) <= 80 for line in out.splitlines() if "model.path" not in line and "simulated" not in line)
    verb, *words = pasted(out)
    assert verb == "submit" and "tuning.targets=[q_proj,v_proj]" in words and "(with data.path of your own)" in out
    assert refused_by_train(verb, *words) == (8, [])
    assert "launcher.signal_lead_s" not in out
    # A card on which a step takes hours: longer than SLURM leaves a job to save.
    code, out = plan(capsys, model, *asked, "hardware.pace=1e8", "--json")
    answer = json.loads(out[out.index("{") : out.rindex("}") + 1])
    assert code == 0 and set(answer["best"]) <= set(words)
    assert [note.partition("; set ")[2].partition("=")[0] for note in answer["notes"]] == [
        "launcher.signal_lead_s",
        "run.timeout_s",
    ]
    best = answer["options"][0]
    assert sum(best["kinds_gib"].values()) == pytest.approx(best["peak_gib"], rel=1e-3, abs=1e-5)
    card = read_plan_request(["hardware=a10g"]).card
    assert best["hours"] > 0 and best["price"] == pytest.approx(best["hours"] * 8 * card.price_per_hour)
    assert {one["micro"] for one in answer["all"]} == {1, 2, 4}


@pytest.mark.parametrize(
    ("asked", "verb", "ranks"),
    [
        ([], "train", 1),
        (["launcher.processes=4"], "train", 4),
        (["launcher=local", "launcher.processes=4"], "train", 4),
        (["launcher=slurm"], "submit", 1),
        (["launcher.gpus_per_node=2", "launcher.partition=fast"], "submit", 2),
        (["launcher.partition=fast"], "submit", 1),
        (["launcher.nodes=2", "launcher.processes=2"], "submit", 4),
    ],
)
def test_the_command_starts_as_many_ranks_as_were_planned(model, asked, verb, ranks):
    """Wherever it is pasted: a host may have more GPUs, and jobs of SLURM get none that are not asked for."""
    card = read_plan_request(["hardware=a10g"]).card
    words = [f"model.path={model}", "budget.steps=1", "precision=bf16", *asked]
    config, _ = compose_planned_run(words, card)
    best = SimpleNamespace(
        overrides=["strategy=ddp", "batch.global=32", "batch.micro=2"], variant=RunVariant(config, ())
    )
    said = "\n".join(planned_command_lines(words, best, prepare_planned_job(config, card)))
    starts, *typed = pasted(said)
    assert (starts, *refused_by_train(starts, *typed)) == (verb, ranks, [])
    assert verb == "train" or compose_config([*typed, "launcher=slurm"], check=False).config.launcher.gpus_per_node > 0


def test_plan_says_how_many_cards_would_do(capsys, tmp_path):
    words = ["plan", "model=smollm2_135m", "tuning=full", "data.max_length=64", "hardware=l4", "hardware.memory_gib=2"]
    words += ["strategy=fsdp2", "strategy.activation_checkpointing=full", "batch.micro=1"]
    assert command.main([*words, f"to={tmp_path}"]) == 69
    found = re.search(r"(\d+) cards would do \((launcher[^)]*)\)", " ".join(capsys.readouterr().out.split()))
    num_cards, more_words = found.groups()
    assert int(num_cards) > 1 and f"{num_cards} cards would do" in (tmp_path / "plan.html").read_text()
    assert command.main([*words[:6], *shlex.split(more_words)]) == 0, "with them it fits"


def test_plan_says_that_nothing_fits(capsys, model, tmp_path):
    code, out = plan(capsys, model, "hardware=l4", "hardware.memory_gib=0.5", "strategy=single", f"to={tmp_path}")
    assert code == 69, out
    assert "Nothing fits" in out and "too large" in out
    page = (tmp_path / "plan.html").read_text()
    assert f"written: {tmp_path}/plan.html" in out and "Nothing fits" in page and "<b>too large</b>" in page
    # The parts of a bar add up to what the way needs.
    (label,) = set(re.findall(r'aria-label="(single, nothing recomputed[^"]*)"', page))
    *parts, total, card = map(float, re.findall(r" ([\d.]+)(?: GiB|$)", label))
    assert sum(parts) == pytest.approx(total, abs=0.06) and total > card == 0.5


def test_plan_shows_separately_what_another_trainer_holds(capsys, model):
    """Arithmetic by hand: 12 bytes for each of 512 words and 64 tokens; weights, moments and update in bf16."""
    words = [
        "hardware=l4",
        "strategy=single",
        "strategy.activation_checkpointing=none",
        "batch.micro=1",
        "batch.global=1",
    ]
    told = [
        plan(capsys, model, *words, "--json", *more)
        for more in ([], ["plan.theirs=[stock_loss]"], ["plan.theirs=[pure_bf16]"])
    ]
    assert [code for code, _ in told] == [0, 0, 0]
    answers = [json.JSONDecoder().raw_decode(out)[0] for _, out in told]
    ours, loss, pure = (answer["options"][0] for answer in answers)
    theirs = [one.pop("theirs_gib") for one in (ours, loss, pure)]
    assert ours == loss == pure and theirs[0] is None, "what is told of this trainer is what it is without"
    assert theirs[1]["total"] > ours["peak_gib"] and theirs[1]["at"] == "loss"
    words = json.loads((model / "config.json").read_text())["vocab_size"]
    assert theirs[1]["parts"]["logits"] * 2**30 == 12 * words * 64
    assert theirs[1]["total"] == pytest.approx(sum(theirs[1]["parts"].values()))
    size = answers[0]["model"]["parameters"] / 2**30
    assert theirs[2]["parts"].items() >= {"weights": 2 * size, "moments": 4 * size}.items()


def killed(config, *asked, **exact):
    """What the kernel does to a process where memory is short."""
    if config.strategy.name == "zero2":
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def test_plan_shows_what_is_simulated_while_it_lasts(monkeypatch):
    """One simulation may take a minute on a slow machine."""
    monkeypatch.setattr(sweep, "PROGRESS_INTERVAL_S", 0.01)
    first, second = Future(), Future()
    variants = [SimpleNamespace(overrides=(f"strategy={name}", "batch.micro=1")) for name in ("ddp", "zero3")]
    shown = []

    def on_progress(*progress):
        shown.append(progress)
        if len(shown) == 3:
            second.set_result("of zero3")
        if len(shown) == 6:
            first.set_result("of ddp")

    found = sweep._collect_cost_models(variants, {second: 1, first: 0}, on_progress)
    assert found == ["of ddp", "of zero3"]
    assert shown[:3] == [(0, 2, "strategy=zero3 batch.micro=1")] * 3
    assert shown[-2] == (1, 2, "strategy=ddp batch.micro=1") and shown[-1] == (2, 2, "")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_plan_progress_is_a_line_in_a_terminal_and_one_each_15_seconds_in_a_log(monkeypatch, capsys, is_terminal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    now = 0.0
    monkeypatch.setattr("launch.plan.progress.time", SimpleNamespace(monotonic=lambda: now))
    shown = PlanProgress()
    shown.show_phase("reading the settings")
    shown.clear()
    for second in range(1, 41):
        now = float(second)
        shown.show(second // 10, 5, "strategy=zero3 " + "x" * 200)
    shown.show(5, 5, "")
    said = capsys.readouterr().err
    assert "simulated 1 of 5 options in 15 s; now strategy=zero3" in said and "simulated 5 options\n" in said
    assert said.count("simulated ") == (41 if is_terminal else 3)
    assert ("reading the settings" in said) == is_terminal and ("\033[K" in said) == is_terminal
    assert said.count("\n") == (1 if is_terminal else 3)


def test_a_simulation_that_is_killed_ends_no_plan(model, monkeypatch):
    """Those that were done by then stay; one after the other, so that it is known which."""
    monkeypatch.setattr(sweep, "_simulate", killed)
    asked = read_plan_request(["hardware=l4", "plan.workers=1"])
    card, settings = asked.card, asked.settings
    config, typed = compose_planned_run([f"model.path={model}", "strategy.activation_checkpointing=none"], card)
    found, _ = list_variants(config, settings, typed, 1)
    told = []
    forms = sweep.simulate_variants(found, job(card), [1] * len(found), settings, lambda *said: told.append(said))
    by_name = dict(zip([way.name for way in found], forms, strict=True))
    assert by_name["zero3"] == "done" and by_name["zero2"] == by_name["fsdp2"] == sweep.WORKER_KILLED
    assert told[-1][:2] == (len(found), len(found))


def test_plan_reports_what_cannot_be_simulated(capsys, tmp_path, model):
    settings = json.loads((model / "config.json").read_text())
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "config.json").write_text(json.dumps(settings | {"model_type": "nobodys"}))
    code, out = plan(capsys, odd, "hardware=l4", "strategy=single")
    assert code == 64 and "nobodys" in out and "Traceback" not in out


def job(card, *, nodes=2, per_node=4, batch=32):
    return PlannedJob(card, Precision.bf16, nodes, per_node, batch, DocumentLengths.uniform(64, 1))


def test_plan_variants_are_all_but_those_typed_or_ruled_out(model):
    card = read_plan_request(["hardware=l4"]).card
    config, typed = compose_planned_run([f"model.path={model}", *GPUS, "tuning=lora"], card)
    found, refused = list_variants(config, PlanConfig(), typed, 8)
    assert {way.name for way in found} == {"ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"}
    assert len(found) == 18
    assert {way.name for way, _ in refused} == {"single"} and "runs in one process" in refused[0][1]
    found, _ = list_variants(config, PlanConfig(offload=True), typed, 8)
    assert {way.name for way in found if way.offloads_to_host} == {"fsdp2", "hsdp", "zero1", "zero2", "zero3"}
    config, typed = compose_planned_run(
        [f"model.path={model}", "strategy=zero2", "strategy.activation_checkpointing=full"], card
    )
    assert [way.name for way in list_variants(config, PlanConfig(), typed, 1)[0]] == ["zero2"]


@pytest.mark.parametrize(("name", "asked", "shards"), SHARDS)
def test_gradients_that_wait_lie_among_the_ranks_of_a_replica(monkeypatch, name, asked, shards):
    """As the mesh has it (tests/strategies/test_mesh.py): a plan that knew better would promise room that is not there."""

    class RowsAlone:
        size_is_in_rows = True

        def memory_peak_at(self, units):
            return None

    def heard(form, among, num_expert_ranks):
        raise LookupError(among)

    monkeypatch.setattr(plan_module, "deferred_gradient_bytes", heard)
    strategy = Fsdp2Config(name=StrategyName(name), replicate=asked)
    card = read_plan_request(["hardware=l4"]).card
    with pytest.raises(LookupError) as found:
        plan_choices(RunVariant(RunConfig(strategy=strategy), ()), RowsAlone(), job(card), [1])
    assert found.value.args == (shards,)


def test_micro_batches_divide_the_part_of_a_rank():
    card = read_plan_request(["hardware=l4"]).card
    assert candidate_micro_batches(job(card, batch=96), None) == [1, 2, 3, 4, 6, 12]
    assert candidate_micro_batches(job(card, batch=96), 4) == [4]
    assert candidate_micro_batches(job(card, batch=96), 5) == []
    assert candidate_micro_batches(job(card, batch=10), None) == candidate_micro_batches(job(card, batch=4), 1) == []


def test_plan_rows_name_all_settings_stored_otherwise(model):
    card = read_plan_request(["hardware=l4"]).card
    config, typed = compose_planned_run([f"model.path={model}", "tuning=lora", "strategy=fsdp2"], card)
    settings = PlanConfig(offload=True, quantisation=[Quantisation.none, Quantisation.nf4])
    found, _ = list_variants(config, settings, typed, 1)
    labels = {(way.offloads_to_host, str(way.config.model.quantisation)): memory_savings_text(way) for way in found}
    assert labels == {
        (False, "none"): "",
        (True, "none"): "offload",
        (False, "nf4"): "nf4",
        (True, "nf4"): "offload+nf4",
    }
    form = SimpleNamespace(num_parameters=1, num_trained_parameters=1, layout="padded", notes=())
    answer = PlanAnswer(job(card), [], [], [(way, "too odd") for way in found], form)
    assert refused_variants_by_reason(answer)["too odd"].count(", none, offload+nf4") == 1


def test_a_small_job_costs_less_than_a_cent_on_one_card():
    assert (format_dollars(0.001), format_dollars(1234.5)) == ("less than $0.01", "$1,234.50")
    assert [cards_text(SimpleNamespace(world_size=ranks)) for ranks in (1, 8)] == ["1 card", "8 cards"]


@pytest.mark.parametrize(
    ("words", "card", "said"),
    [
        (
            ["budget.epochs=3"],
            [],
            ["budget.epochs=3 takes depends on the data: give data.path", "a million tokens cost $"],
        ),
        (["budget.steps=3"], [], ["the budget takes 0.01 hours on 8 cards: $0."]),
        (
            ["budget.steps=3"],
            ["hardware.price_per_hour=null"],
            ["0.01 hours on 8 cards", "give hardware.price_per_hour"],
        ),
        ([], ["hardware.price_per_hour=null"], ["no price was found for NVIDIA A10G; give hardware.price_per_hour"]),
        ([], [], ["a million tokens cost $", "with a budget (budget.tokens=...) the price of the whole run is shown"]),
    ],
)
def test_plan_says_what_the_cost_of_a_run_lacks(model, words, card, said):
    a10g = read_plan_request(["hardware=a10g", *card]).card
    config, _ = compose_planned_run([f"model.path={model}", *GPUS, *words], a10g)
    hours = 0.0125 if "budget.steps=3" in words else None
    price = None if hours is None or card else 0.1
    found = SimpleNamespace(variant=RunVariant(config, ()), budget_hours=hours, budget_dollars=price, tokens_per_s=1e4)
    told = " ".join(budget_and_price_lines(found, job(a10g)))
    assert all(part in told for part in said), told
    assert told.replace("the price of the whole run", "").count("price") == len(card) + (
        "give hardware.price_per_hour" in told
    )


def test_rates_of_groups_within_and_between_nodes():
    card = replace(read_plan_request(["hardware=h100_80g"]).card, link_gb_s=450.0, node_gb_s=400.0, gpus_per_node=8)
    assert ring_bytes_per_s(card, 8, 1) == 450e9 * LINK_EFFICIENCY
    assert ring_bytes_per_s(card, 32, 4) == 400e9 * LINK_EFFICIENCY  # a ring leaves a node by all its ports
    assert ring_bytes_per_s(card, 4, 4) == 50e9 * LINK_EFFICIENCY  # one rank a node has one of them


class Form:
    """As much of a form as speeds ask for."""

    num_blocks, accumulation, update_bytes, host_bytes = 4, 2, 0.0, 0
    token_all_to_alls = ()
    collective_totals = {  # noqa: RUF012 - never changed
        CollectiveKind("allgather_base", 8, 1, "bfloat16", CollectiveTiming.each_micro_batch): CollectiveTotal(
            4, 8 * 10**9
        ),
        CollectiveKind("allgather_base", 8, 1, "bfloat16", CollectiveTiming.last_micro_batch): CollectiveTotal(
            4, 8 * 10**9
        ),
        CollectiveKind("allreduce", 8, 1, "float32", CollectiveTiming.update): CollectiveTotal(1, 8),
    }

    def __init__(self, flops):
        self.flops = flops

    def micro_batch_work(self, units, squares):
        return MicroBatchWork(self.flops, moved_bytes=0.0, host_copy_bytes=0.0)


def test_plan_hides_exchange_behind_arithmetic_where_there_is_enough():
    card = replace(read_plan_request(["hardware=h100_80g"]).card, link_gb_s=400.0)
    one = 4 * COLLECTIVE_LATENCY_S + 7 / 8 * 8e9 / (400e9 * LINK_EFFICIENCY)
    inside, after = collective_seconds(Form(0.0), 4, card)
    assert inside == pytest.approx(4 * one) and after == pytest.approx(COLLECTIVE_LATENCY_S, rel=1e-3)
    slow = estimate_step_time(Form(1e15), MicroBatchLoad(1, 1, 4), card, Precision.bf16, ranks_per_node=8)
    assert slow.exposed_communication_s == pytest.approx(inside / 16 + after)
    fast = estimate_step_time(Form(1e9), MicroBatchLoad(1, 1, 4), card, Precision.bf16, ranks_per_node=8)
    assert fast.exposed_communication_s == pytest.approx(inside + after, rel=0.02)
    assert fast.total_s < slow.total_s


def test_dry_run_reports_the_simulated_step(capsys, model, tmp_path, monkeypatch):
    """The longest documents of the data, in the micro-batch of the run, as the simulation has it."""
    data = write_chat_data(tmp_path / "chats.jsonl")
    words = [
        f"model.path={model}",
        f"data.path={data}",
        f"data.cache_dir={tmp_path}",
        "batch.global=4",
        "batch.micro=2",
    ]
    words += ["budget.steps=1", "run.device=cpu", "tuning=lora"]
    assert command.main(["train", "--dry-run", *words]) == 0
    out = capsys.readouterr().out
    told = re.search(r"memory per rank of the longest micro-batch, simulated: most in (.*?);", out)
    total = re.search(r"  total +([\d.]+) MiB", out)
    config = compose_config(words).config
    config.batch["global"] = 4
    lengths = sorted(prepare_data(config, load_tokenizer(config.model)).train.lengths.tolist())[-2:]
    found = simulate_depth(config, lengths, device=torch.device("cpu"))
    assert told is not None and told[1] == str(found.peak_phase)
    assert "learning rate: 0.0002 after 0 steps of warm-up, then cosine\nnote: the run takes only 1 step," in out
    assert "resolved: optim.lr: 0.0002 (usual for lora" in out
    assert "launcher.signal_lead_s" not in out
    asked = ["launcher=slurm", "launcher.nodes=2", "launcher.gres=gpu:h100:8", "strategy=ddp", "batch.global=32"]
    monkeypatch.setattr(long_steps, "REACHED_PEAK_SHARE", 1e-12)  # a step takes hours
    assert command.main(["train", "--dry-run", *words, *asked]) == 0
    out = capsys.readouterr().out
    assert "batch: 32 = 2 micro x 1 accumulation x 16 ranks" in out
    assert "set launcher.signal_lead_s=" in out and "warning: a step takes about" in out
    assert total is not None and float(total[1]) == pytest.approx(found.peak_bytes / 2**20, abs=0.006)
