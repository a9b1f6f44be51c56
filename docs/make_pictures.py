"""Takes the pictures of `docs/pictures`, one of each page, from runs that it makes itself.

    python docs/make_pictures.py --site /tmp/site           # all; what the site has already is not made again
    python docs/make_pictures.py --site /tmp/site run audit # these

The runs are those of `shardtune demo`: a small real model on real data, some minutes on two CPU cores. Needs the extra `test`
and an installed Chromium. A picture has at most 150 KB.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PICTURES = ROOT / "docs" / "pictures"
MAX_BYTES = 150 * 1024
WIDTH = 1200
"""Pixels of the browser's window; the picture is as wide."""
COLORS = (256, 128, 64, 32)
"""Sizes of the palette that are tried until the file is small enough."""


@dataclass(frozen=True)
class Picture:
    """A page and how it comes about."""

    page: str
    """The file below the site; a pattern, of which the first match counts."""
    commands: tuple[str, ...]
    """Commands of shardtune that make it, in the site."""
    height: int = 1050
    """Pixels from the top of the page that are shown."""
    script: str = ""
    """JavaScript that brings the page to where it is shown."""


DEMO = "demo run.dir=runs/demo evaluation.every_steps=3"
DEMO_DATA = "model.path={model} data.path={train} data.eval_path={held_out}"
TASKS = (
    "evaluation.tasks=[loss,token_accuracy] evaluation.tasks.notes.kind=summarisation evaluation.tasks.notes.path={held_out} "
    "evaluation.tasks.notes.max_rows=8 evaluation.tasks.notes.write.max_new_tokens=48"
)
TINY = "model.path=model data.path=train.jsonl data.eval_path=held-out.jsonl debug=tiny run.device=cpu"
POINTS = "tuning=full,lora optim.lr=1e-3,1e-2 budget.steps=12 evaluation.every_steps=4 to=reports"
SPACE = (
    "optim.lr=tag(log,interval(1e-4,1e-1)) tuning=choice(lora,full) budget.steps=8 sweeper.trials=8 run.dir=runs/search"
)
PAGES = {
    "run": Picture("runs/demo/report.html", (DEMO, "compare runs/demo")),
    "audit": Picture("audit/*/audit.html", (DEMO, f"prepare {DEMO_DATA} data.max_length=256 data.cache_dir=audit")),
    "evaluation": Picture("runs/demo/evaluation.html", (DEMO, f"evaluate runs/demo against=base {TASKS}")),
    "review": Picture(
        "runs/demo/review/review.html",
        (DEMO, "review make runs/demo prompts=prompts.jsonl n=4 review.write.max_new_tokens=48"),
        height=760,
        # Into the first pair of answers.
        script="document.getElementById('name').value = 'Ada'; document.getElementById('begin').click();",
    ),
    "plan": Picture(
        "plan/plan.html",
        (
            DEMO,
            "plan model.path={model} data.path={train} tuning=lora hardware=l4 batch.global=8 budget.epochs=3 to=plan",
        ),
    ),
    "compare": Picture("reports/compare.html", (f"compare {TINY} {POINTS}",)),
    "search": Picture("runs/search/search.html", (f"train -m sweeper=optuna {TINY} {SPACE}",)),
}
"""By the name of the picture's file. What one command has made stands for the next."""


def main() -> None:
    """Make the site's pages and their pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--site", type=Path, required=True, help="directory for the runs; kept")
    parser.add_argument("names", nargs="*", choices=[[], *PAGES], help="pictures to take; default: all")
    words = parser.parse_args()
    site = words.site.resolve()
    prepare(site)
    names = words.names or list(PAGES)
    for name in names:
        make_page(PAGES[name], site)
    take(names, site)


def prepare(site: Path) -> None:
    """The tiny model and data of the comparison, in the site, which becomes the working directory."""
    from tests.helpers.models import tiny_model_dir
    from tests.helpers.tokenizers import chat_rows, tiny_tokenizer, write_jsonl

    site.mkdir(parents=True, exist_ok=True)
    os.chdir(site)
    if not Path("model").exists():
        tokenizer = tiny_tokenizer()
        tiny_model_dir(Path("model"), "llama", vocab_size=len(tokenizer) + 10)
        tokenizer.save_pretrained("model")
    write_jsonl(Path("train.jsonl"), chat_rows(200))
    write_jsonl(Path("held-out.jsonl"), chat_rows(40, seed=7))


def make_page(picture: Picture, site: Path) -> None:
    """Run the commands of a page unless it is there; SystemExit if one fails."""
    from tests.helpers.launching import command_here

    if page_of(picture, site) is not None:
        return
    for command in picture.commands:
        done = site / ".done" / command.replace("/", "_")[:200]
        if done.exists():
            continue
        words = command.format(**demo_files(site)).split()
        print(f"$ shardtune {' '.join(words)}", flush=True)
        code = command_here(words)
        if code != 0:
            raise SystemExit(f"shardtune {command}: exit code {code}")
        done.parent.mkdir(exist_ok=True)
        done.touch()


def demo_files(site: Path) -> dict[str, str]:
    """Model and data of the demo's run, by the names that commands have for them; empty before there is a run.

    Copies the data into the site and links the model there, since pages show their paths. Also writes `prompts.jsonl`:
    conversations without their last answer.
    """
    config_file = site / "runs" / "demo" / "config.yaml"
    if not config_file.exists():
        return {}
    from trainer.reporting.settings_file import read_settings_tree

    config = read_settings_tree(config_file)
    held_out = config["data"]["eval_path"]
    rows = [json.loads(line) for line in Path(held_out).read_text(encoding="utf-8").splitlines()]
    prompts = [json.dumps({"messages": row["messages"][:-1]}) for row in rows]
    (site / "prompts.jsonl").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    shutil.copy(config["data"]["path"], site / "notes.jsonl")
    shutil.copy(held_out, site / "held-out-notes.jsonl")
    model = Path(config["model"]["path"])
    link = site / model.name  # a short path, which is the same on every machine
    if not link.exists():
        link.symlink_to(model)
    return {"model": model.name, "train": "notes.jsonl", "held_out": "held-out-notes.jsonl"}


def page_of(picture: Picture, site: Path) -> Path | None:
    """The page's file, if it is there."""
    return next(iter(sorted(site.glob(picture.page))), None)


def take(names: list[str], site: Path) -> None:
    """Take the pictures of these pages."""
    from tests.helpers.browser import started

    PICTURES.mkdir(exist_ok=True)
    with started() as browser:
        for name in names:
            picture = PAGES[name]
            page_file = page_of(picture, site)
            if page_file is None:
                raise SystemExit(f"{picture.page}: its commands did not write it")
            page = browser.open(page_file, width=WIDTH)
            if picture.script:
                page.evaluate(f"() => {{ {picture.script} }}")
            page.tab.wait_for_timeout(3000)  # plots are drawn after the page is loaded
            height = min(picture.height, page.evaluate("document.documentElement.scrollHeight"))
            clip = {"x": 0, "y": 0, "width": WIDTH, "height": height}
            png = small_png(page.tab.screenshot(full_page=True, clip=clip))
            (PICTURES / f"{name}.png").write_bytes(png)
            print(f"docs/pictures/{name}.png: {len(png):,} bytes", flush=True)


def small_png(png: bytes) -> bytes:
    """The picture with as large a palette as `MAX_BYTES` allows. ValueError if none is small enough."""
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGB")
    for num_colors in COLORS:
        file = io.BytesIO()
        # Which keeps rare colours, such as those of thin curves, as they are.
        palette = image.quantize(num_colors, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        palette.save(file, "PNG", optimize=True)
        if len(file.getvalue()) <= MAX_BYTES:
            return file.getvalue()
    raise ValueError(f"no palette makes the picture smaller than {MAX_BYTES} bytes: show less of the page")


if __name__ == "__main__":
    main()
