"""The rooms and the direction of the imports between them, as docs/architecture.md describes them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

# A room may import from itself and from rooms further left.
ROOMS = [
    {"errors", "resources"},
    {"outputs", "jit"},
    {"files"},
    {"language"},
    {"model", "corpus"},
    {"machine"},
    {"training", "inference"},
    {"tl"},
    {"evaluation", "report"},
    {"benchmarks"},
    {"cli"},
]
PLACE = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}
# Rooms that know nothing of networks.
WITHOUT_TORCH = {"errors", "resources", "outputs", "jit", "files", "language", "corpus"}


def imports(path: Path) -> set[str]:
    """Modules that a file imports at run time, also inside functions; `if TYPE_CHECKING` is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for part in branch.body
        for node in ast.walk(part)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "scmulan" and len(parts) > 1 and parts[1] in PLACE else None


def files(root: Path):
    for path in sorted((root / "src" / "scmulan").rglob("*.py")):
        room = path.relative_to(root / "src" / "scmulan").with_suffix("").parts[0]
        if room not in ("__init__", "__main__"):
            yield room, path


def test_every_room_is_known_and_has_a_sentence_about_itself(root):
    rooms = {room for room, _ in files(root)}
    assert rooms == set(PLACE)
    for room in rooms:
        init = root / "src" / "scmulan" / room / "__init__.py"
        if init.exists():
            assert ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))), f"{room} says nothing about itself"


def test_imports_go_from_left_to_right(root):
    wrong = []
    for room, path in files(root):
        for module in imports(path):
            other = room_of(module)
            if other is not None and other != room and PLACE[other] >= PLACE[room]:
                wrong.append(f"{path.relative_to(root)} imports {module}")
    assert not wrong


def test_torch_stays_out_of_the_rooms_that_do_without(root):
    wrong = [
        f"{path.relative_to(root)} imports {module}"
        for room, path in files(root)
        if room in WITHOUT_TORCH
        for module in imports(path)
        if module.split(".")[0] == "torch"
    ]
    assert not wrong


def test_files_are_short(root):
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for _, path in files(root)}
    assert sorted(lines.values())[len(lines) // 2] <= 250
    assert max(lines.values()) <= 600


LIGHT = ["import scmulan", "from scmulan.cli.__main__ import main; main(['--help'])"]


@pytest.mark.parametrize("code", LIGHT)
def test_a_light_start_loads_no_torch(code):
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\n"
    script += "print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "False"
