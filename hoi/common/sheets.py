"""Pictures to look at: contact sheets, curves, animations.  Arrays -> PIL pictures, files.

Drawn with pillow alone; PyAV, where it is installed, adds MP4.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hoi.common.files import write_whole

MARGIN = 2
FONT_SIZE, LABEL_HEIGHT, LETTER_WIDTH = 11, 14, 6  # pixels, of pillow's built-in font
COLORS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207))
GRID_COLOR = (225, 225, 225)
CURVE_SIZE = 640, 360  # width and height, pixels
MP4_HINT = "no clip.mp4: it needs PyAV (pip install av)"


def contact_sheet(rows: Sequence[Sequence[np.ndarray]], labels: Sequence[Sequence[str]] | None = None) -> Image.Image:
    """Lay pictures out in rows.

    rows    each a sequence of (H, W, 3) uint8 pictures, all of one size; rows may differ in length
    labels  a line of text above each picture, cut to its width, in the same rows; or None
    Raises ValueError when there is no picture or the sizes differ.
    """
    sizes = {picture.shape for row in rows for picture in row}
    if len(sizes) != 1:
        raise ValueError(f"a contact sheet needs pictures of one size, got {sorted(sizes) or 'none'}")
    height, width, _ = sizes.pop()
    label_height = LABEL_HEIGHT if labels else 0
    across, down = width + MARGIN, height + label_height + MARGIN  # from one picture to the next
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * across + MARGIN, len(rows) * down + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=FONT_SIZE)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            left, top = MARGIN + c * across, MARGIN + r * down
            if labels:
                draw.text((left + 2, top), labels[r][c][: width // LETTER_WIDTH], fill="black", font=font)
            sheet.paste(Image.fromarray(picture), (left, top + label_height))
    return sheet


def curve(series: dict[str, Sequence[tuple[float, float]]], title: str) -> Image.Image:
    """Draw named curves on one pair of axes.

    series  name -> (x, y) points; y is drawn on a logarithmic axis when every value is positive, and left out where it
            is not finite
    """
    picture = Image.new("RGB", CURVE_SIZE, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=FONT_SIZE)
    left, right, top, bottom = 60, picture.width - 12, 24, picture.height - 24
    points = [p for values in series.values() for p in values if np.isfinite(p[1])]
    draw.text((left, 6), title, fill="black", font=font)
    if not points:
        return picture
    xs, ys = np.array(points, dtype=np.float64).T
    logarithmic = bool((ys > 0).all())
    to_axis = np.log10 if logarithmic else np.asarray
    low, high = to_axis(ys).min(), to_axis(ys).max()
    high = high if high > low else low + 1e-6  # a constant curve lies at the bottom instead of dividing by zero
    x_low, x_high = xs.min(), max(xs.max(), xs.min() + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (float(to_axis(y)) - low) / (high - low)
        return left + across * (right - left), bottom - up * (bottom - top)

    for fraction in np.linspace(0, 1, 5):
        value = low + fraction * (high - low)
        y = bottom - fraction * (bottom - top)
        draw.line([(left, y), (right, y)], fill=GRID_COLOR)
        draw.text((4, y - 6), f"{10**value if logarithmic else value:.3g}", fill="black", font=font)
        x = left + fraction * (right - left)
        draw.text((x - 12, bottom + 6), f"{x_low + fraction * (x_high - x_low):.0f}", fill="black", font=font)
    for k, (name, values) in enumerate(series.items()):
        color = COLORS[k % len(COLORS)]
        line = [place(x, y) for x, y in values if np.isfinite(y)]
        if len(line) > 1:
            draw.line(line, fill=color, width=2)
        draw.text((right - 120, top + 14 * k), name, fill=color, font=font)
    return picture


def smooth(values: Sequence[tuple[float, float]], window: int = 50) -> list[tuple[float, float]]:
    """Average (x, y) points in windows, so that a noisy loss shows its trend; at most a few hundred points remain."""
    window = max(window, len(values) // 300, 1)
    chunks = [values[k : k + window] for k in range(0, len(values), window)]
    return [(chunk[-1][0], float(np.mean([y for _, y in chunk]))) for chunk in chunks]


# --- moving pictures ---


def write_video(
    folder: Path, pictures: Sequence[np.ndarray], fps: int, gif: bool = False
) -> tuple[list[str], list[str]]:
    """Write clip.webp, clip.mp4 where PyAV is installed, and clip.gif if wanted.

    pictures  (H, W, 3) uint8, height and width even
    returns   names of the files, and what to tell about those that could not be written
    """
    files, notes = {"clip.webp": encode_animation(pictures, fps, "WEBP")}, []
    if importlib.util.find_spec("av"):
        files["clip.mp4"] = encode_mp4(pictures, fps)
    else:
        notes.append(MP4_HINT)
    if gif:
        files["clip.gif"] = encode_animation(pictures, fps, "GIF")
    for name, content in files.items():
        write_whole(folder / name, content)
    return list(files), notes


def encode_animation(pictures: Sequence[np.ndarray], fps: int, kind: str) -> bytes:
    """(H, W, 3) uint8 pictures -> an endless animation; kind "WEBP" or "GIF" (256 colours, hundredths of a second)."""
    first, *rest = [Image.fromarray(picture) for picture in pictures]
    tick = 1 if kind == "WEBP" else 10  # milliseconds that the format counts in: at 12 fps 83.3 become 80
    ends = [tick * round(1000 * count / (fps * tick)) for count in range(len(pictures) + 1)]
    durations = np.diff(ends).tolist()  # of each picture; rounded together, they add up to the clip's
    stream = io.BytesIO()
    quality = {"quality": 90, "method": 4} if kind == "WEBP" else {}
    first.save(stream, kind, save_all=True, append_images=rest, duration=durations, loop=0, **quality)
    return stream.getvalue()


def encode_mp4(pictures: Sequence[np.ndarray], fps: int) -> bytes:
    """(H, W, 3) uint8 pictures of even height and width -> H.264 by PyAV, which must be installed."""
    import av

    stream = io.BytesIO()
    height, width, _ = pictures[0].shape
    with av.open(stream, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=fps)
        video.height, video.width, video.pix_fmt = height, width, "yuv420p"  # the format that every player knows
        video.options = {"crf": "16"}  # finer than libx264's default of 23: so short a video may be large
        for picture in pictures:
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(video.encode())  # what the encoder still holds back
    return stream.getvalue()
