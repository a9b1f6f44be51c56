"""Every learning rate in an example is one that docs/peft.md advises for what the example trains."""

import re
import runpy
from itertools import chain

import yaml

from tests.docs.test_pages import FENCED, PAGES
from tests.helpers.launching import ROOT
from trainer.optim.config import OPTIMIZERS
from trainer.optim.rates import RATE_BY_OPTIMIZER_AND_METHOD, UsualRate, usual_learning_rate

CONFIG_BY_OPTIMIZER = {settings().name: settings for settings in OPTIMIZERS}
NUMBER = re.compile(r"\d[\d.]*(e-?\d+)?")


def values_of(words: list[str], key: str, default: str) -> list[str]:
    """The values that a command gives a setting: one, or those of an axis."""
    typed = [word.partition("=")[2] for word in words if word.startswith(f"{key}=")]
    return typed[-1].split(",") if typed else [default]


def advised(method: str, objective: str, optimizer: str) -> UsualRate | None:
    return usual_learning_rate(CONFIG_BY_OPTIMIZER[optimizer](), method, objective)


def unadvised(words: list[str]) -> list[tuple[str, float]]:
    """(method, rate) of each rate of a command that is advised for none of its methods, and of each method without one."""
    rates = [float(value) for value in values_of(words, "optim.lr", "") if NUMBER.fullmatch(value)]
    objective = values_of(words, "objective", "sft")[0]
    optimizer = values_of(words, "optim", "adamw")[0]
    if not rates or optimizer not in CONFIG_BY_OPTIMIZER:
        return []
    ranges = {}
    for method in values_of(words, "tuning", "full"):
        typed = values_of(words, "tuning.type", method)[0] if method == "peft" else method
        rate = advised(typed, objective, optimizer)
        if rate is not None:  # else it is another author's method, or one that nobody knows a rate for
            ranges[method] = rate
    found = []
    for rate in rates:
        if ranges and not any(usual.low <= rate <= usual.high for usual in ranges.values()):
            found.append((next(iter(ranges)), rate))
    for method, usual in ranges.items():
        if not any(usual.low <= rate <= usual.high for rate in rates):
            found.append((method, rates[-1]))
    return list(dict.fromkeys(found))


def example_commands(text: str) -> list[list[str]]:
    """The words of every command in the blocks of a page; quoting does not matter here."""
    blocks = [body for language, body in FENCED.findall(text) if language in ("bash", "text", "")]
    lines = chain.from_iterable(block.replace("\\\n", " ").splitlines() for block in blocks)
    starters = ("shardtune", "torchrun", "sbatch")
    return [line.split() for line in lines if "optim.lr=" in line and line.lstrip("$ ").startswith(starters)]


def test_no_page_shows_a_rate_that_is_not_advised():
    commands = [(page.name, words) for page in PAGES for words in example_commands(page.read_text(encoding="utf-8"))]
    assert len(commands) > 25
    wrong = {(page, *rate): " ".join(words) for page, words in commands for rate in unadvised(words)}
    assert wrong == {}


def test_the_heads_of_conf_and_its_experiments_have_advised_rates():
    wrong = {}
    for file in sorted((ROOT / "conf").glob("*/*.yaml")):
        text = file.read_text(encoding="utf-8")
        commands = [line.removeprefix("# Use: ").split() for line in text.splitlines() if line.startswith("# Use: ")]
        content = yaml.safe_load(text) or {}
        if "lr" in content.get("optim", {}):
            chosen = {}
            for entry in content["defaults"]:
                if isinstance(entry, dict):
                    chosen |= entry
            words = [f"{key.removeprefix('override /')}={choice}" for key, choice in chosen.items()]
            commands.append([*words, f"optim.lr={content['optim']['lr']}"])
        for words in commands:
            if unadvised(words):
                wrong[file.name] = unadvised(words)
    assert wrong == {}


def test_a_rate_outside_of_its_range_is_found():
    assert unadvised(["tuning=lora", "optim.lr=2e-5"]) == [("lora", 2e-5)]
    assert unadvised(["tuning=lora", "objective=dpo", "optim.lr=1e-4"]) == [("lora", 1e-4)]
    assert unadvised(["tuning=full,lora", "optim.lr=2e-5,2e-4"]) == []
    assert unadvised(["tuning=full,prefix", "optim.lr=2e-5,2e-2"]) == [("full", 2e-2), ("prefix", 2e-2)]
    assert unadvised(["tuning=lora"]) == []


def test_the_tables_of_rates_are_up_to_date():
    path = ROOT / "docs" / "peft.md"
    written = path.read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "docs" / "make_rates.py"))["page"](written) == written, (
        "run: python docs/make_rates.py"
    )
    assert "| `lora` | 2e-4 |" in written and all(f"`{name}`" in written for name, _ in RATE_BY_OPTIMIZER_AND_METHOD)
