"""Dataset folder -> a page to look at it: thumbnails, filters, annotation over the picture, hand and object in 3D.

    python -m hoi.page out                       # then open out/index.html in a browser
    python -m hoi.page out_a out_b               # both side by side, by index: open out_a/index.html
    python -m hoi.page data/dexycb --mano MANO_RIGHT.pkl     # hands of MANO need its file for their skin

The page opens from disk, without server or network, and lists its keys.  What is marked there is saved as a list, which
`python -m hoi.verify DIR --keep marked.txt --out DIR2` copies.  The same command again takes what is new.

    DIR/index.html             page.html of this room, as it is
    DIR/page/head.js           folders, names of scores, colours
    DIR/page/rows-0000.js      what is listed and filtered of 1,000 records
    DIR/page/views-0000.js     what 100 records show when they are opened
    DIR/page/mesh-NAME.js      each object once, thinned; faces of the hand
Scripts, for beside them and pictures a browser reads nothing for a page that lies on disk.
"""

# ruff: noqa: E402
import argparse
from pathlib import Path


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hoi.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a dataset folder; the page is DIR/index.html")
    parser.add_argument("other", type=Path, nargs="?", metavar="DIR2", help="another one to see beside it, by index")
    parser.add_argument("--mano", metavar="FILE", type=Path, help="official MANO_RIGHT.pkl: the skin of MANO hands; "
                        "without it their bones are drawn")  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse_args()  # --help and mistakes are told before the seconds that these imports take

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from hoi.common.command import problems_as_messages
from hoi.common.files import short_hash, write_whole
from hoi.conditions import BONES, SKELETON_COLORS
from hoi.data import folder as dataset
from hoi.geometry.hand import PARAM_SIZES, HandModel, load_hand
from hoi.verify.choices import SCORES

TEMPLATE = Path(__file__).with_name("page.html")
OURS = b'<meta name="generator" content="hoi.page">'  # stands in every page that we made
ROWS, VIEWS = 1000, 100  # records of a part: what the first thumbnails, and the first large record, wait for
DEPTH_SIDE = 256  # pixels of the longer side of a depth preview
MOST_VERTICES = 6000  # of a mesh on the page; scans have a hundred times as many
GRASP_SCORES = {
    "grasp_score": "comfortable, well-distributed contacts: higher is better",
    "fingers_in_contact": "how many of the five touch the object",
    "force_closure": "1 when the contacts resist any small push or twist, else 0",
    "crossing_edges": "edges of the hand that pass through the object's surface",
    "penetration_mm": "depth of the deepest skin point inside the object, millimetres",
}
Record = dict[str, Any]


# --- what is listed ---


def scores_of(record: Record) -> list[float | None]:
    """What a record can be filtered by, in the order of SCORES and GRASP_SCORES; None where it has none."""
    grasp = record.get("grasp") or {}
    fingers = grasp.get("fingers_in_contact")
    found = (record.get("verification") or {}) | {
        **{name: grasp.get(name) for name in ("force_closure", "crossing_edges")},
        "grasp_score": grasp.get("score"),
        "fingers_in_contact": sum(map(bool, fingers)) if isinstance(fingers, list) else None,
        "penetration_mm": record.get("penetration_mm"),
    }
    values = [found.get(name) for name in (*SCORES, *GRASP_SCORES)]
    return [round(float(value), 4) if isinstance(value, (int, float)) else None for value in values]


def row_of(record: Record) -> list[Any]:
    """index, picture to show, text, object, hand side, scores.  Without a picture its conditions are shown."""
    pictures = (record.get(key) for key in ("file_name", *reversed(dataset.CONDITION_KEYS)))
    mesh = record.get("object_path")
    noun = Path(mesh).stem if mesh else record.get("category")
    return [record["index"], next(filter(None, pictures), None), record.get("text"), noun, record.get("hand_side"),
            *scores_of(record)]  # fmt: skip


# --- what a large record shows ---


def data_url(picture: np.ndarray) -> str:
    """A small picture (H, W) uint8 as text."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def depth_preview(depth_mm: np.ndarray) -> dict[str, Any]:
    """Depth as browsers can show it, who take the upper 8 of 16 bits: near is bright, nothing is black.

    depth_mm  (H, W) uint16, 0 = nothing
    returns   url and the range in millimetres, from the 1st to the 99th percentile: sensors have outliers
    """
    seen = depth_mm[depth_mm > 0]
    near, far = np.percentile(seen, (1, 99)) if seen.size else (0, 0)
    grey = 255 - 215 * np.clip((depth_mm - near) / max(far - near, 1), 0, 1)
    picture = Image.fromarray(np.where(depth_mm > 0, grey, 0).astype(np.uint8))
    picture.thumbnail((DEPTH_SIDE, DEPTH_SIDE))
    return {"url": data_url(np.asarray(picture)), "near_mm": int(near), "far_mm": int(far)}


def packed(points: np.ndarray) -> dict[str, Any]:
    """Points (V, 3) in 16 bits a number over their own box: {low, step, data}, point = low + step * number."""
    low = points.min(axis=0)
    step = max(float(np.ptp(points, axis=0).max()) / 65535, 1e-9)
    numbers = np.rint((points - low) / step).astype("<u2")
    return {"low": low.round(6).tolist(), "step": step, "data": base64.b64encode(numbers.tobytes()).decode()}


def thinned(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A mesh of at most MOST_VERTICES for the eye: vertices of one cell of a grid become their mean.

    vertices (V, 3), faces (F, 3); faces that become a line or a point vanish
    """
    cells = 128
    while len(vertices) > MOST_VERTICES:
        grid = np.floor((vertices - vertices.min(axis=0)) / max(np.ptp(vertices, axis=0).max(), 1e-9) * cells)
        _, cell, count = np.unique(grid, axis=0, return_inverse=True, return_counts=True)
        if len(count) <= MOST_VERTICES:
            cell = cell.reshape(-1)  # numpy 2.0 gave it another shape
            means = [np.bincount(cell, vertices[:, k]) / count for k in range(3)]
            vertices, faces = np.stack(means, axis=1), cell[faces]
        cells = int(cells * 0.8)
    whole = (faces != np.roll(faces, 1, axis=1)).all(axis=1)
    return vertices, faces[whole]


def has_link(folder: Path, path: str) -> bool:
    """Whether a link stands on the way to a file of the folder: asked before the slow path_of, for half a million."""
    while path and not os.path.islink(os.path.join(folder, path)):
        path = os.path.dirname(path)
    return bool(path)


def view_of(folder: Path, record: Record, missing: list[str], hand: HandModel | None, shared: Record) -> Record:
    """What one large record shows; skins and depths go to `shared`, where looks of one view find the same ones.

    missing  its files that are not there       hand  that its parameters are for, None when it is not at hand
    Raises ValueError naming a damaged depth file, or a path that leads out of the folder.
    """
    view: Record = {"record": record, "missing": missing}
    for key in dataset.PICTURE_FOLDERS:  # the browser opens them: a link must not take it elsewhere
        if record.get(key) is not None and has_link(folder, record[key]):
            dataset.path_of(folder, record, key)
    depth = record.get("depth_file_name")
    if depth not in (None, *missing):
        if depth not in shared:
            shared[depth] = depth_preview(dataset.load_picture(folder, record, "depth_file_name"))
        view["depth"] = depth
    if hand is not None and all(record.get(key) is not None for key in (*PARAM_SIZES, "hand_side")):
        key = short_hash(json.dumps([record[key] for key in (*PARAM_SIZES, "hand_side")]))
        if key not in shared:
            shared[key] = packed(hand(dataset.hand_of(record)).vertices)
        view["hand"] = key
    if record.get("object_path") not in (None, *missing) and record.get("object_to_camera") is not None:
        view["mesh"] = short_hash(record["object_path"])
    return view


def views_of(folder: Path, some: list[tuple[Record, list[str]]], hands: Mapping[str, HandModel]) -> Record:
    """What some records show when they are opened; each comes with its missing files.  Raises as view_of."""
    shared: Record = {}
    views = [view_of(folder, record, gone, hands.get(record.get("hand_model")), shared) for record, gone in some]
    return {"views": views, "shared": shared}


def mesh_of(folder: Path, record: Record) -> Record:
    """A record's object, thinned, in its own frame.  Raises as load_mesh."""
    vertices, faces = thinned(*dataset.load_mesh(folder, record))
    return packed(vertices) | {"faces": faces.ravel().tolist()}


# --- written ---


def write_part(path: Path, content: Any) -> str:
    """Write `part = content` as a script and return its name."""
    # ASCII alone, so that no sign of a text ends a line for JavaScript.
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    write_whole(path, f"part = {text};\n".encode())
    return path.name


def write_data(folder: Path, hands: Mapping[str, HandModel]) -> Record:
    """Write what the page reads of a folder and return what head.js says of it.

    hands  by the records' hand_model
    Raises as read_records, and ValueError naming a damaged file.
    """
    records = dataset.read_records(folder)
    place, on_disk = folder / "page", dataset.FolderFiles(folder)
    told = [(record, on_disk.missing(record)) for record in records]
    written = {write_part(place / f"mesh-{name}.js", {"faces": hand.faces().ravel().tolist()})
               for name, hand in hands.items()}  # fmt: skip
    for start in range(0, len(records), ROWS):
        rows = [row_of(record) for record in records[start : start + ROWS]]
        written.add(write_part(place / f"rows-{start // ROWS:04d}.js", rows))
    for start in tqdm(range(0, len(records), VIEWS), "views", unit="part", disable=len(records) < 10 * VIEWS):
        views = views_of(folder, told[start : start + VIEWS], hands)
        written.add(write_part(place / f"views-{start // VIEWS:04d}.js", views))
    meshes = {record["object_path"]: record for record, gone in told if record.get("object_path") not in (None, *gone)}
    for name, record in meshes.items():
        written.add(write_part(place / f"mesh-{short_hash(name)}.js", mesh_of(folder, record)))
    for path in place.glob("*.js"):  # of a longer folder, before
        if path.name not in (*written, "head.js"):
            path.unlink()
    description = dataset.read_description(folder)
    growing = any(folder.glob("metadata-*.jsonl")) or ("job" in description and "counts" not in description)
    return {"name": folder.resolve().name, "records": len(records), "growing": growing,
            "missing": sum(len(gone) for _, gone in told), "hands": sorted(hands)}  # fmt: skip


def write_page(folders: Sequence[Path], mano: Path | None = None) -> list[Record]:
    """Write index.html and page/ into each folder; that of the first shows all, side by side.

    mano     MANO_RIGHT.pkl, for records of that hand
    returns  what head.js says of each folder: name, records, growing, missing, hands
    Raises FileExistsError for an index.html that is not ours, and as write_data.
    """
    for folder in folders:
        page = folder / "index.html"
        if page.is_file() and OURS not in page.read_bytes():
            raise FileExistsError(f"{page} was not made by hoi.page; move it away, the page takes its place")
    hands = {hand.name: hand for hand in [load_hand(), *([load_hand(mano)] if mano else [])]}
    heads = [write_data(folder, hands) for folder in folders]
    scores = SCORES | GRASP_SCORES
    drawing = {"bones": BONES, "colors": SKELETON_COLORS.tolist(), "rowsInPart": ROWS, "viewsInPart": VIEWS}
    for k, folder in enumerate(folders):
        shown = [heads[k] | {"base": ""}]
        if k == 0:
            bases = [os.path.relpath(other.resolve(), folder.resolve()) for other in folders[1:]]
            shown += [head | {"base": f"{Path(base).as_posix()}/"} for head, base in zip(heads[1:], bases, strict=True)]
        write_part(folder / "page" / "head.js", {"folders": shown, "scores": scores, **drawing})
        write_whole(folder / "index.html", TEMPLATE.read_bytes())
    return heads


def main(args: argparse.Namespace) -> None:
    """Write the page and say what it shows."""
    folders = [args.folder, *([args.other] if args.other else [])]
    for folder, head in zip(folders, write_page(folders, args.mano), strict=True):
        print(f"{folder}: {head['records']} records")
        if head["growing"]:
            print("  its maker is not done: run the same command again for what comes")
        if head["missing"]:
            print(f"  {head['missing']} files are missing; run the command that made {folder} again")
    print(f"open {args.folder / 'index.html'} in a browser")


def run(arguments: list[str] | None = None) -> None:
    """The command: problems become a message and exit code 1."""
    args = parse_args(arguments)
    with problems_as_messages("hoi.page", "interrupted: the same command continues"):
        main(args)


if __name__ == "__main__":
    run()
