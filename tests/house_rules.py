"""House rules that no linter knows: run by `make check`, prints every violation and exits 1 if there is one."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

# The rule stands in a file beside this one. A script finds it there; a test that imports this module does not.
sys.path.insert(0, str(Path(__file__).parent))

import dense_places

ROOT = Path(__file__).parent.parent
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 8
FOREIGN = {"varlen_attention"}
"""Functions that mirror an interface of another library."""
OBJECTIVES = re.compile(
    r"(^|[^a-z-])(kto|dpo|orpo|simpo|grpo|dapo|gspo|rloo|seq2seq|distil\w*|classification|multi_label|rated)([^a-z]|$)"
)
"""What trainer/data and strategies must not know: an objective says what it reads (trainer/data/objective_spec.py)."""
OWNERS = {  # external package -> the only places that may import it
    "deepspeed": ("strategies/",),
    "torch.distributed.fsdp": ("strategies/",),
    "peft": ("trainer/tuning/", "trainer/export/"),
    "wandb": ("trainer/reporting/trackers/",),
    "trackio": ("trainer/reporting/trackers/",),
    "mlflow": ("trainer/reporting/trackers/",),
    # Modules that are no public interface of their library: whoever raises a bound looks at these files.
    "transformers.cli": ("launch/serve/compat.py",),
    "transformers.integrations": ("trainer/model/compat.py", "trainer/tuning/compat/"),
    "transformers.masking_utils": ("trainer/model/compat.py",),
    "transformers.quantizers": ("trainer/model/compat.py",),
    "transformers.core_model_loading": ("trainer/model/compat.py", "trainer/tuning/compat/"),
    "transformers.conversion_mapping": ("trainer/model/compat.py", "trainer/tuning/compat/"),
    "transformers.utils.output_capturing": ("trainer/model/compat.py",),
    "transformers.utils.chat_template_utils": ("trainer/data/tokens/compat.py",),
    "transformers.models": ("trainer/model/compat.py",),
    "peft.utils": ("trainer/tuning/compat/",),
    "lm_eval.models": ("trainer/evaluation/harness/compat.py",),
}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, node.lineno))
    return found


def names(tree: ast.AST) -> set[str]:
    """Identifiers, and short texts that are no documentation, in lower case."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    prose = {
        id(statement.value)
        for node in ast.walk(tree)
        if isinstance(node, documented)
        for statement in node.body
        if isinstance(statement, ast.Expr)
    }
    found = set()
    for node in ast.walk(tree):
        found |= {value for key in ("id", "attr", "name", "arg") if isinstance(value := getattr(node, key, None), str)}
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            found |= {node.value} if len(node.value) < 60 else set()
    return {word.lower() for word in found}


def violations(path: Path) -> list[str]:
    name = path.relative_to(ROOT).as_posix()
    text = path.read_text(encoding="utf-8")
    tree = parsed(path)
    out = []
    if (lines := len(text.splitlines())) > MAX_FILE_LINES:
        out.append(f"{name}: {lines} lines, at most {MAX_FILE_LINES}: split it by what it owns")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                out.append(f"{name}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}")
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if len(arguments) > MAX_PARAMETERS and node.name not in FOREIGN:
                out.append(
                    f"{name}:{node.lineno}: {node.name} has {len(arguments)} parameters, at most {MAX_PARAMETERS}"
                )
    if name.startswith(("trainer/data/", "strategies/")):
        out += [
            f"{name}: knows an objective by name: {word}" for word in sorted(names(tree)) if OBJECTIVES.search(word)
        ]
    for module, line in imports(tree):
        for package, places in OWNERS.items():
            if (module == package or module.startswith(package + ".")) and not name.startswith(places):
                out.append(f"{name}:{line}: {package} may only be imported under {', '.join(places)}")
    if path.name == "utils.py":
        out.append(f"{name}: a module name says what it owns; there is no utils.py")
    return out


def same_names(paths: list[Path]) -> list[str]:
    """A class is looked for by its name alone, which therefore no other has."""
    places: dict[str, list[str]] = {}
    for path in paths:
        for node in parsed(path).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    return [f"two classes are called {name}: {', '.join(where)}" for name, where in places.items() if len(where) > 1]


def private_names(paths: list[Path]) -> list[str]:
    """Private names of libraries outside the compat files: imports of them, and attributes that nothing of ours defines."""
    own = {name for path in paths for name in own_private_names(parsed(path))}
    out = []
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        if "compat" in path.relative_to(ROOT).parts or path.stem == "compat":
            continue
        places = private_imports(parsed(path)) + private_attributes(parsed(path), own)
        out += [f"{name}:{line}: {what} is private: it belongs in a compat file" for what, line in sorted(places)]
    return out


def own_private_names(tree: ast.AST) -> set[str]:
    """Names that begin with an underscore and that a module defines itself."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            found.add(node.attr)
    return {name for name in found if name.startswith("_")}


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_imports(tree: ast.AST) -> list[tuple[str, int]]:
    """Imports of private modules of libraries, or of private names out of any of theirs."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module != "__future__":
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    theirs = [(name, line) for name, line in found if name.split(".")[0] not in ("launch", "trainer", "strategies")]
    return [(name, line) for name, line in theirs if any(is_private(part) for part in name.split("."))]


def private_attributes(tree: ast.AST, own: set[str]) -> list[tuple[str, int]]:
    """Attributes that are private and no names of ours."""
    return [
        (ast.unparse(node), node.lineno)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own
    ]


def is_private(name: str) -> bool:
    """Whether a name begins with one underscore, but for names that Python documents: of named tuples, and `_thread`."""
    documented = ("_replace", "_asdict", "_fields", "_thread")
    return name.startswith("_") and not name.startswith("__") and name not in documented


def without_encoding(path: Path) -> list[str]:
    """Texts that are read or written in the encoding of whoever runs us: a file of ours is UTF-8 everywhere."""
    name = path.relative_to(ROOT).as_posix()
    return [
        f'{name}:{node.lineno}: a text file without encoding="utf-8"'
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and is_text_file_call(node)
        if all(keyword.arg not in ("encoding", None) for keyword in node.keywords)
    ]


def is_text_file_call(call: ast.Call) -> bool:
    """Whether it is read_text, write_text, or an open in a text mode; `place.open()` may be anybody's, and passes."""
    is_method = isinstance(call.func, ast.Attribute)
    function = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if function == "read_text":
        return not call.args
    if function == "write_text":
        return len(call.args) < 2
    if function not in ("open", "fdopen"):
        return False
    modes = call.args[:1] if is_method and function == "open" else call.args[1:2]
    modes = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] or modes
    if not modes:
        return function == "open" and not is_method
    mode = getattr(modes[0], "value", None)
    return isinstance(mode, str) and set(mode) <= set("rwax+t")


def broken_imports(path: Path) -> list[str]:
    """Modules of ours, and names in them, that a script imports although they are gone: no test runs these scripts."""
    name = path.relative_to(ROOT)
    problems = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            problems += [
                f"{name}:{node.lineno}: there is no module {alias.name}"
                for alias in node.names
                if is_ours(alias.name) and file_of(alias.name) is None
            ]
        elif isinstance(node, ast.ImportFrom) and node.module and is_ours(node.module):
            module = file_of(node.module)
            if module is None:
                problems.append(f"{name}:{node.lineno}: there is no module {node.module}")
                continue
            names = bound(parsed(module))
            for alias in node.names:
                if alias.name not in names and file_of(f"{node.module}.{alias.name}") is None:
                    problems.append(f"{name}:{node.lineno}: {node.module} has no {alias.name}")
    return problems


def is_ours(module: str) -> bool:
    return module.split(".")[0] in ("launch", "trainer", "strategies", "conf", "tests")


def file_of(module: str) -> Path | None:
    """The file of a module of ours, or the `__init__.py` of a package; None if there is no such module."""
    place = ROOT / module.replace(".", "/")
    for file in (place.with_suffix(".py"), place / "__init__.py"):
        if file.exists():
            return file
    return None


def bound(tree: ast.AST) -> set[str]:
    """What a module defines or imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def main() -> int:
    files = dense_places.product_files()
    found = [line for f in files for line in violations(f)] + same_names(files) + private_names(files)
    found += dense_places.violations(files)
    scripts = [*sorted((ROOT / "benchmarks").rglob("*.py")), *sorted((ROOT / "docs").glob("*.py"))]
    found += [line for path in scripts for line in broken_imports(path)]
    found += [line for path in [*files, *scripts] for line in without_encoding(path)]
    found += [
        f"{f}: contains the path of a machine"
        for f in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
        if (ROOT / f).suffix in {".py", ".md", ".yaml", ".toml", ".sh", ".sbatch"}
        and re.search(r"/(work|farm|root)/(?!\*)", (ROOT / f).read_text(encoding="utf-8"))
        and f != "tests/house_rules.py"
    ]
    print("\n".join(found) or "house rules: ok")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
