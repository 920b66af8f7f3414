"""The Semantic Boundaries Dataset (SBD): instance masks for the images of PASCAL VOC 2011.

Two ways to split its 11355 images are in use: that of the release (``sbd_train``, 8498 images, and
``sbd_val``), and that of the SDS, MNC and FCIS papers (``sbd_sds_train``, 5623 images, and
``sbd_sds_val``), which follows VOC 2012. They overlap: never train on one and test on the other.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np

from instseg_ext.data.voc import (
    VOC_CLASSES,
    Layout,
    VocSource,
    classes_by_pixels,
    find_layout,
    not_found,
    object_numbers,
    read_names,
)

__all__ = ["SBD_SETS"]

_PARTS = ("img", "inst", "cls", ".mat")
_RELEASE = (
    Layout("sbd", "{}.txt", *_PARTS),
    Layout("benchmark_RELEASE/dataset", "{}.txt", *_PARTS),
)
# As MNC and as FCIS want it.
_SDS = (
    Layout("VOCdevkitSDS", "{}.txt", *_PARTS),
    Layout("VOCdevkit/VOCSDS", "ImageSets/Main/{}.txt", *_PARTS),
)
_VOC_LISTS = ("VOC2012/ImageSets/Main/{}.txt", "VOCdevkit/VOC2012/ImageSets/Main/{}.txt")


def _find_release(name: str, split: str, root: Path) -> VocSource:
    layout = find_layout(_RELEASE, split, root)
    if layout is None:
        raise not_found(name, _RELEASE, split, root)
    return _source(layout, root, root / layout.folder / layout.list_file.format(split))


def _find_sds(name: str, split: str, root: Path) -> VocSource:
    """Take the papers' list where it is, else the images of SBD that VOC 2012's list names."""
    layout = find_layout(_SDS, split, root)
    if layout is not None:
        return _source(layout, root, root / layout.folder / layout.list_file.format(split))
    release = find_layout(_RELEASE, "train", root)
    voc_lists = [root / path.format(split) for path in _VOC_LISTS]
    voc_list = next((path for path in voc_lists if path.is_file()), None)
    if release is None or voc_list is None:
        more = (
            f"or the release of SBD ({' or '.join(layout.folder for layout in _RELEASE)}) beside "
            f"VOC 2012's list ({' or '.join(path.format(split) for path in _VOC_LISTS)})."
        )
        raise not_found(name, _SDS, split, root, more)
    return _source(release, root, voc_list)


def _source(layout: Layout, root: Path, list_file: Path) -> VocSource:
    """Describe the images that a list names, and SBD has."""
    folder = root / layout.folder
    objects, classes = folder / layout.objects, folder / layout.classes
    names = read_names(list_file)
    if folder not in list_file.parents:
        there = {path.stem for path in objects.iterdir()}
        names = [name for name in names if name in there]
        if not names:
            raise ValueError(f"{objects} has no image of {list_file}.")
    return VocSource(
        names,
        f"{layout.folder}/{layout.images}",
        functools.partial(_read, objects, classes),
        (list_file, objects, classes),
    )


SBD_SETS: dict[str, Callable[[Path], VocSource]] = {
    f"{prefix}_{split}": functools.partial(find, f"{prefix}_{split}", split)
    for prefix, find in (("sbd", _find_release), ("sbd_sds", _find_sds))
    for split in ("train", "val")
}


def _read(object_folder: Path, class_folder: Path, name: str) -> tuple[np.ndarray, dict[int, int]]:
    """Read the objects of an image, and their classes.

    The file of the objects lists their classes; where it does not, the labels of their pixels in
    the file of the classes count.
    """
    path = object_folder / f"{name}.mat"
    content = _load(path, "GTinst")
    objects = _label_map(path, content)
    listed = content["Categories"].ravel() if "Categories" in content.dtype.names else []
    classes = {
        number: int(label) - 1
        for number, label in enumerate(listed, 1)
        if 1 <= label <= len(VOC_CLASSES)
    }
    if classes.keys() >= set(object_numbers(objects)):
        return objects, classes
    path = class_folder / f"{name}.mat"
    labels = _label_map(path, _load(path, "GTcls"))
    if labels.shape != objects.shape:
        raise ValueError(f"{path} is not of the size of {object_folder / name}.mat.")
    return objects, classes_by_pixels(objects, labels)


def _load(path: Path, variable: str) -> np.void:
    """Read one structure of a MATLAB file.

    Raises:
        FileNotFoundError, ValueError: naming the file.
        ImportError: without scipy.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, but the list of images names it.")
    scipy_io = _scipy_io()
    try:
        return scipy_io.loadmat(path, variable_names=[variable])[variable][0, 0]
    except Exception as error:  # a broken file makes scipy raise nearly anything
        raise ValueError(
            f"{path} is no MATLAB file with the structure {variable}: {error}"
        ) from error


def _scipy_io() -> ModuleType:
    try:
        return importlib.import_module("scipy.io")
    except ImportError as error:
        raise ImportError(
            "The .mat files of SBD need the package scipy: pip install 'instseg_ext[voc]' or scipy "
            f"({error})."
        ) from error


def _label_map(path: Path, content: np.void) -> np.ndarray:
    names = content.dtype.names or ()
    labels = content["Segmentation"] if "Segmentation" in names else None
    if not isinstance(labels, np.ndarray) or labels.ndim != 2 or labels.dtype.kind not in "uif":
        raise ValueError(f"{path} has no label map called Segmentation.")
    return labels.astype(np.uint8)
