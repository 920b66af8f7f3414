"""Names of data sets: the bundled ones, VOC and SBD, those of a config and of the command line.

Registering stores names and paths only; no file is touched until a data set is loaded.
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from instseg_ext import resources
from instseg_ext.data.coco import load_coco, read_categories
from instseg_ext.data.keypoints import declared_keypoints, mirror_pairs
from instseg_ext.data.sbd import SBD_SETS
from instseg_ext.data.shapes import SHAPE_CATEGORIES, SHAPE_SPLITS, cached_shapes, generate_cached
from instseg_ext.data.voc import (
    VOC_CLASSES,
    VOC_SETS,
    cached_annotations,
    datasets_root,
    write_annotations,
)

__all__ = [
    "add_registrations",
    "dataset_classes",
    "dataset_files",
    "ensure_files",
    "free_name",
    "is_semantic",
    "load_keypoint_metadata",
    "parse_register_flag",
    "register",
    "register_bundled",
    "register_from_config",
    "require_source",
]

logger = logging.getLogger(__name__)

NUCLEI = ("nuclei_train", "nuclei_val", "nuclei_fold1_train", "nuclei_fold1_val")

# What this module registered: name -> (annotation file, image folder).
_REGISTERED: dict[str, tuple[Path, Path]] = {}
# Converted into a COCO file when they are first used: name -> how they are found below a folder.
_CONVERTED = {**VOC_SETS, **SBD_SETS}


def register(
    name: str,
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    *,
    evaluator_type: str = "coco",
) -> None:
    """Register a COCO-format data set under a name.

    Args:
        name: the name used in ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        json_file: annotation file; need not exist yet.
        image_root: folder of the images; need not exist yet.
        evaluator_type: see ``build_evaluator``.

    Raises:
        ValueError: if the name already stands for other files. Registering the same files again is
            allowed and changes nothing; names of VOC and SBD are free for somebody's own files.
    """
    if not name:
        raise ValueError("A data set needs a non-empty name.")
    files = (Path(json_file).absolute(), Path(image_root).absolute())
    if _is_converted(name) and _REGISTERED[name] != files:
        # It may have meant these files before this package had a meaning for it.
        logger.info("Data set %r is now that of %s.", name, files[0])
        del _REGISTERED[name]
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    if name in _REGISTERED:
        if _REGISTERED[name] != files:
            old = _REGISTERED[name]
            raise ValueError(
                f"Data set {name!r} is registered with {old[0]} and images in {old[1]}; it cannot "
                f"also mean {files[0]} with images in {files[1]}. Choose another name."
            )
        return
    if name in DatasetCatalog.list():
        raise ValueError(
            f"Data set name {name!r} is taken by detectron2 or another package; choose another."
        )
    _REGISTERED[name] = files
    DatasetCatalog.register(name, functools.partial(_load, name))
    MetadataCatalog.get(name).set(
        json_file=str(files[0]), image_root=str(files[1]), evaluator_type=evaluator_type
    )


def free_name(name: str, json_file: str | os.PathLike, image_root: str | os.PathLike) -> str:
    """Return ``name``, or ``name_2``, ``name_3``, ... where it stands for other files already."""
    files = (Path(json_file).absolute(), Path(image_root).absolute())
    candidate, number = name, 1
    while _REGISTERED.get(candidate, files) != files:
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def register_bundled() -> None:
    """Register nuclei, generated shapes, VOC and SBD; may be called any number of times.

    A name of VOC or SBD that somebody else has registered, or described in the metadata as another
    data set, stays theirs.
    """
    nuclei = resources.root() / "datasets" / "nuclei"
    for name in NUCLEI:
        if name not in _REGISTERED:
            register(name, nuclei / "annotations" / f"{name}.json", nuclei / "images")
    for name in SHAPE_SPLITS:
        if name not in _REGISTERED:
            register(name, *cached_shapes(name))
    root = datasets_root()
    for name in _CONVERTED:
        if name not in DatasetCatalog.list() and not _is_described(name):
            register(name, cached_annotations(name, root), root, evaluator_type="sbd")
            MetadataCatalog.get(name).thing_classes = list(VOC_CLASSES)


def _is_described(name: str) -> bool:
    """Tell whether somebody's metadata mean another data set than VOC's or SBD's of this name."""
    if name not in MetadataCatalog.list():
        return False
    known = MetadataCatalog.get(name).as_dict()
    ours = {"evaluator_type": "sbd", "thing_classes": list(VOC_CLASSES)}
    files = known.keys() & {"json_file", "image_root"}
    return bool(files) or any(known.get(key, value) != value for key, value in ours.items())


def parse_register_flag(text: str) -> dict[str, str]:
    """Read ``NAME=ANNOTATIONS.json:IMAGE_DIR``.

    Returns:
        ``{"NAME", "JSON", "IMAGES"}``, the form of ``INSTSEG.DATASETS``.

    Raises:
        ValueError: if the text has another form.
    """
    name, equals, paths = text.partition("=")
    json_file, colon, images = paths.rpartition(":")
    if len(json_file) == 1 and json_file.isalpha():
        # "C:\data": the colon belongs to a Windows drive, so there is no image folder.
        colon = ""
    if not (name and equals and json_file and colon and images):
        raise ValueError(f"--register wants NAME=ANNOTATIONS.json:IMAGE_DIR, not {text!r}.")
    return {"NAME": name, "JSON": json_file, "IMAGES": images}


def add_registrations(cfg: CfgNode, entries: list[dict[str, str]]) -> None:
    """Register data sets and write them into ``INSTSEG.DATASETS``, with absolute paths.

    They then travel with the dumped config and the checkpoint.

    Args:
        cfg: changed in place; an entry that is there already is not repeated.
        entries: as :func:`parse_register_flag` gives them.

    Raises:
        ValueError: if a name already stands for other files.
    """
    known = [dict(e) for e in cfg.INSTSEG.DATASETS]
    for entry in entries:
        register(entry["NAME"], entry["JSON"], entry["IMAGES"])
        json_file, image_root = _REGISTERED[entry["NAME"]]
        absolute = {"NAME": entry["NAME"], "JSON": str(json_file), "IMAGES": str(image_root)}
        if absolute not in known:
            known.append(absolute)
    cfg.INSTSEG.DATASETS = known


def register_from_config(cfg: CfgNode) -> None:
    """Register what ``INSTSEG.DATASETS`` declares, and the bundled sets.

    Class names of ``INSTSEG.CLASS_NAMES`` stand in for those of a data set of this config whose
    files are not there, so that predictions carry names on a machine that only has the config.

    Raises:
        ValueError: if an entry lacks a key or its name already stands for other files.
    """
    register_bundled()
    for entry in cfg.INSTSEG.DATASETS:
        missing = [k for k in ("NAME", "JSON", "IMAGES") if k not in entry]
        if missing:
            raise ValueError(f"INSTSEG.DATASETS: entry {dict(entry)} lacks {', '.join(missing)}.")
        register(entry["NAME"], entry["JSON"], entry["IMAGES"])
    if not cfg.INSTSEG.CLASS_NAMES:
        return
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        metadata = MetadataCatalog.get(name)
        absent = name not in DatasetCatalog.list() or (
            name in _REGISTERED and name not in SHAPE_SPLITS and not _REGISTERED[name][0].is_file()
        )
        if absent and not hasattr(metadata, "thing_classes"):
            metadata.thing_classes = list(cfg.INSTSEG.CLASS_NAMES)


def dataset_files(name: str) -> tuple[Path, Path] | None:
    """Return annotation file and image folder of a data set, None if it is not a COCO-style one.

    Raises:
        KeyError: if no data set has this name; the message lists those of this package.
    """
    _require_known(name)
    if name in _REGISTERED:
        return _REGISTERED[name]
    metadata = MetadataCatalog.get(name)
    json_file, images = getattr(metadata, "json_file", None), getattr(metadata, "image_root", None)
    return (Path(json_file), Path(images)) if json_file and images else None


def require_source(name: str) -> None:
    """Make sure that the files are there which a data set is converted from; quick.

    Raises:
        FileNotFoundError: with the folders and files that are expected.
    """
    if _is_converted(name):
        _CONVERTED[name](_REGISTERED[name][1])


def ensure_files(name: str) -> None:
    """Make the files of a data set that is generated or converted; nothing for all others.

    Raises:
        FileNotFoundError: if the files of a data set to convert are not there.
        ValueError: if one of them cannot be read.
        ImportError: if reading them needs a package that is not installed.
    """
    if name in SHAPE_SPLITS and name in _REGISTERED:
        generate_cached(name, _REGISTERED[name][0])
    elif _is_converted(name):
        json_file, root = _REGISTERED[name]
        write_annotations(name, _CONVERTED[name](root), json_file)


def _is_converted(name: str) -> bool:
    """Tell whether the name stands for our conversion, not for somebody's own files."""
    if name not in _CONVERTED or name not in _REGISTERED:
        return False
    json_file, root = _REGISTERED[name]
    return json_file.parent.name == cached_annotations(name, root).parent.name


def is_semantic(name: str) -> bool:
    """Tell whether a data set holds label maps for semantic segmentation, by its evaluator."""
    return str(MetadataCatalog.get(name).get("evaluator_type")).endswith("sem_seg")


def dataset_classes(name: str) -> list[str]:
    """Return the class names of a data set in the order of the contiguous class indices.

    Read from the annotation file (its categories by ascending id), or from the metadata of data
    sets that another package registered; the names of label maps are ``stuff_classes``.

    Raises:
        KeyError: if no data set has this name, or it has label maps without names.
        FileNotFoundError: if the annotation file is missing.
    """
    _require_known(name)
    if name in SHAPE_SPLITS and name in _REGISTERED:
        return [str(c["name"]) for c in SHAPE_CATEGORIES]
    if _is_converted(name):
        return list(VOC_CLASSES)
    if name in _REGISTERED:
        return [str(c["name"]) for c in read_categories(_REGISTERED[name][0])]
    metadata = MetadataCatalog.get(name)
    if is_semantic(name):
        if not metadata.get("stuff_classes"):
            raise KeyError(
                f"Data set {name!r} has no class names: set MetadataCatalog.get({name!r})"
                ".stuff_classes."
            )
        return list(metadata.stuff_classes)
    if not hasattr(metadata, "thing_classes"):
        DatasetCatalog.get(name)
    return list(metadata.thing_classes)


def load_keypoint_metadata(name: str) -> None:
    """Fill in ``keypoint_names`` and ``keypoint_flip_map`` from the annotation file's categories.

    Points change places in a mirrored image if their names say left and right. A list of pairs that
    was set in the metadata before stays. Data sets of other packages are left alone.

    Raises:
        KeyError: if no data set has this name.
        FileNotFoundError: if the annotation file is missing.
        ValueError: if two categories have different keypoints.
    """
    _require_known(name)
    if name not in _REGISTERED:
        return
    ensure_files(name)
    metadata = MetadataCatalog.get(name)
    names = declared_keypoints(read_categories(_REGISTERED[name][0]))
    if not names or metadata.get("keypoint_names") == names:
        return
    metadata.keypoint_names = names
    if metadata.get("keypoint_flip_map") is None:
        metadata.keypoint_flip_map = mirror_pairs(names)
        logger.info(
            "%s: keypoints that change places in a mirrored image: %s.",
            name,
            ", ".join("/".join(pair) for pair in metadata.keypoint_flip_map) or "none",
        )


def _require_known(name: str) -> None:
    if name not in DatasetCatalog.list():
        known = ", ".join(sorted(_REGISTERED)) or "none"
        raise KeyError(
            f"No data set is called {name!r}; known here: {known}. "
            "Register your own with --register NAME=ANNOTATIONS.json:IMAGE_DIR."
        )


def _load(name: str) -> list[dict]:
    """Load a registered data set and fill in its metadata; called by detectron2's catalog."""
    ensure_files(name)
    json_file, image_root = _REGISTERED[name]
    dicts, classes, contiguous = load_coco(json_file, image_root)
    metadata = MetadataCatalog.get(name)
    if list(getattr(metadata, "thing_classes", classes)) != classes:
        # Names taken from a config before the file was there; the file knows better.
        kind = metadata.evaluator_type
        MetadataCatalog.pop(name)
        metadata = MetadataCatalog.get(name).set(
            json_file=str(json_file), image_root=str(image_root), evaluator_type=kind
        )
    metadata.thing_classes = classes
    metadata.thing_dataset_id_to_contiguous_id = contiguous
    if any("keypoints" in a for d in dicts for a in d["annotations"]):
        try:
            load_keypoint_metadata(name)
        except ValueError as error:  # no reason not to train masks
            logger.warning("%s: %s", json_file, error)
    return dicts
