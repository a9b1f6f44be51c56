"""A real run and a review of it, for the tests of this room: two steps of LoRA on a tiny model, and what `review make` wrote."""

import json
from pathlib import Path

from tests.helpers.building import model_dir
from tests.helpers.launching import command_here
from tests.helpers.tokenizers import write_chat_data

PROMPTS = [f"a quick brown {n} fox?\n" for n in range(11)] + ["<script>alert(1)</script></script>\n"]


def made(root: Path) -> Path:
    """The run, with its review in `review/`."""
    model_dir(root)
    data = write_chat_data(root / "train.jsonl", 8)
    words = [
        f"model.path={root}/llama",
        f"data.path={data}",
        f"data.cache_dir={root}/cache",
        "tuning=full",
        "optim.lr=1e-1",
    ]
    words += ["batch.global=4", "batch.micro=4", "budget.steps=2", "export.at_end=false", "logging.wandb=disabled"]
    words += [f"run.dir={root}/run", "run.device=cpu", "run.threads=1"]
    assert command_here(["train", *words]) == 0
    (root / "prompts.jsonl").write_text("".join(f"{json.dumps({'prompt': prompt})}\n" for prompt in PROMPTS))
    asked = [
        "review",
        "make",
        f"{root}/run",
        f"prompts={root}/prompts.jsonl",
        "n=40",
        "review.repeats=0.25",
        "run.threads=1",
    ]
    assert command_here([*asked, "review.write.max_new_tokens=6", "review.rubric={kind: Which one is kinder?}"]) == 0
    return root / "run"


def answers(run: Path, name: str, vote) -> dict:
    """What the page would save: `vote(item of the key)` says tuned, other or tie, of every item."""
    found = json.loads((run / "review" / "key.json").read_text())
    items = {}
    for item in found["key"]["items"]:
        said = vote(item)
        side = said if said == "tie" else item["tuned"] if said == "tuned" else {"a": "b", "b": "a"}[item["tuned"]]
        items[item["id"]] = {"answers": {"overall": side, "kind": side}, "comment": "", "seconds": 30.0}
    return {"version": 1, "review": found["review"], "reviewer": name, "items": items}
