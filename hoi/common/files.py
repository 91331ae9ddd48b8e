"""Files that appear whole or not at all; hashes; and one reader for each kind of file, which runs no code from it.

What is read and written, whatever it means.  A damaged file is told in one sentence that names it, and what would take
much memory is refused before it does: pictures, JSON, CSV, .npz and .npy, pickles.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import pickle
import platform
import re
import shutil
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from PIL import Image, ImageOps, PngImagePlugin

ASSETS = Path(__file__).parents[1] / "assets"  # what is delivered with the package: hand, prompts, trained weights
ZIP_MAGIC, GIT_LFS_MAGIC = b"PK\x03\x04", b"version https://git-lfs"
# Whatever numpy, zipfile, zlib, pickle, json, yaml and Pillow raise for files that are cut, or whose bytes are others.
DAMAGE = (
    ArithmeticError, AttributeError, EOFError, Image.DecompressionBombError, LookupError, MemoryError, OSError,
    RuntimeError, SyntaxError, SystemError, TypeError, ValueError, pickle.UnpicklingError, struct.error,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
MOST_UNPACKED = 1 << 27  # bytes that a small archive may hold; a large one four times its size
DEEPEST = 100  # lists in lists of a JSON file
TOO_DEEP = "its values are nested too deeply"
MOST_TUPLES = 10_000  # of a pickle; an array takes three
NPY_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
LITTLE_ROOM = 1 << 20  # bytes; a disk with less is taken for full when a library does not say why it could not write


# --- written whole ---


def write_whole(path: str | Path, content: bytes | Callable[[BinaryIO], Any], lasting: bool = True) -> None:
    """Write under a temporary name beside `path`, then rename: `path` holds the old content or the new, never a part.

    content  bytes; or a function that writes to the stream it is given
    lasting  also through a power cut.  False, for thousands of small files: the caller has `make_lasting` do it for
             many at once, before anything says that they are there, and `remove_leftovers` what it else does here
    Folders above are made, what a killed writer of this file left is removed, and a file that holds these bytes already
    is left alone.  Several processes may write one file at once.  Raises OSError saying so when the disk is full.
    """
    path, small = Path(path), isinstance(content, bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    if lasting:
        remove_leftovers(path.parent, re.escape(path.name))
    if small and path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return
    temporary = _temporary(path)
    try:
        with full_disk_told(path):
            with open(temporary, "wb") as stream:
                stream.write(content) if small else content(stream)
            if lasting:
                _sync(temporary)
            os.replace(temporary, path)
            if lasting:
                _sync(path.parent)
    finally:
        _remove(temporary)


def _temporary(path: Path) -> Path:
    """A name beside `path` that no other process takes, and that says whose it is."""
    return path.with_name(f".{path.name}.{os.getpid()}@{platform.node()}.tmp")


def remove_leftovers(folder: Path, names: str = ".+?") -> None:
    """Remove from a folder what processes that were killed had begun; that of living ones and other machines stays.

    names  what the finished files are called, a regular expression; any only where nobody else has hidden files
    """
    pattern = re.compile(rf"\.{names}\.(\d+)@{re.escape(platform.node())}\.tmp")
    for entry in os.scandir(folder) if folder.is_dir() else ():
        left = pattern.fullmatch(entry.name)
        if left and not _runs(int(left[1])):
            _remove(Path(entry))


def _runs(process: int) -> bool:
    """Whether a number is another running process's; containers give all of them one number."""
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno == errno.EPERM  # another user's
    return process != os.getpid()


def _remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def make_lasting(paths: Iterable[Path]) -> None:
    """Have the disk keep these files and their names through a power cut, for what is said of them afterwards.

    At once: the disk then writes its journal for all, 0.3 ms a file instead of 6 one after the other (60 files, ext4).
    """
    files = set(paths)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(_sync, files | {path.parent for path in files}))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
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
    """An empty folder to fill; it becomes `path` at the end of the block and is removed when the block fails, by the
    next for the same `path` when its process was killed.

    Raises FileExistsError when `path` is there already, OSError saying so when the disk is full.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another folder, or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, re.escape(path.name))
    # Made here and not by tempfile, whose folders are for their owner alone.
    unfinished = _temporary(path)
    unfinished.mkdir()
    try:
        with full_disk_told(path, "the unfinished export was removed"):
            yield unfinished
            make_lasting(each for each in unfinished.rglob("*") if each.is_file())
            os.rename(unfinished, path)
            _sync(path.parent)
    finally:
        _remove(unfinished)


@contextmanager
def held_alone(folder: str | Path, what: str) -> Iterator[None]:
    """Within this block no other process of this machine holds the folder, which is made, and left if it is not empty.

    what  does the holding, for the message, such as "a training"
    Raises ValueError at once when another one holds it.  Nothing is left behind: the lock ends with the process.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
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
        os.close(descriptor)
        with suppress(OSError):
            folder.rmdir()  # only where nothing was made


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


# --- pictures ---

# Of Pillow's other readers some start programs, and no dataset needs them.
PICTURE_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MOST_PIXELS = 40_000_000  # as RGB and turned Pillow takes 8 bytes for each; larger photographs are cut down first


def read_picture(path: str | Path, mode: str | None = None) -> np.ndarray:
    """A picture file as people see it, turned as its EXIF orientation says: OpenCV, the authors' reader, does so, too.

    mode     "RGB": converted; None: as the file holds it, such as 16-bit depth
    returns  (H, W, 3) or (H, W)
    Raises ValueError naming a file that is missing, damaged, of another format, of more than MOST_PIXELS pixels (said
    before they are unpacked), or of more than 8 bits a channel where RGB is asked for.
    """
    try:
        with Image.open(path, formats=PICTURE_FORMATS) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise ValueError(f"it has {picture.width} x {picture.height} pixels, more than {MOST_PIXELS // 10**6} "
                                 "million: make it smaller")  # fmt: skip
            if mode and picture.mode.startswith(("I", "F")):  # Pillow would cut them at 255, to a white picture
                raise ValueError(f"it has {picture.mode} pixels: a depth map or the like, not 8 bits a channel")
            ImageOps.exif_transpose(picture, in_place=True)
            return np.array(picture if mode in (None, picture.mode) else picture.convert(mode))
    except DAMAGE as error:
        raise ValueError(f"{path} is no picture that can be read: {' '.join(str(error).split())}") from error


def encode_png(pixels: np.ndarray, png_text: dict[str, str] | None = None) -> bytes:
    """PNG bytes of (H, W, 3) uint8, (H, W) uint8 or (H, W) uint16, with optional text chunks."""
    info = PngImagePlugin.PngInfo()
    for key, value in (png_text or {}).items():
        info.add_text(key, value)
    stream = io.BytesIO()
    # Level 1 is five times faster than the default and 10 to 20 % larger on these pictures.
    Image.fromarray(pixels).save(stream, format="PNG", compress_level=1, pnginfo=info)
    return stream.getvalue()


@contextmanager
def content_expected(path: str | Path, what: str) -> Iterator[None]:
    """Within this block whatever the content of a file causes is told as what the file should hold."""
    try:
        yield
    except (LookupError, TypeError, ArithmeticError, AssertionError, RuntimeError, ValueError) as error:
        if str(path) in str(error):  # told already
            raise
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"{path}: expected {what} ({why})") from error


# --- text: JSON, JSON lines, CSV ---


def read_text(path: str | Path) -> str:
    """A text file with its line ends as they are.  Raises ValueError naming a file that is not UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from error


def read_csv(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of every row.  Raises ValueError naming file and line of what is no CSV."""
    rows = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:  # a quote that never ends makes one cell of the rest: at most 131,072 characters
        raise ValueError(f"{path} line {rows.line_num} is not CSV ({error}); is a quote missing?") from error


def user_cache() -> Path:
    """The folder of this project in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hoidiffusion"


def write_json(path: str | Path, content: Any) -> None:
    """Write a small JSON file whole, indented by one space."""
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def parse_json(text: str) -> Any:
    """What JSON says.  Raises ValueError, also for values nested so deeply that nobody could write them again."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    if text.count("[") + text.count("{") > DEEPEST:  # else there is no need to walk through it
        below = [content]
        for _ in range(DEEPEST):
            below = [child for value in below if isinstance(value, (dict, list))
                     for child in (value.values() if isinstance(value, dict) else value)]  # fmt: skip
        if below:
            raise ValueError(TOO_DEEP)
    return content


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
        content = parse_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}){advice}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a {kind.__name__}{advice}")
    return content


def read_json_lines(
    path: str | Path, needs: Mapping[str, type] | None = None, shorten: Callable[[bytes], bytes] = bytes
) -> Iterator[tuple[int, Any]]:
    """Number and content of each line, from 1 on; a last line that an interruption cut short counts as absent.

    needs    keys of objects, with the type of what they hold; None: a line may hold anything
    shorten  line -> what of it is read as JSON
    Raises ValueError naming file and line for a line that is not JSON or lacks what it needs.
    """
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                entry = parse_json(shorten(line).decode())
                if absent := [key for key, kind in (needs or {}).items()
                              if type(entry.get(key) if isinstance(entry, dict) else None) is not kind]:  # fmt: skip
                    raise ValueError(f"it lacks {', '.join(absent)}")
            except ValueError as error:
                raise ValueError(f"{path} line {number} is not JSON as it is written there ({error}); delete the line "
                                 "to drop it") from error  # fmt: skip
            yield number, entry


class JsonLines:
    """A file of JSON objects, one a line, that grows at its end alone.

    Opening removes what an interruption left of a last line, or the next would be glued to it; reading does not
    (read_json_lines), for others may be writing.
    """

    def __init__(self, path: str | Path, **needs: type) -> None:
        """path: need not exist; the first line makes it.  needs: as of read_json_lines."""
        self.path, self._needs = Path(path), needs
        if self.path.exists():
            size = whole = self.path.stat().st_size
            with open(self.path, "rb") as stream:
                if size:  # its end alone is read: a million records are four gigabytes
                    with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                        whole = content.rfind(b"\n") + 1
            if whole < size:  # an untouched file keeps its time of change
                os.truncate(self.path, whole)

    def __iter__(self) -> Iterator[Any]:
        """What the whole lines hold; nothing where there is no file yet."""
        return (entry for _, entry in read_json_lines(self.path, self._needs)) if self.path.exists() else iter(())

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


def read_npz(
    path: str | Path, what: str, names: Sequence[str] | None = None, words: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Arrays of numbers of an .npz file by name; nothing in it is run.

    what    it should be, for the message
    names   read these alone, those of them that are there; None: all
    words   names of arrays that may hold text
    Raises ValueError when the file is missing, empty, damaged, holds more than plain arrays, or unpacks to many times
    its size: said before memory is taken.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            members = {name: info for name, info in members.items() if names is None or name in names}
            check_unpacked(members.values(), Path(path).stat().st_size)
            arrays = {}
            for name, info in members.items():
                with archive.open(info) as stream:
                    _check_header(stream, info.file_size, "biufU" if name in words else "biuf")
                    arrays[name] = npy.read_array(stream, allow_pickle=False)
                    arrays[name].dtype.kind == "U" and arrays[name].tolist()  # numbers that are no characters show here
        return arrays
    except DAMAGE as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not a readable .npz of arrays ({reason}), so it is no {what}") from error


def read_npy(path: str | Path, what: str) -> np.ndarray:
    """The array of numbers of an .npy file, mapped: read when it is used.  Raises ValueError as read_npz."""
    try:
        with open(path, "rb") as stream:
            _check_header(stream, Path(path).stat().st_size, "biuf")
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except DAMAGE as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not a readable .npy of numbers ({reason}), so it is no {what}") from error


def check_unpacked(members: Iterable[zipfile.ZipInfo], size: int) -> None:
    """Raise ValueError for members of a zip archive of `size` bytes that are packed in a way or unpack to a size that
    none of the files read here has.
    """
    members = list(members)
    if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in members):
        raise ValueError("it is packed by another method than zip's own")
    if (unpacked := sum(info.file_size for info in members)) > max(MOST_UNPACKED, 4 * size):
        raise ValueError(f"its {size} bytes unpack to {unpacked}")


def _check_header(stream: BinaryIO, size: int, kinds: str) -> None:
    """Hold what the header of an .npy of `size` bytes asks for against what is there; ValueError unless it fits."""
    shape, _, dtype = NPY_HEADERS[npy.read_magic(stream)](stream)
    wanted, there = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if dtype.kind not in kinds:
        raise ValueError(f"it holds {dtype} values, expected numbers")
    if wanted > there:
        raise ValueError(f"its header asks for {wanted} bytes, and there are {there}")
    stream.seek(0)


def array_globals() -> dict[tuple[str, str], Any]:
    """What a pickle of numpy arrays and numbers names, in the spellings of both Pythons and of old and new numpy."""
    # An array before its state, which says shape and values; numpy's own takes memory for any shape at once.
    numpy = {"_reconstruct": lambda *_: np.empty(0), "scalar": _scalar, "ndarray": None, "dtype": np.dtype}
    modules = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
    named = {(module, name): value for module in modules for name, value in numpy.items()}
    return named | {("_codecs", "encode"): _latin1}


def _scalar(dtype: np.dtype, *state: Any) -> Any:
    if not state:  # numpy would make one of zeros, of any size
        raise pickle.UnpicklingError("it holds a number without a value")
    return np.float64(0).__reduce__()[0](dtype, *state)


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
    # Python's own unpickler: C's takes gigabytes for a memo in which seven bytes name a far place, and both take any
    # room for bytearrays before they look what is there.  Tuples in tuples by the hundred thousand end the process when
    # one is a key.
    plain, tuples = dict(pickle._Unpickler.dispatch), itertools.count()
    del plain[pickle.BYTEARRAY8[0]]

    def counted(unpickler: pickle._Unpickler, code: bytes) -> None:
        if next(tuples) > MOST_TUPLES:
            raise pickle.UnpicklingError(f"it holds more than {MOST_TUPLES} tuples")
        plain[code[0]](unpickler)

    class Restricted(pickle._Unpickler):
        codes = (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
        dispatch = plain | {code[0]: partial(counted, code=code) for code in codes}

        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in allowed:
                raise pickle.UnpicklingError(f"it names {module}.{name}, which {what} does not contain")
            return allowed[module, name]

    try:
        return Restricted(io.BytesIO(Path(path).read_bytes()), encoding="latin1").load()
    except DAMAGE as error:
        raise ValueError(f"{path} cannot be read as {what}: {error}. Nothing in it was run") from error
