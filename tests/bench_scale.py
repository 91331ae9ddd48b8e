"""What starting, resuming and finishing a dataset folder cost with what is there already.

    python tests/bench_scale.py                              # 1 k, 100 k and 1 M records: minutes, 10 GB of disk
    python tests/bench_scale.py --records 1000 10000 --folder /big/disk

Makes one record with make_dataset.py and fakes the others: its line under other numbers, hard links of its pictures
(eight looks share the five condition images, as with --looks 8).  Then the command runs in processes forked from this
one, which has imported all: CPU seconds and peak memory beyond that, which the first row has for any run (grasps from
the cache, a renderer).  All is removed at the end.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import make_dataset  # noqa: E402

MAKE = "--object can --object-instances 1 --grasps-per-object 1 --size 32"
LOOKS, MOST_LINKS = 8, 50_000  # ext4 takes 65,000 links of a file


def anonymous() -> float:
    """MB that this process has of its own: not of files, which the kernel may drop and read again."""
    words = Path("/proc/self/status").read_text().split()
    return int(words[words.index("RssAnon:") + 1]) / 1024


def run(folder: Path, count: int) -> tuple[float, float]:
    """make_dataset.py up to so many records; CPU seconds and MB that it took at most."""
    process = os.fork()
    if not process:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        before, most, done = anonymous(), [0.0], threading.Event()

        def watch() -> None:
            while not done.wait(0.02):
                most[0] = max(most[0], anonymous() - before)

        threading.Thread(target=watch, daemon=True).start()
        try:
            make_dataset.run([*MAKE.split(), "--count", str(count), "--out", str(folder / "out"), "--cache",
                              str(folder.parent / "cache")])  # fmt: skip
            (folder / "most").write_text(str(most[0]))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status, used = os.wait4(process, 0)
    assert status == 0, (folder / "log").read_text()
    return used.ru_utime + used.ru_stime, float((folder / "most").read_text())


def fake(out: Path, count: int) -> None:
    """Records 0 to count - 1, of one that is there; each has a picture, of which record 0 has none yet."""
    first = json.loads((out / "metadata.jsonl").read_text())
    pictures = [Path(name).parent for key, name in first.items() if key.endswith("file_name") and name]
    (out / "images").mkdir()
    (out / "images/000000.png").write_bytes((out / first["normal_file_name"]).read_bytes())
    first["text"] = "A hand is grasping a can on a wooden table by the window"
    _, _, rest = json.dumps(first).partition('"index": 0,')
    names, height, numbers = rest.partition(', "height"')
    source = {}
    with open(out / "metadata.jsonl", "w") as lines:
        for k in range(count):
            shared = k - k % LOOKS
            lines.write(f'{{"file_name": "images/{k:06d}.png", "index": {k},')
            lines.write(names.replace("000000", f"{shared:06d}") + height + numbers + "\n")
            for place in [Path("images"), *(pictures if k == shared else ())] if k else ():
                path = f"{out}/{place}/{k:06d}.png"
                if k // MOST_LINKS != source.get(place, (0, ""))[0]:  # a new file to link
                    Path(path).write_bytes((out / place / "000000.png").read_bytes())
                    source[place] = k // MOST_LINKS, path
                else:
                    os.link(source.get(place, (0, f"{out}/{place}/000000.png"))[1], path)


def uncount(out: Path) -> None:
    """Take the counts out of dataset.json, as a run does that is killed later."""
    card = json.loads((out / "dataset.json").read_text())
    (out / "dataset.json").write_text(json.dumps({key: card[key] for key in card if key != "counts"}))


def split(out: Path) -> None:
    """The lines of two ranks that were killed before the merge."""
    with open(out / "metadata.jsonl") as lines, open(out / "metadata-00000.jsonl", "w") as even, open(
            out / "metadata-00001.jsonl", "w") as odd:  # fmt: skip
        for k, line in enumerate(lines):
            (odd if k % 2 else even).write(line)
    (out / "metadata.jsonl").unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[1000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where the folders are made (default: that for temporary files)")
    args = parser.parse_args()
    print("| records there | nothing to do | one record more | one more, after a kill | two ranks to merge |")
    print("|---|---|---|---|---|")
    for count in args.records:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder = Path(name) / "folder"
            folder.mkdir()
            run(folder, 1)
            fake(folder / "out", count)
            run(folder, count)
            told = [run(folder, count), run(folder, count + 1)]
            uncount(folder / "out")
            told.append(run(folder, count + 2))
            split(folder / "out")
            told.append(run(folder, count + 2))
            lines = sum(1 for _ in open(folder / "out/metadata.jsonl"))
            card = json.loads((folder / "out/dataset.json").read_text())
            assert lines == card["counts"]["records"] == count + 2
            assert sorted(path.name for path in (folder / "out").glob("metadata*")) == ["metadata.jsonl"]
            print(f"| {count:,} |", " | ".join(f"{cpu:.1f} s, {mb:.0f} MB" for cpu, mb in told), "|", flush=True)


if __name__ == "__main__":
    main()
