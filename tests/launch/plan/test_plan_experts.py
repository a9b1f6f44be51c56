"""`shardtune plan` of a mixture: experts distributed over ranks as ways, what is assumed of them, and the words to paste."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from launch import main as command
from launch.config.compose import compose_config
from launch.plan.dry_run import describe_run
from launch.plan.expert_notes import expert_parallel_notes, imbalance_notes
from launch.plan.from_run import _measured_imbalance
from strategies.base import Precision
from tests.helpers.building import model_dir
from tests.helpers.tokenizers import write_chat_data
from trainer.planner.dealt_experts import configs_with_expert_parallelism
from trainer.planner.hardware import find_card
from trainer.planner.lengths import DocumentLengths
from trainer.planner.plan import PlannedJob, with_imbalance
from trainer.planner.variants import PlanConfig, list_variants
from trainer.reporting.run_record import RunOutcome, RunRecord

WORDS = ["data.max_length=64", "hardware=h100_80g", "launcher.gpus_per_node=4", "strategy=fsdp2", "batch.micro=1"]
WORDS += ["strategy.activation_checkpointing=full", "budget.steps=10"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_dir(tmp_path_factory.mktemp("mixture"), "qwen3_moe", num_experts=8)


def planned(capsys, model, *words):
    code = command.main(["plan", f"model.path={model}", *WORDS, *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_plan_of_a_mixture_deals_its_experts(capsys, model, tmp_path):
    code, out, err = planned(capsys, model, "--json", f"to={tmp_path}")
    assert code == 0, err
    answer = json.loads(out)
    by_degree = {}
    for way in answer["options"]:
        (degree,) = [word.partition("=")[2] for word in way["settings"] if word.startswith("parallel.experts=")] or [
            "1"
        ]
        by_degree[degree] = way
    assert set(by_degree) == {"1", "2", "4"}, "of the ranks of a host"
    assert by_degree["4"]["peak_gib"] < by_degree["1"]["peak_gib"], "fewer experts are whole at a time"
    assert answer["experts"]["imbalance"] == 2
    notes = answer["experts"]["notes"]
    assert any("parallel.experts=" in note and "the fastest option that gathers all experts" in note for note in notes)
    assert any("2 times the mean of tokens in every layer (plan.expert_imbalance)" in note for note in notes)
    first_deals = any(word.startswith("parallel.experts=") for word in answer["options"][0]["settings"])
    assert (answer["experts"]["all_on_one_rank_gib"] is not None) == first_deals
    assert "Experts over ranks" in (tmp_path / "plan.html").read_text()


def test_a_typed_number_is_planned_alone_with_its_worst_case(capsys, model):
    code, out, err = planned(capsys, model, "parallel.experts=2", "plan.expert_imbalance=1.5")
    assert code == 0, err
    flat = " ".join(out.split())
    assert "1.5 times the mean of tokens" in flat
    assert "if one rank got all tokens, this option would take" in flat and "which fits" in flat
    assert "parallel.experts=2" in flat and "experts/4" not in flat
    rows = [line for line in out.splitlines() if line.startswith("fsdp2")]
    assert len(rows) == 1 and "experts/2" in rows[0]


def test_what_cannot_deal_experts_is_left_out(model, tmp_path):
    def variants(path, *words):
        config = compose_config(
            [f"model.path={path}", "data.max_length=64", "launcher=slurm", *words], check=False
        ).config
        config.batch.update({"micro": 1, "global": 48})
        return config

    dense = variants(model_dir(tmp_path, "llama"), "strategy=fsdp2", "launcher.nodes=1", "launcher.gpus_per_node=8")
    assert configs_with_expert_parallelism([dense], 8) == [[]]
    config = variants(model, "launcher.nodes=1", "launcher.gpus_per_node=6")  # of a host's six ranks two can be a group
    possible, _ = list_variants(config, PlanConfig(), set(), 6)
    found = {(way.name, way.config.parallel.experts) for way in possible if way.config.parallel.experts > 1}
    assert found == {("fsdp2", 2)}, "three ranks of a replica are no multiple of two"
    possible, _ = list_variants(config, PlanConfig(), {"parallel.experts"}, 6)
    assert all(way.config.parallel.experts == 1 for way in possible)


def test_the_imbalance_that_a_run_measured_is_taken():
    layers = [{"rank_max_over_mean": 1.2}, {"rank_max_over_mean": 1.7}]
    measured = _measured_imbalance(RunRecord(outcome=RunOutcome(experts=layers)), 4)
    assert measured.busiest_over_mean == 1.7
    assert _measured_imbalance(RunRecord(outcome=RunOutcome(experts=[{"max_over_mean": 3.0}])), 4) is None
    assert _measured_imbalance(RunRecord(), 4) is None
    job = PlannedJob(find_card("NVIDIA L4"), Precision.bf16, 1, 4, 8, DocumentLengths.uniform(64, 1))
    assert with_imbalance(job, PlanConfig(), None).imbalance_over(2) == 2
    assert with_imbalance(job, PlanConfig(expert_imbalance=3.0), measured).imbalance_over(8) == 3
    of_run = with_imbalance(job, PlanConfig(), measured)
    assert [of_run.imbalance_over(ranks) for ranks in (2, 4, 8)] == [1.7, 1.7, 2.0]


def test_a_plan_says_of_which_groups_the_imbalance_was_not_measured():
    job = PlannedJob(find_card("NVIDIA L4"), Precision.bf16, 1, 8, 8, DocumentLengths.uniform(64, 1))
    assert imbalance_notes(job, {2, 4})[0].endswith("(plan.expert_imbalance)")
    measured = replace(job, expert_imbalance=1.7, imbalance_measured_over=4)
    notes = imbalance_notes(measured, {2, 4, 8})
    assert [("1.7 times" in note, "did not measure" in note) for note in notes] == [
        (True, False),
        (False, True),
        (False, True),
    ]
    assert notes[1].startswith("with 2, ") and notes[2].startswith("with 8, ") and "2 times the mean" in notes[2]
    assert len(imbalance_notes(measured, {4})) == 1


def test_a_plan_deals_no_experts_that_its_teacher_cannot(model, tmp_path):
    """A teacher of six experts can be distributed over two ranks, not over four; a dense one is no obstacle."""
    teachers = {
        "six": model_dir(tmp_path / "six", "qwen3_moe", num_experts=6),
        "dense": model_dir(tmp_path / "dense", "llama"),
    }
    degrees = {}
    for name, teacher in teachers.items():
        words = [f"model.path={model}", "data.max_length=64", "launcher=slurm", "strategy=fsdp2", "launcher.nodes=1"]
        words += ["launcher.gpus_per_node=4", "objective=distillation", f"objective.teacher.path={teacher}"]
        config = compose_config(words, check=False).config
        config.batch.update({"micro": 1, "global": 8})
        (dealt,) = configs_with_expert_parallelism([config], 4)
        degrees[name] = [way.parallel.experts for way in dealt]
    assert degrees == {"six": [2], "dense": [2, 4]}


def answer_of(*choices, nodes=1):
    """A plan of `(parallel.experts, whether it fits, tokens a second)`, the best first."""
    best_choices = []
    for degree, fits, speed in choices:
        config = SimpleNamespace(parallel=SimpleNamespace(experts=degree))
        best_choices.append(SimpleNamespace(variant=SimpleNamespace(config=config), fits=fits, tokens_per_s=speed))
    job = PlannedJob(find_card("NVIDIA L4"), Precision.bf16, nodes, 8, 8, DocumentLengths.uniform(64, 1))
    return SimpleNamespace(best_choices=best_choices, planned_run=job, worst_imbalance_fit=None)


def test_a_plan_says_where_groups_cross_hosts():
    def crossing(*degrees, nodes):
        answer = answer_of(*((degree, True, 1.0) for degree in degrees), nodes=nodes)
        return [note for note in expert_parallel_notes(answer) if "cross hosts" in note]

    (note,) = crossing(8, 16, nodes=4)
    assert note.startswith("parallel.experts=16: groups of 16 ranks cross hosts of 8: ")
    assert "over the network" in note
    assert crossing(2, 8, nodes=4) == []
    assert crossing(8, nodes=1) == []


def test_a_plan_of_groups_that_cross_hosts_prints_the_note(capsys, model):
    code, out, err = planned(capsys, model, "parallel.experts=8", "launcher.nodes=2")
    assert code == 0, err
    # The note of the plan: what the run itself notes under "chosen for you" has no number.
    assert "parallel.experts=8: groups of 8 ranks cross hosts of 4" in " ".join(out.split())


def test_a_plan_offers_expert_parallelism_where_nothing_else_fits():
    """The branch of a layer that is too large to be gathered; and those beside it."""
    only = "parallel.experts=4 fits, and nothing does that gathers all experts of a layer on each rank"
    assert expert_parallel_notes(answer_of((4, True, 100.0), (1, False, 50.0)))[0] == only
    both = expert_parallel_notes(answer_of((4, True, 100.0), (1, True, 50.0)))
    assert both[0].startswith("parallel.experts=4 is 2.00 times as fast as the fastest option that gathers")
    slower = expert_parallel_notes(answer_of((1, True, 100.0), (4, True, 50.0)))
    assert slower[0].startswith("parallel.experts=4 is slower, 0.50 times the speed of the fastest option that gathers")
    for notes in (expert_parallel_notes(answer_of((4, False, 1.0), (1, False, 1.0))), both, slower):
        assert only not in notes
    assert expert_parallel_notes(answer_of((1, True, 100.0))) == []


def test_dry_run_of_a_local_model_says_how_experts_are_spread(model, tmp_path):
    data = write_chat_data(tmp_path / "train.jsonl", 16)
    words = [f"model.path={model}", f"data.path={data}", f"data.cache_dir={tmp_path / 'cache'}", "budget.steps=2"]
    words += ["strategy=fsdp2", "parallel.experts=2", "launcher.processes=4", "run.device=cpu"]
    dry_run = describe_run(compose_config([*words, "batch.global=8", "batch.micro=2"]).config)
    assert dry_run.exit_code == 0
    held = (
        "experts: 2 layers of 8 are distributed over 2 ranks (parallel.experts); "
        "each rank holds 4 of a layer, which 2 ranks shard"
    )
    assert held in dry_run.text and "each token goes to its 2 experts and back: about " in dry_run.text
    assert "memory per rank" in dry_run.text and "cross hosts" not in dry_run.text


def test_dry_run_of_a_published_shape_says_how_experts_are_spread(tmp_path):
    """Also that groups cross hosts, where they do."""
    data = write_chat_data(tmp_path / "train.jsonl", 2)
    words = ["model=qwen3_30b_a3b", f"data.path={data}", "data.max_length=64", "tuning=lora", "strategy=fsdp2"]
    words += ["strategy.activation_checkpointing=full", "parallel.experts=8", "launcher=slurm", "launcher.nodes=2"]
    words += ["launcher.gpus_per_node=4", "batch.global=8", "batch.micro=1", "budget.steps=1"]
    dry_run = describe_run(compose_config(words).config)
    assert dry_run.exit_code == 0
    assert (
        "experts: 48 layers of 128 are distributed over 8 ranks (parallel.experts); each rank holds 16 of a layer"
        in dry_run.text
    )
    assert "resolved: parallel.experts: groups of 8 ranks cross hosts of 4: " in dry_run.text
    assert "cross hosts" in dry_run.facts["substitutions"]["parallel.experts"]
