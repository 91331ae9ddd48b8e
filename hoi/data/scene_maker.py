"""Scenes on disk, made in any order by any number of processes.  Settings, meshes -> records.  Paper: Sec. 3.2.

Scene k and its records, numbered from k * records_per_scene on, depend on the settings, the meshes and k alone.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hoi.data.folder import PICTURE_FOLDERS
from hoi.data.scenes import SceneFile
from hoi.data.writer import write_object, write_pictures
from hoi.geometry.contact import DistanceField
from hoi.geometry.grabnet import find_grabnet_grasps, load_grabnet
from hoi.geometry.grasp import cached_search
from hoi.geometry.hand import load_hand
from hoi.geometry.objects import ObjectMesh
from hoi.geometry.raster import Recent
from hoi.geometry.render import Renderer
from hoi.geometry.scene import (
    GraspedObject,
    Scene,
    ViewSettings,
    annotate,
    compose_scene,
    grasp_object,
    graspable,
    mirror_mesh,
    pictures_of,
    plain_text,
    render_picture,
)
from hoi.toyworld.looks import sample_look, shade_scene

ORDER = 2**20  # makes the random numbers of a round's order others than those of scenes and looks


@dataclass(frozen=True)
class SceneSettings:
    """What decides the records beside the meshes: a folder begun with other values is refused instead of mixed.

    seed               of everything random
    content            share of scenes by kind, keys of hoi.common.choices.CONTENTS
    grasps_per_object  searched for each object
    view               how scenes are seen
    keep_outside       also frames whose hand leaves the picture
    shade              draw pictures, `looks` of each frame, in looks of `style`, some captions in other words
                       (`paraphrase`)
    text               caption without pictures, with {object} for the noun; None: the paper's template
    """

    seed: int
    content: dict[str, float]
    grasps_per_object: int
    view: ViewSettings
    keep_outside: bool
    shade: bool
    looks: int
    style: str
    paraphrase: bool
    text: str | None

    def numbers_of(self, number: int, scenes: SceneFile | None = None) -> range:
        """Numbers that the records of a scene take, whether or not all of them can be made.

        scenes  of a file, where they come from one
        """
        count = self.view.frames
        frames = range(number * count, (number + 1) * count) if scenes is None else scenes.frame_range(number)
        return range(frames.start * self.looks, frames.stop * self.looks)

    @property
    def sides(self) -> tuple[str, ...]:
        """Hands for which grasps are needed."""
        return () if {"hand_object", "hand"}.isdisjoint(self.content) else self.view.sides


class SceneMaker:
    """Everything one process needs to make scenes; built once per process, grasps read when first needed.

    folder          the dataset folder that pictures are written to
    cache           folder of grasps that were found before
    mano_path       MANO file; None: the built-in hand
    scenes          of a file, instead of those composed at random
    grabnet_folder  draw grasps with the GrabNet weights in this folder; None: search them without learned weights
    """

    def __init__(
        self, settings: SceneSettings, meshes: Sequence[ObjectMesh], folder: Path, cache: Path,
        mano_path: str | Path | None = None, grabnet_folder: str | Path | None = None,
        scenes: SceneFile | None = None,
    ) -> None:  # fmt: skip
        torch.set_num_threads(1)  # hands are small: threads would only wait for each other, in every worker
        self.settings, self.meshes, self.folder, self.cache = settings, meshes, folder, cache
        self.hand, self.scenes = load_hand(mano_path), scenes
        self.grabnet = load_grabnet(grabnet_folder) if grabnet_folder else None
        self.fields = scenes.fields if scenes else Recent(DistanceField, len(meshes))
        self.found: dict[int, tuple[GraspedObject, list[str]]] = {}  # a cache that cannot be written brings none back

    def grasps_of(self, k: int) -> tuple[GraspedObject, list[str]]:
        """Search object k's grasps or read them from the cache (same result); and what to tell about the search."""
        if k not in self.found:
            self.found[k] = self._grasps_of(k)
        return self.found[k]

    def _grasps_of(self, k: int) -> tuple[GraspedObject, list[str]]:
        job, mesh = self.settings, self.meshes[k]
        if self.grabnet is None:
            return grasp_object(mesh, self.hand, job.grasps_per_object, job.seed, self.cache, job.sides), []
        found, notes = {}, []
        for side in job.sides:
            target = mesh if side == "right" else mirror_mesh(mesh)  # GrabNet knows right hands alone
            grasps, note = cached_search(
                lambda generator, target=target: find_grabnet_grasps(
                    target, self.hand, self.grabnet, job.grasps_per_object, generator),
                target, self.hand, job.grasps_per_object, job.seed, self.cache, f"grabnet {self.grabnet.digest}",
            )  # fmt: skip
            found[side] = tuple(grasps)
            notes.append(note if side == "right" else f"{note} (left hand)")
        return GraspedObject(mesh, **found), notes

    @cached_property
    def renderer(self) -> Renderer:
        """Started when first needed: searching grasps needs none."""
        return Renderer()

    def renderer_used(self, _: int) -> str:
        """What draws here, and why; the first task given to the pool."""
        return str(self.renderer)

    @cached_property
    def objects(self) -> list[GraspedObject]:
        """Those with grasps, read from the cache that `grasps_of` filled in whichever process."""
        return graspable([self.grasps_of(k)[0] for k in range(len(self.meshes))], self.settings.sides)

    def shown_in(self, number: int) -> list[GraspedObject]:
        """The object whose turn it is: each once a round, in a new order each round."""
        turn, place = divmod(number, len(self.objects))
        order = np.random.default_rng([self.settings.seed, turn, ORDER]).permutation(len(self.objects))
        return [self.objects[order[place]]]

    def make_scene(self, number: int) -> list[dict[str, Any]]:
        """Write the pictures of one scene; returns its complete records."""
        job = self.settings
        if self.scenes is not None:
            scene = self.scenes.scene(number, self.hand, self.renderer)
        else:
            generator = np.random.default_rng([job.seed, number])  # whoever makes the scene, and after which others
            shares = np.array(list(job.content.values()))
            content = list(job.content)[generator.choice(len(shares), p=shares / shares.sum())]
            scene = compose_scene(self.shown_in(number), self.hand, self.renderer, generator, job.view, content)
        frames = range(0 if scene is None else scene.frames)
        return [record for frame in frames for record in self.make_frame(scene, number, frame)]

    def make_frame(self, scene: Scene, number: int, frame: int) -> list[dict[str, Any]]:
        """Write the pictures of one frame, in all its looks; returns its complete records."""
        job = self.settings
        record = annotate(scene, frame, self.hand, self.field(scene))
        # Points behind the camera have no pixels.
        drawable = record.get("keypoints_2d") is None or np.isfinite(record["keypoints_2d"]).all()
        kept = job.keep_outside or scene.keep_outside
        if not drawable or (record.get("hand_in_picture") is False and not kept):
            return []
        record["scene"] = number  # which frames and looks of one geometry share
        if max(job.view.frames, scene.frames) > 1:
            record |= {"trajectory": number, "frame": frame}
        pictures = pictures_of(scene, frame, record, self.hand, self.renderer)
        if scene.object_mesh is not None:
            record["object_path"] = write_object(self.folder, scene.written_mesh)
        # Shaded at twice the size and averaged, so that edges are smooth; the conditions' pixels stay unmixed.
        large = render_picture(scene, frame, self.hand, self.renderer) if pictures and job.shade else None
        records = []
        for look_number in range(job.looks):
            image = None
            if job.shade:
                generator = np.random.default_rng([job.seed, number, frame, look_number])
                look = sample_look(generator, style=job.style)
                image, record["text"] = shade_scene(scene, large, look, generator, paraphrase=job.paraphrase)
                record["look"] = {key: np.asarray(value).tolist() for key, value in asdict(look).items()}
            else:
                record["text"] = plain_text(scene, job.text)
            index = job.numbers_of(number, self.scenes).start + frame * job.looks + look_number
            records.append(write_pictures(self.folder, index, record, image, **pictures))
            # The other looks of this frame point at the same condition files.
            record |= {key: records[0][key] for key in PICTURE_FOLDERS if key != "file_name"}
            pictures = {}
        return records

    def field(self, scene: Scene) -> DistanceField | None:
        """Distance to the object, needed only for the contact of frames before the grasp; built once per object."""
        if scene.frames == 1 or scene.object_mesh is None or scene.grasp is None:
            return None
        return self.fields(scene.object_mesh.vertices, scene.object_mesh.faces)
