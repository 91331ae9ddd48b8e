"""The names in Stable Diffusion files and in diffusers folders, against hashes of independently made tables."""

import hashlib

import pytest
import torch

from hoi.network.config import sd1_config
from hoi.network.model import HOIDiffusion
from hoi.weights import names as names_module

# sha256 over sorted lines.  The tables: the names of a Stable Diffusion 1.x file, and what diffusers' own converters
# make of each (made by feeding them numbered tensors), for all 1130 tensors; and the 16 older names in its VAE.
SINGLE_NAMES = "178dd4a5d29c415c68771239b583291cb8930a0a00ee95044e9dbee5908ecc1c"  # "single name"
SINGLE_TO_DIFFUSERS = "c62979679ef0dfdf98eb47bcba54f2798e7209f2a85badf8b7333009db1340cd"  # "single part/diffusers name"
SINGLE_TO_OLD_VAE = "cecaec196bbe5a37c31221b64f6bc22b87f458c35808cbaca88d7df11105df5f"  # "single diffusers name"


@pytest.fixture(scope="module")
def ours() -> list[str]:
    with torch.device("meta"):
        return list(HOIDiffusion(sd1_config()).state_dict())


def digest(lines: set[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def pairs(first: names_module.NameMap, second: names_module.NameMap, folder: str = "") -> set[str]:
    """Lines "first second" for all of our tensors that both know, stacked ones cut apart."""
    return {f"{a} {folder}{b}" for name in second for a, b in zip(first[name], second[name], strict=True)}


def test_single_file_names_are_those_of_the_table(ours):
    names = names_module.single_file_names(ours, sd1_config().text)
    theirs = {theirs for several in names.values() for theirs in several}
    assert len(theirs) == 1130 and digest(theirs) == SINGLE_NAMES


def test_diffusers_names_are_those_that_its_converters_give(ours):
    config = sd1_config()
    single = names_module.single_file_names(ours, config.text)
    text = names_module.text_names(config.text, "text_model.")
    lines = pairs(single, names_module.diffusers_unet_names(ours, config.unet), "unet/")
    lines |= pairs(single, names_module.diffusers_vae_names(ours, config.vae), "vae/")
    lines |= pairs(single, text, "text_encoder/")
    assert len(lines) == 1130 and digest(lines) == SINGLE_TO_DIFFUSERS


def test_old_attention_names_of_the_vae_are_those_of_the_table(ours):
    single = names_module.single_file_names(ours, sd1_config().text)
    old = names_module.diffusers_vae_names(ours, sd1_config().vae, old_attention=True)
    lines = pairs(single, {name: keys for name, keys in old.items() if ".attn_1." in name and ".norm." not in name})
    assert len(lines) == 16 and digest(lines) == SINGLE_TO_OLD_VAE


def test_each_branch_of_the_official_release_is_the_condition_that_it_sees():
    ours = ("skeleton.body.0.block1.bias", "normal.conv_in.bias", "segmentation.body.7.block2.bias")
    names = names_module.official_adapter_names(f"condition_encoders.{name}" for name in ours)
    theirs = ["pose_ada.body.0.block1.bias", "depth_ada.conv_in.bias", "mask_ada.body.7.block2.bias"]
    assert [name for (name,) in names.values()] == theirs
