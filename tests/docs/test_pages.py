"""What the pages say about the code is true of it: reference, links, commands, messages."""

import re
import runpy
import shlex
import struct
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from launch.cluster.preflight.targets import preflight_targets
from launch.compare.points import plan_points
from launch.config.choices import choices_by_group
from launch.config.compose import compose_config
from launch.main import DESCRIPTION_BY_VERB, EXIT_CODES, module_of_verb
from launch.plan.command import compose_planned_run, read_plan_request
from launch.sweep.sweeper import is_search_requested, plan_search
from tests.helpers.covering import chosen
from tests.helpers.launching import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "slurm" / "README.md"])
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STARTERS = ("shardtune", "torchrun", "sbatch")


def prose(path: Path) -> str:
    """A page without its code blocks."""
    return FENCED.sub("", path.read_text(encoding="utf-8"))


def commands(path: Path) -> list[list[str]]:
    """Every complete command shown for training or submitting, as words."""
    found = []
    for language, text in FENCED.findall(path.read_text(encoding="utf-8")):
        if language == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(re.sub(r"<the [^>]*>", "", line), comments=True)
                if (
                    "model.path" in line
                    and words[0] in STARTERS
                    and words[1] not in ("prepare", "evaluate", "download")
                ):
                    found.append(words)
    return found


SHOWN = [(page, words) for page in PAGES for words in commands(page)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as forges and the site make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        number = 0
        while (unique := f"{anchor}-{number}" if number else anchor) in found:
            number += 1
        found.add(unique)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?[^)]*\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        linked = page.parent / target if target else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), f"{page.name}: {target}#{anchor}"


def paths_into_docs(text: str) -> list[tuple[str, str]]:
    """(path, anchor) of each page, picture or script of docs/ that a text names; not those below an address or another folder."""
    return re.findall(r"(?<![\w/.-])(docs/[\w./-]*\.(?:md|py|png|svg|sh)\b)(?:#([\w-]+))?", text)


def test_every_path_into_docs_that_code_conf_and_help_name_exists():
    """A page that moves takes its pointers along: those of messages, docstrings, comments and `--help`."""
    listed = subprocess.check_output(
        ["git", "ls-files", "-co", "--exclude-standard", "--", ":!docs/*.md", ":!tests/helpers/test_covering.py"],
        cwd=ROOT,
        text=True,
    )
    wrong, count = [], 0
    for name in set(listed.splitlines()):
        file = ROOT / name
        if file.suffix not in (".py", ".yaml", ".toml", ".sh", ".sbatch", ".def", ".md", "") or not file.is_file():
            continue
        for path, anchor in paths_into_docs(file.read_text(encoding="utf-8", errors="replace")):
            count += 1
            if not (ROOT / path).is_file() or (anchor and anchor not in anchors(ROOT / path)):
                wrong.append(f"{name}: {path}#{anchor}")
    assert wrong == [] and count > 100
    missing = "docs/" + "no-page.md"
    assert paths_into_docs(f"({missing}#a), https://x.org/{missing}") == [(missing, "a")]


def test_the_configuration_reference_is_up_to_date():
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    page = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["page"]
    assert page() == written, "run: python docs/make_reference.py"
    for key in (
        "batch.global",
        "data.eval_share",
        "tuning.lr_ratio",
        "strategy.replicate",
        "launcher.signal_lead_s",
        "logging.name",
    ):
        assert written.count(f"| `{key}` |") == 1, key


def test_the_table_of_models_is_that_of_the_sweep():
    written = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "docs" / "make_models.py"))["page"](written) == written, (
        "run: python docs/make_models.py"
    )
    assert written.count("| llama | LlamaForCausalLM |") == 1


def test_every_page_stands_in_a_section_of_the_site():
    """`make docs` says so too, and is not a part of `make test`."""
    sections = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"^ *- (?:[^\n]*: )?(\S+\.md)$", sections, re.MULTILINE)
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert pages <= set(listed), f"mkdocs.yml does not name {pages - set(listed)}"


HOW_TOS = [
    *("planning", "comparing", "searching", "data-preparation", "mixing-data", "large-data", "privacy"),
    *("evaluation", "test-documents", "lm-eval", "judge-models", "ethics", "challenges", "deployment"),
    *(
        "reliability",
        "torchrun-and-slurm",
        "slurm",
        "following",
        "ending",
        "document-runs",
        "tracking",
        "wandb-view",
        "energy",
    ),
    *(
        "optimizers",
        "schedules",
        "classification",
        "seq2seq",
        "long-context",
        "verify",
        "python",
        "adapters",
        "run-page",
    ),
    *("review", "gates", "papers", "mixtures", "router-losses"),
]
"""Pages that somebody reads to do one thing. All cases and limits belong into docs/reference, measurements into docs/evidence."""


WITHOUT_TESTS = {"README", "api", "glossary", "renamed"}
"""Pages that claim nothing a test could show: lists of pages and of words."""


def test_every_page_says_at_its_end_how_it_was_tested():
    pages = {page for page in DOCS.rglob("*.md") if page.parent.name != "lessons" and page.stem not in WITHOUT_TESTS}
    headings = {page: re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE) for page in pages}
    assert {str(page.relative_to(DOCS)) for page, names in headings.items() if names[-1:] != ["Tested how"]} == set()


def test_how_to_pages_are_short():
    lengths = {name: len((DOCS / f"{name}.md").read_text(encoding="utf-8").splitlines()) for name in HOW_TOS}
    assert {name: lines for name, lines in lengths.items() if lines > 120} == {}


def test_the_diagrams_are_those_of_their_script():
    drawn = runpy.run_path(str(ROOT / "docs" / "make_diagrams.py"))["DIAGRAMS"]
    for name, draw in drawn.items():
        assert (ROOT / "docs" / "pictures" / name).read_text(encoding="utf-8") == draw(), (
            "run: python docs/make_diagrams.py"
        )


def test_there_is_a_picture_of_each_page_that_a_reader_can_load():
    """One of each page that the script takes, whole, as wide as it says, at most 150 KB, and shown in the documentation."""
    script = runpy.run_path(str(ROOT / "docs" / "make_pictures.py"), run_name="pictures")
    pages = ROOT.joinpath("docs").rglob("*.md")
    shown = {name for page in pages for name in re.findall(r"!\[[^\]]+\]\(\S*?pictures/(\w+)\.png\)", page.read_text())}
    pictures = {path.stem: path for path in (ROOT / "docs" / "pictures").glob("*.png")}
    assert pictures.keys() == script["PAGES"].keys() == shown
    for name, path in pictures.items():
        assert 10_000 < path.stat().st_size <= 150 * 1024, name
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82"), name
        width, height = struct.unpack(">II", content[16:24])
        assert width == script["WIDTH"] and 500 <= height <= script["PAGES"][name].height, name


def test_the_table_of_optimizers_is_that_of_validation():
    written = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
    remade = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["optimizers_page"]
    assert remade(written) == written, "run: python docs/make_reference.py"
    for optim in choices_by_group()["optim"]:
        assert f"| `{optim}` | " in written and f"| `optim={optim}` | " in written


def said(number):
    """The words of a command, but for paths of the reader's own."""
    return {word for word in SHOWN[number][1] if not re.match(r"(model\.path|data\.path|run\.dir|to)=", word)}


@pytest.mark.parametrize(
    ("page", "words"),
    [pytest.param(*SHOWN[n], id=f"{SHOWN[n][0].stem}-{n}") for n in chosen(range(len(SHOWN)), said)],
)
def test_every_command_shown_is_legal(page, words, tmp_path, monkeypatch):
    """As it stands, but for paths and for the dots that stand for them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "d.jsonl").write_text("{}\n")
    (tmp_path / "rewards.py").write_text("def right_number(completions): ...\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}')
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.json").write_text(
        '{"architectures": ["X4ForSequenceClassification"], "id2label": {"0": "a"}}'
    )
    for name in ("tokenizer.json", "chat_template.jinja"):
        (tmp_path / "r" / name).write_text("{}")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    options = [word for word in words if word.startswith("--")]
    counts = [int(o.split("=")[1]) for o in options if o.startswith(("--nproc-per-node", "--nodes", "--gpus-per-node"))]
    if counts:
        monkeypatch.setenv("WORLD_SIZE", str(counts[0] * (counts[1] if len(counts) > 1 else 1)))
    settings = [word for word in words if "=" in word and not word.startswith("--")]
    replaced = {"model.path": "m", "data.path": "d.jsonl", "data.eval_path": "d.jsonl", "run.resume": "auto"}
    replaced |= {"data.test_path": "d.jsonl", "tuning.from": "a", "model.adapters": "[a]"}
    replaced |= {"objective.teacher.path": "m", "evaluation.tasks.facts.path": "d.jsonl"}
    replaced |= {"challenges.forgetting.data": "d.jsonl", "objective.rewards.liked.path": "r"}
    replaced |= {f"data.sources.{name}.path": "d.jsonl" for name in ("task", "general")}
    settings = [f"{k}={replaced.get(k, v)}" for k, v in (word.split("=", 1) for word in settings)]
    if words[:2] == ["shardtune", "submit"]:
        settings.insert(0, "launcher=slurm")
    if words[:2] == ["shardtune", "doctor"]:  # takes the words of a run, and need not have all
        if "--verify" in options:
            assert compose_config(settings, check=False).config.strategy.name != "single"
            return
        asked = preflight_targets(settings).request
        assert asked.num_nodes * asked.ranks_per_node > 1
        return
    if words[:2] == ["shardtune", "init"]:  # beside a file of another trainer, words need not be a whole run
        assert any(word.startswith("to=") for word in settings)
        own = [word for word in settings if not word.startswith(("to=", "from="))]
        compose_config(own, check=len(own) == len(settings) - 1)
        return
    if words[:2] == ["shardtune", "compare"]:
        points = plan_points([word for word in settings if not word.startswith("to=")]).points
        assert not any(point.refusals for point in points)
        return
    if is_search_requested(settings):
        plan_search(settings)
        return
    choices = [
        [word] if value[:1] in ("[", "{") else [f"{key}={each}" for each in value.split(",")]
        for word in settings
        for key, _, value in (word.partition("="),)
    ]
    if words[:2] == ["shardtune", "plan"]:
        request = read_plan_request([word.replace("<card>", "l4") for word in settings])
        compose_planned_run(request.run_overrides, request.card)
        return
    for number in range(max(map(len, choices))):
        compose_config([values[min(number, len(values) - 1)] for values in choices])


def test_commands_shown_in_the_pages_were_found():
    assert sum(page.name == "README.md" for page, _ in SHOWN) >= 4
    assert {words[0] for _, words in SHOWN} == set(STARTERS)


def test_the_readme_names_every_strategy_exit_code_and_make_target():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for strategy in choices_by_group()["strategy"]:
        assert f"| `{strategy}` |" in text
    for code in re.findall(r"\b\d+\b", EXIT_CODES):
        assert re.search(rf"\*\*Exit codes:\*\*[^*]*\b{code} ", text, re.DOTALL), code
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake (demo|test|install|check|format|test-fast)\b", text))
    assert {"demo", "test"} <= named <= targets
    assert text.index("make test") < 1500, "both commands stand on the first screen"


def test_every_verb_shown_exists():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        shown = [block for _, block in FENCED.findall(text)] + re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
        for verb in re.findall(r"^(?:\$ )?shardtune ([a-z]+)\b", "\n".join(shown), re.MULTILINE):
            assert verb in DESCRIPTION_BY_VERB and find_spec(module_of_verb(verb)), f"{page.name}: shardtune {verb}"


def test_every_setting_named_exists():
    from launch.config.known_settings import all_settings, find_setting

    known = all_settings()
    tops = {key.split(".")[0] for key in known}
    parts = {key.rpartition(".")[0] for key in known} | {key.split(".*")[0] for key in known}
    for page in PAGES:
        for key in re.findall(r"`([a-z]+\.[a-z_.]+)(?:=[^`]*)?`", prose(page)):
            if (
                key.split(".")[0] in tops
                and not (page.parent / key).exists()
                and not key.endswith((".json", ".yaml", ".html", ".csv"))
            ):
                assert find_setting(key) or key in parts or (ROOT / key).exists(), f"{page.name}: {key}"


def test_every_file_of_ours_named_exists():
    """By its path from the root or from docs/; by its name alone, wherever it is."""
    files = set(
        subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).splitlines()
    )
    names = {Path(file).name for file in files}
    for page in [*DOCS.rglob("*.md"), ROOT / "README.md"]:
        text = page.read_text(encoding="utf-8")
        written = set(re.findall(r"<!-- file: (\S+) -->", text))  # files that the reader writes
        for name in re.findall(r"(?<![\w/.<-])((?:[\w-]+/)*[\w-]+\.(?:py|j2))\b", text):
            if name in written:
                continue
            places = {name, f"docs/{name}", f"trainer/{name}", f"launch/{name}"}
            assert places & files or ("/" not in name and name in names), f"{page.name}: {name}"


def test_quoted_messages_exist_in_the_code():
    """A message that was reworded must be reworded here, too."""
    source = "".join(
        re.sub(r'"\s*f?"', "", path.read_text())  # literals that continue on the next line
        for package in ("launch", "trainer", "strategies")
        for path in (ROOT / package).rglob("*.py")
    )
    rows = re.findall(r"^\| `([^`]+)`", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    rows = [row for row in rows if row not in ("data_wait_s", "needs tuning=")]
    assert len(rows) > 20
    missing = [row for row in rows if row not in source]
    assert not missing


def test_planning_tables_of_the_page_are_those_of_the_results():
    written = (ROOT / "docs" / "evidence" / "plans.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "docs" / "make_planning.py"))["page"]() == written, (
        "run: python docs/make_planning.py"
    )


def test_the_page_of_methods_is_up_to_date():
    from trainer.tuning.table import PEFT_METHODS, TUNING_METHODS

    written = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "docs" / "make_methods.py"))["page"]() == written, (
        "run: python docs/make_methods.py"
    )
    assert {*TUNING_METHODS, "peft"} == set(choices_by_group()["tuning"])
    for name in (*TUNING_METHODS, *PEFT_METHODS):
        assert f"={name}`" in written
