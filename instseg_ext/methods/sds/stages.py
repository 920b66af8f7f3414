"""What follows the fine-tuning of SDS: features, classifiers, refinement, one checkpoint.

Each stage leaves a file that the next one reads and that a later run takes over, unless the
settings or the weights it came from are others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor

from instseg_ext import data
from instseg_ext.checkpoint import InstSegCheckpointer, atomic_write, read_metadata
from instseg_ext.methods.sds.arch import SDS
from instseg_ext.methods.sds.feature_store import FeatureStore
from instseg_ext.methods.sds.fit import (
    fit_options,
    fit_refiner_class,
    fit_svms,
    refine_options,
)
from instseg_ext.methods.sds.mapper import RegionMapper

__all__ = ["extract_features", "fit_linear_models", "save_fitted"]

logger = logging.getLogger(__name__)

_LOG_PERIOD = 100


def extract_features(
    cfg: CfgNode, model: SDS, dicts: Sequence[dict], folder: str | Path
) -> FeatureStore:
    """Compute the features of the objects and the first regions of all training images.

    The processes of a job share the images; what is in the folder already is not made again.

    Args:
        cfg: with ``MODEL.SDS.REGIONS_TRAIN``.
        model: fine-tuned; put into evaluation mode.
        dicts: detectron2 dictionaries of the images.
        folder: of the files.

    Returns:
        The features of all images, once all processes have come so far.
    """
    store = FeatureStore(folder, len(dicts))
    if comm.is_main_process():
        store.claim(
            {
                "weights": _fingerprint(model.backbone.state_dict()),
                "regions": str(cfg.MODEL.SDS.REGIONS_TRAIN),
                "max_regions": cfg.MODEL.SDS.MAX_REGIONS_TRAIN,
                "images": _digest([str(d["file_name"]) for d in dicts]),
            }
        )
    comm.synchronize()
    # As the image files are: nothing is augmented.
    images = data.InstSegDatasetMapper(
        is_train=True, augmentations=[], image_format=cfg.INPUT.FORMAT
    )
    mapper = RegionMapper(images, cfg.MODEL.SDS.REGIONS_TRAIN)
    model.eval()
    for image in range(comm.get_rank(), len(dicts), comm.get_world_size()):
        if not store.has(image):
            _extract(model, mapper(dicts[image]), cfg.MODEL.SDS.MAX_REGIONS_TRAIN, image, store)
        if (image + 1) % _LOG_PERIOD == 0:
            logger.info("Features of %d of %d images.", image + 1, len(dicts))
    comm.synchronize()
    return store


@torch.no_grad()
def _extract(model: SDS, sample: dict, max_regions: int, image: int, store: FeatureStore) -> None:
    objects = sample["instances"].to(model.device)
    masks = objects.gt_masks.tensor
    regions = model.regions_of(sample)[:max_regions].intersect(masks)
    features = model.features(sample, regions)
    store.write(image, regions, features, regions.iou(masks), objects.gt_classes)


def fit_linear_models(cfg: CfgNode, model: SDS, store: FeatureStore, folder: str | Path) -> None:
    """Fit classifiers and refinement into a model, in the main process alone.

    Args:
        cfg: reads ``MODEL.SDS`` and ``SEED``.
        model: on whichever device; changed in place.
        store: the features.
        folder: where fitted models are kept, one file for the classifiers and one for the
            refinement of each class.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    seed = max(cfg.SEED, 0)
    features = (store.folder / "settings.json").read_text()
    options = fit_options(cfg)
    key = _digest([features, str(dataclasses.asdict(options)), str(seed)])
    file = folder / "svm.pth"
    fitted = _read(file, key)
    if fitted is None:
        fitted = fit_svms(store, model.num_classes, options, seed)._asdict()
        _write(file, key, fitted)
    head = model.head
    head.svm_weight.copy_(fitted["weight"])
    head.svm_bias.copy_(fitted["bias"])
    head.feature_scale.copy_(fitted["scale"])
    head.svm_fitted.fill_(True)
    if cfg.MODEL.SDS.REFINE.ENABLED:
        _fit_refiner(cfg, model, store, folder, features, seed)


def _fit_refiner(
    cfg: CfgNode, model: SDS, store: FeatureStore, folder: Path, features: str, seed: int
) -> None:
    options = refine_options(cfg)
    key = _digest([features, str(dataclasses.asdict(options)), str(seed)])
    device = model.device
    refiner = model.head.refiner.cpu()
    names = [name for name, _ in refiner.named_buffers()]
    for label in range(model.num_classes):
        file = folder / f"refiner_{label:04d}.pth"
        fitted = _read(file, key)
        if fitted is None:
            fit_refiner_class(store, refiner, label, options, seed)
            _write(file, key, {name: getattr(refiner, name)[label].clone() for name in names})
            continue
        for name in names:
            getattr(refiner, name)[label] = fitted[name]
    refiner.to(device)


def save_fitted(cfg: CfgNode, model: SDS, finetuned: str | Path) -> Path:
    """Write the model, networks and linear models together, to ``OUTPUT_DIR/model_final.pth``.

    Args:
        cfg: of the run; it travels in the checkpoint.
        model: fitted.
        finetuned: the checkpoint of fine-tuning, whose class names and data sets it takes over.

    Returns:
        The file.
    """
    metadata = {**read_metadata(str(finetuned)), "config": cfg.dump()}
    checkpointer = InstSegCheckpointer(model, cfg.OUTPUT_DIR, metadata=metadata)
    checkpointer.save_weights("model_final")
    return Path(cfg.OUTPUT_DIR) / "model_final.pth"


def _read(file: Path, key: str) -> dict[str, Tensor] | None:
    """Return what was fitted with the same settings, None if there is nothing of the kind."""
    if not file.is_file():
        return None
    content = torch.load(file, map_location="cpu", weights_only=True)
    return content["fitted"] if content["key"] == key else None


def _write(file: Path, key: str, fitted: dict[str, Any]) -> None:
    with atomic_write(file) as out:
        torch.save({"key": key, "fitted": fitted}, out)


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def _fingerprint(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
