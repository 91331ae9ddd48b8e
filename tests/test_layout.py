"""The house itself: imports go one way, every flag is read, and the README points at things that exist."""

import ast
import re
from pathlib import Path

import pytest

from real_pictures import PICTURE_JOB_FLAGS

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train.py", "sample.py", "video.py", "make_dataset.py", "real_pictures.py")
# A module imports only from modules before it.  Rooms in one string are one room, split for length.
ORDER = """
    command workers weight_files checkpoint hardware clip_score packing attention sheets
    processes interruption averaging training_log
    camera mano_file hand
    lathe families mesh_repair objects
    contact closing placing grasp grabnet trajectory
    zbuffer gl render conditions
    brushes scenery backgrounds words materials shading appearance
    framing scene png_text dataset data_card dataset_writer estimators estimator_tools check geometry scene_maker
    captions ycb source_frame depth_normals dexycb_files dexycb ho3d official_csv sources frame_converter
    text vae unet diffusion samplers model
    layouts padding diffusers_config weight_kinds weight_pieces public_weights weight_exports
    batches caching pictures clip clip_frames flicker stages pretraining toy_clip prompts planning
    verifier verifier_training verification verification_report selection witnesses verify
    export_folder bop nocs coco csv_export export
    inception features bootstrap distances reference_file measurement umeyama keypoint_metrics pose_metrics pose_files
    extractors feature_metrics metrics replica
""".split()
GEOMETRY = set(ORDER[ORDER.index("camera") : ORDER.index("text")]) - {"conditions", "dataset"}
COMMAND_LINE = ("main", "run", "parse_args", "_check_flags")
PARTS_OF_MAIN = {"metrics": ("measure", "_measure_features", "_measure_predictions"), "verify": ("score_command",)}
NETWORK = {"text", "vae", "unet", "model", "diffusion", "samplers"}


def imported(path: Path) -> set[str]:
    """Modules of hoi/ that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "hoi":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hoi."):
            found.add(node.module.split(".")[1])
    return found


def modules() -> list[str]:
    return sorted(path.stem for path in (ROOT / "hoi").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_from_modules_above_it(module):
    assert module in ORDER, f"hoi/{module}.py has no place in the order of rooms"
    below = {name for name in imported(ROOT / "hoi" / f"{module}.py") if ORDER.index(name) >= ORDER.index(module)}
    assert not below


@pytest.mark.parametrize("module", sorted(NETWORK))
def test_the_network_knows_nothing_of_the_geometry(module):
    assert not imported(ROOT / "hoi" / f"{module}.py") & GEOMETRY


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_of_a_script_is_read(script):
    text = (ROOT / script).read_text()
    flags = re.findall(r"""(?:add|add_argument)\(\s*["']--([a-z0-9-]+)["']""", text)
    assert len(flags) > 10
    read = {node.attr for name in SCRIPTS for node in ast.walk(ast.parse((ROOT / name).read_text()))
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "args"}  # fmt: skip
    read |= set(PICTURE_JOB_FLAGS)  # by getattr
    assert not {flag.replace("-", "_") for flag in flags} - read


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
    for module in modules():
        text = (ROOT / "hoi" / f"{module}.py").read_text()
        allowed = {*COMMAND_LINE, *PARTS_OF_MAIN.get(module, ())} if "ArgumentParser(" in text else set()
        assert functions_with_args(ast.parse(text)) <= allowed, module


def table_rows() -> list[list[str]]:
    """Rows of the README's table *paper -> function -> test*: text, `hoi/file.py: name`, `tests/file.py: name`."""
    text = (ROOT / "README.md").read_text()
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
