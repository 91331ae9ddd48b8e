"""Peak memory and time of loading a full-size Stable Diffusion in half precision (random weights).

    python tests/bench_loading.py                 # .safetensors, .ckpt, diffusers folder; kept in fp16, cast to bf16
    python tests/bench_loading.py --folder /scratch        # 2.1 to 4.3 GB are written there, and deleted

Each load runs in a process of its own, whose peak resident memory the system counts (mapped pages of the file too).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from hoi.network.config import sd1_config  # noqa: E402
from hoi.network.model import HOIDiffusion  # noqa: E402
from hoi.weights.load import load_model  # noqa: E402
from hoi.weights.names import single_file_names  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--load", nargs=2, metavar=("FILE", "DTYPE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def full_size_state() -> dict[str, torch.Tensor]:
    """Random fp16 tensors under the names of a Stable Diffusion 1.x file."""
    config = sd1_config()
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in HOIDiffusion(config, False).state_dict().items()}
    state, generator = {}, torch.Generator().manual_seed(0)
    for ours, theirs in single_file_names(shapes, config.text).items():
        rows, *rest = shapes[ours]
        for name in theirs:
            tensor = torch.empty(rows // len(theirs), *rest, dtype=torch.float16)
            state[name] = tensor.uniform_(-0.02, 0.02, generator=generator)
    return state


def peak_memory() -> float:
    """Largest resident memory of this process so far, GB (Linux; getrusage would count the parent's before exec)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9


def measure(path: str, dtype: str) -> None:
    before = peak_memory()
    begin = time.perf_counter()
    model = load_model(path, dtype=getattr(torch, dtype))
    seconds = time.perf_counter() - begin
    peak = peak_memory()
    files = Path(path).rglob("*") if Path(path).is_dir() else [Path(path)]
    size, count = sum(f.stat().st_size for f in files) / 1e9, sum(parameter.numel() for parameter in model.parameters())
    kind = Path(path).suffix or "folder"
    print(
        f"{kind} of {size:.2f} GB as {dtype}: {count / 1e6:.0f} M parameters in {seconds:.1f} s,"
        f" peak {peak:.2f} GB, {before:.2f} GB of it before loading; file size + {peak - size:.2f} GB"
    )


def main(args: argparse.Namespace) -> None:
    if args.load:
        measure(*args.load)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name in ("sd.ckpt", "sd.safetensors", "sd"):
            path = Path(folder) / name
            if name == "sd":
                export = [sys.executable, ROOT / "tools" / "export_weights.py", path.with_suffix(".safetensors")]
                subprocess.run([*export, "--format", "diffusers", "--half", "--out", path], check=True)
            else:
                state = full_size_state()
                save_file(state, path) if path.suffix == ".safetensors" else torch.save({"state_dict": state}, path)
                del state
            for dtype in ("float16", "bfloat16"):
                subprocess.run([sys.executable, __file__, "--load", str(path), dtype], check=True)
            if path.suffix == ".ckpt":
                path.unlink()


if __name__ == "__main__":
    main(parse_args())
