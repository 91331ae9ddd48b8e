"""Which pictures to make.  Geometries + prompts -> requests, numbered for good.  Paper: Sec. 4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hoi.data.geometry import FolderGeometries, SceneGeometries
from hoi.toyworld.words import fill


@dataclass(frozen=True)
class Request:
    """One picture to make.

    index          of the record
    geometry       number in the source of conditions; None without conditions
    prompt         complete, no placeholder
    source_index   index of the record in the source folder, None where there is no folder
    """

    index: int
    geometry: int | None
    prompt: str
    source_index: int | None = None


def plan(
    geometries: FolderGeometries | SceneGeometries | None, prompts: Sequence[str] | None, count: int | None = None
) -> list[Request]:
    """Requests 0 to count - 1, those of one geometry side by side (so they share its features), else by index.

    prompts   templates: every geometry with every prompt; None: each record of the folder with its own text
    count     None makes each combination once; more go on with other noise (and, from meshes, other views)
    Request i is the same for every count.
    """
    if geometries is None:
        count = count or len(prompts)
        return [Request(i, None, fill(prompts[i % len(prompts)], None)) for i in range(count)]
    if prompts is None:
        records = geometries.records
        chosen = [(i, records[i % len(records)], geometries.numbers[i % len(records)])
                  for i in range(count or len(records))]  # fmt: skip
        requests = [Request(i, number, record["text"] or "", record["index"]) for i, record, number in chosen]
    else:
        usable = [k for k in range(len(geometries)) if geometries.has_conditions(k)]
        if not usable:
            raise ValueError(f"{geometries.folder} has no condition images; use --no-conditions for text alone")
        requests = []
        for i in range(count or len(usable) * len(prompts)):
            turn = i // len(prompts)
            number = usable[turn % len(usable)] if isinstance(geometries, FolderGeometries) else turn
            prompt = fill(prompts[i % len(prompts)], geometries.noun(number))
            requests.append(Request(i, number, prompt, geometries.source_index(number)))
    return sorted(requests, key=lambda request: (request.geometry, request.index))
