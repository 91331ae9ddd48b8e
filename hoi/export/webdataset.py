"""WebDataset: records of a dataset folder -> tar shards, for hundreds of thousands of records and for object stores.

What the members are is said by assets/exports/webdataset.md, which goes with every export.  A shard is whole or absent;
shards.jsonl has a line for each whole one, so the same command goes on behind them, also when the folder has grown.
"""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from hoi.common.choices import SHARD_FIELDS, SHARD_MB
from hoi.common.files import JsonLines, held_alone, short_hash, write_whole
from hoi.data.folder import PICTURE_FOLDERS, file_of, load_picture
from hoi.export.folder import copy_mesh

SHARDS = "shards.jsonl"
# A member's name behind the key, and the key of the record that names its file.
FIELDS = dict(zip(SHARD_FIELDS, PICTURE_FOLDERS, strict=True))


def write_shards(
    folder: Path, records: list[dict[str, Any]], out: Path, shard_mb: int = SHARD_MB, fields: Sequence[str] = (),
    whole: list[dict[str, Any]] | None = None,
) -> Counter[str]:  # fmt: skip
    """Write records to an absent or empty folder, or behind the shards of the same records that are there already.

    shard_mb  a shard is at most so many millions of bytes, but holds a record at least
    fields    of FIELDS, which every record has then; (): those that any of the records has, of `whole` where given:
              the records of all splits
    returns   how many were left out because they lack a field, by reason
    Raises FileExistsError where other files are, ValueError where shards of other records are or a file is damaged.
    """
    fields = [field for field, key in FIELDS.items()
              if field in fields or (not fields and any(record.get(key) for record in whole or records))]  # fmt: skip
    lacking = [[field for field in fields if record.get(FIELDS[field]) is None] for record in records]
    fit = [record for record, absent in zip(records, lacking, strict=True) if not absent]
    if fit:
        if out.is_dir() and any(out.iterdir()) and not (out / SHARDS).exists():
            raise FileExistsError(f"{out} holds something else than shards; choose another folder, or remove it first")
        with held_alone(out, "an export"):
            open(out / SHARDS, "a").close()  # from now on the folder is ours; not touch(), which changes its time
            _continue_shards(folder, fit, out, shard_mb, fields)
    return Counter(f"they have no {', '.join(absent)}; --fields names what every record shall have"
                   for absent in lacking if absent)  # fmt: skip


def _continue_shards(
    folder: Path, records: list[dict[str, Any]], out: Path, shard_mb: int, fields: Sequence[str]
) -> None:
    """Write the shards behind those that shards.jsonl names."""
    lines, number, start = JsonLines(out / SHARDS), 0, 0
    for line in lines:
        if _content(records[start : start + line["records"]], fields) != line["content"]:
            raise ValueError(f"{out / line['shard']} was made of other records, of other fields, or before they were "
                             "changed; choose another folder, or remove it first")  # fmt: skip
        number, start = number + 1, start + line["records"]
    with tqdm(total=len(records), initial=start, unit="record") as bar:
        while start < len(records):
            name = f"shard-{number:06d}.tar"
            taken = _write_shard(folder, records[start:], out / name, shard_mb, fields)
            # Only now: what is named here is never made again, and may have been moved to a store.
            content = _content(records[start : start + taken], fields)
            lines.append({"shard": name, "records": taken, "content": content})
            number, start = number + 1, start + taken
            bar.update(taken)


def _content(records: list[dict[str, Any]], fields: Sequence[str]) -> str:
    """A hash by which records of other content are told apart."""
    return short_hash(json.dumps([fields, records]))


def _write_shard(folder: Path, records: list[dict[str, Any]], path: Path, shard_mb: int, fields: Sequence[str]) -> int:
    """Write a shard of the first records, as many as fit; returns how many."""
    taken = 0

    def fill(stream: BinaryIO) -> None:
        nonlocal taken
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for record in records:
                members = _members(folder, record, path.parent, fields)
                # Members begin at whole blocks, with a block for the name; at the end are zeros.
                size = sum(512 * (1 + -(-len(content) // 512)) for content in members.values())
                if taken and stream.tell() + size > shard_mb * 10**6 - tarfile.RECORDSIZE:
                    break
                for name, content in members.items():
                    member = tarfile.TarInfo(f"{record['index']:06d}.{name}")  # without time and owner: bytes repeat
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                taken += 1

    write_whole(path, fill)
    return taken


def _members(folder: Path, record: dict[str, Any], out: Path, fields: Sequence[str]) -> dict[str, bytes]:
    """What a shard holds of a record; its mesh is copied beside the shards."""
    told = {key: value for key, value in record.items() if key not in PICTURE_FOLDERS}
    told |= {"object_path": copy_mesh(folder, record, out)} if told.get("object_path") else {}
    members = {"json": json.dumps(told).encode()}
    for field in fields:
        load_picture(folder, record, FIELDS[field])
        members[f"{field}.png"] = file_of(folder, record, FIELDS[field]).read_bytes()
    return members
