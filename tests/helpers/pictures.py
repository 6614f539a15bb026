"""Folders of small images for tests, and the same images in WebDataset shards."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_folder(root: Path, train: int, val: int, names: Sequence[str] = ("cat", "dog")) -> Path:
    """``root``/train and ``root``/val: so many images of each class, of several sizes."""
    generator = np.random.default_rng(0)
    for part, per_class in (("train", train), ("val", val)):
        for name in names:
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = generator.integers(0, 256, (24, 20 + i % 3, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return root


def write_shard(path: Path, members: Mapping[str, bytes]) -> None:
    """A tar file of these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))


def write_shards(root: Path, folder: Path, per_shard: int = 7) -> Path:
    """The images of :func:`write_folder` in the same order, in shards."""
    for part in ("train", "val"):
        files = sorted((folder / part).glob("*/*.png"))
        classes = sorted({file.parent.name for file in files})
        for first in range(0, len(files), per_shard):
            members: dict[str, bytes] = {}
            for file in files[first : first + per_shard]:
                key = f"{file.parent.name}/{file.stem}"
                members[f"{key}.cls"] = b"%d\n" % classes.index(file.parent.name)
                members[f"{key}.json"] = b"{}"  # what we do not know is passed over
                members[f"{key}.png"] = file.read_bytes()
            write_shard(root / part / f"{part}-{first // per_shard:06}.tar", members)
    return root


def write_volumes(root: Path, count: int) -> Path:
    """``root``/table.csv and NIfTI volumes of two classes, two a patient, of several sizes.

    The second class has a dense ball; units are Hounsfield's, spacings 1 by 1 by 2 mm.
    """
    import nibabel

    generator = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    rows = ["volume,patient,finding"]
    for i in range(count):
        values = generator.normal(0, 50, (18 + i % 3, 18, 9))
        finding = ("none", "mass")[i % 4 // 2]
        if finding == "mass":
            values[4:14, 4:14, 2:7] += 400
        image = nibabel.Nifti1Image(values.astype(np.int16), np.diag([1.0, 1.0, 2.0, 1.0]))
        nibabel.save(image, root / f"{i}.nii.gz")
        rows.append(f"{i}.nii.gz,{i // 2},{finding}")
    (root / "table.csv").write_text("\n".join(rows))
    return root


def write_xrays(root: Path, count: int) -> Path:
    """``root``/table.csv and 16-bit grey pictures: three labels, some unknown, two a patient.

    A label is a bright square at a place of its own, a sixteenth of the range above noise.
    """
    generator = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    rows = ["image,patient,Edema,Fracture,Mass"]
    for i in range(count):
        has = generator.random(3) < (0.5, 0.4, 0.3)
        values = generator.integers(20_000, 24_000, (24, 24))
        for place, there in enumerate(has):
            values[8 * place : 8 * place + 8, 4:20] += 4096 * there
        Image.fromarray(values.astype(np.uint16)).save(root / f"{i}.png")
        said = ["" if generator.random() < 0.2 else "01"[int(there)] for there in has]
        rows.append(",".join([f"{i}.png", str(i // 2), *said]))
    (root / "table.csv").write_text("\n".join(rows))
    return root
