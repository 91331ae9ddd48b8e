"""The house itself: rooms import one way, every flag is read, and the pages point at things that exist."""

import ast
import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = ("verify", "page", "export", "metrics", "weights")
SCRIPTS = ("train.py", "sample.py", "video.py", "make_dataset.py")
# A room imports only from rooms before it.
ROOMS = "common conditions geometry network weights toyworld data training sources verify page export metrics".split()
FILES = sorted(path for path in (ROOT / "hoi").rglob("*.py") if path.name != "__init__.py")
COMMAND_LINE = ("main", "run", "parse_args", "_check_flags")
PARTS_OF_MAIN = {"metrics": ("measure", "_measure_features", "_measure_predictions"), "verify": ("score_command",)}


def name_of(path: Path) -> str:
    """hoi/geometry/camera.py -> geometry.camera"""
    return ".".join(path.relative_to(ROOT / "hoi").with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Files of hoi/ that a file imports, wherever in the file, as in name_of."""
    names, found = {name_of(other) for other in FILES}, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and re.match(r"hoi\b", node.module or ""):
            module = node.module.removeprefix("hoi").removeprefix(".")
            found |= {module} if module in names else {f"{module}.{alias.name}".strip(".") for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("hoi.") for alias in node.names if alias.name.startswith("hoi.")}
    assert found <= names, f"{path}: imports {found - names}, which no file of hoi/ is"
    return found


def rooms_imported(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)} - {name_of(path).partition(".")[0]}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_room_imports_only_from_rooms_before_it(path):
    room = name_of(path).partition(".")[0]
    assert {other for other in rooms_imported(path) if ROOMS.index(other) >= ROOMS.index(room)} == set()
    assert not re.search(r"\b(runpy|import_module|__import__)\b", path.read_text()), "a way around this test"


@pytest.mark.parametrize("room", ROOMS)
def test_there_is_no_circle_inside_a_room(room):
    graph = {name_of(path): imported(path) for path in FILES if name_of(path).partition(".")[0] == room}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


@pytest.mark.parametrize("path", [path for path in FILES if re.match("geometry|network", name_of(path))], ids=name_of)
def test_geometry_and_network_meet_in_conditions_alone(path):
    assert rooms_imported(path) <= {"common", "conditions"}


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "conditions"])
def test_a_room_says_in_a_sentence_what_it_is_for_and_nothing_else(room):
    tree = ast.parse((ROOT / "hoi" / room / "__init__.py").read_text())
    assert len(ast.get_docstring(tree)) > 20 and len(tree.body) == 1


def test_tests_stand_in_folders_of_the_rooms_names():
    assert {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")} <= set(ROOMS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_imports_another(script):
    others = "|".join(name.removesuffix(".py") for name in SCRIPTS)
    assert not re.search(rf"^\s*(?:import|from) (?:{others})\b", (ROOT / script).read_text(), re.MULTILINE)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_of_a_script_is_read(script):
    """By the script itself: a flag that another one reads does nothing here."""
    text = (ROOT / script).read_text()
    read = {node.attr for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "args"}  # fmt: skip
    shared = (ROOT / "hoi" / "common" / "command.py").read_text()
    bodies = {part.partition("(")[0]: part.partition("\n\n\n")[0] for part in shared.split("\ndef ")}
    text += "".join(body for name, body in bodies.items() if name.endswith("_flags") and f"{name}(" in text)
    flags = re.findall(r"""(?:add|add_argument)\(\s*["']--([a-z0-9-]+)["']""", text)
    assert len(flags) > 10
    assert not {flag.replace("-", "_") for flag in flags} - read


def imports_at_once(path: Path) -> set[str]:
    """Modules that a file imports when it is imported; of a command those above the line that reads its flags."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
            break
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module}
    return found


@pytest.mark.parametrize("path", [*SCRIPTS, *(f"hoi/{room}/__main__.py" for room in COMMANDS)])
def test_flags_are_read_before_what_takes_seconds_to_import(path):
    text, seen, waiting = (ROOT / path).read_text(), set(), imports_at_once(ROOT / path)
    assert re.search(r'^if __name__ == "__main__":\n    parse_args\(', text, re.MULTILINE)
    while waiting:
        module = waiting.pop()
        seen.add(module)
        file = (ROOT / module.replace(".", "/")).with_suffix(".py")
        waiting |= (imports_at_once(file) if file.is_file() else set()) - seen
    others = {module.partition(".")[0] for module in seen} - sys.stdlib_module_names
    assert others <= {"hoi", "numpy", "PIL"}  # together 0.1 s; torch, scipy, trimesh and open_clip take 0.4 to 4 s


def test_every_asset_is_named_with_its_licence():
    assets = ROOT / "hoi" / "assets"
    files = [path.relative_to(assets).as_posix() for path in assets.rglob("*") if path.is_file()]
    table = (assets / "README.md").read_text()
    rows = dict(re.findall(r"^\| `([^`]+)` \|.*\| ([^|]+) \|$", table, re.MULTILINE))
    unnamed = [name for name in files if name not in rows and Path(name).name not in ("README.md", "LICENSE.md")]
    assert not unnamed, f"add a row (file, what, origin, licence) to hoi/assets/README.md: {unnamed}"
    assert set(rows) <= set(files) and all("MIT" in licence for licence in rows.values())


def functions_with_args(tree: ast.Module) -> set[str]:
    """Names of the functions that take or read `args`."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    taking = {f.name for f in functions if "args" in [argument.arg for argument in (*f.args.args, *f.args.kwonlyargs)]}
    return taking | {f.name for f in functions for node in ast.walk(f)
                     if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "args"}  # fmt: skip


def test_hoi_never_sees_args():
    """But for the command line of a `python -m hoi.X`, and what it is split into."""
    for path in FILES:
        text, room = path.read_text(), name_of(path).partition(".")[0]
        allowed = {*COMMAND_LINE, *PARTS_OF_MAIN.get(room, ())} if "ArgumentParser(" in text else set()
        assert functions_with_args(ast.parse(text)) <= allowed, path


def table_rows() -> list[list[str]]:
    """Rows of the table *paper -> function -> test*: text, `hoi/file.py: name`, `tests/file.py: name`."""
    text = (ROOT / "docs" / "paper.md").read_text()
    table = text.split("| paper | function | test |")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[1:]]


def test_every_row_of_the_paper_table_points_at_a_function_and_a_test_that_exist():
    rows = table_rows()
    assert len(rows) >= 19
    for paper, *places in rows:
        for place in places:
            path, names = re.fullmatch(r"`([\w/]+\.py): ([\w., ]+)`", place).groups()
            text = (ROOT / path).read_text()
            for name in names.split(", "):
                last = name.split(".")[-1]
                assert re.search(rf"(def|class) {last}\b", text), f"{paper}: no {name} in {path}"


def test_the_readme_is_a_page_and_lists_the_rooms_in_their_order():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 6000
    rooms = re.findall(r"^\| \**`(\w+)(?:/|\.py)`\** \|", text, re.MULTILINE)
    assert rooms == ROOMS


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_of_a_page_are_there(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert not [link for link in links if not link.startswith("http") and not (page.parent / link).is_file()]
