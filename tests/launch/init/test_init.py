"""`shardtune init`: what is typed, or what another trainer's file says, as a file that trains; nothing said is lost."""

import json
import re
import shutil
from pathlib import Path

import pytest

from launch.config.compose import compose_config
from launch.config.importers.conversion import ConvertedSettings
from launch.config.importers.datasets import translate_axolotl_datasets
from launch.config.importers.equivalent import OtherTrainerSettings
from launch.config.importers.rules import fsdp_strategy
from launch.config.known_settings import all_settings
from launch.init.file import SHOWN_KEYS
from launch.main import main
from tests.helpers.building import model_dir
from tests.helpers.launching import clean_environment
from tests.helpers.tokenizers import write_chat_data

THEIRS = Path(__file__).parent / "foreign"


@pytest.fixture(autouse=True)
def somewhere(monkeypatch, tmp_path):
    """Their files and a model of its own in an empty directory, outside a job."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for key, value in clean_environment().items():
        monkeypatch.setenv(key, value)
    shutil.copytree(THEIRS, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def test_init_sets_what_is_typed_and_shows_the_defaults(tmp_path, capsys):
    words = [
        "model.path=it's: #1 [x]",
        "data.path=[a b.jsonl,c.jsonl]",
        "tuning=lora",
        "tuning.rank=8",
        "evaluation=none",
    ]
    words += [
        "strategy=zero3",
        "strategy.nvme_path='007'",
        "data.columns.text=body",
        "budget.steps=3",
        "precision=fp32",
    ]
    words += [
        "tuning.from=old",
        "tuning.rank_pattern={model.q_proj:4,on:2}",
        "run.device=cpu",
        "optim.betas=[0.9,0.95]",
        "data.learn.turns=last",
    ]
    for name in ("it's: #1 [x]", "old"):
        (tmp_path / name).mkdir()
    (tmp_path / "old/adapter_config.json").write_text('{"peft_type": "LORA"}')
    for name in ("a b.jsonl", "c.jsonl"):
        (tmp_path / name).touch()
    typed = compose_config(words, check=False)
    from launch.init import command as init

    text = init._build_settings_file(words, tmp_path / "my.yaml", [], converted=None)[1]
    (tmp_path / "my.yaml").write_text(text)
    assert compose_config(["my.yaml"], check=False).yaml == typed.yaml
    lines, block = [], ""
    for line in text.splitlines():  # every mark taken away
        block = line.removesuffix(":") if re.fullmatch(r"\w+:", line) else block
        found = re.fullmatch(r"( *)# ((\w+): .*)", line)
        shown = found and (found[3] == "name" or {found[3], f"{block}.{found[3]}"} & SHOWN_KEYS)
        lines.append(found[1] + found[2] if found and shown else line)
    (tmp_path / "all.yaml").write_text("\n".join(lines))
    assert len(set(text.splitlines()) - set(lines)) > 25
    assert compose_config(["all.yaml"], check=False).yaml == typed.yaml
    assert set(all_settings()) >= SHOWN_KEYS
    assert "# merge: null" in text and "# processes: null" in text and "# precision" not in text
    assert "# Peak learning rate. null: the usual one" in text


def test_init_writes_a_file_once_and_only_of_what_could_run(tmp_path, capsys):
    model_dir(tmp_path)
    (tmp_path / "train.jsonl").touch()
    good = ["model.path=llama", "data.path=train.jsonl", "tuning=lora", "budget.steps=1"]
    for words, said in (
        ([], "to: not set; name the file to write, as in to=my.yaml"),
        (["to=my.json"], "must end in .yaml"),
        (["to=no/my.yaml"], "there is no directory no"),
        (["to=axolotl.yml"], "is there already, and is not overwritten"),
        (["to=my.yaml"], "model.path: not set"),
        (["to=my.yaml", "to=b.yaml"], "give one"),
        (["to=my.yaml", "from="], "from needs a value, as in from=axolotl.yml"),
        (["to=my.yaml", *good, "--dry-run"], "there is no such flag"),
        (["to=my.yaml", *good, "~optim.lr"], "nothing to go back from"),
        (["to=my.yaml", *good, "learning_rate=2e-4"], "here it is optim.lr=2e-4"),
        (["to=my.yaml", *good, "optim.lrr=2e-4"], "did you mean optim.lr?"),
        (["to=my.yaml", "from=none.yml"], "from=none.yml: cannot be read (No such file"),
        (["to=my.yaml", "from=broken.json"], "is no JSON"),
        (["to=my.yaml", "from=list.yml"], "holds no settings"),
        (["to=my.yaml", "from=aliases.yml"], "has YAML aliases"),
        (["to=my.yaml", "from=ours.yaml"], "no setting in it is one of axolotl"),
        (["to=my.yaml", "from=ds_config.json", "optim.lr=fast"], "optim.lr must be a number"),
    ):
        (tmp_path / "broken.json").write_text("{")
        (tmp_path / "list.yml").write_text("- a")
        (tmp_path / "aliases.yml").write_text("a: &a [1]\nb: *a")
        (tmp_path / "ours.yaml").write_text("tuning: lora\nmodel: {path: m}\n")
        assert main(["init", *words]) == 64, words
        assert said in capsys.readouterr().err
        assert not (tmp_path / "my.yaml").exists()
    assert main(["init", *good, "to=my.yaml"]) == 0
    before = (tmp_path / "my.yaml").read_text()
    assert main(["init", *good, "tuning.rank=4", "to=my.yaml"]) == 64
    assert (tmp_path / "my.yaml").read_text() == before
    (tmp_path / "my.yaml").write_text(re.sub("steps: 1", "# steps: 1", before) + "guards:\n")
    assert (
        compose_config(["my.yaml"], check=False).config.budget.steps is None
    )  # a block of comments alone sets nothing


def test_secrets_are_not_repeated(tmp_path, capsys):
    token = "hf_" + "aB3dE5gH7jK9mN1pQ3sT5vX7zB9dF1hJ3l"
    (tmp_path / "theirs.yml").write_text(f"base_model: m\nhub_token: abc\nnotes: {token}\nwandb_watch: {token}\n")
    assert main(["init", "from=theirs.yml", "to=my.yaml"]) == 0
    said = capsys.readouterr().out + (tmp_path / "my.yaml").read_text()
    assert "hub_token: (hidden): no setting of this name" in " ".join(said.split())
    assert token not in said and "abc" not in said


def leaves(tree, prefix=""):
    """Every setting of a file by the names of the answer."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def converted(tmp_path, capsys, name, *words):
    """(answer, configuration) of a file of theirs, on a model that is here."""
    import yaml

    if not (tmp_path / "llama").exists():
        model_dir(tmp_path)
        capsys.readouterr()  # what libraries print when they are first imported, such as DeepSpeed's choice of a device
    assert main(["init", f"from={name}", "model.path=llama", "run.device=cpu", *words, "to=my.yaml", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    lists = ("no_equal", "differs", "needless")
    named = {row["setting"] for part in lists for row in told[part]} | set(told["empty"])
    for said in (told["replaced"], *told["origin"].values()):
        named |= {each.partition(": ")[0] for each in said}
    for leaf in leaves(yaml.safe_load((tmp_path / name).read_text())):
        assert any(
            leaf == each or leaf.startswith((f"{each}.", f"{each}[")) or each.startswith(f"{leaf}[") for each in named
        ), leaf
    text = (tmp_path / "my.yaml").read_text()
    bare = " ".join(re.sub(r"^ *#", "", text, flags=re.MULTILINE).split())
    for part in lists:
        for row in told[part]:
            assert " ".join(f"- {row['setting']}: {row['value']}: {row['why']}".split()) in bare
    assert told["to_settle"] == []
    return told, compose_config(["my.yaml"]).config


def test_a_file_of_axolotl(tmp_path, capsys, monkeypatch):
    (tmp_path / "data/train.jsonl").touch()
    monkeypatch.setattr("trainer.config.validate.missing_package", lambda *_: None)  # bitsandbytes need not be here
    told, config = converted(tmp_path, capsys, "axolotl.yml")
    assert (config.tuning.name.value, config.tuning.rank, config.tuning.alpha) == ("lora", 32, 16.0)
    assert config.tuning.targets == ["q_proj", "v_proj"] and config.model.quantisation.value == "nf4"
    assert config.batch == {"global": 8, "micro": 2} and config.budget.epochs == 3
    assert (config.optim.lr, config.schedule.warmup_share, config.data.max_length) == (2e-4, 0.1, 4096)
    ours = {name: (source.path, source.format.value) for name, source in config.data.sources.items()}
    assert ours == {
        "train": ("data/train.jsonl", "auto"),
        "gpt4_llm_cleaned": ("hub:teknium/GPT4-LLM-Cleaned", "alpaca"),
    }
    assert config.data.sources["train"].columns == {"messages": "conversations"}
    assert config.model.neftune_alpha == 5
    lacking = {row["setting"] for row in told["no_equal"]}
    assert {"datasets[1].shards", "plugins", "special_tokens", "peft"} <= lacking
    assert told["replaced"] == ["base_model: NousResearch/Llama-3.2-1B"]
    assert main(["init", "from=axolotl.yml", "launcher.processes=2", "launcher.nodes=2", "to=four.yaml"]) == 0
    assert "  global: 32 " in (tmp_path / "four.yaml").read_text()
    assert "rank: 32  # lora_r: 32" in (tmp_path / "my.yaml").read_text()


def test_a_file_of_deepspeed(tmp_path, capsys):
    (tmp_path / "train.jsonl").touch()
    told, config = converted(tmp_path, capsys, "ds_config.json", "data.path=train.jsonl", "precision=fp32")
    assert told["trainer"] == "DeepSpeed"
    strategy = config.strategy
    assert (strategy.name.value, strategy.offload_optimizer, strategy.offload_parameters) == ("zero3", "cpu", "none")
    assert strategy.persistence_threshold == 1_000_000 and config.batch == {"global": 16, "micro": 2}
    assert (config.optim.lr, config.optim.betas, config.optim.max_grad_norm) == (3e-5, [0.8, 0.999], 0.5)
    assert (config.schedule.name.value, config.schedule.warmup_steps, config.budget.steps) == ("linear", 100, 1000)
    assert told["replaced"] == ["bf16.enabled: true"]
    assert "logarithm" in told["differs"][0]["why"]


def test_a_file_of_llama_factory_trains(tmp_path, capsys):
    write_chat_data(tmp_path / "data/chats.jsonl", 8)
    row = {"instruction": "who are you ?", "output": "a model"}
    (tmp_path / "data/identity.json").write_text(json.dumps([row] * 8))
    words = ("strategy=single", "data.cache_dir=cache", "logging.wandb=disabled", "run.dir=first")
    told, config = converted(tmp_path, capsys, "llamafactory.yaml", *words)
    assert (config.tuning.rank, config.tuning.alpha) == (4, 8.0)  # twice the rank, as there
    assert {name: source.path for name, source in config.data.sources.items()} == {
        "chats": "data/chats.jsonl",
        "identity": "data/identity.json",
    }
    assert any(row["setting"] == "ds_z2_config.json: zero_optimization.reduce_bucket_size" for row in told["no_equal"])
    assert main(["train", "my.yaml"]) == 0
    assert "step 1/1" in capsys.readouterr().out
    assert (tmp_path / "first/export/adapter_config.json").exists()


@pytest.mark.parametrize(
    ("text", "set_", "unset"),
    [
        (
            "base_model: m\nlora_r: 8\nlearning_rate: 1e-4",
            {"tuning": "full", "optim.lr": 1e-4, "data.max_length": 512},
            "lora_r",
        ),
        (
            "base_model: m\nfsdp: [full_shard, auto_wrap]\nfsdp_config: {fsdp_offload_params: true, fsdp_version: 2, odd: 1}",
            {"strategy": "fsdp2", "strategy.cpu_offload": True},
            "fsdp_config.odd",
        ),
        (
            "model_name_or_path: m\nstage: pt\ndataset: gone\ngradient_checkpointing: unsloth",
            {"objective": "pretrain", "optim.lr": 5e-5, "budget.epochs": 3, "tuning": "lora", "tuning.rank": 8},
            "gradient_checkpointing",
        ),
        (
            "model_name_or_path: m\ndataset_text_field: text\nmax_steps: 7\nodd: 1",
            {"optim.lr": 2e-5, "budget.steps": 7},
            "odd",
        ),
        (
            "model_name_or_path: m\ndataset_name: trl-lib/Capybara\nodd: 1\nmax_steps: 7\n"
            "deepspeed: {zero_optimization: {stage: 1}}",
            {"data.path": "hub:trl-lib/Capybara", "budget.steps": 7, "batch.micro": 8, "strategy": "zero1"},
            "odd",
        ),
        ("base_model: m\nrl: ipo\nodd: 1", {"objective": "dpo", "objective.loss_type": "ipo"}, "odd"),
        ("model_name_or_path: m\nstage: dpo\npref_loss: simpo", {"objective": "simpo"}, "stage"),
        (
            "distributed_type: FSDP\nnum_processes: 4\nmixed_precision: bf16\nodd: 1\n"
            "fsdp_config: {fsdp_sharding_strategy: HYBRID_SHARD}",
            {"strategy": "hsdp", "launcher.processes": 4, "precision": "bf16", "optim.lr": None},
            "odd",
        ),
        (
            "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3, offload_param_device: cpu, odd: 1}",
            {"strategy": "zero3", "strategy.offload_parameters": "cpu"},
            "deepspeed_config.odd",
        ),
        (
            "base_model: m\ndatasets: [{path: a/b, split: 'train[:9%]'}]",
            {"data.sources.b.path": "hub:a/b"},
            "datasets.split",
        ),
        ("train_batch_size: 8\nzero_optimization: {stage: auto}\nodd: 1", {"batch.global": 8}, "odd"),
        (
            "zero_optimization: {stage: 1}\noptimizer: {type: AdamW}\nodd: 1",
            {"optim": "adamw", "optim.lr": 1e-3},
            "odd",
        ),
        ("base_model: m\ngradient_accumulation_steps: .inf\nodd: 1\noptimizer: x", {"batch.micro": 1}, "odd"),
        (
            "base_model: m\noptimizer: paged_adamw_32bit\nwandb_name: x\nliger_rope: true\ncut_cross_entropy: true\n"
            "rl: dpo\ndatasets: [{path: a/b, field_chosen: good, field_rejected: rejected}]",
            {"optim": "adamw", "logging.name": "x", "data.columns.chosen": "good", "data.columns.rejected": None},
            "liger_rope",
        ),
        (
            "model_name_or_path: m\nstage: ppo\nreport_to: mlflow, swanlab\nsave_strategy: 'no'",
            {"logging.mlflow": True, "logging.wandb": "disabled", "checkpoint.every_minutes": 0, "objective": None},
            "stage",
        ),
        (
            "model_name_or_path: m\nrl: grpo\nnum_generations: 16\nepsilon_high: 0.28\nscale_rewards: false\nuse_vllm: true",
            {
                "objective": "grpo",
                "optim.lr": 1e-6,
                "objective.group_size": 16,
                "objective.clip_high": 0.28,
                "objective.scale": "none",
            },
            "use_vllm",
        ),
        (
            "model_name_or_path: m\nstage: cls\nsave_strategy: epoch",
            {"objective": "classification", "checkpoint.every_minutes": None},
            "save_strategy",
        ),
        (
            "distributed_type: FSDP\nnum_machines: 2\nmain_process_ip: a\nmain_process_port: 29500\nuse_cpu: true\nodd: 1",
            {"launcher.rdzv": "a:29500", "launcher.nodes": 2, "run.device": "cpu"},
            "odd",
        ),
        ("base_model: m\nlearning_rate: fast\nseed: '${oc.env:HOME}'", {"schedule": "cosine"}, "learning_rate"),
    ],
)
def test_rules_of_whole_files(tmp_path, capsys, text, set_, unset):
    (tmp_path / "theirs.yml").write_text(text)
    assert main(["init", "from=theirs.yml", "to=my.yaml", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {key: told["settings"].get(key) for key in set_} == set_
    assert unset in {row["setting"] for row in told["no_equal"]}
    compose_config(["my.yaml"], check=False)


def test_offload_beside_no_shard_is_told_as_a_difference():
    translation = fsdp_strategy("no_shard,offload", OtherTrainerSettings({}))
    assert translation.overrides == {"strategy": "ddp"} and "strategy.cpu_offload=true" in translation.note
    assert fsdp_strategy("NO_SHARD", OtherTrainerSettings({})).note == ""


@pytest.mark.parametrize("data_files", ["a.jsonl", ["a.jsonl", "gone.jsonl"]])
def test_files_of_a_loader_are_found_beside_the_settings_file(tmp_path, data_files):
    beside = tmp_path / "theirs"
    beside.mkdir()
    (beside / "a.jsonl").touch()
    conversion = ConvertedSettings("axolotl")
    translate_axolotl_datasets({"path": "json", "data_files": data_files}, "datasets", conversion, beside)
    found = str(beside / "a.jsonl")
    assert conversion.overrides["data.path"] == (found if data_files == "a.jsonl" else f"[{found},gone.jsonl]")
