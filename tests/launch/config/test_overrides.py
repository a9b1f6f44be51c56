"""What users type: kept as typed where it is a path, and explained, all at once, where it cannot be used."""

import re
from pathlib import Path

import pytest

from launch.config.axes import read_axes
from launch.config.choices import USER_CONFIG_DIRS, choices_by_group, settings_class_of
from launch.config.compose import ComposedConfig, compose_config
from launch.config.importers.equivalent import OtherTrainerSettings
from launch.config.importers.names import RULE_BY_NORMALISED_NAME, translate_by_rule
from launch.config.known_settings import all_settings, find_setting
from launch.config.removed import SUCCESSOR_BY_REMOVED_KEY
from launch.config.user_files import take_config_dirs
from launch.runs.freeze import write_run_config
from strategies.errors import ConfigError
from tests.helpers.launching import command_here
from trainer.config.validate import OUTPUT_DIRECTORY_KEYS


def expand(words):
    return read_axes(words).points()


@pytest.fixture(autouse=True)
def outside_a_job(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def value_of(word, key):
    holder = compose_config([word], check=False).config
    for part in key.split("."):
        holder = holder[part] if isinstance(holder, dict) else getattr(holder, part)
    return holder


@pytest.mark.parametrize(
    "path",
    [
        "~/x.jsonl",
        "/run=3/d(1).jsonl",
        "a,b.jsonl",
        "my data/train set.jsonl",
        "it's.jsonl",
        'say "x".jsonl',
        "data/{a}.jsonl",
        "data/[1].jsonl",
        "**/*.jsonl",
        "back\\slash.jsonl",
        "über/数据.jsonl",
        "007",
        "1e5",
        "true",
        "#1.jsonl",
        "a: b.jsonl",
        "$HOME/x.jsonl",
    ],
)
def test_a_path_is_kept_as_typed(path):
    config = compose_config([f"data.path={path}", f"model.path={path}", f"run.dir={path}"], check=False).config
    assert [config.data.path, config.model.path, config.run.dir] == [path] * 3


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("data.path=[a.jsonl,b.jsonl]", "data.path", ["a.jsonl", "b.jsonl"]),
        ("data.path=[~/a(1).jsonl, b=2.jsonl]", "data.path", ["~/a(1).jsonl", "b=2.jsonl"]),
        ("data.path='quoted.jsonl'", "data.path", "quoted.jsonl"),
        ("data.eval_path=null", "data.eval_path", None),
        ("batch.global=64", "batch.global", 64),
        ("batch={global: 8, micro: 2}", "batch.global", 8),
        ("optim.lr=1", "optim.lr", 1.0),
        ("+optim.lr=1e-3", "optim.lr", 1e-3),
        ("data.columns.prompt=question", "data.columns", {"prompt": "question"}),
        ("logging.tags=[a,b]", "logging.tags", ["a", "b"]),
        ("logging.group=007", "logging.group", "007"),
        ("optim.betas=[0.9,0.95]", "optim.betas", [0.9, 0.95]),
        ("model.revision=1e5", "model.revision", "1e5"),
    ],
)
def test_override_values_are_read_by_type(word, key, value):
    assert value_of(word, key) == value


def test_patterns_and_site_options_are_kept_as_typed():
    words = ["tuning=lora", r"tuning.targets=.*\.(q|v)_proj", "launcher=slurm", "launcher.time=1-00:00:00"]
    config = compose_config([*words, "launcher.partition=a,b"], check=False).config
    assert config.tuning.targets == r".*\.(q|v)_proj"
    assert (config.launcher.time, config.launcher.partition) == ("1-00:00:00", "a,b")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("optim.lrr=1", "did you mean optim.lr?"),
        ("evaluation.paticence=1", "did you mean evaluation.patience?"),
        ("lr=1", "did you mean optim.lr?"),
        ("batch=8", "batch is not one value; set batch.global, batch.micro"),
        ("budget=3", "budget is not one value"),
        ("budget={epoch: 3}", "there is no setting budget.epoch"),
        ("data.train_path=x", "type data.path=x"),
        ("run.name=x", "type logging.name=x"),
        ("datasets=[a]", "type data.path=[a]"),
        ("gpus=8", "type launcher.processes=8"),
        ("strategy.offload=cpu", "strategy.offload_optimizer=cpu with strategy=zero3"),
        ("evaluation.strategy=epoch", "type evaluation.every_steps="),
        ("early_stopping=true", "type evaluation.patience="),
        ("CUDA_VISIBLE_DEVICES=0", "before the command: CUDA_VISIBLE_DEVICES=0 shardtune"),
        ("zero_stage=3", "here it is strategy=zero3"),
        ("push_to_hub=true", "to=hub:<owner>/<name>"),
        ("strategy=deepspeed", "did you mean strategy=zero2 or strategy=zero3?"),
        ("--multi_gpu", "leave it out"),
        ("@args.txt", "is given by its name alone, as in my.yaml"),
        ("optim.lr=interval(1e-5,1e-3)", "add -m sweeper=optuna"),
        ("logging.tags=['${oc.env:NO_SUCH_VARIABLE_HERE}']", "logging.tags[0]: KeyError"),
        ("data.dropout=0", "model.dropout"),
        ("batch.accumulation=4", "there is no setting batch.accumulation"),
        ("+foo=1", "there is no setting foo"),
        ("++optim.rho=1", "there is no setting optim.rho"),
        ("strategy=fspd2", "no such choice; did you mean strategy=fsdp2? One of auto, ddp"),
        ("model=llama_70b", "no such choice; did you mean model=llama"),
        ("experiment=#", "no such choice; shardtune train --help lists all"),
        ("strategy=schema_fsdp2", "no such choice"),
        ("strategy=null", "no such choice"),
        ("strategy.name=fsdp2", "type strategy=<choice>"),
        ("optim.name=sgd", "type optim=<choice>"),
        ("strategy=ddp,fsdp2", "add -m"),
        ("optim.lr=1e-3,1e-4", "add -m"),
        ("tuning.rank=8", "needs tuning=lora"),
        ("strategy.replicate=2", "needs strategy=fsdp2|hsdp"),
        ("launcher.partition=x", "needs launcher=slurm"),
        ("schedule.decay_share=0.5", "needs schedule=wsd"),
        ("optim.lr=fast", "optim.lr must be a number"),
        ("run.seed=1.5", "run.seed must be a whole number"),
        ("data.packing=perhaps", "data.packing must be true or false"),
        ("precision=fp8", "must be one of auto, fp32, bf16, fp16"),
        ("logging.tags=x", "must be a list"),
        ("optim.lr=[", "cannot be read"),
        ("budget.steps", "not of the form key=value"),
        ("--optim.lr=1", "type optim.lr=1"),
        ("--dry_run", "did you mean --dry-run?"),
        ("tuning", "as in tuning=full"),
        ("optim=1", "no such choice, one of adafactor, adamw"),
        ("tuning=prefix_tuning", "here it is tuning=prefix"),
        ("tuning=prompt_tuning", "here it is tuning=prompt"),
        ("tuning=adapter", "here it is tuning=bottleneck"),
        ("objective=hinge", "here it is objective=dpo objective.loss_type=hinge"),
        ("objective=ipo", "here it is objective=dpo objective.loss_type=ipo"),
        ("run=x", "run is not one value"),
        ("~optim.lrr=1", "did you mean optim.lr?"),
        ("hydra.run.dir=x", "Hydra's own settings"),
        ("hydra/launcher=x", "Hydra's own settings"),
        ("data.path._target_=os.system", "`_target_` is not used here"),
        ("data.columns={_target_: os.system}", "`_target_` is not used here"),
        ("run.dir=runs/${now:%H}", "write the value itself"),
        ("model.path=${oc.env:NO_SUCH_VARIABLE_HERE}", "NO_SUCH_VARIABLE_HERE"),
        ("substitutions={a:b}", "there is no setting substitutions"),
        ("stratgey=zero3", "did you mean strategy=zero3?"),
        ("tunnig=foo", "did you mean tuning=<choice>, one of adalora"),
        ("sharding=fsdp2", "did you mean strategy=fsdp2?"),
        ("learning_rate=2e-4", "here it is optim.lr=2e-4"),
        ("--learning-rate=2e-4", "here it is optim.lr=2e-4"),
        ("training_args.max_steps=10", "here it is budget.steps=10"),
        ("max_steps=-1", "leave it out: no limit"),
        ("num_train_epochs=3.0", "here it is budget.epochs=3"),
        ("per_device_train_batch_size=4", "here it is batch.micro=4 batch.global=4 (batch.global: 4 per device x 1 "),
        ("gradient_accumulation_steps=4", "it is derived: set batch.global"),
        ("output_dir=out", "here it is run.dir=out"),
        ("lora_r=8", "here it is tuning=lora tuning.rank=8"),
        ("lora_target_modules=[q_proj,v_proj]", "here it is tuning=lora tuning.targets=[q_proj,v_proj]"),
        ("lora_target=all", "tuning.targets=all-linear"),
        ("warmup_ratio=0.1", "here it is schedule.warmup_share=0.1"),
        ("warmup_steps=0.1", "here it is schedule.warmup_share=0.1"),
        ("fp16=true", "here it is precision=fp16"),
        ("bf16=false", "here it is precision=fp32"),
        ("max_seq_length=512", "here it is data.max_length=512"),
        ("cutoff_len=512", "here it is data.max_length=512"),
        ("sequence_len=512", "here it is data.max_length=512"),
        ("sample_packing=true", "here it is data.packing=true"),
        ("deepspeed=ds_z2_config.json", "here it is strategy=zero2 (as the name says"),
        ("report_to=tensorboard", "here it is logging.wandb=disabled logging.tensorboard=true"),
        ("optim=adamw_bnb_8bit", "here it is optim=adamw_8bit"),
        ("tuning=qlora", "here it is tuning=lora model.quantisation=nf4"),
        ("val_set_size=200", "set data.eval_share to 200 over"),
        ("neftune_noise_alpha=5", "here it is model.neftune_alpha=5"),
        ("label_smoothing_factor=0.1", "here it is objective.label_smoothing=0.1"),
        ("ema_decay=0.99", "here it is optim.ema_decay=0.99"),
        ("load_best_model_at_end=true", "checkpoint=best"),
    ],
)
def test_override_that_cannot_be_used_is_explained(word, said):
    with pytest.raises(ConfigError) as caught:
        compose_config([word], check=False)
    assert any(said in problem for problem in caught.value.problems), caught.value.problems


def test_schedule_setting_without_meaning_is_refused_unless_the_run_has_begun(tmp_path):
    words = ["schedule=constant", "schedule.min_factor=0.5", f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match=r"schedule\.min_factor=0\.5: needs schedule=cosine\|linear\|wsd"):
        compose_config(words, check=False)
    assert compose_config(["schedule=constant", "schedule.min_factor=0.0"], check=False).config.schedule.min_factor == 0
    points = expand(["schedule=constant,wsd", "schedule.decay_share=0.5"])
    assert sorted(map(len, points)) == [1, 2], "it goes to the points alone for which it means something"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    assert compose_config(words, check=False).config.schedule.min_factor == 0.5, (
        "a run of before goes on with its words"
    )


WRONG_FILES = {
    "name: wrong\n": "schedule.name: Invalid value 'wrong', expected one of [cosine, linear, constant, wsd]",
    "name: cosine\nwarmup: 3\n": "there is no setting schedule.warmup",
    "warmup_steps: many\n": "schedule.warmup_steps: Value 'many' of type 'str' could not be converted to Integer",
    "name: [\n": "line 2 is not valid YAML: expected the node content",
}
"""Content of a user's file of the group `schedule`, and what is said of it."""


@pytest.mark.parametrize("content", WRONG_FILES)
def test_config_file_of_a_user_is_named_with_what_is_wrong_in_it(tmp_path, content):
    (tmp_path / "schedule").mkdir()
    file = tmp_path / "schedule" / "mine.yaml"
    file.write_text(content)
    try:
        take_config_dirs(["--config-dir", str(tmp_path)])
        with pytest.raises(ConfigError, match=re.escape(f"{file}: {WRONG_FILES[content]}")):
            compose_config(["schedule=mine"])
    finally:
        USER_CONFIG_DIRS.clear()
        choices_by_group.cache_clear()


def test_an_experiment_that_is_no_settings_is_named_alone(tmp_path):
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text("- 1\n")
    try:
        take_config_dirs(["--config-dir", str(tmp_path)])
        with pytest.raises(ConfigError) as refused:
            compose_config(["experiment=mine"])
    finally:
        USER_CONFIG_DIRS.clear()
        choices_by_group.cache_clear()
    assert refused.value.problems == [
        f"{file}: must hold settings (key: value), and begin with the line `# @package _global_`"
    ]


def test_config_choice_without_settings_of_its_name_is_named():
    with pytest.raises(ConfigError, match=r"conf/objective/x\.yaml: no settings of that name.*FAMILIES"):
        settings_class_of("objective", "x")
    with pytest.raises(ConfigError, match=r"conf/strategy/zero4\.yaml"):
        settings_class_of("strategy", "zero4")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lr", "=", "1e-4"], "optim.lr = 1e-4: no spaces around the equals sign; type optim.lr=1e-4"),
        (["optim.lr", "=1e-4"], "optim.lr = 1e-4: no spaces around the equals sign; type optim.lr=1e-4"),
        (["optim.lr=", "1e-4"], "optim.lr= 1e-4: no spaces around the equals sign; type optim.lr=1e-4"),
        (["--optim.lr", "1e-4"], "--optim.lr 1e-4: settings have no dashes; type optim.lr=1e-4"),
        (["--lr", "1e-4"], "--lr 1e-4: settings have no dashes; there is no setting lr; did you mean optim.lr?"),
        (["~data.path", "data.path=a"], "~data.path: data.path=a sets the same; leave one of the two out"),
    ],
)
def test_overrides_that_only_make_sense_together_get_one_answer(words, said):
    with pytest.raises(ConfigError) as caught:
        compose_config(words, check=False)
    assert caught.value.problems == [said]


def test_two_budgets_are_refused_in_every_spelling(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    words = ["model.path=m", f"data.path={tmp_path / 'train.jsonl'}"]
    for budgets in (["budget={epochs: 3}", "budget.steps=2"], ["budget={epochs: 3, steps: 2}"]):
        with pytest.raises(ConfigError, match=r"budget\.steps=2 budget\.epochs=3.*exactly one of"):
            compose_config([*words, *budgets])
    config = compose_config([*words, "experiment=gpt2_full_ddp", "budget={steps: 2}"], check=False).config
    assert (config.budget.steps, config.budget.epochs) == (2, None)


def test_overrides_that_an_earlier_version_took_still_resume_a_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    run_dir = tmp_path / "run"
    words = ["model.path=m", f"data.path={tmp_path / 'train.jsonl'}", f"run.dir={run_dir}", "logging.name=my-project"]
    # That version took the one budget, and no variable called *_PASS for a secret.
    both = [*words, "budget={steps: 12}", "budget.epochs=2"]
    write_run_config(ComposedConfig(compose_config([*words, "budget.epochs=2"], check=False).config, both), run_dir)
    monkeypatch.setenv("SITE_PASS", "my-project")

    assert refused_groups(both) == set()
    said = capsys.readouterr().err
    assert f"{run_dir}: keeps budget.epochs=2, with which it began; budget.steps=12 had no effect" in said
    assert refused_groups([*both, f"run.dir={tmp_path / 'new'}"]) == {"budget", "logging"}, "a new run"
    assert refused_groups([*both, "optim.lr=1e-3"]) == {"budget", "logging"}, "not the words it began with"


def refused_groups(words):
    """The groups of settings that the refusals of a run are about."""
    try:
        compose_config(words)
    except ConfigError as error:
        return {problem.partition(".")[0] for problem in error.problems}
    return set()


def test_a_directory_to_write_to_is_no_address(tmp_path, monkeypatch):
    """It would become a local directory called `s3:`, which goes with the host."""
    spelled = {setting: f"{setting}=s3://bucket/x" for setting in OUTPUT_DIRECTORY_KEYS}
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    given = [f"data.path={tmp_path / 'train.jsonl'}", "model.path=m", "budget.steps=1", "strategy=zero3"]
    with pytest.raises(ConfigError) as caught:
        compose_config([*given, *spelled.values()])
    for word in spelled.values():
        assert any(problem.startswith(f"{word}: is an address") for problem in caught.value.problems), word
    monkeypatch.chdir(tmp_path)
    Path("s3:/bucket/x").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"run\.dir=s3://bucket/x: .*; the local directory s3:/bucket/x .* rename it"):
        compose_config([*given, spelled["run.dir"]])
    places = {key for key in all_settings() if re.search(r"[._]dir$|nvme_path$|^launcher.stage$", key)}
    assert places == set(OUTPUT_DIRECTORY_KEYS), "which directories are written to?"
    for verb in ("export", "evaluate", "compare", "init"):
        assert command_here([verb, "to=gs://bucket/x"]) == 64


def test_overrides_of_other_trainers_are_answered_together():
    words = ["--per_device_train_batch_size", "4", "gradient_accumulation_steps=8", "--bf16", "--max-steps", "5"]
    with pytest.raises(ConfigError) as caught:
        compose_config(
            [*words, "launcher.processes=2", "launcher.nodes=2", "strategy=ddp", "model_name_or_path=m", "data.path=d"]
        )
    problems = caught.value.problems
    assert "batch.global=128 (batch.global: 4 per device x 8 accumulation x 4 ranks)" in problems[0]
    assert [problem.split(": here it is ")[0] for problem in problems[:4]] == [
        "--per_device_train_batch_size 4",
        "gradient_accumulation_steps=8",
        "--bf16",
        "--max-steps 5",
    ]
    assert not any(problem.startswith(("budget", "batch", "model.path")) for problem in problems)  # no echoes


def test_overrides_suggested_for_other_trainers_options_compose(tmp_path):
    """Every name, with a value as its users write it: our words for it compose."""
    (tmp_path / "ds.json").write_text(
        '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}}'
    )
    text = {
        "deepspeed": f"{tmp_path}/ds.json",
        "optimizer": "adamw_torch",
        "lr_scheduler_type": "cosine",
        "stage": "dpo",
    }
    text |= {"lr_scheduler": "constant_with_warmup", "rl": "kto", "adapter": "qlora", "finetuning_type": "freeze"}
    text |= {"fsdp": "full_shard offload", "mixed_precision": "no", "torch_dtype": "bfloat16", "dtype": "float16"}
    text |= {
        "attn_implementation": "flash_attention_2",
        "flash_attn": "fa2",
        "quantization_bit": "4",
        "pref_loss": "ipo",
    }
    text |= {"scale_rewards": "group", "loss_agg_mode": "token-mean", "adv_estimator": "rloo"}
    text |= {"dataset_text_field": "body", "wandb_mode": "offline", "data.shuffle": "true", "val_set_size": "0.1"}
    answered = 0
    for name in RULE_BY_NORMALISED_NAME:
        for value in (text.get(name, "1"), "true"):
            found = translate_by_rule(name, OtherTrainerSettings({name: value, "per_device_train_batch_size": "2"}))
            for key, ours in found.overrides.items():
                answered += 1
                assert key in choices_by_group() or find_setting(key) is not None, (name, key)
                assert key not in choices_by_group() or ours in choices_by_group()[key], (name, key, ours)
            assert found.overrides or found.note or found.not_needed, name
    assert answered > 100


def test_everything_wrong_is_reported_at_once_without_echoes(tmp_path):
    words = ["strategy=fspd2", "optim.lrr=1", "tuning.rank=8", "run.seed=x", "batch.global=30", "batch.micro=4"]
    with pytest.raises(ConfigError) as caught:
        compose_config([*words, f"data.pth={tmp_path}", "budget.steps=1", "model.path=no/such/model/here"])
    text = str(caught.value)
    for part in ("fspd2", "lrr", "tuning.rank", "run.seed", "batch.global=30", "data.pth", "no/such/model/here"):
        assert part in text
    assert "data.path: not set" not in text  # the misspelt word was meant for it
    assert len(caught.value.problems) == 7
    with pytest.raises(ConfigError) as caught:
        compose_config([f"data.path={tmp_path}", "budget.steps=two", f"model.path={tmp_path}"])
    assert not [problem for problem in caught.value.problems if "budget: not set" in problem]


def test_a_typed_budget_replaces_that_of_an_experiment():
    config = compose_config(["experiment=gpt2_full_ddp", "budget.steps=7"], check=False).config
    assert (config.budget.steps, config.budget.epochs) == (7, None)


def test_sweeps_are_the_cartesian_product():
    points = expand(["strategy=ddp,fsdp2", "optim.lr=1e-3,1e-4", "run.seed=range(0,2)"])
    assert len(points) == 8
    assert points[0] == ["strategy=ddp", "optim.lr=1e-3", "run.seed=0"]
    assert points[-1] == ["strategy=fsdp2", "optim.lr=1e-4", "run.seed=1"]
    assert expand(["optim.lr=["]) == [["optim.lr=["]]


def test_sweep_setting_of_some_choices_is_only_for_points_that_have_it():
    axes = read_axes(["tuning=full,lora,vera", "tuning.rank=4,8", "tuning.dora=true", "tuning.gamma=1"])
    assert axes.points() == [
        ["tuning=full", "tuning.gamma=1"],  # what no choice has is told when a point is composed
        ["tuning=lora", "tuning.rank=4", "tuning.dora=true", "tuning.gamma=1"],
        ["tuning=lora", "tuning.rank=8", "tuning.dora=true", "tuning.gamma=1"],
        ["tuning=vera", "tuning.rank=4", "tuning.gamma=1"],
        ["tuning=vera", "tuning.rank=8", "tuning.gamma=1"],
    ]
    assert axes.partial_setting_lines() == [
        "tuning.rank: only where tuning is lora or vera",
        "tuning.dora: only where tuning is lora",
    ]
    assert [axes.describe_point(point) for point in axes.points()][:2] == ["tuning=full", "tuning=lora tuning.rank=4"]
    assert expand(["tuning=full", "tuning.dora=true,false"])[0] == ["tuning=full", "tuning.dora=true"]  # refused there
    assert read_axes(["tuning=lora,vera", "tuning.rank=4,8"]).partial_setting_lines() == []


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("data.path=a.jsonl,b/c d.jsonl", ["a.jsonl", "b/c d.jsonl"]),
        ("data.path='a,b.jsonl'", ["'a,b.jsonl'"]),
        ("data.path='a,b.jsonl',c.jsonl", ["'a,b.jsonl'", "c.jsonl"]),
        ("data.path=data/{a,b}.jsonl", ["data/{a,b}.jsonl"]),
        ("tuning.targets=[q_proj,v_proj],[q_proj]", ["[q_proj,v_proj]", "[q_proj]"]),
        ("tuning.targets=.*(q,v),all", [".*(q,v)", "all"]),
        ("data.path=it's.jsonl,b.jsonl", ["it's.jsonl", "b.jsonl"]),
        ("run.seed=choice(1,2)", ["1", "2"]),
        ("tuning.targets=.*(q|v)_proj", [".*(q|v)_proj"]),
    ],
)
def test_sweep_axis_is_a_comma_outside_of_quotes_and_brackets(word, values):
    key = word.partition("=")[0]
    assert [point[0] for point in expand([word])] == [f"{key}={value}" for value in values]


def test_a_quoted_comma_is_part_of_the_value():
    (point,) = expand(["data.path='a,b.jsonl'"])
    assert compose_config(point, check=False).config.data.path == "a,b.jsonl"


def test_sweep_function_without_a_value_is_an_error():
    with pytest.raises(ConfigError, match=r"run.seed=range\(5,5\): stands for no value"):
        read_axes(["run.seed=range(5,5)"])


def test_sweep_with_nothing_between_commas_is_an_error():
    with pytest.raises(ConfigError, match="strategy=ddp,: nothing stands between two commas"):
        expand(["strategy=ddp,"])


def test_setting_that_was_removed_is_answered_with_its_replacement():
    known = all_settings()
    assert not set(SUCCESSOR_BY_REMOVED_KEY) & set(known)
    for key, instead in SUCCESSOR_BY_REMOVED_KEY.items():
        with pytest.raises(ConfigError) as refused:
            compose_config([f"{key}=1"], check=False)
        assert f"there is no setting {key} any more: {instead}" in str(refused.value)
        named = re.findall(r"(?:data|launcher)\.[a-z_.]*[a-z]", instead)
        assert set(named) <= set(known), f"{key}: {named} are to be settings"


@pytest.fixture
def own(tmp_path):
    """A directory laid out as conf/, and a file of settings."""
    (tmp_path / "tuning").mkdir()
    (tmp_path / "experiment").mkdir()
    (tmp_path / "tuning" / "small.yaml").write_text("defaults: [lora, _self_]\nrank: 4\n")
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /tuning: small\noptim:\n  lr: 5e-4\n"
    )
    (tmp_path / "my.yaml").write_text(
        "defaults:\n  - override /strategy: ddp\ntuning: lora\noptim: {lr: 3e-4}\nbudget: {epochs: 2}\n"
        "data: {path: '${oc.env:HOME}/d.jsonl', columns: {prompt: q}}\nrun: {dir: '~/x'}\n"
    )
    yield tmp_path
    USER_CONFIG_DIRS.clear()
    choices_by_group.cache_clear()


def test_a_file_of_settings_is_a_bare_word_that_typed_words_go_before(own):
    config = compose_config(["optim.lr=1e-3", f"{own}/my.yaml", "budget.steps=3"], check=False).config
    assert (str(config.tuning.name), str(config.strategy.name), config.optim.lr) == ("lora", "ddp", 1e-3)
    assert (config.budget.steps, config.budget.epochs, config.data.columns) == (3, None, {"prompt": "q"})
    assert config.data.path == str(Path.home() / "d.jsonl")
    frozen = own / "config.yaml"  # the whole configuration of a run is such a file too
    frozen.write_text(compose_config(["strategy=zero3", "tuning=lora", "tuning.rank=3"], check=False).yaml)
    again = compose_config([str(frozen)], check=False).config
    assert (str(again.strategy.name), again.tuning.rank) == ("zero3", 3)
    for text, said in (
        ("tunnig: lora", "my.yaml: tunnig: lora: there is no setting tunnig; did you mean tuning"),
        ("optim: {lrr: 1}", "my.yaml: optim.lrr: 1: there is no setting optim.lrr; did you mean optim.lr?"),
        ("defaults: [{strtegy: ddp}]", "my.yaml: defaults: there is no group strtegy"),
        ("learning_rate: 1e-4", "my.yaml: learning_rate: 0.0001: here it is optim.lr=0.0001"),
        ("run: {dir: '${now:%H}'}", "write the value itself"),
        ("- a", "my.yaml: holds no settings"),
        ("a: [", "my.yaml: is no YAML"),
    ):
        (own / "my.yaml").write_text(text)
        with pytest.raises(ConfigError) as caught:
            compose_config([f"{own}/my.yaml"], check=False)
        assert said in str(caught.value), str(caught.value)
    with pytest.raises(ConfigError, match=r"gone.yaml: cannot be read \(No such file"):
        compose_config(["gone.yaml"], check=False)


def test_a_settings_file_that_cannot_be_read_is_one_problem(tmp_path):
    (tmp_path / "my.yaml").write_text("tuning: {name: lora\nbudget: [\n")
    for words, expected_keys in (([], []), (["optim.lr=-1"], ["optim.lr"])):
        with pytest.raises(ConfigError) as caught:
            compose_config([f"{tmp_path}/my.yaml", *words])
        first, *others = caught.value.problems
        assert first.startswith(f"{tmp_path}/my.yaml: is no YAML (")
        assert [problem.partition("=")[0] for problem in others] == expected_keys


@pytest.mark.parametrize("text", ["", "# tuning: lora\n", "---\n"])
def test_an_empty_settings_file_is_named_beside_what_is_missing(tmp_path, text):
    (tmp_path / "my.yaml").write_text(text)
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ConfigError) as caught:
        compose_config([f"{tmp_path}/my.yaml"])
    assert caught.value.problems[0].startswith(f"{tmp_path}/my.yaml: is empty: it sets nothing; write settings")
    assert len(caught.value.problems) > 1
    complete = ["model.path=m", f"data.path={tmp_path}/train.jsonl", "budget.steps=1", "experiment=gpt2_full_ddp"]
    assert compose_config([f"{tmp_path}/my.yaml", *complete], check=False).config.budget.steps == 1


@pytest.mark.parametrize("rewards", ["{maths: {kind: maths, weight: 2}, f1: {kind: f1}}", "[maths, f1]"])
def test_typed_table_replaces_that_of_a_settings_file(tmp_path, rewards):
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"objective:\n  rewards: {rewards}\nevaluation: {{tasks: {{strict: {{kind: json}}}}}}\n")

    def names_of(*typed):
        config = compose_config([str(mine), "objective=grpo", *typed], check=False).config
        return [*config.objective.rewards], [*config.evaluation.tasks]

    assert names_of() == (["maths", "f1"], ["strict"])
    assert names_of("objective.rewards=[length]") == (["length"], ["strict"])
    assert names_of("objective.rewards=[maths]", "objective.rewards=[length]") == (["length"], ["strict"])
    # An entry that is typed by itself adds to those of the file, or to a typed list.
    assert names_of("objective.rewards.length.kind=length")[0] == ["maths", "f1", "length"]
    assert names_of("objective.rewards.length.weight=2", "objective.rewards=[length]")[0] == ["length"]
    assert names_of("evaluation.tasks=[code]", "evaluation.tasks=[json:brief]") == (["maths", "f1"], ["brief"])


def test_of_two_settings_files_the_later_one_has_its_own_list_and_model(tmp_path):
    first = tmp_path / "first.yaml"
    first.write_text("objective: {rewards: {maths: {kind: maths, weight: 2}, f1: {kind: f1}}}\nbudget: {epochs: 1}\n")
    second = tmp_path / "second.yaml"
    second.write_text("objective: {rewards: [length]}\nbudget: {steps: 7}\n")
    config = compose_config([str(first), "objective=grpo", str(second)], check=False).config
    assert [*config.objective.rewards] == ["length"]
    second.write_text("model: {path: a/b}\ndefaults: [{model: llama3_8b}]\nobjective: {rewards: [length]}\n")
    first.write_text("objective: {rewards: [maths, f1]}\n")
    with pytest.raises(ConfigError, match="names another model"):
        compose_config([str(first), "objective=grpo", str(second)], check=False)


def test_config_dir_of_a_user_offers_choices(own):
    rest = take_config_dirs(["tuning=small", "--config-dir", str(own), "optim.lr=1e-4"])
    assert rest == ["tuning=small", "optim.lr=1e-4"]
    config = compose_config(rest, check=False).config
    assert (str(config.tuning.name), config.tuning.rank, config.optim.lr) == ("lora", 4, 1e-4)
    config = compose_config(["experiment=mine", "tuning.alpha=8", "~optim.lr"], check=False).config
    assert (config.tuning.rank, config.tuning.alpha, config.optim.lr) == (4, 8.0, 2e-4)
    assert expand(["tuning=glob(s*)", "strategy=glob([zero*,ddp],exclude=zero1)"])[0] == [
        "tuning=small",
        "strategy=ddp",
    ]
    (own / "tuning" / "lora.yaml").write_text("rank: 2")
    with pytest.raises(ConfigError, match="there is such a choice already"):
        take_config_dirs([f"--config-dir={own}"])
    with pytest.raises(ConfigError, match="no such directory"):
        take_config_dirs(["--config-dir", "gone"])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("hydra/launcher=submitit_slurm", "launcher=slurm submits"),
        ("hydra.launcher.timeout_min=60", "launcher.time=60:00 with launcher=slurm"),
        ("hydra.launcher.partition=gpu", "launcher.partition=gpu with launcher=slurm"),
        ("hydra/launcher=joblib", "one after another"),
        ("hydra/sweeper=optuna", "separated by commas under -m"),
        ("hydra.sweeper.params.optim.lr=1", "-m optim.lr=1"),
        ("hydra.sweep.dir=x", "run.dir=x names the directory"),
        ("~strategy", "cannot be removed"),
        ("~model", "for example model.path=<directory or hub id>"),
        ("~optim.lrr", "did you mean optim.lr?"),
    ],
)
def test_hydra_flags_are_answered_with_what_does_it_here(word, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        compose_config([word], check=False)


def test_sweep_glob_of_files_is_an_axis_of_them(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").touch()
    assert expand([f"data.path=glob({tmp_path}/*.jsonl)"]) == [[f"data.path={tmp_path}/{name}.jsonl"] for name in "ab"]
    with pytest.raises(ConfigError, match="matches nothing"):
        expand(["data.path=glob(none/*)"])
