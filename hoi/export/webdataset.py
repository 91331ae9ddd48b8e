"""WebDataset: records of a dataset folder -> tar shards, for hundreds of thousands of records and for object stores.

What the members are is said by assets/exports/webdataset.md, which goes with every export.  A shard is whole or absent;
shards.jsonl has a line for each whole one, so the same command goes on behind them, also when the folder has grown.
"""

import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from hoi.common.files import JsonLines, held_alone, short_hash, write_whole
from hoi.data.folder import PICTURE_FOLDERS, file_of, mesh_file_name
from hoi.export.folder import checked_picture

SHARDS = "shards.jsonl"
SHARD_MB = 500  # millions of bytes: some thousand records of 128 px, and no more files than a store lists at once
# A member's name behind the key, and the key of the record that names its file.
FIELDS = {key.removesuffix("file_name").rstrip("_") or "image": key for key in PICTURE_FOLDERS}


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
    reasons = [_lacking(record, fields) for record in records]
    fit = [record for record, reason in zip(records, reasons, strict=True) if not reason]
    if fit:
        if out.is_dir() and any(out.iterdir()) and not (out / SHARDS).exists():
            raise FileExistsError(f"{out} holds something else than shards; choose another folder, or remove it first")
        with held_alone(out, "an export"):
            open(out / SHARDS, "a").close()  # from now on the folder is ours; not touch(), which changes its time
            _continue_shards(folder, fit, out, shard_mb, fields)
    return Counter(filter(None, reasons))


def _lacking(record: dict[str, Any], fields: Sequence[str]) -> str:
    absent = [field for field in fields if record.get(FIELDS[field]) is None]
    return f"they have no {', '.join(absent)}; --fields names what every record shall have" if absent else ""


def _continue_shards(
    folder: Path, records: list[dict[str, Any]], out: Path, shard_mb: int, fields: Sequence[str]
) -> None:
    """Write the shards behind those that shards.jsonl names."""
    lines, start = JsonLines(out / SHARDS), 0
    finished = list(lines)
    for line in finished:
        there = records[start : start + line["records"]]
        if _content(there, fields) != line["content"]:
            raise ValueError(f"{out / line['shard']} was made of other records, of other fields, or before they were "
                             "changed; choose another folder, or remove it first")  # fmt: skip
        start += line["records"]
    with tqdm(total=len(records), initial=start, unit="record") as bar:
        for number, part in enumerate(_shards(folder, records[start:], shard_mb, fields), start=len(finished)):
            name = f"shard-{number:06d}.tar"
            for record in part:
                if record.get("object_path") and not (mesh := out / mesh_file_name(record["object_path"])).exists():
                    with open(file_of(folder, record, "object_path"), "rb") as source:
                        write_whole(mesh, partial(shutil.copyfileobj, source))
            write_whole(out / name, partial(_write_tar, folder, part, fields))
            # Only now: what is named here is never made again, and may have been moved to a store.
            lines.append({"shard": name, "records": len(part), "content": _content(part, fields)})
            bar.update(len(part))


def _content(records: list[dict[str, Any]], fields: Sequence[str]) -> str:
    """A hash by which records of other content are told apart."""
    return short_hash(json.dumps([fields, records]))


def _shards(
    folder: Path, records: list[dict[str, Any]], shard_mb: int, fields: Sequence[str]
) -> Iterator[list[dict[str, Any]]]:
    """Records of each shard in turn: as many as fit into its size."""
    part, size = [], 0
    for record in records:
        sizes = [file_of(folder, record, FIELDS[field]).stat().st_size for field in fields]
        # Members begin at whole blocks, with a block for the name.
        more = sum(512 * (1 + -(-count // 512)) for count in (*sizes, len(_described(record))))
        if part and size + more > shard_mb * 10**6 - tarfile.RECORDSIZE:  # of zeros, at the end
            yield part
            part, size = [], 0
        part.append(record)
        size += more
    if part:
        yield part


def _described(record: dict[str, Any]) -> bytes:
    """The member with everything but the pictures; `object_path` is relative to the export."""
    told = {key: value for key, value in record.items() if key not in PICTURE_FOLDERS}
    if told.get("object_path"):
        told["object_path"] = mesh_file_name(told["object_path"])
    return json.dumps(told).encode()


def _write_tar(folder: Path, records: list[dict[str, Any]], fields: Sequence[str], stream: BinaryIO) -> None:
    """Write one shard: the members of a record stand together, without times and owners, so that bytes repeat."""
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for record in records:
            members = {"json": _described(record)}
            for field in fields:
                checked_picture(folder, record, FIELDS[field])
                members[f"{field}.png"] = file_of(folder, record, FIELDS[field]).read_bytes()
            for field, content in members.items():
                member = tarfile.TarInfo(f"{record['index']:06d}.{field}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
