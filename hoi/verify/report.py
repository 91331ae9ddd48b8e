"""A scored dataset folder.  Records + scores -> report; what passes.

`verify_folder` scores all records and leaves verification/ (report.json, report.md); `choose`, `write_list` and
`copy_records` take what passes "iou_hand>90%,pck>90%".
"""

import hashlib
import json
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hoi.common.files import write_json, write_whole
from hoi.data.folder import read_description, read_records
from hoi.data.writer import REPORT, DatasetWriter, copy_folder, refresh_card, write_records
from hoi.verify.choices import PCK_THRESHOLD, SCORES
from hoi.verify.perfect import perfect_scores
from hoi.verify.scores import RELATIVE, Estimators, load_estimators, score_records

PERCENTILES = (5, 25, 50, 75, 95)  # the tails decide where to cut, and a mean hides them
SHOWN_PROBLEMS = 20  # in report.md; report.json has all

Record = dict[str, Any]


def summarize(records: list[Record]) -> dict[str, dict[str, float]]:
    """Of each score that any record has: n, mean and percentiles (p5 to p95)."""
    summary = {}
    for name in SCORES:
        values = [record["verification"][name] for record in records if record["verification"][name] is not None]
        if values:
            percentiles = zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)
            summary[name] = {"n": len(values), "mean": float(np.mean(values))}
            summary[name] |= {f"p{percent}": float(value) for percent, value in percentiles}
    return summary


def report_as_markdown(report: dict[str, Any]) -> str:
    """What report.json holds, for people: how the scores were made, a row a score, the first of the problems."""
    columns = ("mean", *(f"p{p}" for p in PERCENTILES))
    rows = [[name, str(row["n"]), *(f"{row[key]:.3f}" for key in columns)] for name, row in report["scores"].items()]
    lines = [
        f"# Verification of {report['folder']}", "",
        f"{report['records']} records, {report['scored']} scored. Verifier: {report['verifier']}. "
        f"Keypoints: {report['keypoints']}. PCK threshold: {PCK_THRESHOLD} of the hand box.", "",
        f"| score | n | {' | '.join(columns)} |", "|" + "---|" * (2 + len(columns)),
        *(f"| {' | '.join(cells)} |" for cells in rows),
    ]  # fmt: skip
    problems = report["problems"]
    if problems:
        lines += ["", f"## {len(problems)} records without scores", ""]
        lines += [f"- {problem}" for problem in problems[:SHOWN_PROBLEMS]]
        lines += ["- ... the others are in report.json"] if len(problems) > SHOWN_PROBLEMS else []
    return "\n".join([*lines, "", "A score counts the records that have it."]) + "\n"


def write_report(folder: Path, records: list[Record], estimators: Estimators) -> dict[str, Any]:
    """Write folder/verification/ and return what report.json holds; the records are scored by the estimators."""
    problems = [record["verification"]["problem"] for record in records if record["verification"]["problem"]]
    report = {"folder": str(folder), "records": len(records), "scored": len(records) - len(problems)}
    report |= estimators.about | {"scores": summarize(records), "problems": problems}
    write_json(folder / REPORT, report)
    write_whole((folder / REPORT).with_suffix(".md"), report_as_markdown(report).encode())
    return report


def verify_folder(
    folder: Path, verifier: Path | None, keypoints: Path | None = None, contacts: Path | None = None,
    device: str = "cpu",
) -> tuple[list[Record], dict[str, Any]]:  # fmt: skip
    """Score every record, replace metadata.jsonl as a whole, write report and data card; returns records and report.

    verifier, keypoints, contacts  files; who scores, as in load_estimators; device  of the verifier
    Until all is scored the folder stays as it was.  Raises ValueError when someone else changed the records meanwhile,
    or when processes have not merged theirs.
    """
    parts, lines = sorted(folder.glob("metadata-*.jsonl")), folder / "metadata.jsonl"
    if parts:
        raise ValueError(f"{folder} has {parts[0].name}: its run is not finished; finish it by the same command first")
    before = lines.stat().st_mtime_ns if lines.is_file() else None  # scoring takes minutes; others may write meanwhile
    records = read_records(folder)
    estimators = load_estimators(folder, records, verifier, keypoints, contacts, device)
    found, perfect = list(score_records(folder, records, estimators)), perfect_scores(folder, records, estimators)
    records = [record | {"verification": scores | {"perfect": best}}
               for record, scores, best in zip(records, found, perfect, strict=True)]  # fmt: skip
    report = write_report(folder, records, estimators)
    refresh_card(folder)
    if lines.stat().st_mtime_ns != before:
        raise ValueError(f"{lines} changed while its pictures were verified; nothing was written to it, verify again")
    write_records(folder, records)  # last: records with scores say that all else is there
    return records, report


RECOMMENDED = "iou_hand>90%,iou_object>80%,pck>60%"  # keeps 95 % of perfect pictures: docs/measuring.md
OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
# Read, never evaluated as code.
CONDITION = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*([^\s%]+)\s*(%?)\s*")


@dataclass(frozen=True)
class Condition:
    """One comparison of a score with a number or with percent of a perfect picture's; str() writes it as it is read."""

    score: str
    sign: str
    limit: float
    percent: str = ""

    def __str__(self) -> str:
        return f"{self.score}{self.sign}{self.limit:g}{self.percent}"

    def limit_for(self, record: Record) -> float | None:
        """What the record's score is compared with; None where nobody knows what a perfect picture scores."""
        reached = ((record["verification"] or {}).get("perfect") or {}).get(self.score)
        return self.limit if not self.percent else None if reached is None else reached * self.limit / 100

    def passes(self, record: Record) -> bool:
        """Whether a record's scores fulfil it; a picture without the score does not pass."""
        value, limit = (record["verification"] or {}).get(self.score), self.limit_for(record)
        return value is not None and limit is not None and OPERATORS[self.sign](value, limit)


@dataclass(frozen=True)
class Listed:
    """A list of pictures, such as --list and the page of hoi.page write, as a condition; str() is the list's file."""

    path: Path
    names: frozenset[str]

    def __str__(self) -> str:
        return str(self.path)

    def passes(self, record: Record) -> bool:
        """Whether the picture is one of the list."""
        return record["file_name"] in self.names


def read_list(path: Path, records: Sequence[Record]) -> Listed:
    """One file_name a line.  Raises ValueError naming the line of a picture that no record has."""
    names, known = path.read_text(encoding="utf-8-sig").splitlines(), {record["file_name"] for record in records}
    for number, name in enumerate(names, start=1):
        if name not in known:
            expected = "expected a file_name of its metadata.jsonl"
            raise ValueError(f"--keep: {path} line {number}: {name!r} is no picture of this folder, {expected}")
    return Listed(path, frozenset(names))


def parse_keep(expression: str, records: Sequence[Record] = ()) -> list[Condition | Listed]:
    """What must hold, joined by commas: comparisons, and files of lists: "iou_hand>90%,pck>=0.9,marked.txt".

    records  all of the folder, of which lists speak
    Raises ValueError naming the part that is no file and not `score > number` (or >=, <, <=), or the score that does
    not exist, and as read_list.
    """
    conditions = []
    for part in expression.split(","):
        if Path(part.strip()).is_file():
            conditions.append(read_list(Path(part.strip()), records))
            continue
        match = CONDITION.fullmatch(part)
        try:
            name, sign, limit = match[1], match[2], float(match[3])
        except (TypeError, ValueError) as error:  # no match, no number
            problem = f"--keep {part.strip()!r} is not score>number (also >=, <, <=), as in iou_hand>90% or pck>0.9"
            raise ValueError(f"{problem}, nor the file of a list of pictures") from error
        if name not in SCORES:
            raise ValueError(f"--keep: there is no score {name!r}; scores are {', '.join(SCORES)}")
        if match[4] and name not in RELATIVE:
            raise ValueError(f"--keep: {name} has no percent of a perfect picture's; {', '.join(RELATIVE)} have")
        conditions.append(Condition(name, sign, limit, match[4]))
    return conditions


def choose(records: list[Record], conditions: list[Condition | Listed]) -> list[Record]:
    """The records, scored where a condition compares scores, that pass all conditions.

    Raises ValueError when one is in percent of perfect pictures and no record says what these score.
    """
    for condition in conditions:
        in_percent = isinstance(condition, Condition) and condition.percent
        if in_percent and records and all(condition.limit_for(record) is None for record in records):
            problem = f"--keep {condition}: no record says what a perfect picture scores; score the folder again, with"
            raise ValueError(f"{problem} a verifier that `python -m hoi.verify train` made, or ask for a number")
    return [record for record in records if all(condition.passes(record) for condition in conditions)]


def describe_yield(records: list[Record], conditions: list[Condition | Listed]) -> str:
    """How many records pass all conditions, and each alone."""
    together = f"pass {', '.join(map(str, conditions))}"
    alone = {f"  {condition} alone": [condition] for condition in conditions} if len(conditions) > 1 else {}
    passing = {title: len(choose(records, some)) for title, some in ({together: conditions} | alone).items()}
    total = len(records)
    return "\n".join(f"{title}: {n} of {total} ({100 * n / total:.1f} %)" for title, n in passing.items())


def write_list(path: Path, records: list[Record]) -> None:
    """One file_name a line."""
    write_whole(path, "".join(f"{record['file_name']}\n" for record in records).encode())


def copy_records(folder: Path, out: Path, records: list[Record], conditions: list[Condition | Listed]) -> None:
    """Copy what passes, with all its files, into a dataset folder of its own, under the same names and indices.

    records  all of the folder, scored
    The same command continues an interrupted copy.  Raises ValueError when `out` holds anything else.
    """
    chosen, keep = choose(records, conditions), ", ".join(map(str, conditions))
    if not chosen:
        raise ValueError(f"nothing passes {keep}, so there is nothing to copy to {out}")
    description = read_description(folder)
    rejected = (description.get("rejected") or {}) | {f"does not pass {keep}": len(records) - len(chosen)}
    # Scores are part of it: after another verifier the same condition chooses others, and must not go on here.
    digest = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
    job = {"selected_from": str(folder.resolve()), "keep": keep, "records": digest}
    # Without a description it may hold what a killed copy left; the writer refuses what is not of a copy.
    there = read_description(out) if out.is_dir() else {}
    if there and there.get("job") != job:
        raise ValueError(f"{out} holds something else than this selection; choose another folder")
    description |= {"rejected": rejected, "selected_job": description.get("job"), "job": job}
    copy_folder(folder, chosen, DatasetWriter(out, description))
