"""Parts of meshes and segmentation images."""

from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from safetensors.torch import load_file, save_file

from distill.data.folders import load_split
from distill.runtime.errors import UserError
from sds3d.scene.cameras import orbit
from sds3d.world.conditions import mesh_condition_images, split_condition_images
from sds3d.world.raycast import RayCaster
from sds3d.world.segments import face_parts, palette, segmentation_images
from sds3d.world.shapes import make_shape
from sds3d.world.world import WorldOptions, make_world


def test_parts_are_connected_pieces_the_largest_first() -> None:
    small, large = trimesh.creation.box((0.2, 0.2, 0.2)), trimesh.creation.icosphere(2, 0.5)
    large.apply_translation((2, 0, 0))
    parts = face_parts(trimesh.util.concatenate([small, large]))
    assert parts.tolist() == [2] * len(small.faces) + [1] * len(large.faces)


def test_creases_do_not_divide_a_part() -> None:
    """The faces of the world's cube share no vertices; a mug is a wall, a bottom and a handle."""
    assert set(face_parts(make_shape("cube").mesh)) == {1}
    assert set(face_parts(make_shape("mug").mesh)) == {1, 2, 3}


def test_faces_in_both_windings_are_of_one_part() -> None:
    """As meshes of files often have them: more than two faces at an edge."""
    box = trimesh.creation.box()
    faces = np.vstack([box.faces, box.faces[:, ::-1]])
    assert set(face_parts(trimesh.Trimesh(box.vertices, faces, process=False))) == {1}


def test_colours_of_parts_differ() -> None:
    colours = palette()
    assert colours[0].tolist() == [0, 0, 0]
    few = colours[1:12].float()
    assert float((torch.cdist(few, few) + 1e3 * torch.eye(11)).min()) > 40
    images = segmentation_images(torch.tensor([[[0, 1], [2, 1]]], dtype=torch.uint8))
    assert images.shape == (1, 3, 2, 2)
    assert torch.equal(images[0, :, 0, 1], colours[1]) and torch.equal(images[0, :, 1, 0], colours[2])


def test_segmentation_covers_the_silhouette() -> None:
    caster = RayCaster(make_shape("chair").mesh)
    cameras = orbit(torch.tensor([30.0]), torch.tensor([20.0]), torch.tensor([3.0]), torch.tensor([35.0]), 64)
    images = mesh_condition_images(caster, "segmentation", cameras)
    silhouette = mesh_condition_images(caster, "silhouette", cameras)
    assert torch.equal(images.amax(1, keepdim=True) > 0, silhouette > 0)
    assert len(images[0].flatten(1).unique(dim=1).T) == 7  # the background, six parts


def test_geometry_of_earlier_versions_has_no_parts(tmp_path: Path, in_process: None) -> None:
    """They are asked for by name, and added when the world is written again."""
    folder, options = tmp_path / "world", WorldOptions(4, 0, 0, geometry=True, resolution=16)
    make_world(folder, options, workers=1)
    path = next((folder / "geometry").iterdir())
    values = load_file(path)
    part = values.pop("part")
    save_file(values, path)
    data = load_split(folder, "train", 16)
    with pytest.raises(UserError, match="has the part of 0 of its 4 train images.*world.geometry=true"):
        split_condition_images(folder, "train", "segmentation", data)
    make_world(folder, options, workers=1)
    images = split_condition_images(folder, "train", "segmentation", data)
    assert torch.equal(images, segmentation_images(part))
    assert torch.equal(images.amax(1) > 0, split_condition_images(folder, "train", "depth", data)[:, 0] > 0)
