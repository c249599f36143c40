"""The house's floors, held by its imports: a module imports from lower floors only, or from its own room."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "dropsurgery"
HOUSE = Path(__file__).resolve().parents[1] / PACKAGE

# From the ground up; rooms on one floor ignore each other. What users' tools are built of is the public face.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "records", "trees"}),
    frozenset({"graph", "kinds", "schedules", "context", "options", "catalogue", "models", "regularizers"}),
    frozenset({"capture", "matching", "surroundings", "widths"}),
    frozenset({"patterns"}),
    frozenset({"recipe"}),
    frozenset({"planning", "forwards"}),
    frozenset({"emission"}),
    frozenset({"rewriting", "flattening", "diffing", "scheduler", "auditing", "running"}),
    frozenset({"surgery"}),
    frozenset({"api", "compression"}),
    frozenset({"__init__"}),
    frozenset({"analysis", "integrations"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {".".join(path.relative_to(HOUSE.parent).with_suffix("").parts): path for path in sorted(HOUSE.rglob("*.py"))}


def room_of(module: str) -> str:
    """The room that a dotted module name lies in; the package itself is the room `__init__`."""
    return module.split(".")[1] if "." in module else "__init__"


def walked(node: ast.AST, is_face: bool) -> Iterator[ast.AST]:
    """All that lies in a node; in the public face without what is there for type checkers alone."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (is_face and isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from walked(child, is_face)


def imported(module: str, source: str) -> Iterator[str]:
    """The dotted names of this package's modules that `source`, being the module `module`, imports.

    What the package itself names for type checkers alone is imported when it is asked for, from wherever it lies.
    """
    for node in walked(ast.parse(source), room_of(module) == "__init__"):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            origin = ".".join(base + (node.module or "").split(".")).strip(".")
            if origin == PACKAGE:  # `from dropsurgery import planning` is an import of the room
                rooms = [alias.name if alias.name in FLOOR_OF else "__init__" for alias in node.names]
                yield from (f"{PACKAGE}.{room}" for room in rooms)
            elif origin.split(".")[0] == PACKAGE:
                yield origin


def violations(module: str, source: str) -> list[str]:
    """What `source`, being the module `module`, imports from its own floor or from above."""
    room = room_of(module)
    others = sorted({room_of(name) for name in imported(module, source)} - {room})
    return [
        f"{module} (floor {FLOOR_OF[room]}) imports {other} (floor {FLOOR_OF[other]}): lower floors only"
        for other in others
        if FLOOR_OF[other] >= FLOOR_OF[room]
    ]


def test_every_room_has_its_floor() -> None:
    assert {room_of(module) for module in MODULES} <= set(FLOOR_OF)


def test_no_room_is_on_two_floors() -> None:
    assert len(FLOOR_OF) == sum(len(rooms) for rooms in FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    assert not violations(module, MODULES[module].read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dropsurgery.patterns.conv_bn", "from dropsurgery.planning import Plan"),
        ("dropsurgery.patterns.conv_bn", "from dropsurgery import planning"),
        ("dropsurgery.regularizers.dropblock", "import dropsurgery.capture"),
        ("dropsurgery.regularizers.dropblock", "from dropsurgery.context import Context"),
        ("dropsurgery.regularizers.dropblock", "def late():\n    from ..surgery import Surgery"),
        ("dropsurgery.graph", "from . import catalogue"),
        ("dropsurgery.graph", "from .context import Context"),
        ("dropsurgery.emission", "from dropsurgery.rewriting import rewrite"),
        ("dropsurgery.recipe.models", "from dropsurgery import diff"),
        ("dropsurgery.capture.__init__", "from ..matching import find"),
        ("dropsurgery.__init__", "from dropsurgery.analysis.width_curve import width_curve"),
        ("dropsurgery.planning", "if TYPE_CHECKING:\n    from dropsurgery.surgery import Surgery"),
        ("dropsurgery.capture.view", "from ..matching import find"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dropsurgery.recipe.models", "from .reading import shown\nfrom . import selection\nimport torch"),
        ("dropsurgery.recipe.models", "from dropsurgery import catalogue"),
        ("dropsurgery.rewriting", "from dropsurgery.emission import emit_root"),
        ("dropsurgery.__init__", "from .api import apply_recipe"),
        ("dropsurgery.__init__", "if TYPE_CHECKING:\n    from dropsurgery.analysis.sweep import sweep"),
        ("dropsurgery.capture.__init__", "from .view import flat_view"),
        ("dropsurgery.scheduler", "from .errors import PlanError"),
    ],
)
def test_a_right_import_is_left_alone(module: str, source: str) -> None:
    assert violations(module, source) == []
