"""Generate a video of a hand that reaches for an object and grasps it: frames of one look, each with its annotation.

    python video.py                                                     # a mug, 16 frames -> ./clip
    python video.py --object bottle --prompt "A hand is grasping a blue {object} in the snow" --seed 3 --gif
    python video.py --scenes docs/example_scenes.jsonl --scene 1                   # your camera, pose and grasp
    python video.py --trajectory data/approach --trajectory-number 2    # frames made by make_dataset.py --frames 16
    python video.py --base model_sd_5000.ckpt --adapter model_ad_5000.pth --chunk 1      # 512 px in little memory
    python video.py --no-anchor --separate-noise                        # for comparison: pictures side by side

It prints what it uses, a progress bar, and what to look at: clip.webp (clip.mp4 with PyAV, clip.gif on request) and
strip.png, conditions above pictures.  Each frame's self-attention also looks at the anchor frame, which looks only at
itself; so a frame depends on itself and the anchor alone, and running the same command again makes just the frames that
are missing.  An approach that would cut more than 2 mm into the object is bent, and it says so (--straight: never).
The folder is a dataset folder; its records have `timestamp` in seconds.  Paper: Sec. 4.4.
"""

# ruff: noqa: E402
import hoi  # noqa: F401 - before torch: says how its threads wait

# isort: split
import argparse
from pathlib import Path

from hoi.common.choices import GRASPS
from hoi.common.command import (
    add_mesh_flags,
    add_model_flags,
    add_sampling_flags,
    add_size_flags,
    default_cache,
    finite,
    not_negative,
    positive,
)
from hoi.geometry.camera import FRAMINGS

TIGHT_START = 0.06  # metres: to show the paper's 0.15, tight framing zooms out until hand and object are small


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; those that contradict each other end the script before anything is loaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    what = parser.add_argument_group("geometry: an object, or a trajectory of a folder")
    what.add_argument("--object", metavar="PATH|NAME", help="a mesh file or a built-in object (default: mug)")
    add_mesh_flags(what.add_argument)
    what.add_argument("--scenes", type=Path, metavar="FILE",
                      help="instead: a scene of your own, of a file of JSON objects, one a line: object, camera, hand "
                      "in metres and pixels (docs/data.md)")
    what.add_argument("--scene", type=not_negative, default=0, metavar="N", help="which of --scenes, from 0 on")
    what.add_argument("--camera", type=Path, metavar="FILE",
                      help="for --scenes: the camera of those that have none, JSON: intrinsics, width and height in "
                      "pixels, pose in metres")
    what.add_argument("--hand-side", choices=("right", "left"), default="right", help="for --object")
    add_size_flags(what.add_argument, "what the checkpoint was made for")
    what.add_argument("--framing", choices=FRAMINGS, help="default: tight for tiny, official for sd1")
    what.add_argument("--mano", metavar="FILE", help="official MANO_RIGHT.pkl (default: the built-in hand)")
    what.add_argument("--cache", type=Path, default=default_cache(), metavar="DIR",
                      help="found grasps (default: %(default)s)")
    what.add_argument("--frames", type=positive, default=16, metavar="F", help="of the approach (default: 16)")
    what.add_argument("--hold", type=not_negative, default=0, metavar="F", help="frames more that stay on the grasp")
    what.add_argument("--start-distance", type=finite, metavar="M", help="metres above the grasp (default: "
                      f"0.15 as in the paper; {TIGHT_START:g} in tight framing, or hand and object would be small)")
    what.add_argument("--straight", action="store_true", help="the paper's straight path even where it cuts the object")
    what.add_argument("--trajectory", type=Path, metavar="DIR", help="instead: frames of a dataset folder")
    what.add_argument("--trajectory-number", type=int, metavar="N", help="which of the folder's (default: the first)")
    video = parser.add_argument_group("video")
    video.add_argument("--anchor", type=int, metavar="I",
                       help="frame that all frames look at (default: the middle, as in the paper)")
    video.add_argument("--no-anchor", action="store_true", help="every frame on its own")
    video.add_argument("--same-noise", action=argparse.BooleanOptionalAction, default=True,
                       help="all frames start from the noise of record 0 of sample.py")
    video.add_argument("--separate-noise", action="store_true", help="the same as --no-same-noise")
    video.add_argument("--fps", type=positive, default=8, metavar="N", help="frames a second (default: 8)")
    video.add_argument("--gif", action="store_true", help="write clip.gif too")
    video.add_argument("--chunk", type=positive, metavar="F",
                       help="frames evaluated at once beside the anchor; decides memory, not pictures (default: 8, or "
                       "1 from 512 px on)")
    add("--prompt", metavar="TEXT", help="{object} stands for the object's name (default: the first of sample.py, or "
        "the text of the folder's anchor frame)")
    add("--seed", type=not_negative, default=0, help="of noise, view and grasp (default: %(default)s)")
    add("--out", type=Path, default=Path("clip"), metavar="DIR", help="the dataset folder (default: %(default)s)")
    add_sampling_flags(parser)
    add_model_flags(parser)
    args = parser.parse_args(arguments)
    alone = (args.object, args.hold, args.size, args.height, args.width)
    if args.trajectory is not None and (any(alone) or args.start_distance is not None):
        parser.error("--trajectory brings its own frames: drop --object, --hold, --start-distance and the size")
    if args.scenes is not None and (args.object or args.trajectory):
        parser.error("--scenes brings its own object: drop --object and --trajectory")
    if (args.camera or args.scene) and args.scenes is None:
        parser.error("--camera and --scene are for --scenes")
    if args.trajectory_number is not None and args.trajectory is None:
        parser.error("--trajectory-number needs --trajectory, the folder")
    if args.no_anchor and args.anchor is not None:
        parser.error("--anchor and --no-anchor exclude each other")
    if args.start_distance is not None and not 0 <= args.start_distance <= 1:
        parser.error("--start-distance lies between 0 and 1 (metres)")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is empty; to sample without text use --guidance-scale 0")
    args.same_noise = args.same_noise and not args.separate_noise
    return args


if __name__ == "__main__":
    parse_args()  # --help and mistakes are told before the seconds that these imports take

from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hoi.common.command import problems_as_messages
from hoi.common.files import encode_png, short_hash, write_whole
from hoi.common.sheets import write_video
from hoi.data.folder import load_conditions, load_image, read_records
from hoi.data.scenes import SceneFile
from hoi.data.views import ApproachFrames, SceneViews, TrajectoryFrames, content_of
from hoi.data.writer import DatasetWriter, folder_description, strip, write_pictures
from hoi.geometry.grasp import MAX_PENETRATION_MM
from hoi.geometry.hand import HandModel, load_hand
from hoi.geometry.objects import collect_objects
from hoi.geometry.render import Renderer
from hoi.geometry.scene import Scene, ViewSettings
from hoi.network.config import ModelConfig
from hoi.network.model import stack_conditions
from hoi.network.pipeline import Pipeline, anchored_pictures, picture_generator
from hoi.network.text import reading_hints
from hoi.toyworld.words import DEFAULT_PROMPTS, fill
from hoi.weights.load import load_pipeline

Frames = ApproachFrames | TrajectoryFrames


def choose_frames(args: argparse.Namespace, config: ModelConfig) -> Frames:
    """The frames of a folder's trajectory, or of a new approach to an object, whose cuts are told.

    Raises ValueError for more than one mesh, and as the two kinds of frames do.
    """
    if args.trajectory is not None:
        return TrajectoryFrames(args.trajectory, args.trajectory_number)
    # As the model was trained: pictures in another framing look wrong.
    framing = args.framing or ("tight" if config.name == "tiny" else "official")
    start_distance = TIGHT_START if args.start_distance is None and framing == "tight" else args.start_distance
    hand, renderer = load_hand(args.mano), Renderer()
    height, width = args.height or args.size or config.image_size, args.width or args.size or config.image_size
    seen = ViewSettings(height, width, args.hand_side, framing, frames=args.frames, start_distance=start_distance)
    if args.scenes is not None:
        return told_frames(*scene_of_file(args, hand, renderer, seen), hand, renderer, args.hold)
    meshes = collect_objects([args.object or "mug"], category=args.category, units=args.units, up=args.up)
    if len(meshes) > 1:
        raise ValueError(f"{args.object} holds {len(meshes)} meshes; a video shows one, so name the file")
    for note in meshes[0].notes:
        print(f"{meshes[0].object_id}: {note}")
    scene = SceneViews(meshes, hand, seen, args.seed, GRASPS, args.cache).scene(0)
    return told_frames(scene, args.straight, hand, renderer, args.hold)


def scene_of_file(
    args: argparse.Namespace, hand: HandModel, renderer: Renderer, seen: ViewSettings
) -> tuple[Scene, bool]:
    """The chosen scene of --scenes, and whether its path stays as it is: straight, or given as a trajectory."""
    scenes = SceneFile(args.scenes, hand, seen, args.seed, args.cache, args.camera, args.mano)
    if args.scene >= len(scenes):
        raise ValueError(f"--scene {args.scene} is not in {args.scenes}; it has scenes 0 to {len(scenes) - 1}")
    scene, line = scenes.scene(args.scene, hand, renderer), scenes.line(args.scene, hand)
    if scene is None:
        raise ValueError(f"{line.where}: no (further) grasp was found, or no camera sees hand and object")
    return scene, args.straight or line.is_path


def told_frames(scene: Scene, straight: bool, hand: HandModel, renderer: Renderer, hold: int) -> ApproachFrames:
    """Frames of a scene, and in print how deep the hand cuts on its way."""
    frames = ApproachFrames(scene, hand, renderer, hold, straight)
    deepest = max(frames.penetration_mm())
    if frames.bent:
        print(f"the straight path cuts more than {MAX_PENETRATION_MM:g} mm deep: the hand comes from the side")
    print(f"conditions drawn by {renderer}", f"on its way the hand cuts at most {deepest:.1f} mm deep", sep="\n")
    if deepest > MAX_PENETRATION_MM:
        print(f"hint: that is more than {MAX_PENETRATION_MM:g} mm; another --seed takes another grasp")
    return frames


def choose_anchor(args: argparse.Namespace, count: int) -> int | None:
    """The frame that all look at, 0 to count - 1; None for none."""
    if args.no_anchor:
        return None
    anchor = count // 2 if args.anchor is None else args.anchor
    if not 0 <= anchor < count:
        raise ValueError(f"--anchor {anchor} is not in the video; it has frames 0 to {count - 1}")
    return anchor


def choose_prompt(args: argparse.Namespace, frames: Frames, anchor: int | None) -> str:
    """The one text of all frames, the object's name filled in."""
    text = args.prompt
    if text is None and isinstance(frames, TrajectoryFrames):
        text = frames.records[anchor or 0]["text"]
    return fill(text or DEFAULT_PROMPTS[0], frames.noun)


def describe(
    args: argparse.Namespace, pipeline: Pipeline, frames: Frames, prompt: str, anchor: int | None
) -> dict[str, Any]:
    """What goes to dataset.json; "job" decides the frames, and another job must not continue in the same folder."""
    job = pipeline.job(args.seed) | {"prompt": prompt}
    job |= {"frames": len(frames), "fps": args.fps, "anchor": anchor, "same_noise": args.same_noise}
    meshes = None
    if isinstance(frames, TrajectoryFrames):
        motion = [record["keypoints_2d"] for record in frames.records]
        job["data_content"] = content_of(frames.records)
    else:
        # In micrometres: the last bits of another processor's floats make no other job.
        motion = [hand.transl.round(6).tolist() for hand in frames.scene.hand_params]
        meshes = [frames.scene.written_mesh]
        job |= {"object": meshes[0].object_id, "object_content": short_hash(meshes[0].vertices.tobytes().hex())}
        job["intrinsics"] = frames.scene.camera.intrinsics.round(6).tolist()
    job["motion"] = short_hash(repr(motion))  # repr: as in the folders that are there already
    sources = [args.trajectory] if args.trajectory else ()
    return folder_description("video.py", job, args.seed, pipeline.checkpoint, meshes=meshes, sources=sources)


def main(args: argparse.Namespace) -> None:
    """Make the frames that are missing, chunk by chunk, and from all frames the files to look at."""
    if args.threads:
        torch.set_num_threads(args.threads)
    pipeline = load_pipeline(
        args.checkpoint, args.base, args.adapter, vae=args.vae, device=args.device, dtype=args.dtype,
        compiled=args.compile, sampler=args.sampler, num_inference_steps=args.steps, guidance_scale=args.guidance_scale,
        negative_prompt=args.negative_prompt, cond_weights=dict(args.cond_scale), cond_tau=args.cond_tau,
    )  # fmt: skip
    config, settings = pipeline.model.config, pipeline.settings
    frames = choose_frames(args, config)
    height, width = frames.size
    anchor = choose_anchor(args, len(frames))
    prompt = choose_prompt(args, frames, anchor)
    writer = DatasetWriter(args.out, describe(args, pipeline, frames, prompt, anchor))
    print(f"{pipeline.checkpoint['name']} ({config.name}), {pipeline.dtype} on {pipeline.device}; {settings.sampler}, "
          f"{settings.num_inference_steps} steps, guidance {settings.guidance_scale:g}",
          f'{len(frames)} frames of "{prompt}", anchor {"off" if anchor is None else anchor}, '
          f"{'one' if args.same_noise else 'separate'} noise -> {args.out}, {len(writer)} are there already",
          *reading_hints([prompt, settings.negative_prompt]), sep="\n")  # fmt: skip
    if note := config.size_note([frames.size]):
        print(note)
    if len(frames) == 1:  # of a folder with one picture, or by --frames 1
        print("hint: one frame is a single picture; --frames 16 makes a video")

    def frame_features(frame: int) -> list[torch.Tensor]:
        """Condition features of one frame, one map (1, C_k, h / 2^k, w / 2^k) a level of the U-Net."""
        return pipeline.features(stack_conditions([frames[frame].conditions], height, width))

    def frame_generator(frame: int) -> torch.Generator:
        """Noise of one frame; the same noise for all makes what is not conditioned change less (Sec. 4.4)."""
        return picture_generator(args.seed, 0 if args.same_noise else frame)

    # Both chosen by trial.  At 512 px one frame beside the anchor takes 7.5 GB, four take 7.7 GB (docs/clips.md).
    chunk = args.chunk or (8 if height * width < 512 * 512 else 1)
    todo = [frame for frame in range(len(frames)) if not writer.done(frame)]
    with writer, tqdm(total=len(todo), unit="frame") as bar:

        def tell(step: int, steps: int, x0: torch.Tensor) -> None:
            bar.set_postfix_str(f"step {step} of {steps}", refresh=False)
            bar.update(0)  # shown when it is time to: see hoi/__init__.py

        pictures = anchored_pictures(
            pipeline, prompt, frame_features, frame_generator, todo, anchor, chunk,
            tell, height, width,
        )  # fmt: skip
        for frame, image in pictures:
            record = frames[frame].write(args.out, frame) | pipeline.record_entries(args.seed)
            record |= {"text": prompt, "trajectory": 0, "frame": frame, "timestamp": round(frame / args.fps, 6)}
            writer.append(write_pictures(args.out, frame, record, image))
            bar.update()
    writer.finish()
    records = read_records(args.out)  # the files show what is on disk, frames of an earlier run too
    pictures = [load_image(args.out, record) for record in records]
    files, notes = write_video(args.out, pictures, args.fps, args.gif)
    sheet = strip([load_conditions(args.out, record) for record in records], pictures)
    write_whole(args.out / "strip.png", encode_png(np.asarray(sheet)))
    print(*notes, f"{len(records)} frames; look at {args.out / files[0]} and {args.out / 'strip.png'}", sep="\n")


@problems_as_messages("video.py", "\ninterrupted: finished frames are complete; the same command makes the others")
def run(arguments: list[str] | None = None) -> None:
    """The script as a command; None: the command line's arguments."""
    main(parse_args(arguments))


if __name__ == "__main__":
    run()
