"""PASCAL VOC 2012's instance masks, and what SBD shares with them: classes, folders, conversion.

The data sets are read once, into a COCO file in the cache; from there on they are like any other.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from instseg_ext.data.cache import cache_folder
from instseg_ext.structures.rle import encode_masks, rle_boxes

__all__ = [
    "VOC_CLASSES",
    "VOC_SETS",
    "Layout",
    "VocSource",
    "cached_annotations",
    "classes_by_pixels",
    "datasets_root",
    "find_layout",
    "not_found",
    "object_numbers",
    "read_names",
    "write_annotations",
]

logger = logging.getLogger(__name__)

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
# The kinds of classes that SDS takes for similar, in its diagnosis of errors.
_GROUPS = {
    "vehicle": ("aeroplane", "bicycle", "boat", "bus", "car", "motorbike", "train"),
    "living": ("bird", "cat", "cow", "dog", "horse", "person", "sheep"),
    "indoor": ("bottle", "chair", "diningtable", "pottedplant", "sofa", "tvmonitor"),
}
_VOID = 255  # label of pixels that belong to nothing, such as the outlines of VOC's objects
_VERSION = 1  # part of the cache folder's name: raise it when the conversion changes


@dataclass(frozen=True)
class Layout:
    """Where the files of a data set are, below the folder of all data sets.

    ``list_file`` is the path of a split's list of names, with ``{}`` for the split.
    """

    folder: str
    list_file: str
    images: str
    objects: str
    classes: str
    suffix: str  # of the files of objects and classes

    def missing(self, root: Path, split: str) -> list[str]:
        """Name the files and folders that are not there; nothing means that all are."""
        parts = (self.list_file.format(split), self.images, self.objects, self.classes)
        return [part for part in parts if not (root / self.folder / part).exists()]

    def tree(self, split: str) -> str:
        """Draw what is expected, for an error message."""
        lines = [
            self.list_file.format(split),
            f"{self.images}/NAME.jpg",
            f"{self.objects}/NAME{self.suffix}",
            f"{self.classes}/NAME{self.suffix}",
        ]
        return "\n".join([f"  {self.folder}/", *(f"    {line}" for line in lines)])


_VOC_PARTS = ("JPEGImages", "SegmentationObject", "SegmentationClass", ".png")
_VOC_LAYOUTS = tuple(
    Layout(folder, "ImageSets/Segmentation/{}.txt", *_VOC_PARTS)
    for folder in ("VOC2012", "VOCdevkit/VOC2012")
)


@dataclass(frozen=True)
class VocSource:
    """A data set that was found.

    ``read`` gives, for the name of an image, the map of its objects (H, W) uint8, 0 where there is
    none, and the class index of each object by its number in the map.
    """

    names: Sequence[str]
    image_folder: str  # below the folder of all data sets
    read: Callable[[str], tuple[np.ndarray, dict[int, int]]]
    # Files and folders that change when the data set does.
    stamped: Sequence[Path]


def datasets_root() -> Path:
    """Return the folder of all data sets: ``$DETECTRON2_DATASETS``, or ``./datasets``."""
    return Path(os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser().absolute()


def find_layout(layouts: Sequence[Layout], split: str, root: Path) -> Layout | None:
    """Return the first layout of which everything is there."""
    return next((layout for layout in layouts if not layout.missing(root, split)), None)


def not_found(
    name: str, layouts: Sequence[Layout], split: str, root: Path, more: str = ""
) -> FileNotFoundError:
    """Make the error that shows where a data set is looked for, and what is there of it.

    Args:
        name: of the data set.
        layouts: where it may be.
        split: of its list of names.
        root: folder of all data sets.
        more: a further possibility, in words.
    """
    lines = [
        f"Data set {name!r} is not in {root}, the folder that the environment variable "
        "DETECTRON2_DATASETS names (./datasets without it). Expected there:",
        "\n  or\n".join(layout.tree(split) for layout in layouts),
    ]
    lines += [more] if more else []
    for layout in layouts:
        if (root / layout.folder).is_dir():
            lines.append(f"{layout.folder} lacks {', '.join(layout.missing(root, split))}.")
    return FileNotFoundError("\n".join(lines))


def read_names(path: Path) -> list[str]:
    """Read a list of image names, one a line; a second column is left out.

    Raises:
        ValueError: if it names nothing.
    """
    names = [
        line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    if not names:
        raise ValueError(f"{path} names no image.")
    return names


def _find_voc(name: str, root: Path) -> VocSource:
    split = name.rpartition("_")[2]
    layout = find_layout(_VOC_LAYOUTS, split, root)
    if layout is None:
        raise not_found(name, _VOC_LAYOUTS, split, root)
    folder = root / layout.folder
    list_file = folder / layout.list_file.format(split)
    return VocSource(
        read_names(list_file),
        f"{layout.folder}/{layout.images}",
        functools.partial(_read_voc, folder / layout.objects, folder / layout.classes),
        (list_file, folder / layout.objects, folder / layout.classes),
    )


VOC_SETS: dict[str, Callable[[Path], VocSource]] = {
    name: functools.partial(_find_voc, name)
    for name in ("voc_2012_inst_train", "voc_2012_inst_val")
}


def _read_voc(
    object_folder: Path, class_folder: Path, name: str
) -> tuple[np.ndarray, dict[int, int]]:
    objects, labels = (
        _read_indices(folder / f"{name}.png") for folder in (object_folder, class_folder)
    )
    if objects.shape != labels.shape:
        raise ValueError(
            f"{object_folder / name}.png is {objects.shape[1]} x {objects.shape[0]} pixels, but "
            f"{class_folder / name}.png is {labels.shape[1]} x {labels.shape[0]}."
        )
    return objects, classes_by_pixels(objects, labels)


def _read_indices(path: Path) -> np.ndarray:
    """Read the palette indices of a picture."""
    try:
        with Image.open(path) as picture:
            indices = np.array(picture)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if indices.ndim != 2 or indices.dtype != np.uint8:
        raise ValueError(f"{path} has no palette whose numbers are those of objects or classes.")
    return indices


def object_numbers(objects: np.ndarray) -> list[int]:
    """List the numbers in a map of objects.

    Args:
        objects: (H, W) uint8, 0 where there is none, 255 void.
    """
    pixels = np.bincount(objects.ravel(), minlength=256)
    return [number for number in np.flatnonzero(pixels).tolist() if number not in (0, _VOID)]


def classes_by_pixels(objects: np.ndarray, labels: np.ndarray) -> dict[int, int]:
    """Give each object the class that most of its pixels have.

    Args:
        objects: (H, W) uint8, 0 where there is none.
        labels: (H, W) uint8, 0 background, 1 to 20 classes, 255 void.

    Returns:
        Class index, from 0, by number of the object; objects without a class are left out.
    """
    count = len(VOC_CLASSES)
    known = (objects > 0) & (objects != _VOID) & (labels > 0) & (labels <= count)
    pairs = objects[known].astype(np.int64) * count + labels[known] - 1
    votes = np.bincount(pairs, minlength=256 * count).reshape(-1, count)
    return {int(key): int(votes[key].argmax()) for key in np.flatnonzero(votes.any(axis=1))}


def cached_annotations(name: str, root: Path) -> Path:
    """Return where the COCO file of a data set lies in the cache, without touching the disk."""
    place = hashlib.sha256(str(root).encode()).hexdigest()[:12]
    return cache_folder() / f"{name}_v{_VERSION}_{place}" / "annotations.json"


def write_annotations(name: str, source: VocSource, json_file: Path) -> None:
    """Convert a data set to a COCO file, unless that was done since it last changed.

    Several processes may do so at the same time: they write the same, each in one step.

    Args:
        name: of the data set.
        source: what to convert.
        json_file: in the cache.

    Raises:
        FileNotFoundError, ValueError: naming the file that is missing or cannot be read.
    """
    stamp = {str(path): _stamp(path) for path in source.stamped}
    stamp_file = json_file.with_name("source.json")
    current = json_file.is_file() and stamp_file.is_file()
    if current and json.loads(stamp_file.read_text(encoding="utf-8")) == stamp:
        return
    logger.info("Reading the annotations of %d images of %s, once.", len(source.names), name)
    content = _convert(name, source)
    json_file.parent.mkdir(parents=True, exist_ok=True)
    _write(json_file, content)
    # After the annotations: an interrupted run leaves no stamp that says they are current.
    _write(stamp_file, stamp)


def _stamp(path: Path) -> list[int]:
    """Return numbers that change when a file is written, or any file of a folder."""
    status = path.stat()
    numbers = [status.st_mtime_ns, status.st_size]
    if path.is_dir():
        # The folder's own time tells of files that came or went, not of those written in place.
        # Sums, since what is put in place of a file may be older than the newest one.
        with os.scandir(path) as entries:
            inside = [entry.stat() for entry in entries if entry.is_file()]
        numbers += [sum(file.st_mtime_ns for file in inside), sum(file.st_size for file in inside)]
    return numbers


def _write(path: Path, content: dict) -> None:
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file)
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)


def _convert(name: str, source: VocSource) -> dict:
    images, annotations, unclassed = [], [], []
    for index, image in enumerate(tqdm(source.names, desc=name, disable=None, leave=False), 1):
        objects, classes = source.read(image)
        height, width = objects.shape
        file_name = f"{source.image_folder}/{image}.jpg"
        images.append({"id": index, "file_name": file_name, "height": height, "width": width})
        numbers = object_numbers(objects)
        unclassed += [f"{number} of {image}" for number in numbers if number not in classes]
        kept = [number for number in numbers if number in classes]
        masks = objects == np.array(kept, dtype=np.uint8)[:, None, None]
        rles = encode_masks(masks)
        boxes = rle_boxes(rles).tolist()
        for number, mask, rle, box in zip(kept, masks, rles, boxes, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": classes[number] + 1,
                    "iscrowd": 0,
                    "area": int(mask.sum()),
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "segmentation": rle,
                }
            )
    if unclassed:
        logger.warning(
            "%s: %d objects without a class left out; the first is object %s.",
            name,
            len(unclassed),
            unclassed[0],
        )
    group_of = {member: group for group, members in _GROUPS.items() for member in members}
    categories = [
        {"id": index, "name": label, "supercategory": group_of[label]}
        for index, label in enumerate(VOC_CLASSES, 1)
    ]
    return {
        "info": {"description": name},
        "licenses": [],
        "categories": categories,
        "images": images,
        "annotations": annotations,
    }
