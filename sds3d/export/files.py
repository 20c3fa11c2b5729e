"""The files of a coloured mesh, GLB, OBJ and PLY.

Axes: a scene is z-up with its front at +x. Files follow glTF, y-up with the front at +z (and the object's left at +x):
(x, y, z) in the scene is (y, z, x) in all files. `load_mesh` turns a file back.
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
    """Write `name`.glb, `name`.obj and `name`.ply, axes as at the top of this file, and return their paths.

    Colours are the vertices', or in GLB and OBJ (with `name`.mtl and `name`.png beside it) the texture's where `textured` is given:
    the same surface cut into charts. The OBJ and PLY have sRGB colours (an OBJ in its lines, 'v x y z r g b'); the GLB linear ones,
    as glTF 2.0 section 3.7.2.1 has them (its textures are sRGB), normals and a matt material (without one, glTF's default is a metal).
    """
    paths = [Path(folder) / f"{name}.{suffix}" for suffix in ("glb", "obj", "ply")]
    turned = mesh.copy()
    turned.apply_transform(TO_FILE)
    for path in paths[1:] if textured is None else paths[2:]:
        with atomic_path(path) as temporary:
            turned.export(temporary)
    if textured is None:
        turned.visual.vertex_colors = _recolour(turned.visual.vertex_colors, to_linear)
    else:
        turned = textured.copy()
        turned.apply_transform(TO_FILE)
        _save_textured_obj(turned, paths[1])
    with atomic_path(paths[0]) as temporary:
        turned.export(temporary, include_normals=True, tree_postprocessor=_matt if textured is None else None)
    return paths[0], paths[1], paths[2]


def _save_textured_obj(mesh: trimesh.Trimesh, path: Path) -> None:
    """The OBJ last: what it names is there when it is."""
    mesh.visual.material.name = path.stem  # as its picture is then called
    text, beside = trimesh.exchange.obj.export_obj(
        mesh, include_normals=True, return_texture=True, mtl_name=f"{path.stem}.mtl"
    )
    matt = f"newmtl {path.stem}\nKa 1 1 1\nKd 1 1 1\nKs 0 0 0\nillum 1\nmap_Kd {path.stem}.png\n"  # trimesh's shines
    for name, content in ({**beside, f"{path.stem}.mtl": matt.encode(), path.name: text.encode()}).items():
        with atomic_path(path.parent / name) as temporary:
            temporary.write_bytes(content)


def _matt(tree: dict[str, Any]) -> None:
    tree["materials"] = [{"pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}}]
    for mesh in tree["meshes"]:
        for primitive in mesh["primitives"]:
            primitive["material"] = 0


def _recolour(colours: np.ndarray, law: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Colours (V, 4) uint8 with a law applied to RGB in [0, 1]."""
    changed = np.array(colours, np.uint8)
    changed[:, :3] = np.round(law(changed[:, :3] / 255) * 255)
    return changed


def to_linear(srgb: np.ndarray) -> np.ndarray:
    """Linear light of sRGB values, both in [0, 1] (IEC 61966-2-1)."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """The inverse of `to_linear`."""
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def read_scene(path: Path | str, process: bool = True) -> trimesh.Scene:
    """What a mesh file holds, in its own axes; `process` merges vertices and drops what is not finite.

    Raises `UserError` for a file that is missing or holds no mesh.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: expected a .glb or .obj file")
    try:
        return trimesh.load_scene(path, process=process)
    except (ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise UserError(f"{path} cannot be read as a mesh ({error})") from None


def load_textured(path: Path | str) -> trimesh.Trimesh:
    """A mesh that `save_mesh` wrote, back in scene axes as it lies in the file: cut along its charts, its texture on it.

    Raises `UserError` for a file that is missing or holds no mesh.
    """
    mesh = next(iter(read_scene(path, process=False).geometry.values()))
    mesh.apply_transform(TO_FILE.T)
    return mesh


def load_mesh(path: Path | str) -> trimesh.Trimesh:
    """A mesh that `save_mesh` wrote, back in scene axes and whole again, its colours (a texture's too) at its vertices, sRGB.

    Raises `UserError` for a file that is missing or holds no mesh.
    """
    parts = read_scene(path)
    mesh = parts.to_mesh()
    mesh.apply_transform(TO_FILE.T)
    whole = next(iter(parts.geometry.values())) if len(parts.geometry) == 1 else mesh
    kept = getattr(
        whole.visual, "vertex_attributes", {}
    )  # where trimesh has the colours of a GLB with a material; joining loses them
    if "color" in kept:
        mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=_recolour(kept["color"], to_srgb))
    elif isinstance(mesh.visual, TextureVisuals):
        mesh.visual = mesh.visual.to_color()
        mesh.merge_vertices(merge_tex=True, merge_norm=True)  # charts meet where they were cut
    return mesh
