"""The limits on imports and on the length of files, checked in the sources without importing them."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rooms import ROOMS

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 350

PACKAGES = {
    "dash_api": ROOT / "proto" / "dash_api",
    "dash_client": ROOT / "client" / "dash_client",
    "dash_server": ROOT / "server" / "dash_server",
    "dash_runtime": ROOT / "dash_runtime",
}
MAY_IMPORT = {
    "dash_api": set[str](),
    "dash_client": {"dash_api"},
    "dash_server": {"dash_api", "dash_runtime"},
    "dash_runtime": set[str](),
}
CLIENT_THIRD_PARTIES = {"grpc", "grpc_health", "google"}
ADAPTER_THIRD_PARTIES = {"langchain_core", "llm", "lm_eval", "pydantic"}

# An editable install makes namespace packages of the folders; `dash` is Plotly's package.
NEVER_IMPORTED = {"server", "client", "proto", "dash"}


def python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if not path.stem.endswith(("_pb2", "_pb2_grpc")))


def our_folders() -> list[Path]:
    others = (ROOT / name for name in ("tests", "benchmarks", "examples"))
    return [*PACKAGES.values(), *(folder for folder in others if folder.is_dir())]


def imported_roots(path: Path) -> Iterator[str]:
    """Yields the top-level names of all absolute imports, including those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            yield node.module.partition(".")[0]


def imported_modules(path: Path, package: str) -> set[str]:
    """Returns the modules of its own package that a file imports, including those imported inside functions."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names if alias.name.startswith(f"{package}.")}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == package:
            inner = PACKAGES[package].joinpath(*node.module.split(".")[1:])
            names = [alias.name for alias in node.names]
            # `from package.folder import module` names modules; anything else is in the folder's own __init__.
            found = [name for name in names if inner.is_dir() and (inner / f"{name}.py").exists()]
            modules |= {f"{node.module}.{name}" for name in found}
            modules |= {node.module} if len(found) < len(names) else set()
    return modules


def room_of(package: str, module: str) -> int | None:
    """Returns the number of a module's room from the top, by the most specific name in the list."""
    place = "/".join(module.split(".")[1:])
    is_folder = PACKAGES[package].joinpath(place).is_dir()
    rooms = {name: number for number, line in enumerate(ROOMS[package].split("\n")) for name in line.split()}
    parents = [f"{place[:end]}/" for end in range(len(place), 0, -1) if place[end:] == "" or place[end] == "/"]
    return next((rooms[name] for name in ([] if is_folder else [place]) + parents if name in rooms), None)


def module_of(path: Path, package: str) -> str:
    parts = path.relative_to(PACKAGES[package]).with_suffix("").parts
    return ".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))


def roots_at_import_time(path: Path) -> set[str]:
    """Returns the top-level names that importing the module imports, without functions and `if TYPE_CHECKING`."""
    roots: set[str] = set()
    for statement in ast.parse(path.read_text(), str(path)).body:
        if isinstance(statement, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.module is not None:
            roots.add(statement.module.partition(".")[0])
    return roots


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_a_package_imports_only_its_allowed_neighbours(package: str) -> None:
    forbidden = PACKAGES.keys() - MAY_IMPORT[package] - {package}
    files = python_files(PACKAGES[package])
    assert files, f"{PACKAGES[package]} has no Python files"
    found = {str(path.relative_to(ROOT)): sorted(forbidden & set(imported_roots(path))) for path in files}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize("package", [package for package, rooms in ROOMS.items() if rooms.strip()])
def test_every_file_imports_from_its_own_room_or_one_below(package: str) -> None:
    up: list[str] = []
    for path in python_files(PACKAGES[package]):
        module = module_of(path, package)
        if module == package:
            continue  # the package's `__init__` may export anything
        own = room_of(package, module)
        assert own is not None, f"{module} has no room"
        for other in imported_modules(path, package) - {package}:
            below = room_of(package, other)
            assert below is not None, f"{other} has no room"
            if below < own:
                up.append(f"{module} -> {other}")
    assert up == []


def test_only_backends_and_starts_know_native_code() -> None:
    users = {
        str(path.relative_to(ROOT))
        for folder in (PACKAGES["dash_runtime"], PACKAGES["dash_server"])
        for path in python_files(folder)
        if any(module.startswith("dash_runtime.native") for module in imported_modules(path, "dash_runtime"))
    }
    known = tuple(f"dash_runtime/{room}/" for room in ("native", "decoder/backends", "startup"))
    assert {path for path in users if not path.startswith(known)} == set()
    assert users, "nothing imports native code"


def test_nothing_imports_a_folder_as_a_namespace_package() -> None:
    files = [path for folder in our_folders() for path in python_files(folder)]
    found = {str(path.relative_to(ROOT)): sorted(NEVER_IMPORTED & set(imported_roots(path))) for path in files}
    assert {path: names for path, names in found.items() if names} == {}


def test_the_folders_above_the_packages_are_no_packages() -> None:
    for name in ("proto", "server", "client"):
        assert not (ROOT / name / "__init__.py").exists()


def test_the_client_needs_its_base_dependencies_only() -> None:
    allowed = CLIENT_THIRD_PARTIES | sys.stdlib_module_names | {"dash_api", "dash_client"}
    adapters = PACKAGES["dash_client"] / "adapters"
    found = {}
    for path in python_files(PACKAGES["dash_client"]):
        is_adapter = path.is_relative_to(adapters)
        found[path.name] = sorted(
            roots_at_import_time(path) - allowed - (ADAPTER_THIRD_PARTIES if is_adapter else set())
        )
        # Importing anything else must not need an adapter's third parties.
        assert is_adapter or "dash_client.adapters" not in path.read_text(), path
    assert {name: names for name, names in found.items() if names} == {}


def test_files_are_short() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for folder in our_folders()
        for path in python_files(folder)
    }
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}
