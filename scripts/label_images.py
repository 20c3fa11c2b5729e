"""What is in each image of a folder, by the teacher's CLIP: python scripts/label_images.py folder=photos "a red teapot" "a blue duck" """

from pathlib import Path
from typing import Any

from entry import entry


def main(config: dict[str, Any]) -> None:
    import torch

    from distill.data.images import composite_over, image_files, open_image
    from distill.runtime.files import write_json
    from distill.runtime.machine import pick_device
    from distill.teacher.clip import label_shares
    from distill.teacher.folder import load_clip
    from distill.teacher.latent import Teacher
    from distill.teacher.vocabulary import check_prompt

    teacher = Teacher.load(config["teacher"], pick_device(config["device"]))
    for label in config["labels"]:
        check_prompt(label, teacher.words)
    files = image_files(Path(config["folder"]))
    images = torch.cat([composite_over(open_image(path, teacher.resolution)) for path in files])
    shares = label_shares(
        load_clip(teacher.place).to(teacher.device), teacher.tokenizer, images, config["labels"]
    )
    best = shares.max(1)
    for path, share, index in zip(files, best.values.tolist(), best.indices.tolist(), strict=True):
        print(f"{path.name:32} {config['labels'][index]:32} {share:.3f}")
    told = {
        path.name: dict(zip(config["labels"], row.tolist(), strict=True))
        for path, row in zip(files, shares, strict=True)
    }
    write_json(config["output"], told)
    print(f"written: {config['output']}")


if __name__ == "__main__":
    entry("label_images", main, positional="labels")
