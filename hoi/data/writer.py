"""An overview of a dataset folder's pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from hoi.common.sheets import contact_sheet
from hoi.conditions import Conditions


def strip(
    conditions: Sequence[Conditions], pictures: Sequence[np.ndarray], most: int = 16, cell: int = 128
) -> Image.Image:
    """Skeleton, normal and segmentation above the picture, a column a frame; of long clips `most` frames, evenly."""
    chosen = np.unique(np.linspace(0, len(pictures) - 1, most).round().astype(int))
    rows = [[getattr(conditions[i], name) for i in chosen] for name in ("skeleton", "normal", "segmentation")]
    rows.append([pictures[i] for i in chosen])
    return contact_sheet([[np.asarray(Image.fromarray(image).resize((cell, cell))) for image in row] for row in rows])
