"""Choosing the pictures whose scores pass.  Scored records + "iou_hand>0.8,pck>0.9" -> a list, or a dataset folder."""

import hashlib
import json
import operator
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hoi.common.files import write_bytes_atomically
from hoi.data.folder import PICTURE_FOLDERS, read_description
from hoi.data.writer import DatasetWriter
from hoi.verify.scores import SCORES

OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
CONDITION = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*(\S+)\s*")


@dataclass(frozen=True)
class Condition:
    """One comparison of a score with a number; str() writes it as it is read."""

    score: str
    sign: str
    limit: float

    def __str__(self) -> str:
        return f"{self.score}{self.sign}{self.limit:g}"

    def passes(self, scores: dict[str, Any] | None) -> bool:
        """A picture without the score does not pass."""
        value = (scores or {}).get(self.score)
        return value is not None and OPERATORS[self.sign](value, self.limit)


def parse_keep(expression: str) -> list[Condition]:
    """Comparisons joined by commas, all of which must hold: "iou_hand>0.8,pck>=0.9".

    Raises ValueError naming the part that is not `score > number` (or >=, <, <=), or the score that does not exist.
    """
    conditions = []
    for part in expression.split(","):
        match = CONDITION.fullmatch(part)
        try:
            name, sign, limit = match[1], match[2], float(match[3])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"--keep {part.strip()!r} is not score>number (also >=, <, <=), as in iou_hand>0.8"
            ) from error
        if name not in SCORES:
            raise ValueError(f"--keep: there is no score {name!r}; scores are {', '.join(SCORES)}")
        conditions.append(Condition(name, sign, limit))
    return conditions


def choose(records: list[dict[str, Any]], conditions: list[Condition]) -> list[dict[str, Any]]:
    return [record for record in records if all(c.passes(record["verification"]) for c in conditions)]


def describe_yield(records: list[dict[str, Any]], conditions: list[Condition]) -> str:
    """How many records pass all conditions, and each alone."""
    total = len(records)

    def counted(title: str, passing: list[dict[str, Any]]) -> str:
        return f"{title}: {len(passing)} of {total} ({100 * len(passing) / total:.1f} %)"

    alone = [counted(f"  {c} alone", choose(records, [c])) for c in conditions] if len(conditions) > 1 else []
    return "\n".join([counted(f"pass {', '.join(map(str, conditions))}", choose(records, conditions)), *alone])


def write_list(path: Path, records: list[dict[str, Any]]) -> None:
    """One file_name a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(path, "".join(f"{record['file_name']}\n" for record in records).encode())


def copy_records(folder: Path, out: Path, records: list[dict[str, Any]], conditions: list[Condition]) -> None:
    """Copy what passes, with all its files, into a dataset folder of its own, under the same names and indices.

    records  all of the folder, scored
    The same command continues an interrupted copy.  Raises ValueError when `out` holds anything else.
    """
    chosen, keep = choose(records, conditions), ", ".join(map(str, conditions))
    if not chosen:
        raise ValueError(f"nothing passes {keep}, so there is nothing to copy to {out}")
    description = read_description(folder)
    rejected = (description.get("rejected") or {}) | {f"does not pass {keep}": len(records) - len(chosen)}
    digest = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
    job = {"selected_from": str(folder.resolve()), "keep": keep, "records": digest}
    if out.is_dir() and any(out.iterdir()):
        if read_description(out).get("job") != job:
            raise ValueError(f"{out} holds something else than this selection; choose another folder")
    writer = DatasetWriter(
        out, description | {"rejected": rejected, "selected_job": description.get("job"), "job": job}
    )
    for record in tqdm(chosen, desc="copying", unit="record"):
        if writer.done(record["index"]):
            continue
        for path in filter(None, (record.get(key) for key in (*PICTURE_FOLDERS, "object_path"))):
            if not (out / path).resolve().is_relative_to(out.resolve()):
                raise ValueError(f"record {record['index']} names {path}, which is outside of {folder}")
            if not (out / path).exists():  # several looks share one geometry
                (out / path).parent.mkdir(parents=True, exist_ok=True)
                write_bytes_atomically(out / path, (folder / path).read_bytes())
        writer.append(record)
    writer.finish()
