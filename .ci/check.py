"""What `make check` holds beside ruff and mypy: the shape of the house. Each check yields lines that say what is wrong.

python .ci/check.py [ROOT]             all checks
python .ci/check.py --write-flags      freeze the command line's flags as they are
"""

from __future__ import annotations

import ast
import difflib
import os
import re
import resource
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

# A module imports only from rows above its own, and from its own folder.
ROWS: tuple[tuple[str, ...], ...] = (
    ("columns", "types", "errors", "config", "env", "trace"),
    ("numerics", "sandbox"),
    ("kernels",),
    ("models",),
    ("algo", "engine", "program"),
    ("corpus", "train", "server", "rollout", "surgery", "search"),
    ("speculate",),
    ("sync",),
    ("plan",),
    ("run", "sim", "report"),
    ("bench", "study"),
    ("cli", "recipes", "studies"),
)
APART = ({"train", "engine"},)  # meet in models, numerics and sync, and never import each other, whatever their rows
ROW_OF = {folder: index for index, row in enumerate(ROWS) for folder in row}
FREE = {"", "__init__", "__main__"}  # the package's own front door

# Files that run on a machine without torch, and so import none; `config` means the config.py of every folder.
TORCH_FREE = {
    *(f"engine/{name}" for name in ("admit", "affinity", "bill", "branches", "cluster", "constraint", "costs", "deal")),
    *(f"engine/{name}" for name in ("draft", "drafters", "drafting", "driver", "guard", "hand", "integrity", "layout")),
    *(f"engine/{name}" for name in ("lengths", "opened", "order", "pages", "park", "policies", "predict", "prefix")),
    *(f"engine/{name}" for name in ("programs", "queues", "record", "schedule", "share", "slice", "suffix")),
    *(f"engine/{name}" for name in ("synthetic", "table", "tables", "tails", "tally", "yields")),
    *ROWS[0],
    "cli/main",
    "cli/recipes",
}

FILE_LINES, KERNEL_FILE_LINES, FUNCTION_LINES, PARAMETERS = 500, 800, 80, 8
PRODUCT_LINES = (
    84_000  # without APART_LINES, what measures and shows; 78,000 before speculation: its drafters, lengths, training
)
APART_LINES = ("bench", "study", "report")
LOOP_LINES = 60  # run/loop.py is the table of contents

# path, or path:function -> (what it may have, why). Lines for a file, and lines or parameters for a function.
RAISED: dict[str, tuple[int, str]] = {
    "src/tandem/kernels/gpu/attention.py:attention_kernel": (33, "pointers, strides and shapes of one launch"),
    "src/tandem/kernels/gpu/attention_backward.py:tile_of": (15, "what two kernels load alike"),
    "src/tandem/kernels/gpu/attention_backward.py:query_kernel": (26, "pointers, strides and shapes of one launch"),
    "src/tandem/kernels/gpu/attention_backward.py:key_kernel": (27, "pointers, strides and shapes of one launch"),
    "src/tandem/kernels/gpu/linear.py:linear_kernel": (14, "pointers and shapes of one launch"),
    "src/tandem/kernels/gpu/linear.py:store_tile": (10, "what three kernels store alike"),
    "src/tandem/kernels/gpu/eights.py:round_rows_kernel": (9, "pointers and shapes of one launch"),
    "src/tandem/kernels/gpu/eights.py:eights_kernel": (17, "pointers and shapes of one launch"),
    "src/tandem/kernels/gpu/codes.py:codes_kernel": (22, "pointers and shapes of one launch"),
    "src/tandem/kernels/gpu/codes.py:open_tile": (15, "a matrix's pointers and its form"),
    "src/tandem/kernels/gpu/sample.py:draw_kernel": (9, "pointers and shapes of one launch"),
    "src/tandem/kernels/gpu/sample.py:finish_kernel": (10, "pointers and shapes of one launch"),
    "src/tandem/cli/generate.py:generate": (16, "one a flag"),
    "src/tandem/cli/eval.py:evaluate": (9, "one a flag"),
    "src/tandem/cli/numerics.py:numerics": (16, "one a flag"),
    "src/tandem/cli/convert.py:convert": (14, "one a flag"),
    "tests/cpu/test_mutations.py": (540, "one table of mutations, beside what they replace"),
    "src/tandem/kernels/gpu/rotary.py:rotate_kernel": (12, "pointers and shapes of one launch"),
    "src/tandem/kernels/gpu/rotary.py:store_codes_kernel": (12, "pointers and shapes of one launch"),
}

# path -> why it may hold an absolute path.
PATHS_ALLOWED: dict[str, str] = {}

BANNED = {"data", "item", "info", "meta", "handle", "process", "manager", "utils", "helpers", "common", "misc"}
# path:name -> why the name is fitting.
NAMES_ALLOWED: dict[str, str] = {
    "tests/null/test_report.py:data": "the argument of HTMLParser.handle_data, which the test overrides",
}

# Spelt in parts, so that this file holds none.
PRIVATE = re.compile(
    r"(?<![\w.:~$}/)-])/(?:" + "|".join(("home", "root", "work", "tmp", "Users", "mnt", "farm")) + r")/\w"
)

HELP_SECONDS = 0.5
Tree = dict[Path, ast.Module]
Module = tuple[str, ...]


def tracked(root: Path) -> list[Path]:
    """Files of the repository, those not yet added included and those ignored left out; relative to `root`."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        found = [Path(name) for name in listed.stdout.split("\0") if name]
    else:
        found = [Path(folder, name).relative_to(root) for folder, _, names in os.walk(root) for name in names]
    return sorted(path for path in found if (root / path).is_file() and not (root / path).is_symlink())


def parse(root: Path, files: list[Path]) -> Tree:
    return {
        path: ast.parse((root / path).read_text(encoding="utf-8"), filename=str(path))
        for path in files
        if path.suffix == ".py"
    }


def module_of(path: Path) -> tuple[str, ...] | None:
    """Parts below `tandem` of a file of the package (`recipes` and `studies` count as folders of it), or None."""
    parts = path.with_suffix("").parts
    if parts[:2] == ("src", "tandem"):
        parts = parts[2:]
    elif parts[0] not in ("recipes", "studies"):
        return None
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for node in child.orelse:
                yield node
                yield from runtime_nodes(node)
        else:
            yield child
            yield from runtime_nodes(child)


def imports(tree: ast.Module, module: tuple[str, ...], is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import at run time; `from a import b` gives a.b. Function-level ones included."""
    for node in runtime_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ["tandem", *module] if is_package else ["tandem", *module[:-1]]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            if isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def check_imports(root: Path, trees: Tree) -> Iterator[str]:
    """Import order; torch-free files; one reader of the environment; one importer of Ray."""
    for path, tree in trees.items():
        module = module_of(path)
        if module is None or module[0] in FREE:
            continue
        if module[0] not in ROW_OF:
            yield f"{path}: the folder {module[0]} is in no row of the import order (.ci/check.py ROWS)"
            continue
        torch_free = "/".join(module) in TORCH_FREE or module[-1] == "config" or module[0] in ("recipes", "studies")
        for line, name in imports(tree, module, path.name == "__init__.py"):
            top, *rest = name.split(".")
            if top == "torch" and torch_free:
                yield f"{path}:{line}: imports torch; this file must run without it"
            if top == "ray" and module not in (("run", "ray"), ("run", "ray_tasks")):
                yield f"{path}:{line}: imports ray; only run/ray.py and run/ray_tasks.py do"
            if top == "tandem" and rest:
                yield from _order(f"{path}:{line}", module[0], rest[0])
        if module != ("env",):
            yield from _environment(path, tree)


def check_circles(root: Path, trees: Tree) -> Iterator[str]:
    """No modules of the package import each other in a circle, inside a folder either."""
    modules = {module: path for path in trees if (module := module_of(path)) is not None}
    imported: dict[Module, list[Module]] = {}
    for module, path in modules.items():
        parts = (name.split(".") for _, name in imports(trees[path], module, path.name == "__init__.py"))
        named = [tuple(rest) for top, *rest in parts if top == "tandem"]
        found = [name if name in modules else name[:-1] for name in named]  # `from package import module`, or a name
        imported[module] = sorted({name for name in found if name in modules and name != module})
    seen: set[Module] = set()
    for module in sorted(modules):
        circle = () if module in seen else _circle(module, imported)
        seen.update(circle)
        if circle:
            way = " -> ".join("/".join(each) for each in (*circle, module))
            yield f"{modules[module]}: a circle of imports, {way}; move what both need to a module below them"


def _circle(
    start: tuple[str, ...], imported: dict[tuple[str, ...], list[tuple[str, ...]]]
) -> tuple[tuple[str, ...], ...]:
    """The shortest way from a module along imports back to it, without its end; () where there is none."""
    ways, reached = [(start,)], {start}
    for way in ways:  # grows as it is walked
        for name in imported[way[-1]]:
            if name == start:
                return way
            if name not in reached:
                reached.add(name)
                ways.append((*way, name))
    return ()


def _order(where: str, own: str, other: str) -> Iterator[str]:
    if other not in ROW_OF and not other.startswith("__"):
        yield f"{where}: imports {other} by the package's front door, which hides its module; name the module"
    if other not in ROW_OF or other == own:
        return
    base = ROWS[0]
    if own in base and other in base:
        allowed = base.index(other) < base.index(own)
    else:
        allowed = ROW_OF[other] < ROW_OF[own]
    if {own, other} in APART:
        yield f"{where}: {own} imports {other}; they never import each other"
    elif not allowed:
        yield f"{where}: {own} imports {other}, which is not in a row above it"


def room_of(module: tuple[str, ...]) -> str:
    """The folder of a module, or "nouns" for those that lie beside the folders."""
    return "nouns" if module[0] in ROWS[0] else module[0]


def arrows(trees: Tree) -> Counter[tuple[str, str]]:
    """(room, room that it imports) -> number of imports, `recipes` and `studies` counted as rooms."""
    found: Counter[tuple[str, str]] = Counter()
    for path, tree in trees.items():
        module = module_of(path)
        if module is None or module[0] in FREE:
            continue
        for _, name in imports(tree, module, path.name == "__init__.py"):
            top, *rest = name.split(".")
            if top == "tandem" and rest and rest[0] in ROW_OF:
                found[room_of(module), room_of((rest[0],))] += 1
    return Counter({pair: count for pair, count in found.items() if pair[0] != pair[1]})


def room_sizes(root: Path, files: list[Path]) -> dict[str, tuple[int, int]]:
    """Room -> files and lines of its Python and C++."""
    sizes: dict[str, tuple[int, int]] = {}
    for path in files:
        module = module_of(path) if path.suffix in (".py", ".cpp", ".h") else None
        if module is not None and module[0] in ROW_OF:
            count, lines = sizes.get(room_of(module), (0, 0))
            more = len((root / path).read_text(encoding="utf-8").splitlines())
            sizes[room_of(module)] = count + 1, lines + more
    return sizes


def check_picture(root: Path, trees: Tree) -> Iterator[str]:
    """The arrows of docs/pictures/house.svg are today's imports."""
    picture = root / "docs" / "pictures" / "house.svg"
    if not picture.exists():
        return
    drawn = re.search(r"<desc>(.*?)</desc>", picture.read_text(encoding="utf-8"), re.DOTALL)
    before = set(drawn[1].split("; ")) if drawn else set()
    now = {f"{start} imports {aim}" for start, aim in arrows(trees)}
    if changed := sorted(before ^ now):
        yield f"docs/pictures/house.svg is of other imports ({'; '.join(changed[:3])}): python .ci/house.py"


def _environment(path: Path, tree: ast.Module) -> Iterator[str]:
    banned = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    for node in ast.walk(tree):
        read = isinstance(node, ast.Attribute) and node.attr in banned and ast.unparse(node.value) == "os"
        taken = isinstance(node, ast.ImportFrom) and node.module == "os" and banned & {a.name for a in node.names}
        if read or taken:
            yield f"{path}:{node.lineno}: reads the environment; only env.py does"  # type: ignore[attr-defined]


def counts(path: Path) -> bool:
    """Whether a Python file's lines are the product's."""
    module = module_of(path)
    return module is not None and module[0] not in (*APART_LINES, "studies")


def check_budgets(root: Path, trees: Tree) -> Iterator[str]:
    """Lines of a file, lines and parameters of a function, lines of src/; run/loop.py stays a table of contents."""
    total = 0
    for path, tree in trees.items():
        name, lines = path.as_posix(), len((root / path).read_text(encoding="utf-8").splitlines())
        kernel = name.startswith("src/tandem/kernels/")
        total += lines if counts(path) else 0
        limit = RAISED.get(name, (KERNEL_FILE_LINES if kernel else FILE_LINES, ""))[0]
        if lines > limit:
            yield f"{path}: {lines} lines; {limit} at most"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _function_budget(name, node, kernel)
        if name == "src/tandem/run/loop.py":
            yield from _loop(path, tree)
    for path in sorted(root.glob("src/tandem/kernels/*")):
        if path.suffix in (".cpp", ".h", ".hpp"):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            total += lines
            limit = RAISED.get(path.relative_to(root).as_posix(), (KERNEL_FILE_LINES, ""))[0]
            if lines > limit:
                yield f"{path.relative_to(root)}: {lines} lines; {limit} at most"
    if total > PRODUCT_LINES:
        yield f"the product: {total} lines without {', '.join(APART_LINES)}; {PRODUCT_LINES} at most"


def _function_budget(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef, kernel: bool) -> Iterator[str]:
    raised = RAISED.get(f"{name}:{node.name}")
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    usual = LOOP_LINES if name == "src/tandem/run/loop.py" else FUNCTION_LINES
    limit = max(raised[0], usual) if raised else usual
    if lines > limit and not kernel:
        yield f"{name}:{node.lineno}: {node.name} has {lines} lines; {limit} at most"
    parameters = [argument for argument in arguments(node) if argument not in ("self", "cls")]
    if len(parameters) > (raised[0] if raised else PARAMETERS):
        yield f"{name}:{node.lineno}: {node.name} has {len(parameters)} parameters; {PARAMETERS} at most"


def _loop(path: Path, tree: ast.Module) -> Iterator[str]:
    for line, name in imports(tree, ("run", "loop"), False):
        if name.split(".")[0] == "torch":
            yield f"{path}:{line}: the loop holds no tensor; hand in a stage"
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp) and re.search(r"\bconfig\.", ast.unparse(node.test)):
            yield f"{path}:{node.lineno}: `if config.` in the loop; hand in a stage"


def arguments(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> list[str]:
    given = node.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [argument.arg for argument in every if argument is not None]


def check_names(root: Path, trees: Tree) -> Iterator[str]:
    """Banned names of modules, folders, classes, functions and arguments."""
    for path, tree in trees.items():
        named: list[tuple[int, str, str]] = [(1, "module", part) for part in path.with_suffix("").parts]
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                last_word = re.findall(r"[A-Z][a-z0-9]*|[a-z0-9]+", node.name)[-1:]
                named += [(node.lineno, f"class {node.name}", word) for word in last_word]
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                named.append((node.lineno, "function", node.name))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                named += [(node.lineno, "argument", argument) for argument in arguments(node)]
        for line, kind, name in named:
            if name.lower().strip("_") in BANNED and f"{path.as_posix()}:{name}" not in NAMES_ALLOWED:
                yield f"{path}:{line}: {kind} is named {name}, which says nothing; name what it is"


def check_paths(root: Path, files: list[Path]) -> Iterator[str]:
    """Absolute paths of one machine."""
    for path in files:
        if path.as_posix() in PATHS_ALLOWED:
            continue
        try:
            text = (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            found = PRIVATE.search(line)
            if found:
                yield f"{path}:{number}: an absolute path of one machine: {line[found.start() :][:40].strip()}"


def check_links(root: Path, files: list[Path]) -> Iterator[str]:
    """Links of the pages lead to a file of the repository, and to a heading that it has."""
    known = {path.as_posix() for path in files} | {parent.as_posix() for path in files for parent in path.parents}
    for path in files:
        if path.suffix != ".md":
            continue
        text = re.sub(r"```.*?```|`[^`\n]*`", "", (root / path).read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            aim = Path(os.path.normpath(path.parent / file)) if file else path
            if aim.as_posix() not in known:
                yield f"{path}: the link {target} leads to no file of the repository"
            elif anchor and aim.suffix == ".md" and anchor not in _anchors((root / aim).read_text(encoding="utf-8")):
                yield f"{path}: the link {target} leads to no heading"


def _anchors(text: str) -> set[str]:
    """What a forge makes of each heading: lower case, punctuation dropped, blanks to hyphens."""
    headings = re.findall(r"^#+\s+(.*?)\s*#*$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _python(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(root / "src"), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})


def check_flags(root: Path) -> Iterator[str]:
    """The command line's verbs and flags are those of tests/goldens/flags.txt."""
    frozen = root / "tests" / "goldens" / "flags.txt"
    asked = _python(root, "-c", "from tandem.cli.main import flags; print('\\n'.join(flags()))")
    if asked.returncode:
        yield f"the flags cannot be listed: {asked.stderr.strip()[-500:]}"
        return
    before = frozen.read_text(encoding="utf-8").splitlines() if frozen.exists() else []
    changes = list(difflib.unified_diff(before, asked.stdout.splitlines(), "frozen", "now", lineterm="", n=0))
    if changes:
        yield "the flags changed (python .ci/check.py --write-flags, if on purpose):\n    " + "\n    ".join(changes[2:])


def check_slim(root: Path, trees: Tree) -> Iterator[str]:
    """`import tandem`, the command line and the torch-free files load no torch; help is quick."""
    modules = ["tandem", "tandem.cli.main"]
    for path in trees:
        module = module_of(path)
        if module and path.parts[0] == "src" and ("/".join(module) in TORCH_FREE or module[-1] == "config"):
            modules.append(".".join(["tandem", *module]))
    program = (
        "import importlib, sys\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(name + ' loads torch')\n"
    )
    loaded = _python(root, "-c", program)
    if loaded.returncode:
        yield loaded.stderr.strip()[-500:]
        return
    seconds = []
    for _ in range(5):
        before_s = _children_s()
        asked = _python(root, "-m", "tandem", "--help")
        seconds.append(_children_s() - before_s)
        if asked.returncode:
            yield f"tandem --help fails: {asked.stderr.strip()[-500:]}"
            return
    if statistics.median(seconds) > HELP_SECONDS:
        yield f"tandem --help takes {statistics.median(seconds):.2f} s of a core; {HELP_SECONDS} s at most"


def _children_s() -> float:
    """Processor seconds of the children so far: what runs beside them does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def check_tables(root: Path) -> Iterator[str]:
    """The tables of this file have a reason in each line and name what exists."""
    for table in (RAISED, PATHS_ALLOWED, NAMES_ALLOWED):
        for key, entry in table.items():
            reason = entry[1] if isinstance(entry, tuple) else entry
            if not reason.strip():
                yield f".ci/check.py: {key} has no reason"
            if not (root / key.partition(":")[0]).exists():
                yield f".ci/check.py: {key} names no file; drop the line"


def run_checks(root: Path) -> list[str]:
    """Every complaint about the tree at `root`."""
    files = tracked(root)
    trees = parse(root, files)
    checks: list[Callable[[], Iterator[str]]] = [
        lambda: check_imports(root, trees),
        lambda: check_circles(root, trees),
        lambda: check_budgets(root, trees),
        lambda: check_names(root, trees),
        lambda: check_paths(root, files),
        lambda: check_links(root, files),
        lambda: check_tables(root),
        lambda: check_picture(root, trees),
        lambda: check_flags(root),
        lambda: check_slim(root, trees),
    ]
    return [complaint for check in checks for complaint in check()]


def main(arguments: list[str]) -> int:
    root = Path(__file__).resolve().parent.parent
    if arguments == ["--write-flags"]:
        asked = _python(root, "-c", "from tandem.cli.main import flags; print('\\n'.join(flags()))")
        (root / "tests" / "goldens" / "flags.txt").write_text(asked.stdout, encoding="utf-8")
        return asked.returncode
    complaints = run_checks(Path(arguments[0]).resolve() if arguments else root)
    for complaint in complaints:
        print(complaint)
    print(f"house: {len(complaints)} complaints" if complaints else "house: in order")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
