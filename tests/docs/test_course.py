"""The page of claims: each is taught somewhere, and what it names as its proof is there."""

import re

from tests.helpers.launching import ROOT

CLAIMS = ROOT / "docs" / "lessons" / "claims.md"
NUM_CLAIMS = 86
PROOF = re.compile(r"\[[^\]]*\]\(\.\./\.\./([^)]+)\)(?:: `(\w+)`)?")


def rows(text: str) -> list[list[str]]:
    """The cells of each claim: what it says, where it is taught, its proofs, and whether it is shown."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [cells for cells in lines if cells[0] != "claim"]


def faults(text: str) -> list[str]:
    """What is wrong with the page: proofs that do not exist, and verdicts without a reason."""
    found = []
    for cells in rows(text):
        claim, taught, proofs, shown = cells
        if not re.search(r"\]\([^)]+\)", taught):
            found.append(f"{claim}: no page")
        named = PROOF.findall(proofs)
        if not named:
            found.append(f"{claim}: no test and no result")
        for file, test in named:
            path = ROOT / file
            if not path.is_file():
                found.append(f"{claim}: there is no {file}")
            elif test and not re.search(rf"^def {test}\(", path.read_text(encoding="utf-8"), re.MULTILINE):
                found.append(f"{claim}: {file} has no {test}")
        reason = shown.partition("partly: ")[2]
        if shown != "yes" and len(reason.split()) < 5:
            found.append(f"{claim}: neither shown nor explained: {shown}")
    return found


def test_each_claim_has_a_page_and_a_proof_that_exists():
    text = CLAIMS.read_text(encoding="utf-8")
    assert faults(text) == []
    claims = rows(text)
    assert len(claims) == NUM_CLAIMS == len({cells[0] for cells in claims})
    num_shown = sum(cells[3] == "yes" for cells in claims)
    counted = f"Of the {NUM_CLAIMS} claims, {num_shown} are shown and {NUM_CLAIMS - num_shown} are partly shown."
    assert counted in text


def test_a_claim_without_a_proof_is_found():
    row = "| it works | [page](../peft.md) | [tests/docs/test_course.py](../../tests/docs/test_course.py): `{}` | {} |"
    assert faults(row.format("test_a_claim_without_a_proof_is_found", "yes")) == []
    assert faults(row.format("test_of_nothing", "yes")) != []
    assert faults(row.format("test_a_claim_without_a_proof_is_found", "partly: no")) != []
    assert faults("| it works | nowhere | [tests](../../tests/none.py) | yes |") == [
        "it works: no page",
        "it works: there is no tests/none.py",
    ]


def experiments_shown() -> dict[str, str]:
    """The lesson that shows the table of an experiment, by the experiment's name."""
    shown = {}
    for page in sorted(CLAIMS.parent.glob("*.md")):
        for name in re.findall(
            r"^<!-- begin experiment: (\w+) -->\n\|", page.read_text(encoding="utf-8"), re.MULTILINE
        ):
            shown[name] = page.name
    return shown


def test_a_claim_shown_by_an_experiment_is_taught_where_its_table_stands():
    shown = experiments_shown()
    assert len(shown) >= 8
    elsewhere = []
    for claim, taught, proofs, _ in rows(CLAIMS.read_text(encoding="utf-8")):
        for name in re.findall(r"results/course/(\w+)\.json\)", proofs):
            if name in shown and f"]({shown[name]})" not in taught:
                elsewhere.append(f"{claim}: {name} is in {shown[name]}")
    assert elsewhere == []
