"""Ranges and rules: what is refused before any process starts, and what the line says about it."""

import dataclasses
import itertools
import re
import types
import typing
from collections import defaultdict

import pytest

from launch.config.compose import compose_config
from launch.config.known_settings import all_settings
from launch.config.removed import REASON_BY_NOT_OFFERED_KEY
from strategies.errors import ConfigError, key_of_problem
from strategies.registry import STRATEGIES
from strategies.settings import Range, SettingMetadata, number, setting_metadata
from tests.helpers.covering import chosen
from trainer.config.run import RunConfig
from trainer.config.tree import SETTINGS_CLASSES_BY_GROUP, keyed_fields, metadata_by_key
from trainer.config.validate import config_problems
from trainer.optim.config import OptimName

RANGED = [key for key, traits in metadata_by_key().items() if traits.bounds is not None]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "models/small").mkdir(parents=True)
    (tmp_path / "models/small/config.json").write_text("{}")


def problems(*words, world_size=1):
    base = ["model.path=model", "data.path=train.jsonl", "run.device=cpu"]
    budget = [] if any(word.startswith("budget.") for word in words) else ["budget.steps=10"]
    return config_problems(compose_config([*base, *budget, *words], check=False).config, world_size=world_size)


def test_smallest_command_of_a_run_is_legal():
    assert problems() == []


def test_every_number_has_a_range():
    numeric = set()
    for key, setting in all_settings().items():
        parts = typing.get_args(setting.type) if isinstance(setting.type, types.UnionType) else (setting.type,)
        if {int, float} & set(parts):
            numeric.add(key)
    assert numeric == set(RANGED), "give these fields a range: number(<default>, least=..., advice=...)"


def test_settings_classes_that_share_a_key_agree_on_its_traits():
    """Who asks by key gets the first class's answer; a second one that says otherwise would not be heard."""
    for group, choices in SETTINGS_CLASSES_BY_GROUP.items():
        for settings in choices.values():
            for each in keyed_fields(settings, group):
                first = metadata_by_key()[each.key]
                assert (each.metadata.reach, each.metadata.resume) == (first.reach, first.resume), (settings, each.key)
                assert each.metadata.bounds == first.bounds, (settings, each.key)


def test_settings_subclass_with_another_default_keeps_the_traits_of_the_field():
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Parent:
        rate: float = number(0.1, above=0, advice="0.1 as a rule", resume="optimizer")
        plain: int = 1

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Child(Parent):
        rate: float = 0.5

    assert setting_metadata(Child, "rate") == setting_metadata(Parent, "rate")
    assert setting_metadata(Child, "rate").bounds == Range(above=0) and Child().rate == 0.5
    assert setting_metadata(Child, "rate", {"rate": "0.5 here"}).advice == "0.5 here"
    assert setting_metadata(Parent, "plain") == SettingMetadata()


def test_advice_of_the_settings_group_goes_before_that_of_the_class():
    [line] = [each for each in problems("review.write.beams=0") if "beams" in each]
    assert line == "review.write.beams=0: must be at least 1; 1 is greedy"
    [line] = [each for each in problems("evaluation.generate.beams=0") if "beams" in each]
    assert line.endswith("1 is greedy; 4 is usual for summaries and translation")


def plan_choice(key):
    """The words that a key needs to mean something: the choice of its group."""
    setting = all_settings()[key]
    return f"{key.split('.')[0]}={setting.available_under[-1]}" if setting.available_under else ""


RANGED_BY_CHOICE = defaultdict(list)
for ranged in sorted(set(RANGED) - {"objective.rewards.*.weight"}):  # which may be negative: a penalty
    RANGED_BY_CHOICE[plan_choice(ranged)].append(ranged)


@pytest.mark.parametrize("choice", RANGED_BY_CHOICE)
def test_numbers_outside_their_ranges_are_refused_all_at_once(choice):
    for value in (-1, -0.5):
        keys = RANGED_BY_CHOICE[choice]
        if value != int(value):
            keys = [key for key in keys if all_settings()[key].type in (float, float | None)]
        typed = [f"{key.replace('*', 'first')}={value}" for key in keys]
        found = problems(*filter(None, [choice]), *typed, world_size=None)
        unrefused = [word for word in typed if not any(line.startswith(f"{word}: must be ") for line in found)]
        assert unrefused == []


def test_a_weight_of_a_reward_may_be_negative_but_not_without_bounds():
    key = "objective.rewards.first.weight"
    rest = ("objective=grpo", "objective.rewards.first.kind=maths")
    assert not any(line.startswith(key) for line in problems(*rest, f"{key}=-0.5", world_size=None))
    assert any(line.startswith(f"{key}=-1001: must be ") for line in problems(*rest, f"{key}=-1001", world_size=None))


@pytest.mark.parametrize("value", [".nan", "inf", "nan"])
def test_no_number_is_infinite_or_not_a_number(value):
    words = [f"optim.lr={value}"] if value != ".nan" else ["optim.lr=nan"]
    assert any("optim.lr=" in line and "must be" in line for line in problems(*words))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("budget.steps=1 budget.epochs=1", "exactly one of"),
        ("budget.steps=null", "budget: not set"),
        ("batch.global=30 batch.micro=4", "set batch.global=28 or batch.global=32, or batch.micro=1 or 2 or 3"),
        ("model.path=null", "model.path: not set"),
        ("model.path=train.jsonl", "is a file"),
        ("model.path=./nowhere", "does not exist"),
        ("model.path=/no/where/model", "does not exist"),
        ("model.path=model/7b", "does not exist"),
        ("model.path=models", "holds models, and is none; give one of them, as in model.path=models/small"),
        ("data.path=null", "data.path: not set"),
        ("data.path=no.jsonl", "data.path=no.jsonl: does not exist"),
        ("data.path=[train.jsonl,no.jsonl]", "data.path=no.jsonl: does not exist"),
        ("data.eval_path=no.jsonl", "data.eval_path=no.jsonl: does not exist"),
        ("data.eval_path=train.jsonl data.eval_share=0.1", "set one of the two"),
        ("objective=classification data.packing=true", "set data.packing=false"),
        ("objective=classification data.format=text", "data.format=labelled"),
        ("objective=classification objective.labels=[a]", "two or more"),
        ("data.format=labelled", "objective=classification"),
        ("data.packing=true data.layout=padded", "data.layout=auto"),
        ("objective=dpo data.packing=true", "set data.packing=false"),
        ("objective=orpo data.over_length=split", "data.over_length=truncate or data.over_length=drop"),
        ("objective=simpo data.format=messages", "set data.format=preference"),
        ("objective=dpo data.format=labelled", "set data.format=preference"),
        ("objective=reward data.layout=padding_free", "set data.layout=auto"),
        ("objective=dpo objective.loss_type=ipo objective.label_smoothing=0.1", "objective.loss_type=sigmoid"),
        ("objective=kto data.packing=true", "set data.packing=false"),
        ("objective=kto data.over_length=split", "data.over_length=truncate or data.over_length=drop"),
        ("objective=kto data.format=messages", "set data.format=thumbs, or data.format=preference"),
        ("objective=pretrain data.format=alpaca", "set data.format=text, or objective=sft"),
        ("objective=pretrain data.learn.turns=last", "reads none; leave it out"),
        ("objective=pretrain model.chat_template=train.jsonl", "plain texts, which need none"),
        ("objective=distillation", "objective.teacher.path: not set"),
        ("objective=distillation objective.teacher.path=./no", "objective.teacher.path=./no: does not exist"),
        ("objective=distillation objective.teacher.path=train.jsonl", "is a file"),
        ("objective=distillation objective.teacher.path=model model.add_tokens=[<x>]", "leave them out"),
        (
            "objective=distillation objective.teacher.path=model objective.interpolation=0.1",
            "set objective.divergence=jensen_shannon, not forward_kl",
        ),
        ("objective.forgetting.kl_weight=0.1", "data.sources.<name>.replay=true"),
        ("objective.forgetting.replay_loss=false", "set objective.forgetting.kl_weight=0.5"),
        (
            "data.path=null data.sources.a.path=train.jsonl data.sources.a.replay=true objective=dpo",
            "take objective=sft or objective=pretrain",
        ),
        (
            "data.path=null data.sources.a.path=train.jsonl data.sources.a.replay=true objective.forgetting.kl_weight=1 "
            "objective.forgetting.replay_loss=false",
            "mark only the general text",
        ),
        (
            "data.path=null data.sources.a.path=train.jsonl data.sources.a.weight=0",
            "every weight is 0, so nothing is left to train on",
        ),
        ("model.chat_template=no.jinja", "no such file"),
        ("evaluation.every_steps=5", "there is no evaluation data"),
        ("evaluation.patience=5 data.eval_share=0.1 evaluation.every_steps=0", "set evaluation.every_steps as well"),
        ("export.checkpoint=best", "nothing is evaluated that could say which is the best"),
        (
            "evaluation.patience=5 data.eval_share=0.1 evaluation.generate.samples=4 evaluation.watch=eval/bleu",
            "evaluation.every_steps=auto makes at the start and at the end alone",
        ),
        ("evaluation.every_steps=sometimes", "must be a whole number, or auto"),
        ("evaluation.watch=test/loss data.eval_share=0.1", "nothing may be chosen by them"),
        ("evaluation.watch=loss", "such as eval/loss"),
        ("evaluation.watch=eval/accuracy evaluation.greater_is_better=false", "a larger value is better"),
        ("evaluation.greater_is_better=true", "a smaller value is better"),
        ("challenges.forgetting.limit=3%", "nothing is measured; give challenges.forgetting.data"),
        ("challenges.forgetting.limit=three challenges.forgetting.data=train.jsonl", "as 3% or 0.03"),
        ("challenges.forgetting.tasks=[facts]", "there is no such task in evaluation.tasks"),
        ("challenges.forgetting.data=none.jsonl data.eval_share=0.1", "challenges.forgetting.data=none.jsonl"),
        ("challenges.forgetting.data=train.jsonl", "there is no evaluation data, only tasks"),
        ("model.neftune_alpha=5 tuning=prompt", "use tuning=lora"),
        ("optim=schedule_free schedule=constant optim.ema_decay=0.9", "averages weights itself"),
        (
            "data.path=null data.sources.a.path=train.jsonl data.sources.a.replay=true objective.forgetting.kl_weight=1 "
            "objective.label_smoothing=0.1",
            "spread targets pull away",
        ),
        ("run.resume=always", "is not a directory; give a checkpoint directory (step-...), auto or never"),
        ("checkpoint.every_steps=5 checkpoint.every_minutes=10", "says already when"),
        ("checkpoint.fallback_dir=train.jsonl", "must be a directory on another disk that this user can write"),
        ("checkpoint.fallback_dir=train.jsonl/spare", "must be a directory on another disk that this user can write"),
        ("schedule=wsd schedule.warmup_share=0.5 schedule.decay_share=0.6", "more than the whole run"),
        ("schedule.warmup_steps=11", "more than budget.steps=10"),
        ("precision=fp16", "not supported on CPUs"),
        ("strategy=zero3 precision=fp16", "precision=bf16"),
        ("strategy=fsdp2 strategy.replicate=2", "strategy=hsdp"),
        ("strategy=hsdp", "must divide the number of ranks, 1"),
        ("strategy=zero2 strategy.offload_parameters=cpu", "use strategy=zero3"),
        ("strategy=zero2 strategy.stage=3", "use strategy=zero3"),
        ("strategy=zero3 strategy.offload_parameters=disk", "one of none, cpu, nvme"),
        ("strategy=zero3 strategy.offload_parameters=nvme", "needs strategy.nvme_path"),
        ("strategy=zero3 strategy.nvme_path=no/drive", "no such directory"),
        ("optim.betas=[0.9]", "two numbers"),
        ("optim.betas=[0.9,1]", "below 1"),
        ("optim=lion optim.betas=[0.9,1]", "[0.9,0.99] as a rule"),
        ("optim=sgd optim.nesterov=true optim.momentum=0", "set optim.momentum=0.9"),
        ("optim=schedule_free", "set schedule=constant, not cosine"),
        ("optim=muon strategy=fsdp2 strategy.cpu_offload=true", "set strategy.cpu_offload=false"),
        ("optim.groups.head.lr_factor=2", "optim.groups.head.match: not set"),
        ("optim.groups.head.match=(x", "not a regular expression"),
        ("optim.layer_decay=1.5", "at most 1"),
        ("objective=classification objective.class_weights=even", "must be balanced, or a list"),
        ("objective=classification objective.class_weights=[1,0]", "numbers above 0"),
        ("objective=classification objective.labels=[a,b] objective.class_weights=[1]", "1 weights for 2 labels"),
        ("objective=classification objective.multi_label=true objective.labels=['a|b',c]", "rename it"),
        ("evaluation.watch=eval/f1_macro data.eval_share=0.1", "only classifiers have it"),
        ("tuning=lora tuning.targets=[]", "must be all-linear"),
        ("tuning=lora tuning.targets=(q", "not a regular expression"),
        ("tuning=lora tuning.targets=auto", "tuning.targets=all-linear"),
        ("tuning=lora tuning.init=pisa", "did you mean pissa?"),
        ("tuning=lora tuning.init=pissa tuning.dora=true", "tuning.dora=false"),
        ("tuning=lora tuning.rank_pattern={q_proj:0}", "tuning.rank_pattern.q_proj=0: must be at least 1"),
        ("tuning=lora tuning.alpha_pattern={q_proj:0}", "must be above 0"),
        ("tuning=freeze", "nothing is chosen to train"),
        ("tuning=freeze tuning.layers=2", "last-<n> or <first>-<last>"),
        ("tuning=freeze tuning.modules=(q", "not a regular expression"),
        ("tuning=ia3 tuning.feedforward=[down_proj]", "list tuning.targets too"),
        ("tuning=ia3 tuning.targets=[k_proj] tuning.feedforward=[down_proj]", "must be among tuning.targets"),
        ("tuning=vera precision=bf16 strategy=zero2", "use fp32 or strategy=ddp"),
        ("tuning=peft", "tuning.type: not set"),
        ("tuning=peft tuning.type=prefix_tuning", "use tuning=prefix"),
        ("tuning=peft tuning.type=p_tuning", "use tuning=p_tuning"),
        ("tuning=peft tuning.type=cpt", "use tuning=prompt, p_tuning or prefix"),
        ("tuning=prompt tuning.init=text", "needs tuning.init_text"),
        ("tuning=prompt tuning.init_text=x", "set tuning.init=text, or leave it out"),
        ("tuning=prompt tuning.num_virtual_tokens=0", "must be at least 1; 8 to 100 as a rule"),
        ("tuning=prefix data.packing=true", "set data.packing=false"),
        ("tuning=p_tuning data.layout=padding_free", "set data.layout=padded"),
        ("tuning=prefix objective=classification", "use tuning=lora or tuning=prompt"),
        ("tuning=adaption_prompt objective=reward", "cannot store a classification head"),
        ("tuning=prefix export.merge=true", "use export.merge=false"),
        ("tuning=bottleneck export.merge=true", "a nonlinear network cannot be merged"),
        ("tuning=bottleneck model.add_tokens=[x]", "use tuning=lora or tuning=full"),
        ("tuning=bottleneck tuning.size=0", "8 to 256 as a rule"),
        ("tuning=peft tuning.type=adalora", "use tuning=adalora"),
        ("tuning=adalora strategy=fsdp2 launcher.processes=2", "use strategy=ddp, or tuning=lora"),
        ("tuning=adalora tuning.target_rank=12", "set tuning.init_rank=18"),
        ("tuning=adalora tuning.initial_share=0.6 tuning.final_share=0.4", "no step is left to take ranks in"),
        ("tuning=adalora tuning.from=runs/x/export", "has a different rank"),
        ("tuning=peft tuning.type=oft", "use tuning=oft"),
        ("tuning=peft tuning.type=hraa", "did you mean hra?"),
        ("tuning=peft tuning.type=hra tuning.options.rr=8", "has no such option; did you mean r?"),
        ("tuning=peft tuning.type=hra tuning.options.target_modules=q", "set tuning.targets"),
        ("tuning=peft tuning.type=beft export.merge=true", "use export.merge=false"),
        ("tuning=peft tuning.type=c3a strategy.activation_checkpointing=selective", "use full or none"),
        ("strategy.mlp_tokens=64 strategy.activation_checkpointing=selective", "keeps the MLP's products"),
        ("strategy.mlp_tokens=64 strategy.activation_checkpointing=auto", "counts what blocks keep without tiles"),
        ("strategy.mlp_tokens=64 strategy.compile=true", "set strategy.compile=false"),
        ("strategy.offload_activations=true", "no block is recomputed; set strategy.activation_checkpointing=full"),
        ("launcher.nodes=2", "needs launcher.rdzv"),
        ("launcher.nodes=2 launcher.rdzv=n1:29400", "needs run.dir"),
        ("launcher.rdzv=n1", "must be host:port"),
        ("launcher.node_rank=1", "below launcher.nodes=1"),
        ("launcher.nodes=3 launcher.hosts=[a,b]", "launcher.hosts=[a,b] are 2; leave launcher.nodes out"),
        ("launcher.hosts=[a,b] launcher.node_rank=0", "says it of each host; leave it out"),
        ("launcher.hosts=[a,a]", "a host is named twice; its number of ranks is launcher.processes"),
        ("launcher.hosts=[a,-oProxyCommand]", "`-oProxyCommand` is no host"),
        ("launcher.stage=scratch", "must be the same on every node: an absolute path, or a variable"),
        ("launcher.ssh=[-p,2222]", "no host is reached over ssh; name them in launcher.hosts"),
        ("launcher=slurm launcher.hosts=[a,b]", "SLURM chooses the nodes"),
        ("launcher=slurm launcher.time=tomorrow", "hours:minutes:seconds"),
        ("launcher=slurm launcher.address=n1", "address of one host, and SLURM starts all of them"),
        ("launcher=slurm launcher.node_rank=0", "SLURM numbers the nodes"),
        ("launcher=slurm launcher.job_name=a/b", "names log files, too"),
        ("launcher=slurm launcher.after=runs/first", "must be the id of a job, as in launcher.after=17"),
        ("launcher=slurm launcher.mail_user=me@lab", "nothing is mailed; say what"),
        ("launcher=slurm launcher.array_limit=0", "null runs all at a time"),
    ],
)
def test_a_combination_that_cannot_run_is_refused_with_a_way_out(words, said):
    found = problems(*words.split())
    assert any(said in line for line in found), found
    assert all(": " in line and "\n" not in line for line in found)
    keys = {*(key.partition(".*")[0] for key in all_settings()), *SETTINGS_CLASSES_BY_GROUP}
    unknown = [line for line in found if not is_of_a_setting(key_of_problem(line), keys)]
    assert unknown == [], "a line begins with the key of its setting"


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("budget: not set: exactly one", "budget"),
        ("launcher.hosts=[a,b]: two", "launcher.hosts"),
        ("there is no verb: x", ""),
        ("nothing to evaluate: name a run", ""),
    ],
)
def test_problem_line_names_its_setting_and_a_sentence_names_none(line, key):
    assert key_of_problem(line) == key


def is_of_a_setting(key: str, keys: set[str]) -> bool:
    """Whether a key is a setting, a group of settings, or stands below a table whose names the user chooses."""
    return any(known == key or known.startswith(f"{key}.") or key.startswith(f"{known}.") for known in keys if key)


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        ("strategy=hsdp", 4),
        ("strategy=fsdp2 parallel.sequence=2 batch.global=4 batch.micro=2", 4),
        ("strategy=zero3 parallel.sequence=3 data.layout=padding_free batch.global=8 batch.micro=4", 6),
        ("tuning=lora tuning.rank_pattern={q_proj:8} tuning.init=pissa_niter_16 tuning.lr_ratio=16", 1),
        ("tuning=freeze tuning.bias_only=true", 1),
        ("tuning=vera precision=bf16 strategy=ddp", 1),
        ("tuning=peft tuning.type=hra tuning.options.r=8", 1),
        ("strategy=hsdp strategy.replicate=3 batch.global=24", 6),
        ("batch.global=48 batch.micro=8 strategy=ddp", 3),
        ("data.packing=true", 1),
        ("model.path=org/name", 1),
        ("model.path=gpt2", 1),
        ("data.path=*.jsonl", 1),
        ("strategy=zero3 strategy.offload_parameters=nvme strategy.nvme_path=model", 1),
        ("launcher=slurm launcher.time=1-12:00:00", 1),
        ("launcher=slurm launcher.time=90", 1),
        ("launcher=slurm checkpoint.fallback_dir=train.jsonl/of_the_nodes", 1),
        ("checkpoint.fallback_dir=model/spare/of_mine", 1),
        ("evaluation.watch=eval/accuracy evaluation.greater_is_better=true data.eval_share=0.1", 1),
        ("optim=muon strategy=fsdp2", 2),
        ("optim=lion strategy=zero3", 2),
        ("optim.groups.head.match=lm_head|score optim.groups.head.lr_factor=2", 1),
        ("objective=classification objective.labels=[a,b] objective.class_weights=[1,2.5]", 1),
        ("objective=classification objective.multi_label=true objective.class_weights=balanced", 1),
        ("objective=dpo data.format=preference data.over_length=drop objective.label_smoothing=0.1", 1),
        ("objective=reward data.layout=padded", 1),
        ("data.format=preference", 1),
        ("objective=kto data.format=thumbs objective.desirable_weight=1.33", 1),
        ("objective=pretrain data.packing=true data.over_length=split", 1),
        ("objective=distillation objective.teacher.path=model objective.divergence=reverse_kl", 1),
        (
            "data.path=null data.sources.a.path=train.jsonl data.sources.b.path=train.jsonl data.sources.b.replay=true "
            "objective.forgetting.kl_weight=0.5 objective.forgetting.replay_loss=false",
            1,
        ),
    ],
)
def test_valid_combinations_are_not_refused(words, ranks):
    assert problems(*words.split(), world_size=ranks) == []


@pytest.mark.parametrize(
    ("words", "ranks", "problem"),
    [
        ("strategy=single", 1, "strategy=single is one process"),
        ("strategy=fsdp2", 3, "must divide the number of ranks, 3, so that every group is whole; set one of 1, 3"),
        ("strategy=fsdp2 data.layout=padded", 2, "rows with padding are not cut; set data.layout=padding_free"),
        ("strategy=fsdp2 model.attention=sdpa", 2, "model.attention=sdpa takes rows with padding"),
        ("strategy=ddp strategy.compile=true", 2, "set strategy.compile=false, or parallel.sequence=1"),
        ("strategy=fsdp2 objective=seq2seq", 2, "objective=seq2seq has two rows for each document"),
    ],
)
def test_ranks_that_cannot_share_rows_are_refused_before_anything_is_read(words, ranks, problem):
    lines = problems("parallel.sequence=2", *words.split(), world_size=ranks)
    assert any(line.startswith("parallel.sequence=2: ") and problem in line for line in lines), lines


def test_batch_is_divided_among_groups_of_ranks_that_share_rows():
    lines = problems("strategy=fsdp2", "parallel.sequence=2", "batch.global=6", "batch.micro=2", world_size=4)
    assert lines == [
        "batch.global=6: must be a multiple of batch.micro=2 x 2 groups of 2 ranks = 4; set batch.global=4 or "
        "batch.global=8, or batch.micro=1"
    ]


def test_batch_that_does_not_fit_names_the_ranks_on_which_it_would():
    """A run that resumes cannot change its global batch."""
    [line] = problems("strategy=fsdp2", "batch.global=8", "batch.micro=2", world_size=3)
    assert line.endswith("set batch.global=6 or batch.global=12, or train on 2 or 4 ranks"), line


@pytest.mark.parametrize("key", REASON_BY_NOT_OFFERED_KEY)
def test_setting_that_other_trainers_have_is_answered_with_what_does_the_same(key):
    with pytest.raises(ConfigError, match=re.escape(f"there is no setting {key}: {REASON_BY_NOT_OFFERED_KEY[key]}")):
        compose_config([f"{key}=2"], check=False)


def test_single_strategy_needs_one_process():
    assert any("strategy=ddp" in line for line in problems("strategy=single", world_size=2))


def needing(case):
    """Each optimizer on each side: where shards do, and where none, by block or by DeepSpeed's flat ones, are its matter."""
    optim, strategy = case
    kind = "flat" if strategy.startswith("zero") else "whole" if strategy in ("single", "ddp") else "blocks"
    return {(optim, kind), strategy}


@pytest.mark.parametrize(("optim", "strategy"), chosen(itertools.product(OptimName, STRATEGIES), needing))
def test_optimizer_is_refused_under_a_strategy_whose_shards_do_not_suit_it(optim, strategy):
    found = problems(f"optim={optim}", f"strategy={strategy}", "schedule=constant", world_size=None)
    lines = [line for line in found if line.startswith(f"optim={optim}: needs ") and "package" not in line]
    whole = optim in ("muon", "adafactor", "schedule_free") and strategy in ("zero1", "zero2", "zero3")
    blocks = optim == "adamw_8bit" and strategy not in ("single", "ddp")
    assert len(lines) == int(whole or blocks), lines
    for line in lines:
        assert ("use strategy=fsdp2, or optim=adamw" if whole else "use strategy=ddp, or optim=adamw") in line


def test_optimizer_package_that_is_missing_is_refused_when_composing(monkeypatch):
    monkeypatch.setattr("trainer.optim.support.find_spec", lambda name: None)
    for optim, extra in (("schedule_free", "schedule_free"), ("adamw_8bit", "qlora")):
        words = [f"optim={optim}", "schedule=constant"]
        (line,) = problems(*words)
        assert f"pip install -e '.[{extra}]'" in line
        assert problems(*words, "launcher=slurm") == []  # the nodes may have it


def test_batch_sizes_count_all_ranks():
    (line,) = problems("strategy=ddp", "batch.global=32", "batch.micro=8", world_size=3)
    assert "batch.micro=8 x 3 ranks = 24" in line
    assert "batch.global=24 or batch.global=48" in line


def test_every_settings_class_of_the_tree_is_closed():
    from trainer.config.run import RunConfig

    with pytest.raises(AttributeError):
        RunConfig().typo = 1  # type: ignore[attr-defined]
    assert dataclasses.is_dataclass(RunConfig)


def test_sources_are_named_on_the_command_line():
    words = ["model.path=m", "budget.steps=1", "data.sources.chat.path=train.jsonl", "data.sources.chat.weight=0.9"]
    words += [
        "data.sources.chat.columns.text=body",
        "data.sources.plain.path=[train.jsonl]",
        "data.sources.plain.weight=0.1",
    ]
    sources = compose_config(words).config.data.sources
    assert (sources["chat"].path, sources["chat"].weight, dict(sources["chat"].columns)) == (
        "train.jsonl",
        0.9,
        {"text": "body"},
    )
    assert list(sources["plain"].path) == ["train.jsonl"]
    whole = ["model.path=m", "data.path=train.jsonl", "budget.steps=1", "data.columns={prompt:q,completion:a}"]
    assert dict(compose_config(whole).config.data.columns) == {"prompt": "q", "completion": "a"}
    for word, said in (
        ("data.sources.chat.wieght=1", "did you mean data.sources.*.weight"),
        ("data.sources.chat.weight=-1", "data.sources.chat.weight=-1: must be at least 0"),
        ("data.privcy.mode=redact", "did you mean data.privacy.mode"),
        ("data.privacy.mode=redacted", "one of none, report, redact"),
    ):
        with pytest.raises(ConfigError) as caught:
            compose_config([*words, word])
        assert said in str(caught.value), caught.value


def test_a_huge_batch_is_answered_at_once():
    """Not by trying every micro-batch below it, which would take minutes."""
    config = RunConfig(batch={"global": 10**12 - 1, "micro": 10**11})
    [said] = [line for line in config_problems(config, world_size=1) if line.startswith("batch.global=")]
    assert "set batch.global=900000000000 or batch.global=1000000000000, or batch.micro=" in said
