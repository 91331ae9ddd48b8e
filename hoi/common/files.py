"""Files that appear whole or not at all; hashes; and JSON, JSON lines, .npz and pickles read without running code.

What is read and written, whatever it means.  A damaged file is told in one sentence that names it.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, PngImagePlugin

try:
    import fcntl
except ImportError:  # Windows, which has no such locks
    fcntl = None

ASSETS = Path(__file__).parents[1] / "assets"  # what is delivered with the package: hand, prompts, trained weights
ZIP_MAGIC, GIT_LFS_MAGIC = b"PK\x03\x04", b"version https://git-lfs"
# Whatever numpy, zipfile, zlib and pickle raised for 18,000 files that were cut or had bytes changed at random.
DAMAGE = (
    AttributeError, EOFError, IndexError, KeyError, MemoryError, NotImplementedError, OSError, OverflowError,
    RuntimeError, SystemError, TypeError, ValueError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip
LITTLE_ROOM = 1 << 20  # bytes; a disk with less is taken for full when a library does not say why it could not write


# --- written whole ---


def write_whole(path: str | Path, content: bytes | Callable[[BinaryIO], Any]) -> None:
    """Write under a temporary name beside `path`, then rename: `path` holds the old content or the new, never a part.

    content  bytes of a small file, which several processes may write at once: each has a temporary name of its own;
             or a function that writes to the stream it is given (or to the file of its name), for a big file with one
             writer: it is also made to last through a power cut, and what a killed writer left is replaced by the next
    Folders above are made; a file that holds these bytes already is left alone.  Raises OSError saying so when the disk
    is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    small = isinstance(content, bytes)
    if small and path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if small else f".{path.name}.tmp")
    try:
        with full_disk_told(path):
            with open(temporary, "wb") as stream:
                stream.write(content) if small else content(stream)
            if not small:  # thousands of small files would wait for the disk thousands of times
                with open(temporary, "rb+") as stream:  # again: safetensors puts another file in the place of this one
                    os.fsync(stream.fileno())
            os.replace(temporary, path)
            if not small:
                _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut; where folders cannot be opened (Windows), do nothing."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def full_disk_told(path: Path, left: str = "what was finished is safe") -> Iterator[None]:
    """Within this block an error of a full disk becomes an OSError that says what to do; others pass.

    path  that is written      left  what the user finds afterwards
    """
    try:
        yield
    except Exception as error:  # torch and safetensors have kinds of their own, which do not say why
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        else:
            full = shutil.disk_usage(path.parent).free < LITTLE_ROOM
        if not full:
            raise
        message = f"the disk is full; {left}: free some space and run the same command again"
        raise OSError(errno.ENOSPC, message, str(path)) from error


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill; it becomes `path` at the end of the block and is removed when the block fails.

    Raises FileExistsError when `path` is there already, OSError saying so when the disk is full.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another folder, or remove it first")
    # Made here and not by tempfile, whose folders are for their owner alone.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed and had the same number
    unfinished.mkdir(parents=True)
    try:
        with full_disk_told(path, "the unfinished export was removed"):
            yield unfinished
            os.rename(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def held_alone(folder: str | Path, what: str) -> Iterator[None]:
    """Within this block no other process of this machine holds the folder, which is made, and left if it is not empty.

    what  does the holding, for the message, such as "a training"
    Raises ValueError at once when another one holds it.  Nothing is left behind: the lock ends with the process.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if descriptor is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ValueError(f"{what} is running in {folder} already; wait for its end, stop it, or choose another "
                         "--out") from error  # fmt: skip
    except OSError:  # some network disks know no locks: there nobody can tell
        pass
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
        with suppress(OSError):
            folder.rmdir()  # only where nothing was made


def encode_png(pixels: np.ndarray, png_text: dict[str, str] | None = None) -> bytes:
    """PNG bytes of (H, W, 3) uint8, (H, W) uint8 or (H, W) uint16, with optional text chunks."""
    info = PngImagePlugin.PngInfo()
    for key, value in (png_text or {}).items():
        info.add_text(key, value)
    stream = io.BytesIO()
    # Level 1 is five times faster than the default and 10 to 20 % larger on these pictures.
    Image.fromarray(pixels).save(stream, format="PNG", compress_level=1, pnginfo=info)
    return stream.getvalue()


# --- names ---

# Words from which Hugging Face's `datasets` concludes that a folder has splits, and between which signs it looks.
SPLIT_WORDS = "training|train|validation|valid|val|dev|testing|test|evaluation|eval"
NO_WORD = "-._ 0-9/"


def unlike_a_split(name: str) -> str:
    """A file's name or path in which nothing looks like a split: test.ply -> objtest.ply.

    One file called test.ply hides all others from load_dataset("imagefolder").
    """
    return re.sub(rf"(?<![^{NO_WORD}])(?=({SPLIT_WORDS})(?![^{NO_WORD}]))", "obj", name, flags=re.IGNORECASE)


def files_under(folder: str | Path) -> list[Path]:
    """Files under a folder in order of path, linked folders included, each once: a link may lead back up.

    Hidden ones are left out: macOS puts a ._mug.stl beside mug.stl.
    """
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        found += [] if real in seen else [Path(place, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return sorted(path for path in found if path.is_file())


# --- hashes ---


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal.  Remembered for as long as size and modification time stay the same."""
    status = readable_file(path).stat()
    return _sha256(os.path.abspath(path), status.st_size, status.st_mtime_ns)


def short_hash(text: str) -> str:
    """The first 16 hexadecimal digits of a text's SHA-256: enough to tell two jobs apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@lru_cache(maxsize=32)
def _sha256(path: str, size: int, modified_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


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


# --- JSON ---


def user_cache() -> Path:
    """The folder of this project in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hoidiffusion"


def write_json(path: str | Path, content: Any) -> None:
    """Write a small JSON file whole, indented by one space."""
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: str | Path, what: str, advice: str = "", kind: type = dict) -> Any:
    """The content of a JSON file.

    what    it should be, for the message     advice  what the user can do, behind each message
    kind    of the content; object: any
    Raises FileNotFoundError, or ValueError when the file is not JSON or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the {what} {path} is missing{advice}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}){advice}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a {kind.__name__}{advice}")
    return content


def read_json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Number and content of each line, from 1 on; a last line that an interruption cut short counts as absent.

    Raises ValueError naming file and line for a line that is not JSON.
    """
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number} is not JSON ({error}); delete the line to drop it") from error


class JsonLines:
    """A file of JSON objects, one a line, that grows at its end alone.

    Opening removes what an interruption left of a last line, or the next would be glued to it; reading does not
    (read_json_lines), for others may be writing.
    """

    def __init__(self, path: str | Path) -> None:
        """path: need not exist; the first line makes it."""
        self.path = Path(path)
        if self.path.exists():
            with open(self.path, "rb") as stream:  # line by line: half a million records are a gigabyte
                whole = sum(len(line) for line in stream if line.endswith(b"\n"))
            if whole < self.path.stat().st_size:  # an untouched file keeps its time of change
                os.truncate(self.path, whole)

    def __iter__(self) -> Iterator[Any]:
        """What the whole lines hold; nothing where there is no file yet."""
        return (entry for _, entry in read_json_lines(self.path)) if self.path.exists() else iter(())

    def append(self, entry: Mapping[str, Any], allow_nan: bool = True) -> None:
        """Write one line, or none: on a full disk the begun line is taken back.

        allow_nan  write numbers that are not finite as Python does (NaN); False: raise ValueError for them
        """
        line = (json.dumps(entry, allow_nan=allow_nan) + "\n").encode()
        # Opened for each line: a merge may have put another file in the place of the one before.
        with full_disk_told(self.path), open(self.path, "ab") as stream:
            whole = stream.tell()
            try:
                stream.write(line)
                stream.flush()
            except OSError:
                os.truncate(self.path, whole)
                raise


# --- arrays and pickles, without code ---


def read_npz(path: str | Path, what: str, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Arrays of an .npz file by name; nothing in it is run.

    what    it should be, for the message
    names   read these alone, those of them that are there; None: all
    Raises ValueError when the file is missing, empty, damaged or holds more than plain arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files if names is None or name in names}
        # numpy gives the bytes of members that are no arrays, such as a text file packed with them.
        if odd := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f"{odd[0]} is no array")
        return arrays
    except DAMAGE as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not a readable .npz of arrays ({reason}), so it is no {what}") from error


def array_globals() -> dict[tuple[str, str], Any]:
    """What a pickle of numpy arrays and numbers names, in the spellings of both Pythons and of old and new numpy."""
    numpy = {
        "_reconstruct": np.empty(0).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0],
        "ndarray": np.ndarray, "dtype": np.dtype,
    }  # fmt: skip
    modules = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
    return {(module, name): value for module in modules for name, value in numpy.items()} | {
        ("_codecs", "encode"): _latin1
    }


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes at protocol 2; a codec of the file's choosing is not looked up."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes bytes as {encoding!r}, expected 'latin1'")
    return text.encode("latin1")


def restricted_load(path: str | Path, allowed: Mapping[tuple[str, str], Any], what: str) -> Any:
    """The content of a pickle that may name nothing but `allowed`: it can run code only through a name.

    allowed  (module, name) -> what stands for it
    what     the file should be, with its article, for the message
    Raises ValueError when the file is damaged or names anything else.
    """

    class Restricted(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in allowed:
                raise pickle.UnpicklingError(f"it names {module}.{name}, which {what} does not contain")
            return allowed[module, name]

    try:
        with open(path, "rb") as file:
            return Restricted(file, encoding="latin1").load()
    except DAMAGE as error:
        raise ValueError(f"{path} cannot be read as {what}: {error}. Nothing in it was run") from error
