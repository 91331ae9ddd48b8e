"""Files that appear whole or not at all, hashes, JSON: what is read and written whatever it means."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Write to a temporary name beside path, fsync, rename: path holds the old content or the new, never a part.

    write   receives the temporary path and fills it
    A killed process may leave the temporary file; the next write to the same path replaces it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut; where folders cannot be opened (Windows), do nothing."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal.  Remembered for as long as size and modification time stay the same."""
    status = readable_file(path).stat()
    return _sha256(os.path.abspath(path), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=32)
def _sha256(path: str, size: int, modified_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


ZIP_MAGIC, GIT_LFS_MAGIC = b"PK\x03\x04", b"version https://git-lfs"


def readable_file(path: str | Path) -> Path:
    """The path, if there is a file that may be read and that is more than a place holder."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}")
    try:
        with open(path, "rb") as file:
            start = file.read(len(GIT_LFS_MAGIC))
    except PermissionError as error:
        raise PermissionError(f"{path} may not be read by this user; change its permissions (chmod u+r)") from error
    if start == GIT_LFS_MAGIC:
        raise ValueError(f"{path} is not a readable weight file: it is a git-lfs pointer; fetch it with `git lfs pull`")
    return path


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: a reader sees the whole file or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
        os.replace(temporary, path)
    except OSError as error:
        raise explain_full_disk(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def explain_full_disk(error: OSError, path: Path) -> OSError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        message = "the disk is full; finished records are safe: free some space and run the same command again"
        return OSError(error.errno, message, str(path))
    return error


def encode_png(pixels: np.ndarray, png_text: dict[str, str] | None = None) -> bytes:
    """PNG bytes of (H, W, 3) uint8, (H, W) uint8 or (H, W) uint16, with optional text chunks."""
    # Level 1 is five times faster than the default and 10 to 20 % larger on these pictures.
    info = PngImagePlugin.PngInfo()
    for key, value in (png_text or {}).items():
        info.add_text(key, value)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", compress_level=1, pnginfo=info)
    return stream.getvalue()


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill; it becomes `path` at the end of the block and is removed when the block fails.

    Raises FileExistsError when `path` is there already, OSError saying so when the disk is full.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another folder, or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".unfinished", dir=path.parent))
    unfinished.chmod(0o777 & ~_umask())  # mkdtemp's folders are for their owner alone
    try:
        yield unfinished
        os.rename(unfinished, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = "the disk is full; the unfinished export was removed: free some space and run the command again"
        raise OSError(error.errno, message, str(path)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: str | Path) -> Any:
    """Raises FileNotFoundError, or ValueError when the file is not JSON."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no prediction file at {path}; python tools/convert_keypoints.py --help says how to make one"
        )
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
