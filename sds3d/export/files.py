"""Mesh files with colours: GLB, OBJ and PLY.

Axes: a scene is z-up with its front at +x. Files follow glTF, y-up with the front at +z and the object's left
at +x: (x, y, z) in the scene is (y, z, x) in all files. `load_mesh` inverts this.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from trimesh.visual import TextureVisuals

from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path

TO_FILE = np.eye(4)[[1, 2, 0, 3]]  # (x, y, z) -> (y, z, x), a rotation


def save_mesh(
    mesh: trimesh.Trimesh, folder: Path | str, name: str = "mesh", textured: trimesh.Trimesh | None = None
) -> tuple[Path, Path, Path]:
    """Write `name`.glb, `name`.obj and `name`.ply in the axes above, and return their paths.

    Colours are vertex colours; or a texture in GLB and OBJ (with `name`.mtl and `name`.png), if `textured`,
    the same surface cut into charts, is given. Colours are sRGB, in an OBJ as 'v x y z r g b', but a GLB's
    vertex colours are linear (glTF 2.0, section 3.7.2.1). A GLB has normals and a matt material, as glTF's
    default is metallic.
    """
    paths = [Path(folder) / f"{name}.{suffix}" for suffix in ("glb", "obj", "ply")]
    rotated = mesh.copy()
    rotated.apply_transform(TO_FILE)
    for path in paths[1:] if textured is None else paths[2:]:
        with atomic_path(path) as temporary:
            rotated.export(temporary)
    if textured is None:
        rotated.visual.vertex_colors = _convert_colours(rotated.visual.vertex_colors, to_linear)
    else:
        rotated = textured.copy()
        rotated.apply_transform(TO_FILE)
        _save_textured_obj(rotated, paths[1])
    with atomic_path(paths[0]) as temporary:
        postprocessor = _set_matt_material if textured is None else None
        rotated.export(temporary, include_normals=True, tree_postprocessor=postprocessor)
    return paths[0], paths[1], paths[2]


def _save_textured_obj(mesh: trimesh.Trimesh, path: Path) -> None:
    """Write the OBJ and the files it refers to, the OBJ last, so that it is never without them."""
    name = path.stem
    mesh.visual.material.name = name  # trimesh names the image file after it
    text, files = trimesh.exchange.obj.export_obj(
        mesh, include_normals=True, return_texture=True, mtl_name=f"{name}.mtl"
    )
    # The MTL of trimesh is specular.
    matt = f"newmtl {name}\nKa 1 1 1\nKd 1 1 1\nKs 0 0 0\nillum 1\nmap_Kd {name}.png\n"
    for file, content in ({**files, f"{name}.mtl": matt.encode(), path.name: text.encode()}).items():
        with atomic_path(path.parent / file) as temporary:
            temporary.write_bytes(content)


def _set_matt_material(tree: dict[str, Any]) -> None:
    tree["materials"] = [{"pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}}]
    for mesh in tree["meshes"]:
        for primitive in mesh["primitives"]:
            primitive["material"] = 0


def _convert_colours(colours: np.ndarray, transfer: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Colours (V, 4) uint8 with a transfer function applied to RGB in [0, 1]."""
    converted = np.array(colours, np.uint8)
    converted[:, :3] = np.round(transfer(converted[:, :3] / 255) * 255)
    return converted


def to_linear(srgb: np.ndarray) -> np.ndarray:
    """Linear light of sRGB values, both in [0, 1] (IEC 61966-2-1)."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """The inverse of `to_linear`."""
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def read_scene(path: Path | str, process: bool = True) -> trimesh.Scene:
    """The content of a mesh file in its own axes; `process` merges vertices and removes non-finite ones.

    Raises `UserError` for a file that is missing or holds no mesh.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: expected a .glb or .obj file")
    try:
        return trimesh.load_scene(path, process=process)
    except (ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise UserError(f"{path} cannot be read as a mesh ({error})") from None


def load_textured(path: Path | str) -> trimesh.Trimesh:
    """A mesh that `save_mesh` wrote, in scene axes, textured and cut along its charts as in the file.

    Raises `UserError` for a file that is missing or holds no mesh.
    """
    mesh = next(iter(read_scene(path, process=False).geometry.values()))
    mesh.apply_transform(TO_FILE.T)
    return mesh


def load_mesh(path: Path | str) -> trimesh.Trimesh:
    """A mesh that `save_mesh` wrote, in scene axes, with merged vertices and sRGB vertex colours.

    Raises `UserError` for a file that is missing or holds no mesh.
    """
    scene = read_scene(path)
    mesh = scene.to_mesh()
    mesh.apply_transform(TO_FILE.T)
    # Where trimesh keeps the colours of a GLB with a material; `to_mesh` loses them.
    single = next(iter(scene.geometry.values())) if len(scene.geometry) == 1 else mesh
    attributes = getattr(single.visual, "vertex_attributes", {})
    if "color" in attributes:
        colours = _convert_colours(attributes["color"], to_srgb)
        mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=colours)
    elif isinstance(mesh.visual, TextureVisuals):
        mesh.visual = mesh.visual.to_color()
        mesh.merge_vertices(merge_tex=True, merge_norm=True)  # along the charts' borders
    return mesh
