"""The house rules that a machine can check: who imports whom, and what no module may contain.

Everything is read from the syntax trees, so that a forbidden import inside a function counts as
much as one at the top.
"""

import ast
import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "instseg_ext"

# Imports go from a higher number to a lower or equal one.
LAYERS = {
    "compat": 0,
    "resources": 0,
    "shipped": 0,
    "config": 1,
    "method": 1,
    "structures": 1,
    "layers": 1,
    "modeling": 2,
    "data": 2,
    "evaluation": 2,
    "checkpoint": 2,
    "visualization": 2,
    "methods": 3,
    "zoo": 4,
    "engine": 4,
    "export": 4,
    "cli": 5,
    "doctor": 5,
}
# These are handed a method's record by cli and must not look for it themselves.
METHOD_BLIND = ("engine", "export", "visualization")
# Not to be imported: compiled code that not everybody has, and what needs pkg_resources.
FORBIDDEN_IMPORTS = ("detectron2._C", "detectron2.model_zoo", "detectron2.utils.testing")

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "shipped" not in path.parts)
SCRIPTS = [*sorted((ROOT / "tools").glob("*.py")), ROOT / "train_net.py"]
assert MODULES, "the package was not found"


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """All modules and names a file imports; ``from a import b`` gives ``a`` and ``a.b``."""
    package = dotted(path) if path.name == "__init__.py" else dotted(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) in IMPORT_FUNCTIONS
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        ):
            found.add(node.args[0].value)
    return found


IMPORT_FUNCTIONS = ("import_module", "__import__")


def parts_of(path: Path) -> set[str]:
    """The top-level parts of our package that a file imports."""
    names = (name.split(".") for name in imports_of(path))
    return {name[1] for name in names if name[0] == "instseg_ext" and len(name) > 1} & set(LAYERS)


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def lines_where(path: Path, matches) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for node in ast.walk(tree_of(path))
        if matches(node)
    ]


def offences(paths, matches) -> list[str]:
    return [line for path in paths for line in lines_where(path, matches)]


# --- direction ----------------------------------------------------------------------------------


def test_every_part_has_a_layer():
    parts = {part(path) for path in MODULES} - {"__init__"}
    assert parts <= set(LAYERS), f"add to LAYERS: {parts - set(LAYERS)}"


def test_imports_point_downwards():
    wrong = [
        f"{dotted(path)} -> {target}"
        for path in MODULES
        if part(path) != "__init__"
        for target in parts_of(path)
        if LAYERS[target] > LAYERS[part(path)]
    ]
    assert not wrong


def test_engine_export_and_visualization_know_no_method():
    wrong = [
        f"{dotted(path)} -> {target}"
        for path in MODULES
        if part(path) in METHOD_BLIND
        for target in parts_of(path) & {"methods", "zoo"}
    ]
    assert not wrong


def test_parts_of_one_layer_do_not_import_each_other_in_a_circle():
    edges = {name: set() for name in LAYERS}
    for path in MODULES:
        if part(path) != "__init__":
            edges[part(path)] |= parts_of(path) - {part(path)}
    reached = {name: set(targets) for name, targets in edges.items()}
    for _ in LAYERS:
        for targets in reached.values():
            targets |= set().union(*(reached[target] for target in targets), set())
    circles = {name for name, targets in reached.items() if name in targets}
    assert not circles


def test_no_method_imports_another():
    wrong = []
    for path in MODULES:
        if part(path) != "methods" or path.parent == PACKAGE / "methods":
            continue
        room = path.relative_to(PACKAGE / "methods").parts[0]
        wrong += [
            f"{dotted(path)} -> {name}"
            for name in imports_of(path)
            if name.startswith("instseg_ext.methods.") and name.split(".")[2] != room
        ]
    assert not wrong


def test_a_room_has_one_door():
    """Outside its room, nobody reaches past a method's package."""
    wrong = [
        f"{dotted(path)} -> {name}"
        for path in MODULES
        if part(path) != "methods"
        for name in imports_of(path)
        if name.startswith("instseg_ext.methods.")
        and (PACKAGE / "methods").joinpath(*name.split(".")[2:]).with_suffix(".py").exists()
    ]
    assert not wrong


def test_projects_hold_no_python():
    assert not list((ROOT / "projects").rglob("*.py"))


# --- content ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORBIDDEN_IMPORTS)
def test_forbidden_imports(name):
    wrong = [
        dotted(path)
        for path in [*MODULES, *SCRIPTS]
        for found in imports_of(path)
        if found == name or found.startswith(name + ".")
    ]
    assert not wrong


def test_no_print_in_the_library():
    assert not offences(
        MODULES,
        lambda node: isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print",
    )


def test_no_star_import():
    assert not offences(
        [*MODULES, *SCRIPTS],
        lambda node: isinstance(node, ast.ImportFrom) and node.names[0].name == "*",
    )


def test_no_broad_except():
    """Nothing is swallowed unseen; a handler that raises again may look at everything."""

    def broad(node):
        if not isinstance(node, ast.ExceptHandler):
            return False
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        names = {getattr(kind, "id", "") for kind in kinds if kind is not None}
        raises = any(isinstance(child, ast.Raise) for child in ast.walk(node))
        return (node.type is None or names & {"Exception", "BaseException"}) and not raises

    assert not offences([*MODULES, *SCRIPTS], broad)


def test_no_stub():
    def stub(node):
        return isinstance(node, ast.Raise) and "NotImplemented" in ast.unparse(node)

    wrong = offences(MODULES, stub)
    note = re.compile(r"#.*\b(TODO|FIXME|XXX)\b")
    wrong += [dotted(path) for path in MODULES if note.search(path.read_text(encoding="utf-8"))]
    assert not wrong


def test_only_the_zoo_compares_meta_architectures():
    def compares(node):
        if isinstance(node, ast.Match):
            return "META_ARCHITECTURE" in ast.unparse(node.subject)
        return isinstance(node, ast.Compare) and "META_ARCHITECTURE" in ast.unparse(node)

    assert not offences([path for path in MODULES if part(path) != "zoo"], compares)


def test_no_object_below_the_engine_keeps_the_config():
    """``from_config`` and builder functions read it; what they build holds plain values."""

    def keeps(node):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            return False
        on_self = [
            target
            for target in targets
            if isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self"
        ]
        named = any(target.attr.strip("_") in ("cfg", "config") for target in on_self)
        return bool(on_self) and (named or getattr(node.value, "id", "") == "cfg")

    below = [path for path in MODULES if part(path) != "__init__" and LAYERS[part(path)] < 4]
    assert not offences(below, keeps)


def test_files_and_functions_stay_readable():
    long_files = [
        dotted(path)
        for path in [*MODULES, *SCRIPTS]
        if len(path.read_text(encoding="utf-8").splitlines()) > 400
    ]

    def long_function(path, node):
        """More than 60 lines of code: comments, blank lines and the docstring are free."""
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return False
        first = node.body[0].end_lineno if ast.get_docstring(node) is not None else node.lineno - 1
        lines = path.read_text(encoding="utf-8").splitlines()[first : node.end_lineno]
        return sum(1 for line in lines if line.strip() and not line.lstrip().startswith("#")) > 60

    long_functions = [
        f"{dotted(path)}.{node.name}"
        for path in [*MODULES, *SCRIPTS]
        for node in ast.walk(tree_of(path))
        if long_function(path, node)
    ]
    assert not long_files
    assert not long_functions


def test_no_path_of_one_machine():
    machine = re.compile(r"""(^|[\s"'=(`])/(work|root|home/\w+)/""", re.MULTILINE)
    texts = [
        path
        for folder in ("instseg_ext", "configs", "projects", "docs", "tools", "tests", "datasets")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".yaml", ".yml", ".txt") and path != Path(__file__)
    ]
    texts += [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.py"), ROOT / "Makefile"]
    wrong = [
        str(path.relative_to(ROOT))
        for path in texts
        if machine.search(path.read_text(encoding="utf-8"))
    ]
    assert not wrong


# --- importing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_every_module_is_importable(path):
    importlib.import_module(dotted(path))


def in_fresh_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import instseg_ext",
        "import instseg_ext.compat, instseg_ext.resources, instseg_ext.doctor",
        "import contextlib, instseg_ext.cli.main as main\n"
        "with contextlib.suppress(SystemExit): main.main(['--help'])",
    ],
    ids=["package", "compat", "help"],
)
def test_importing_is_cheap(code):
    heavy = "('torch', 'torchvision', 'detectron2', 'cv2', 'matplotlib', 'numpy')"
    out = in_fresh_python(
        f"import sys\n{code}\nprint('loaded:', *[m for m in {heavy} if m in sys.modules])"
    )
    assert out.splitlines()[-1].strip() == "loaded:"


def test_everything_imports_without_optional_packages():
    blocked = (
        "('pkg_resources', 'onnx', 'wandb', 'shapely', 'lvis', 'detectron2._C', 'safetensors')"
    )
    names = [dotted(path) for path in MODULES]
    in_fresh_python(
        f"import sys, importlib\nfor name in {blocked}: sys.modules[name] = None\n"
        f"for name in {names}: importlib.import_module(name)"
    )
