"""The Semantic Boundaries Dataset (SBD): instance masks for the images of PASCAL VOC 2011.

Two ways to split its 11355 images are in use: that of the release (``sbd_train``, 8498 images, and
``sbd_val``), and that of the SDS, MNC and FCIS papers (``sbd_sds_train``, 5623 images, and
``sbd_sds_val``), which follows VOC 2012. They overlap: never train on one and test on the other.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from detectron2.utils.logger import log_first_n

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
    return _listed(layout, split, root)


def _find_sds(name: str, split: str, root: Path) -> VocSource:
    """Take the papers' list where it is, else the images of SBD that VOC 2012's list names."""
    layout = find_layout(_SDS, split, root)
    if layout is not None:
        return _listed(layout, split, root)
    whole = [layout for layout in _RELEASE if not layout.missing(root, "val")]
    release = find_layout(whole, "train", root)
    voc_lists = [root / path.format(split) for path in _VOC_LISTS]
    voc_list = next((path for path in voc_lists if path.is_file()), None)
    if release is None or voc_list is None:
        more = (
            f"or the release of SBD ({' or '.join(layout.folder for layout in _RELEASE)}), with "
            "train.txt and val.txt, beside VOC 2012's list "
            f"({' or '.join(path.format(split) for path in _VOC_LISTS)})."
        )
        raise not_found(name, _SDS, split, root, more)
    return _shared(name, release, voc_list, root)


def _shared(name: str, layout: Layout, voc_list: Path, root: Path) -> VocSource:
    """Describe the images of VOC 2012's list that SBD has.

    By SBD's own lists, not by its files: a copy that lacks some must not pass for a smaller split.
    """
    own_lists = [root / layout.folder / layout.list_file.format(part) for part in ("train", "val")]
    own = {image for path in own_lists for image in read_names(path)}
    listed = read_names(voc_list)
    names = [image for image in listed if image in own]
    if not names:
        raise ValueError(f"{own_lists[0]} and {own_lists[1].name} have no image of {voc_list}.")
    log_first_n(
        logging.INFO,
        f"{name}: SBD has {len(names)} of the {len(listed)} images that {voc_list} names.",
        key="message",
    )
    return _source(layout, root, names, [voc_list, *own_lists])


def _listed(layout: Layout, split: str, root: Path) -> VocSource:
    """Describe the images of a list that lies beside the files."""
    list_file = root / layout.folder / layout.list_file.format(split)
    return _source(layout, root, read_names(list_file), [list_file])


def _source(
    layout: Layout, root: Path, names: Sequence[str], list_files: Sequence[Path]
) -> VocSource:
    """Describe images of SBD, and the lists that they were taken from."""
    objects, classes = (root / layout.folder / part for part in (layout.objects, layout.classes))
    return VocSource(
        names,
        f"{layout.folder}/{layout.images}",
        functools.partial(_read, objects, classes),
        (*list_files, objects, classes),
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
