"""Runs commands that are killed, for test_killing.py, each in a process forked from this one, which has all imported.

Reads a job a line (JSON) and answers a line: how it ended, in how many seconds, and after how many file operations.
A process that starts anew takes ten times as long.
"""

import json
import os
import runpy
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import torch  # noqa: E402

import make_dataset  # noqa: E402, F401
import sample  # noqa: E402, F401
import train  # noqa: E402, F401
import video  # noqa: E402, F401
from hoi.export import __main__ as export  # noqa: E402, F401
from hoi.metrics import __main__ as metrics  # noqa: E402, F401
from hoi.metrics import features, inception  # noqa: E402
from hoi.verify import __main__ as verify  # noqa: E402, F401

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.fsync"}  # and opening to write


def kill_at(number: int, folder: str) -> list[int]:
    """Have this process kill itself just before its file operation of that number (0: never); returns their count.

    Operations are those on a path below the folder, and every fsync.
    """
    done, sync = [0], os.fsync

    def watch(event: str, details: tuple) -> None:
        writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        if not (writes or event in CHANGES):
            return
        with suppress(TypeError):  # a number is a file's that is open
            if event != "os.fsync" and not os.path.abspath(os.fsdecode(details[0])).startswith(folder):
                return
        done[0] += 1
        if done[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def told_sync(descriptor: int) -> None:  # Python itself does not tell of it
        sys.audit("os.fsync", descriptor)
        sync(descriptor)

    sys.addaudithook(watch)
    os.fsync = told_sync
    return done


def instead_of_inception() -> None:
    """Statistics of a network that takes a moment: the mean colour."""
    inception.load_inception = lambda path: torch.nn.Identity()
    features.inception_extractor = lambda network, file: features.Extractor(
        "tf1", features.cache_key("tf1", file), "none", features.partial(features._for_verifier, side=8),
        lambda images: {name: images.mean((2, 3)) for name in ("pool", "spatial")},
    )  # fmt: skip


def run(job: SimpleNamespace) -> None:
    """Be the command; its output goes to FOLDER.log."""
    log = os.open(f"{job.folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(job.folder)
    torch.set_num_threads(1)
    instead_of_inception()
    script, *sys.argv[1:] = job.words
    sys.argv[0] = script
    done = kill_at(job.kill_at, job.folder)
    status = 0
    try:
        if script.endswith(".py"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        print(end.code)
    Path(f"{job.folder}.count").write_text(str(done[0]))
    sys.stdout.flush()
    os._exit(status)


def main() -> None:
    for line in sys.stdin:
        job = SimpleNamespace(**json.loads(line))
        begin = time.monotonic()
        child = os.fork()
        if child == 0:
            try:
                run(job)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            os._exit(99)
        ended, status = os.waitpid(child, os.WNOHANG)
        while not ended:
            time.sleep(0.002)
            if job.seconds and time.monotonic() - begin > job.seconds:
                os.kill(child, signal.SIGKILL)
                ended, status = os.waitpid(child, 0)
            else:
                ended, status = os.waitpid(child, os.WNOHANG)
        answer = {"status": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - begin}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
