"""The dataset folder, written: records and pictures -> disk, each record complete or not at all.

Beside the records stand what made the folder, from what, and under whose terms (dataset.json, the data card), and
pictures of pictures to look at first.  folder.py is the way back.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from hoi.common import files
from hoi.common.command import first_few, how_made
from hoi.common.files import ASSETS, JsonLines, encode_png, read_json, unlike_a_split, write_json, write_whole
from hoi.common.sheets import contact_sheet
from hoi.conditions import Conditions
from hoi.data import folder as dataset
from hoi.geometry.objects import ObjectMesh, object_card, save_object

FORMAT, FORMAT_VERSION = "hand-object dataset folder", 1
# All that the scripts write to a folder; video.py adds strip.png and the clip.
WRITTEN = (
    "dataset.json", "grid.png", "rejected*.jsonl", "strip.png", "clip.*", "objects/*",
    *(f"{name}/*" for name in dataset.PICTURE_FOLDERS.values()),
)  # fmt: skip
HASH = re.compile(r" ?\b(?=[0-9]*[a-f])[0-9a-f]{8,64}\b")
SHOWN_LENGTH = 40  # characters of a value in which two jobs differ
SHARE_OF_DISK = 0.02  # of the time: waiting for it costs nearly as much for one record as for a hundred
MOST_METRES = 65.535  # what 16 bits of millimetres hold

BUILT_IN = "built-in family"
AS_GIVEN = "as given by the user"
HAND_TERMS = {
    "mano": "MANO licence (non-commercial research): hand parameters, keypoints and whatever was drawn from them",
    "builtin": "built-in hand: MIT, see hoi/assets",
}
REPORT = Path("verification") / "report.json"  # what python -m hoi.verify DIR leaves

# Of a data card: what it counts the records by, and the key of each.
LABELS = {"annotation": "source", "hands": "hand_model", "categories": "category"}
COUNTED = ("file_name", "checkpoint", *LABELS.values())

# What sheets show: records of a long folder, frames of a long video, and the side of each picture in pixels.
MOST_RECORDS, MOST_FRAMES, CELL = 24, 16, 128


# --- what a folder says of itself ---


def folder_description(
    made_by: str, job: dict[str, Any], seed: int | None = None, checkpoint: dict[str, str] | None = None,
    licences: dict[str, Any] | None = None, meshes: Sequence[ObjectMesh] | None = None,
    sources: Sequence[str | Path] = (),
) -> dict[str, Any]:  # fmt: skip
    """What dataset.json says before the first record: who made the folder, from what, under whose terms.

    made_by     name of the script
    job         everything that decides the records: a folder begun with another job is refused
    checkpoint  name and sha256 of the weights that make the pictures
    licences    of what is not named here, such as the hand; objects, weights and source are added
    meshes      the objects shown        sources  or the dataset folders that conditions are taken from
    """
    licences = dict(licences or {})
    if checkpoint is not None:
        licences["weights"] = f"those of {checkpoint['name']}"
    objects = None if meshes is None and checkpoint is None else [object_card(mesh) for mesh in meshes or ()]
    if sources:
        described = {str(source): dataset.read_description(source) for source in sources}
        terms = {name: there.get("licences") for name, there in described.items()}
        licences["data"] = terms if len(terms) > 1 else terms.popitem()[1]
        objects = [card for there in described.values() for card in there.get("objects") or ()]
    if meshes is not None:
        licences["objects"] = sorted({mesh.source for mesh in meshes})
    entries = {"seed": seed, "checkpoint": checkpoint, "licences": licences, "job": job, "objects": objects}
    return how_made(made_by) | {name: entry for name, entry in entries.items() if entry is not None}


def count(records: Iterable[dict[str, Any]], counts: dict[str, Any] | None = None) -> dict[str, Any]:
    """The entries of a card that count records, by COUNTED.

    counts  go on from these, which are changed; None: from nothing
    """
    counts = counts or {
        "counts": {"records": 0, "pictures": 0}, "weights": [],
        "sources": {**{name: {} for name in LABELS}, "pictures": {"generated": 0, "drawn or photographed": 0}},
    }  # fmt: skip
    for record in records:
        checkpoint, has_picture = record.get("checkpoint"), record["file_name"] is not None
        counts["counts"]["records"] += 1
        counts["counts"]["pictures"] += has_picture
        labels = {name: record.get(key) for name, key in LABELS.items()}
        labels["pictures"] = "generated" if checkpoint else "drawn or photographed" if has_picture else None
        for name, label in labels.items():
            if label is not None:
                counts["sources"][name][label] = counts["sources"][name].get(label, 0) + 1
        if checkpoint and checkpoint not in counts["weights"]:
            counts["weights"].append(checkpoint)
    return counts


def data_card(folder: str | Path, counts: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    """Entries that dataset.json has beside what the maker of the folder says of it.

    counts       of all records
    description  what dataset.json says already; its `licences` come back with what the records show
    returns      counts, sources, labels, licences, weights, yield, verification (None where nothing was verified)
    """
    rejected, accepted = description.get("rejected") or {}, counts["counts"]["records"]
    # The most frequent first, equally many by name: in no order that tells how the folder grew.
    ordered = {name: dict(sorted(counts["sources"][name].items(), key=lambda item: (-item[1], item[0])))
               for name in LABELS}  # fmt: skip
    return {
        "counts": counts["counts"],
        "sources": ordered | {"pictures": counts["sources"]["pictures"]},
        "licences": _licences(ordered["hands"], description.get("licences") or {}),
        "weights": counts["weights"],
        "yield": {"accepted": accepted, "rejected": sum(rejected.values()), "reasons": rejected},
        "verification": _verification_summary(Path(folder)),
    }


def _licences(models: Iterable[str], licences: dict[str, Any]) -> dict[str, Any]:
    """The maker's licences; terms of hands and objects where it only names them.  models: of hands, in the records."""
    hands = [HAND_TERMS.get(name, f"unknown terms of the hand model {name!r}") for name in models]
    objects = licences.get("objects")
    if isinstance(objects, list):
        objects = {source: "MIT, made by this project" if source == BUILT_IN else AS_GIVEN for source in objects}
    more = {"hand": "; ".join(hands)} if hands else {}
    return licences | more | ({"objects": objects} if objects else {})


def _verification_summary(folder: Path) -> dict[str, Any] | None:
    """The verifier's report, the lengths of its lists in their place; None where there is none that can be read."""
    try:
        report = read_json(folder / REPORT, "report")
    except (OSError, ValueError):
        return None
    return {key: len(value) if isinstance(value, list) else value for key, value in report.items()}


def read_card(folder: str | Path) -> dict[str, Any]:
    """dataset.json with the entries of data_card as they are now: folders grow, and are verified later."""
    description = dataset.read_description(folder)
    counts = count(dataset.read_records(folder, ("index", *COUNTED)))
    return description | data_card(folder, counts, description)


def refresh_card(folder: str | Path) -> None:
    """Bring the data card in dataset.json up to date, after a verification for instance."""
    write_json(Path(folder) / "dataset.json", read_card(folder))


def card_text(card: dict[str, Any]) -> str:
    """Markdown for people.

    card  the content of dataset.json with the entries of `data_card`
    """
    names = ("made_by", "command", "seed", "versions", "job", "counts", "sources", "yield", "licences", "weights",
             "verification")  # fmt: skip
    shown = {name: card[name] for name in names if card.get(name) not in (None, {}, [])}
    return f"# Data card\n\n```\n{json.dumps(shown, indent=1, ensure_ascii=False)}\n```\n"


# --- one record and its files ---


def complete_record(index: int, record: dict[str, Any]) -> dict[str, Any]:
    """All RECORD_KEYS in order (null where unknown), then extra keys; arrays become lists of the promised length.

    Raises ValueError for another count of numbers and for numbers that are not finite.
    """
    full = dict.fromkeys(dataset.RECORD_KEYS) | record
    full["index"] = int(index)
    for key, shape in dataset.NUMBER_SHAPES.items():
        if full[key] is None:
            continue
        numbers, count = np.asarray(full[key], dtype=np.float64).ravel(), math.prod(shape)
        if numbers.size != count or not np.isfinite(numbers).all():
            raise ValueError(f"record {index}: {key} has {numbers.size} numbers, expected {count}, all finite")
        # Nine digits: a nanometre of a position, far below the float32 of the hand model.
        full[key] = [round(float(value), 9) for value in numbers]
    return full


def write_pictures(
    folder: Path, index: int, record: dict[str, Any], image: np.ndarray | None = None,
    conditions: Conditions | None = None, depth: np.ndarray | None = None, object_mask: np.ndarray | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the pictures of one record and return the complete record, its line not yet appended.

    image        (H, W, 3) uint8 or None; of a generated record its text chunk `hoi` is the record as JSON
    depth        (H, W) metres, 0 = nothing, or None
    object_mask  (H, W) bool or None
    A `*_file_name` already in the record (several looks of one view, or conditions of another folder) is kept.
    Worker processes call this and hand the result to `DatasetWriter.append`, which makes the pictures last.
    """
    full = complete_record(index, record)
    pictures = {"file_name": image, "depth_file_name": depth, "object_mask_file_name": object_mask}
    if conditions is not None:
        pictures |= {key: getattr(conditions, dataset.PICTURE_FOLDERS[key]) for key in dataset.CONDITION_KEYS}
    pictures = {key: _as_pixels(key, pixels) for key, pixels in pictures.items() if pixels is not None}
    sizes = {(full["height"], full["width"])} - {(None, None)} | {pixels.shape[:2] for pixels in pictures.values()}
    if len(sizes) > 1:
        raise ValueError(f"record {index}: pictures differ in size (height, width): {sorted(sizes)}")
    if sizes:
        full["height"], full["width"] = (int(side) for side in sizes.pop())
    full |= {key: f"{dataset.PICTURE_FOLDERS[key]}/{index:06d}.png" for key in pictures}
    for key, pixels in pictures.items():
        is_generated = key == "file_name" and full["checkpoint"] is not None
        content = encode_png(pixels, {"hoi": json.dumps(full, allow_nan=False)} if is_generated else None)
        write_whole(folder / full[key], content, lasting=False)
    return full


def _as_pixels(name: str, pixels: np.ndarray) -> np.ndarray:
    """Check one picture and turn it into what its PNG holds (depth: metres -> millimetres; mask: bool -> 0/255)."""
    pixels = np.asarray(pixels)
    if name == "depth_file_name":
        if pixels.ndim != 2 or not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() >= MOST_METRES:
            raise ValueError(f"depth is {pixels.shape}; expected (H, W) finite metres from 0 to 65.5 (16-bit mm)")
        return np.rint(pixels.astype(np.float64) * 1000).astype(np.uint16)
    if name == "object_mask_file_name":
        if pixels.ndim != 2 or pixels.dtype != bool:
            raise ValueError(f"object_mask is {pixels.shape} {pixels.dtype}, expected (H, W) bool")
        return pixels.astype(np.uint8) * 255
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"{dataset.PICTURE_FOLDERS[name]} is {pixels.shape} {pixels.dtype}, expected (H, W, 3) uint8")
    return pixels


def write_object(folder: Path, object_mesh: ObjectMesh) -> str:
    """Write a mesh once as objects/<object_id>.ply; returns that path, relative to the folder."""
    relative = f"objects/{object_mesh.object_id}.ply"
    if not (folder / relative).exists():
        save_object(object_mesh, folder / relative)
    return relative


def write_records(folder: str | Path, records: list[dict[str, Any]]) -> None:
    """Replace metadata.jsonl as a whole (to add `verification` scores, or to drop records)."""
    lines = "".join(json.dumps(record) + "\n" for record in sorted(records, key=lambda record: record["index"]))
    write_whole(Path(folder) / "metadata.jsonl", lines.encode())


# --- pictures to look at ---


def overview(folder: str | Path, chosen: Sequence[dict[str, Any]]) -> Image.Image:
    """Records, each a strip of picture, skeleton, normal, segmentation below its text.

    Where a record lacks one of them its cell is white.
    """
    has_image = any(record["file_name"] for record in chosen)
    keys = [*(["file_name"] if has_image else []), "skeleton_file_name", "normal_file_name", "segmentation_file_name"]

    def in_cell(record: dict[str, Any], key: str) -> np.ndarray:
        if record.get(key) is None:
            return np.full((CELL, CELL, 3), 255, dtype=np.uint8)
        return _in_cell(dataset.load_picture(folder, record, key))

    strips = [np.concatenate([in_cell(record, key) for key in keys], axis=1) for record in chosen]
    # Pillow's built-in font knows ASCII alone.
    texts = [f"{record['index']} {record.get('text') or ''}".encode("ascii", "replace").decode() for record in chosen]
    pairs = [slice(k, k + 2) for k in range(0, len(chosen), 2)]
    return contact_sheet([strips[pair] for pair in pairs], [texts[pair] for pair in pairs])


def strip(conditions: Sequence[Conditions], pictures: Sequence[np.ndarray]) -> Image.Image:
    """Skeleton, normal and segmentation above the picture, a column a frame; of long videos MOST_FRAMES, evenly.

    pictures  (H, W, 3) uint8, as many as conditions
    """
    chosen = _evenly(len(pictures), MOST_FRAMES)
    rows = [[getattr(conditions[i], name) for i in chosen] for name in ("skeleton", "normal", "segmentation")]
    rows.append([pictures[i] for i in chosen])
    return contact_sheet([[_in_cell(image) for image in row] for row in rows])


def _in_cell(pixels: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) or (H, W) uint8 in the middle of a cell (CELL, CELL, 3), white beside what is not square."""
    return np.asarray(ImageOps.pad(Image.fromarray(pixels).convert("RGB"), (CELL, CELL), color="white"))


def _evenly(count: int, most: int) -> np.ndarray:
    """At most so many of `count` numbers, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, most).round().astype(int))


# --- the folder ---


def refuse_other_job(folder: str | Path, description: dict[str, Any], ignoring: Sequence[str] = ()) -> None:
    """Raise ValueError when the folder was begun by a job that `description` does not continue, or by another program.

    ignoring  entries of "job" that are not compared: not known yet
    """
    folder = Path(folder)
    # In this order: another process of this job may be writing dataset.json, which comes before all others.
    found = next((path for pattern in WRITTEN for path in sorted(folder.glob(pattern))), None)
    there = dataset.read_description(folder)
    if found is not None and there.get("format") != FORMAT and not any(folder.glob("metadata*.jsonl")):
        raise ValueError(f"{folder} is no dataset folder but has {found.relative_to(folder)}, which might be "
                         "overwritten; nothing was changed: choose another folder with --out")  # fmt: skip
    before, job = there.get("job"), json.loads(json.dumps(description.get("job")))  # tuples become lists, as on disk
    if before is None or job is None:  # nothing was promised
        return
    keys = sorted(key for key in before | job if key not in ignoring and before.get(key) != job.get(key))
    if not keys:
        return
    if there.get("made_by") != description.get("made_by"):  # whose entries say nothing to each other
        difference = f"{there.get('made_by')} made it, this is {description.get('made_by')}"
    else:
        told = [(key.removesuffix("_content"), _shortly(before.get(key)), _shortly(job.get(key))) for key in keys]
        told = [f"{key}: {was} there, {now} now" if was != now else f"{key}: other content" for key, was, now in told]
        difference = first_few(told, most=4, joint="; ")
    more = "" if there.get("made_by") == "video.py" else " (a larger --count adds more)"
    again = f", or continue it with its own command{more}: {there['command']}" if there.get("command") else ""
    raise ValueError(f"{folder} holds records of another job ({difference}); choose another folder with --out{again}")


def _shortly(value: Any) -> str:
    """A value in a line, without the hashes in it, which tell people nothing."""
    text = HASH.sub("", repr(value))
    return text if len(text) <= SHOWN_LENGTH else f"{text[: SHOWN_LENGTH - 3]}..."


class DatasetWriter:
    """Appends records to a folder; opening an existing folder continues it.  `with writer:` around all that appends
    leaves the lines of all records behind, also when it fails.

    folder       made when absent
    description  goes to dataset.json as it is.  Its entry "job" (a dict) says what determines the pictures; a folder
                 begun with another job is refused, so that two jobs never mix; so is one with files of other origin.
    rank, world_size  with several processes each rank appends to its own metadata-RRRRR.jsonl; `finish` on rank 0,
                 after all ranks are done (a barrier), merges them.
    Raises OSError, with a way out, for a folder that cannot be written to.
    """

    def __init__(self, folder: str | Path, description: dict[str, Any], rank: int = 0, world_size: int = 1) -> None:
        self.folder, self.description = Path(folder), description
        self.rank, self.world_size = rank, world_size
        self._waiting: list[dict[str, Any]] = []
        self._due, self._path = 0.0, self.folder / "metadata.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            refuse_other_job(self.folder, description)
            # By one, before any of this job writes.
            for place in ("objects", *dataset.PICTURE_FOLDERS.values()) if rank == 0 else ():
                files.remove_leftovers(self.folder / place)
            self._lines = JsonLines(dataset.part_of(self._path, rank, world_size))
            self._done: set[int] = set()
            self._last, self._in_order, lines = -1, True, 0
            there = dataset.FolderFiles(self.folder)
            for record in dataset.each_record(self.folder, ("index", *dataset.FILE_KEYS)):
                lines += 1
                self._note(record["index"])
                # A record that lost a file is made again; its new line replaces the old one.
                (self._done.discard if there.missing(record) else self._done.add)(record["index"])
            card = dataset.read_description(self.folder)
            counts = card if lines and self._is_counted() else count(())
            self._counts = counts if counts["counts"]["records"] == lines else None  # None: counted at the end
            self._card_stands = bool(card)
            if rank == 0 and not card:
                self._write_description()
        except OSError as error:
            raise OSError(f"cannot write to {folder} ({error}); choose another folder with --out") from error

    def _note(self, index: int) -> None:
        """Note whether lines still are in order, each index once."""
        self._in_order, self._last = self._in_order and index > self._last, index

    def _write_description(self, **more: Any) -> None:
        """Write dataset.json, unless it says so already: when and by which command it was said does not matter."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **self.description, **more}
        there = dataset.read_description(self.folder)
        told = json.loads(json.dumps(content)) | {key: there[key] for key in ("command", "versions") if key in there}
        if told != there:
            write_json(self.folder / "dataset.json", content)

    def __len__(self) -> int:
        """Finished records in the folder, all ranks together as far as known."""
        return len(self._done)

    def done(self, index: int) -> bool:
        """True when record `index` is complete on disk."""
        return index in self._done

    @property
    def end(self) -> int:
        """The index after the last finished record."""
        return max(self._done, default=-1) + 1

    def append(self, record: dict[str, Any]) -> None:
        """Append the line of a record whose pictures are in place (the result of `write_pictures`), at once or soon."""
        self._waiting.append(record)
        self._done.add(record["index"])
        self._note(record["index"])
        if self._counts is not None:
            count([record], self._counts)
        if time.monotonic() > self._due:
            self.flush()

    def flush(self) -> None:
        """Append the lines that wait, as soon as what they name would survive a power cut."""
        if self._waiting and self._card_stands and self.rank == 0:  # its counts are no longer true
            self._write_description()
            self._card_stands = False
        records, self._waiting, began = self._waiting, [], time.monotonic()
        named = {record[key] for record in records for key in dataset.FILE_KEYS if record.get(key) is not None}
        files.make_lasting(self.folder / name for name in named)
        for record in records:
            self._lines.append(record, allow_nan=False)  # other readers of JSON know no NaN
        self._due = time.monotonic() + (time.monotonic() - began) / SHARE_OF_DISK

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, *fault: object) -> None:
        self.flush()

    def merge(self) -> None:
        """Write what waits; on rank 0, after all ranks are done, put all lines in order, and know of them."""
        self.flush()
        if self.rank == 0 and not (self._in_order and dataset.metadata_files(self.folder) == [self._path]):
            self._done = dataset.merge_lines(self.folder)
            self._last, self._in_order, self._counts = max(self._done, default=-1), True, None

    def finish(self, grid: bool = True) -> None:
        """Merge the ranks' lines in order of index, count, and draw grid.png.  Does nothing on ranks other than 0.

        May be repeated: what an interruption left undone is done, and a finished folder keeps every byte.  Lines are
        read again only where they are in disorder, or were never counted.
        """
        self.merge()
        if self.rank != 0:
            return
        sheet = self.folder / "grid.png"
        if self._counts is None:
            self._counts = count(dataset.each_record(self.folder, COUNTED))
        records = self._counts["counts"]["records"]
        if not (page := self.folder / "README.md").exists():  # somebody may have written more into it
            write_whole(page, (ASSETS / "dataset.md").read_bytes())
        if grid and records and not (sheet.exists() and self._is_counted()):
            with open(self._path, "rb") as stream:
                shown = set(_evenly(records, MOST_RECORDS))
                chosen = [json.loads(line) for k, line in enumerate(stream) if k in shown]
            write_whole(sheet, encode_png(np.asarray(overview(self.folder, chosen))))
        # Last: the next run takes what is counted for finished.
        self._write_description(**data_card(self.folder, self._counts, self.description))

    def _is_counted(self) -> bool:
        """Whether dataset.json counts the lines as they are: they were not written after it."""
        there = dataset.read_description(self.folder)
        if not (self._path.exists() and {"counts", "sources", "weights"} <= there.keys()):
            return False
        return self._path.stat().st_mtime_ns < (self.folder / "dataset.json").stat().st_mtime_ns


def copy_folder(folder: Path, records: Sequence[dict[str, Any]], writer: DatasetWriter) -> None:
    """Copy records that are not there yet with all their files, under the same names and indices, and finish."""
    with writer:
        for record in tqdm(records, desc="copying", unit="record"):
            if writer.done(record["index"]):
                continue
            named = {key: unlike_a_split(record[key]) for key in dataset.FILE_KEYS if record.get(key) is not None}
            for key, name in named.items():  # several looks share one view, which is written once
                content = dataset.file_of(folder, record, key).read_bytes()
                write_whole(writer.folder / name, content, lasting=False)
            writer.append(record | named)
    writer.finish()
