"""The data card: what a dataset folder holds, where it comes from, under whose terms.  Records, dataset.json -> entries
of dataset.json, and a page for people.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

BUILT_IN = "built-in family"
AS_GIVEN = "as given by the user"
HAND_TERMS = {
    "mano": "MANO licence (non-commercial research): hand parameters, keypoints and whatever was drawn from them",
    "builtin": "built-in hand: MIT, see hoi/assets",
}
REPORT = Path("verification") / "report.json"  # what python -m hoi.verify DIR leaves


def data_card(folder: str | Path, records: list[dict[str, Any]], description: dict[str, Any]) -> dict[str, Any]:
    """Entries that dataset.json has beside what the maker of the folder says of it.

    records      all of the folder
    description  what dataset.json says already; its `licences` come back with what the records show
    returns      counts, sources, labels, licences, weights, yield, verification (None where nothing was verified)
    """
    pictures = sum(record["file_name"] is not None for record in records)
    generated = sum(record.get("checkpoint") is not None for record in records)
    rejected = description.get("rejected") or {}
    report = verification_summary(Path(folder))
    checkpoints = {json.dumps(record["checkpoint"]): None for record in records if record.get("checkpoint")}
    return {
        "counts": {"records": len(records), "pictures": pictures},
        "sources": {
            "annotation": _count(records, "source"),
            "hands": _count(records, "hand_model"),
            "categories": _count(records, "category"),
            "pictures": {"generated": generated, "drawn or photographed": pictures - generated},
        },
        "licences": _licences(records, description.get("licences") or {}),
        "weights": [json.loads(text) for text in checkpoints],
        "yield": {"accepted": len(records), "rejected": sum(rejected.values()), "reasons": rejected},
        "verification": report,
    }


def _count(records: list[dict[str, Any]], key: str) -> dict[str, int]:
    return dict(Counter(record[key] for record in records if record.get(key) is not None).most_common())


def _licences(records: list[dict[str, Any]], licences: dict[str, Any]) -> dict[str, Any]:
    """The maker's licences; terms of hands and objects where it only names them."""
    hands = [
        HAND_TERMS.get(name, f"unknown terms of the hand model {name!r}") for name in _count(records, "hand_model")
    ]
    objects = licences.get("objects")
    if isinstance(objects, list):
        objects = {source: "MIT, made by this project" if source == BUILT_IN else AS_GIVEN for source in objects}
    more = {"hand": "; ".join(hands)} if hands else {}
    return licences | more | ({"objects": objects} if objects else {})


def verification_summary(folder: Path) -> dict[str, Any] | None:
    """The verifier's report, the lengths of its lists in their place; None where there is none that can be read."""
    try:
        report = json.loads((folder / REPORT).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(report, dict):
        return None
    return {key: len(value) if isinstance(value, list) else value for key, value in report.items()}


def card_text(card: dict[str, Any]) -> str:
    """Markdown for people.

    card  the content of dataset.json with the entries of `data_card`
    """
    rows = [(name, card.get(name)) for name in ("made_by", "command", "seed", "versions", "job")]
    rows += [(name, card.get(name)) for name in ("counts", "sources", "yield", "licences", "weights", "verification")]
    lines = ["# Data card", ""]
    for name, value in rows:
        if value not in (None, {}, []):
            lines += _item(name.replace("_", " "), value, 0)
    return "\n".join(lines) + "\n"


def _item(name: str, value: Any, depth: int) -> list[str]:
    start = "  " * depth + f"- {name}:"
    if isinstance(value, dict):
        return [start, *(line for key, part in value.items() for line in _item(key, part, depth + 1))]
    return [f"{start} {value}" if isinstance(value, str) else f"{start} {json.dumps(value)}"]
