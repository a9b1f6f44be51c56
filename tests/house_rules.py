"""House rules that no linter knows: run by `make check`, prints every violation and exits 1 if there is one."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAX_FILE_LINES = 320
MAX_FUNCTION_LINES = 60
OWNERS = {  # external package -> the only places that may import it
    "deepspeed": ("strategies/",),
    "torch.distributed.fsdp": ("strategies/",),
    "peft": ("trainer/tuning/", "trainer/export/"),
    "wandb": ("trainer/records/trackers.py",),
}


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, node.lineno))
    return found


def violations(path: Path) -> list[str]:
    name = path.relative_to(ROOT).as_posix()
    text = path.read_text()
    tree = ast.parse(text)
    out = []
    if len(text.splitlines()) > MAX_FILE_LINES:
        out.append(f"{name}: {len(text.splitlines())} lines, at most {MAX_FILE_LINES}: split it by what it owns")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                out.append(f"{name}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}")
    for module, line in imports(tree):
        for package, places in OWNERS.items():
            if (module == package or module.startswith(package + ".")) and not name.startswith(places):
                out.append(f"{name}:{line}: {package} may only be imported under {', '.join(places)}")
    if path.name == "utils.py":
        out.append(f"{name}: a module name says what it owns; there is no utils.py")
    return out


def main() -> int:
    files = subprocess.check_output(
        ["git", "ls-files", "-co", "--exclude-standard", "launch", "trainer", "strategies"], cwd=ROOT, text=True
    ).split()
    found = [line for f in files if f.endswith(".py") and (ROOT / f).exists() for line in violations(ROOT / f)]
    found += [
        f"{f}: contains the path of a machine"
        for f in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
        if (ROOT / f).suffix in {".py", ".md", ".yaml", ".toml", ".sh", ".sbatch"}
        and re.search(r"/(work|farm|root)/(?!\*)", (ROOT / f).read_text())
        and f != "tests/house_rules.py"
    ]
    print("\n".join(found) or "house rules: ok")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
