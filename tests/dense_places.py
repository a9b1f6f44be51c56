"""Places where a line has more than one thought: part of the house rules.

`tests/dense_places.json` lists how many each file had when the rule came. A file may have fewer, never more.
`python tests/dense_places.py` writes the list anew after places were opened.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
LISTED = Path(__file__).with_suffix(".json")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
ONE_LINE_STATEMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr, ast.Assert)
RULES = {
    "conditional": "a conditional expression inside another one: write an if statement",
    "tuple": "an assignment of several unlike values: write one assignment a line",
    "comprehension": "a second comprehension in a statement: give the first one a name, or write a loop",
}


def dense_places(tree: ast.AST) -> dict[str, list[int]]:
    """Line numbers of dense places, by rule."""
    places: dict[str, list[int]] = {}
    for node in ast.walk(tree):
        rule = rule_broken_by(node)
        if rule is not None:
            places.setdefault(rule, []).append(node.lineno)  # type: ignore[attr-defined]
    return places


def rule_broken_by(node: ast.AST) -> str | None:
    """The rule that this node breaks by itself, if any."""
    if isinstance(node, ast.IfExp) and count_of(ast.IfExp, node) > 1:
        return "conditional"
    if isinstance(node, ast.Assign) and is_tuple_of_unlike_values(node):
        return "tuple"
    if isinstance(node, ONE_LINE_STATEMENTS) and loops_in(node) > 1:
        return "comprehension"
    return None


def count_of(kinds: type[ast.AST], node: ast.AST) -> int:
    return sum(isinstance(inner, kinds) for inner in ast.walk(node))


def loops_in(statement: ast.AST) -> int:
    """How many `for` its comprehensions have together."""
    return sum(len(inner.generators) for inner in ast.walk(statement) if isinstance(inner, COMPREHENSIONS))


def is_tuple_of_unlike_values(node: ast.Assign) -> bool:
    """Whether several names get values in one line, but for a swap and for numbers or texts of one type."""
    target = node.targets[0]
    if not isinstance(target, ast.Tuple) or not isinstance(node.value, ast.Tuple):
        return False
    names = {ast.unparse(element) for element in target.elts}
    values = node.value.elts
    is_swap = names == {ast.unparse(element) for element in values}
    constants = {type(element.value) for element in values if isinstance(element, ast.Constant)}
    are_alike = len(constants) == 1 and all(isinstance(element, ast.Constant) for element in values)
    return not is_swap and not are_alike


def places_by_file(paths: list[Path]) -> dict[str, dict[str, list[int]]]:
    """Line numbers of dense places by file and rule, of files that have any."""
    places = {}
    for path in paths:
        lines_by_rule = dense_places(ast.parse(path.read_text(encoding="utf-8")))
        if lines_by_rule:
            places[path.relative_to(ROOT).as_posix()] = lines_by_rule
    return places


def counts(places: dict[str, dict[str, list[int]]]) -> dict[str, dict[str, int]]:
    """Number of dense places by file and rule, as the list holds it."""
    table = {}
    for name, lines_by_rule in places.items():
        table[name] = {rule: len(lines) for rule, lines in sorted(lines_by_rule.items())}
    return table


def new_places(places: dict[str, dict[str, list[int]]], listed: dict[str, dict[str, int]]) -> list[str]:
    """One line for each file and rule with more places than listed."""
    problems = []
    for name, lines_by_rule in places.items():
        for rule, lines in lines_by_rule.items():
            allowed = listed.get(name, {}).get(rule, 0)
            if len(lines) > allowed:
                where = ", ".join(str(line) for line in lines)
                problems.append(f"{name}: {RULES[rule]} (lines {where}; {allowed} of them are old)")
    return problems


def violations(paths: list[Path]) -> list[str]:
    """One line for each file and rule with more places than listed, or one if the list could be shorter."""
    listed: dict[str, dict[str, int]] = json.loads(LISTED.read_text(encoding="utf-8"))
    places = places_by_file(paths)
    problems = new_places(places, listed)
    if not problems and counts(places) != listed:
        problems.append(f"{LISTED.relative_to(ROOT)} lists more than there is: run python tests/dense_places.py")
    return problems


def product_files() -> list[Path]:
    """Our Python files that users run."""
    listed = subprocess.check_output(
        ["git", "ls-files", "-co", "--exclude-standard", "launch", "trainer", "strategies", "shardtune.py"],
        cwd=ROOT,
        text=True,
    ).split()
    return [ROOT / file for file in sorted(set(listed)) if file.endswith(".py") and (ROOT / file).exists()]


def main() -> int:
    """Write the list; refuse to let it grow."""
    places = places_by_file(product_files())
    grown = new_places(places, json.loads(LISTED.read_text(encoding="utf-8")))
    if grown:
        print("\n".join(grown))
        return 1
    current = counts(places)
    LISTED.write_text(json.dumps(current, indent=1) + "\n", encoding="utf-8")
    totals: Counter[str] = Counter()
    for count_by_rule in current.values():
        totals.update(count_by_rule)
    print(f"{LISTED.name}: {len(current)} files, {dict(totals)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
