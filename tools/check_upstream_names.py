"""Names that torch, TorchRec, FBGEMM and others do not promise to keep are touched in torchrec_mpe/upstream/ alone.

Such names are those with a leading underscore, private modules and attributes, and what is listed below. The check
reads sources, of this package and of the installed ones, and imports nothing: a subclass of an upstream class is not to
use or override the private names of its bases, unless a class of ours in upstream/ between the two lends them, in a
tuple ``lent_to_subclasses``.

Usage: python tools/check_upstream_names.py [PACKAGE_FOLDER]
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

UPSTREAM = ("torch", "torchrec", "fbgemm_gpu", "torchx", "polars", "pyarrow", "tensordict", "torchmetrics")
# Modules without an underscore that are nevertheless no promise, and those within them that are.
UNSTABLE_MODULES = (
    "torch.distributed.checkpoint",
    "torch.distributed.distributed_c10d",
    "torch.fx.experimental",
    "torchrec.distributed.planner.constants",
    "torchrec.distributed.planner.shard_estimators",
    "torchx.util",
)
STABLE_MODULES = ("torch.distributed.checkpoint.stateful",)
# Attributes of FBGEMM's TBEs and others that are no promise either; polars calls Categories unstable.
UNSTABLE_ATTRIBUTES = frozenset(
    (
        "Categories",
        "distributed_c10d",
        "iter_cpu",
        "momentum1_offsets",
        "momentum1_physical_offsets",
        "momentum1_placements",
        "weights_physical_offsets",
    )
)

_REMEDY = "wrap it in torchrec_mpe/upstream/ under a name that says what it is needed for"
_PUBLIC = frozenset(("_replace", "_fields", "_asdict", "_make", "_exit", "_"))  # of the standard library's documents


class _Class(NamedTuple):
    """A class, and the module that defines it."""

    module: str
    definition: ast.ClassDef


class Sources:
    """Modules of a package and of upstream packages, as parsed text.

    Args:
        package (Path): its folder.
    """

    def __init__(self, package: Path) -> None:
        self.package = package

    @cache  # noqa: B019  (one object a run)
    def tree(self, module: str) -> tuple[ast.Module, bool] | None:
        """A module, and whether it is a package; None where it is neither ours nor upstream's, or has no source."""
        root, *rest = module.split(".")
        if root == self.package.name:
            folder = self.package
        else:
            spec = find_spec(root) if root in UPSTREAM else None
            if spec is None or not spec.submodule_search_locations:
                return None
            folder = Path(next(iter(spec.submodule_search_locations)))
        path = folder.joinpath(*rest)
        for file, is_package in ((path / "__init__.py", True), (path.with_suffix(".py"), False)):
            if file.is_file():
                return ast.parse(file.read_text(encoding="utf-8")), is_package
        return None

    @cache  # noqa: B019
    def imports(self, module: str) -> tuple[dict[str, tuple[str, str]], list[str]]:
        """What a module imports, by name: module and name there ("" for the module itself); and what it stars."""
        found, stars = {}, []
        tree = self.tree(module)
        for node in ast.walk(tree[0]) if tree else ():
            if isinstance(node, ast.Import):
                for alias in node.names:
                    found[alias.asname or alias.name.split(".")[0]] = (
                        (alias.name, "") if alias.asname else (alias.name.split(".")[0], "")
                    )
            elif isinstance(node, ast.ImportFrom):
                parents = module.split(".")
                up = node.level - (1 if tree and tree[1] else 0)
                parents = parents[: len(parents) - up] if node.level else []
                origin = ".".join([*parents, *([node.module] if node.module else [])])
                for alias in node.names:
                    if alias.name == "*":
                        stars.append(origin)
                    else:
                        found[alias.asname or alias.name] = (origin, alias.name)
        return found, stars

    @cache  # noqa: B019
    def find_class(self, module: str, name: str) -> _Class | None:
        """The class that a module knows under a name, dotted or not."""
        tree = self.tree(module)
        if tree is None:
            return None
        first, _, rest = name.partition(".")
        imports, stars = self.imports(module)
        if rest:
            origin, imported = imports.get(first, (f"{module}.{first}", ""))
            return self.find_class(f"{origin}.{imported}" if imported else origin, rest)
        for node in ast.walk(tree[0]):
            if isinstance(node, ast.ClassDef) and node.name == name:
                return _Class(module, node)
        if name in imports and imports[name][0] != module:
            return self.find_class(*imports[name])
        return next((found for star in stars if star != module and (found := self.find_class(star, name))), None)

    def lineage(self, of: _Class) -> Iterator[_Class]:
        """A class and all its bases whose sources are at hand."""
        yield of
        for base in of.definition.bases:
            name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
            found = self.find_class(of.module, name)
            if found is not None and found.definition is not of.definition:
                yield from self.lineage(found)


def is_private(name: str) -> bool:
    """Whether a name begins with one underscore, and Python itself does not document it."""
    return name.startswith("_") and not name.startswith("__") and name not in _PUBLIC


def _private_modules(name: str) -> bool:
    root, *rest = name.split(".")
    if root not in UPSTREAM or name.startswith(STABLE_MODULES):
        return False
    return any(map(is_private, rest)) or any(name == m or name.startswith(f"{m}.") for m in UNSTABLE_MODULES)


def _assigned(node: ast.AST) -> Iterator[ast.expr]:
    """What a statement assigns to, one target at a time."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    for target in targets:
        if isinstance(target, ast.expr):
            yield from (part for part in ast.walk(target) if isinstance(part, ast.Name | ast.Attribute))


def _is_self(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def defined(tree: ast.AST) -> set[str]:
    """Private names that a class or file defines: functions, classes, variables, and attributes of ``self``."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.For | ast.NamedExpr):
            for target in _assigned(node):
                if isinstance(target, ast.Name):
                    found.add(target.id)
                elif _is_self(target.value):
                    found.add(target.attr)
    return set(filter(is_private, found))


def _lent(of: _Class) -> set[str]:
    """The names in ``lent_to_subclasses`` of a class."""
    for node in of.definition.body:
        names = {t.id for t in _assigned(node) if isinstance(t, ast.Name)}
        if "lent_to_subclasses" in names and isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            return set(ast.literal_eval(node.value))
    return set()


class _Findings(ast.NodeVisitor):
    """What one file touches that it should not, as (line, what)."""

    def __init__(self, sources: Sources, module: str) -> None:
        self.found: list[tuple[int, str]] = []
        self._sources, self._module = sources, module
        tree = sources.tree(module)
        assert tree is not None
        self._own = defined(tree[0])
        self._class: tuple[set[str], set[str]] | None = None  # names of ours, and of its upstream bases
        self.visit(tree[0])

    def _tell(self, node: ast.stmt | ast.expr, what: str) -> None:
        self.found.append((node.lineno, what))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if _private_modules(alias.name):
                self._tell(node, f"imports {alias.name}")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            if node.module and (
                _private_modules(f"{node.module}.{alias.name}")
                or (node.module.split(".")[0] in UPSTREAM and is_private(alias.name))
            ):
                self._tell(node, f"imports {alias.name} from {node.module}")

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before = self._class
        ours: set[str] = set()
        theirs: set[str] = set()
        lent: set[str] = set()
        for each in self._sources.lineage(_Class(self._module, node)):
            if each.module.split(".")[0] == self._sources.package.name:
                ours |= defined(each.definition)
                lent |= _lent(each) if ".upstream." in each.module else set()
            else:
                theirs |= defined(each.definition)
        self._class = (ours | lent, theirs - lent)
        for statement in node.body:
            for name in self._names_of_statement(statement):
                if name in self._class[1]:
                    self._tell(statement, f"{node.name} overrides {name} of an upstream class")
        self.generic_visit(node)
        self._class = before

    @staticmethod
    def _names_of_statement(statement: ast.stmt) -> list[str]:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            return [statement.name]
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            return [target.id for target in _assigned(statement) if isinstance(target, ast.Name)]
        return []

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._check(node, node.value, node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr", "hasattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                self._check(node, node.args[0], name.value)
        self.generic_visit(node)

    def _check(self, node: ast.expr, receiver: ast.expr, name: str) -> None:
        if name in UNSTABLE_ATTRIBUTES and name not in self._own:
            self._tell(node, f"reads {ast.unparse(receiver)}.{name}")
        if not is_private(name):
            return
        if _is_self(receiver) and self._class is not None:
            ours, theirs = self._class
            if name in theirs:
                self._tell(node, f"uses {name} of an upstream class")
            elif name not in ours:
                self._tell(node, f"uses {name}, which no class of ours defines")
        elif name not in self._own:
            self._tell(node, f"reads {ast.unparse(receiver)}.{name}, which this file does not define")


def findings(package: Path) -> list[str]:
    """Every place where a package touches upstream names outside its ``upstream/``, a line each."""
    sources = Sources(package)
    lines: list[str] = []
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package)
        if inside.parts[0] == "upstream":
            continue
        parts = inside.with_suffix("").parts
        module = ".".join((package.name, *(parts[:-1] if parts[-1] == "__init__" else parts)))
        for line, what in sorted(set(_Findings(sources, module).found)):
            lines.append(f"{path}:{line}: {what}: {_REMEDY}")
    return lines


def main() -> int:
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "torchrec_mpe"
    found = findings(package)
    print("\n".join(found) or f"{package.name} touches upstream names in {package.name}/upstream/ alone")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
