"""What every real dataset becomes first, and what became of its frames."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

from hoi.sources.source_frame import SourceFrame

REJECTED_FILE = "rejected.jsonl"


class Source(Protocol):
    """What DexYCB, HO3D and OfficialCSV have in common.

    name          of the dataset
    has_geometry  hand parameters and object poses are annotated
    has_labels    hand and object are labelled in the picture; otherwise they are rendered
    is_scenery    pictures without hand or object, for the background buffer
    """

    name: str
    has_geometry: bool
    has_labels: bool
    is_scenery: bool

    def __len__(self) -> int: ...

    def read(self, number: int) -> SourceFrame: ...

    def missing_models(self) -> list[str]: ...


class RejectionLog:
    """Frames that gave no record, one line each in the folder's rejected.jsonl; a run that continues skips them."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / REJECTED_FILE
        self.reasons: dict[int, str] = {}
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # cut short by an interruption
            os.truncate(self.path, whole)
        for line in content[:whole].splitlines():
            entry = json.loads(line)
            self.reasons[entry["index"]] = entry["rejected"]

    def add(self, entry: dict[str, Any]) -> None:
        """entry  index, rejected (the reason), detail"""
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        self.reasons[entry["index"]] = entry["rejected"]

    def counts(self) -> dict[str, int]:
        """How often each reason occurred, the most frequent first."""
        return dict(Counter(self.reasons.values()).most_common())
