"""Data sets in other formats than COCO's, which detectron2 registers: LVIS and Cityscapes.

What reading and evaluating them takes (packages, folders), and how an LVIS file differs from a COCO
file.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from types import ModuleType

import numpy as np
from detectron2.data import MetadataCatalog

__all__ = ["is_lvis", "lvis_as_coco", "lvis_problems", "require_files", "require_packages"]

logger = logging.getLogger(__name__)

_CITYSCAPES = ("cityscapesscripts", "cityscapesScripts")
# Polygons of instances need it.
_SHAPELY = ("shapely", "shapely")
# Modules and what to install for them, by evaluator type.
_PACKAGES = {
    "lvis": (("lvis", "lvis"),),
    "cityscapes": (_SHAPELY, _CITYSCAPES),
    "cityscapes_instance": (_SHAPELY, _CITYSCAPES),
    "cityscapes_sem_seg": (_CITYSCAPES,),
}
# Where the metadata of detectron2's data sets say that files and folders are.
_PLACES = ("json_file", "image_root", "image_dir", "gt_dir", "sem_seg_root")
# detectron2 main imports the Cityscapes scripts under the name they have in its owner's repository.
_CITYSCAPES_ALIAS = "deeplearning.projects.cityscapesApi.cityscapesscripts"


def require_packages(name: str) -> None:
    """Make sure that the packages with which detectron2 reads a data set are there and work.

    Args:
        name: of a data set.

    Raises:
        ImportError: naming the package that is missing.
    """
    packages = _PACKAGES.get(MetadataCatalog.get(name).get("evaluator_type"), ())
    for module, package in packages:
        try:
            importlib.import_module(module)
            _PREPARE.get(module, bool)()
        except ImportError as error:
            raise ImportError(
                f"Data set {name!r} needs the package {package}: pip install "
                f"'instseg_ext[eval]' or {package} ({error})."
            ) from error


def require_files(name: str) -> None:
    """Make sure that the files and folders of a data set are there.

    Args:
        name: of a registered data set.

    Raises:
        FileNotFoundError: naming the first that is missing.
    """
    metadata = MetadataCatalog.get(name)
    for place in _PLACES:
        path = metadata.get(place)
        if path and "://" not in str(path) and not os.path.exists(path):
            raise FileNotFoundError(
                f"Data set {name!r} needs {path}, which does not exist. detectron2's own data "
                "sets are looked for in the folder that the environment variable "
                "DETECTRON2_DATASETS names, or in ./datasets."
            )


def is_lvis(content: dict) -> bool:
    """Tell an LVIS file from a COCO file by its images.

    Args:
        content: the parsed file.
    """
    first = next((image for image in content["images"] if isinstance(image, dict)), {})
    return "neg_category_ids" in first and "coco_url" in first


def lvis_as_coco(content: dict) -> dict:
    """Return an LVIS file in the form of a COCO file.

    Image files are named by the end of ``coco_url`` (``val2017/000000000139.jpg``), as detectron2
    does, and no annotation is a crowd.

    Args:
        content: the parsed file; not modified. Entries that are no objects stay.
    """

    def image(entry: object) -> object:
        if not isinstance(entry, dict):
            return entry
        rest = {key: value for key, value in entry.items() if key != "file_name"}
        parts = str(entry.get("coco_url", "")).split("/")[-2:]
        return {**rest, "file_name": "/".join(parts)} if len(parts) == 2 else rest

    def annotation(entry: object) -> object:
        return {"iscrowd": 0, **entry} if isinstance(entry, dict) else entry

    return {
        **content,
        "images": [image(entry) for entry in content["images"]],
        "annotations": [annotation(entry) for entry in content["annotations"]],
    }


def lvis_problems(content: dict) -> list[tuple[str, object]]:
    """Find what LVIS evaluation reads and a file lacks.

    Args:
        content: the parsed file.

    Returns:
        A sentence, and the id of the image it is about or None, for each.
    """
    problems: list[tuple[str, object]] = []
    for image in content["images"]:
        needed = ("coco_url", "neg_category_ids", "not_exhaustive_category_ids")
        missing = [key for key in needed if isinstance(image, dict) and key not in image]
        if missing:
            problems.append((f"the image entry lacks {', '.join(missing)}", image.get("id", "?")))
    for category in content["categories"]:
        if isinstance(category, dict) and category.get("frequency") not in ("r", "c", "f"):
            text = f"category {category.get('name')!r} lacks its frequency: r, c or f"
            problems.append((text, None))
    return problems


def _mend_lvis() -> None:
    """Let the package lvis find ``numpy.float``, which numpy 1.24 removed."""
    _give_numpy("lvis.eval", "float", float)


def _mend_cityscapes() -> None:
    """Make the scripts run, and known under the name that detectron2 main imports."""
    for part in ("Instance", "Pixel"):
        # numpy 2.4 removed it
        module = f"cityscapesscripts.evaluation.eval{part}LevelSemanticLabeling"
        _give_numpy(module, "in1d", np.isin)
    _alias_cityscapes()


def _give_numpy(user: str, name: str, value: object) -> None:
    """Let one module find something that numpy had when the module was written.

    Args:
        user: the module; it calls numpy ``np``. numpy itself stays as it is.
        name: what it looks for.
        value: what it gets.
    """
    module = importlib.import_module(user)
    if hasattr(module.np, name):
        return
    numpy = ModuleType("numpy")
    numpy.__dict__.update(vars(np), **{name: value})
    module.np = numpy
    logger.info("%s was given numpy.%s, which this numpy no longer has.", user, name)


def _alias_cityscapes() -> None:
    """Make the installed Cityscapes scripts importable under the name that detectron2 main uses."""
    parents = _CITYSCAPES_ALIAS.split(".")
    if _CITYSCAPES_ALIAS in sys.modules:
        return
    scripts = importlib.import_module("cityscapesscripts")
    for depth in range(1, len(parents)):
        # The parents need to exist as packages; where the real ones do, they are kept.
        name = ".".join(parents[:depth])
        sys.modules.setdefault(name, ModuleType(name))
        if not hasattr(sys.modules[name], "__path__"):
            sys.modules[name].__path__ = []
    sys.modules[_CITYSCAPES_ALIAS] = scripts
    for part in ("evaluation", "helpers"):
        sys.modules[f"{_CITYSCAPES_ALIAS}.{part}"] = importlib.import_module(
            f"cityscapesscripts.{part}"
        )
    leaf = (
        "evaluation.evalInstanceLevelSemanticLabeling",
        "evaluation.evalPixelLevelSemanticLabeling",
        "helpers.labels",
    )
    for name in leaf:
        sys.modules[f"{_CITYSCAPES_ALIAS}.{name}"] = importlib.import_module(
            f"cityscapesscripts.{name}"
        )
    logger.info("Cityscapes scripts made known to detectron2 under its internal name.")


# What else has to be done before detectron2 can use a module.
_PREPARE = {"lvis": _mend_lvis, "cityscapesscripts": _mend_cityscapes}
