"""The linear models of SDS, fitted to the features of a training set (Sec. 3 and 4 of its sheet).

Shapes: K classes, D features, S x S cells.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

from instseg_ext.methods.sds.feature_store import FeatureStore, ImageFeatures
from instseg_ext.methods.sds.logistic import fit_logistic
from instseg_ext.methods.sds.refine import Refiner, enlarge, mask_cells
from instseg_ext.methods.sds.svm import LinearSvm, MinedSvm, SvmOptions
from instseg_ext.methods.sds.targets import latent_positives, svm_negatives

__all__ = [
    "FitOptions",
    "RefineOptions",
    "SvmModels",
    "fit_options",
    "fit_refiner_class",
    "fit_svms",
    "refine_options",
]

logger = logging.getLogger(__name__)

# Images, and regions of each, whose features tell the mean norm.
_NORM_IMAGES = 100
_NORM_REGIONS = 100
# Superpixels, over all regions of a class, that the second regression sees.
_MAX_SUPERPIXELS = 1_000_000


@dataclass(frozen=True)
class FitOptions:
    """Settings of the classifiers; see the config keys of the same names."""

    svm: SvmOptions = field(default_factory=SvmOptions)
    norm: float = 20.0
    negative_iou: float = 0.2
    latent: bool = True
    latent_iou: float = 0.5
    first_images: int = 1000


@dataclass(frozen=True)
class RefineOptions:
    """Settings of the refinement; see the config keys of the same names."""

    min_iou: float = 0.7
    max_samples: int = 5000
    c: float = 0.01
    superpixel_c: float = 1.0
    min_pixels: int = 100
    min_coarse: float = 0.2


class SvmModels(NamedTuple):
    """Fitted classifiers.

    Attributes:
        weight: (K, D) float32, of features times ``scale``.
        bias: (K,) float32.
        scale: () float32.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor


def fit_options(cfg: CfgNode) -> FitOptions:
    """Read ``MODEL.SDS.SVM``."""
    node = cfg.MODEL.SDS.SVM
    svm = SvmOptions(c=node.C, positive_weight=node.POSITIVE_WEIGHT, bias_value=node.BIAS_VALUE)
    return FitOptions(
        svm, node.NORM, node.NEGATIVE_IOU, node.LATENT, node.LATENT_IOU, node.FIRST_IMAGES
    )


def refine_options(cfg: CfgNode) -> RefineOptions:
    """Read ``MODEL.SDS.REFINE``."""
    node = cfg.MODEL.SDS.REFINE
    return RefineOptions(
        node.MIN_IOU,
        node.MAX_SAMPLES,
        node.C,
        node.SUPERPIXEL_C,
        node.MIN_PIXELS,
        node.MIN_COARSE,
    )


# --- classifiers ---------------------------------------------------------------------------------


def fit_svms(store: FeatureStore, num_classes: int, options: FitOptions, seed: int) -> SvmModels:
    """Fit a classifier for each class, with hard negatives of all images.

    All classes share one pass over the files; in memory are the positives and the hard negatives,
    in 16 bits. A class that no image has never scores.

    Args:
        store: of the training set.
        num_classes: K.
        options: settings.
        seed: of the images whose negatives the first round sees.
    """
    rng = np.random.default_rng(seed)
    scale = options.norm / max(_mean_norm(store, rng), 1e-12)
    scaled = _Scaled(store, scale)
    mined = {
        label: MinedSvm(options.svm, positives)
        for label, positives in scaled.objects(num_classes).items()
    }
    order = rng.permutation(store.num_images)
    rounds = [order[: options.first_images], np.arange(store.num_images)]
    for number, images in enumerate(rounds if options.latent else rounds[1:]):
        if number:
            found = scaled.latent({k: m.model for k, m in mined.items()}, options.latent_iou)
            for label, positives in found.items():
                mined[label].replace_positives(positives)
                mined[label].fit()
        for image in images:
            _mine(scaled, int(image), mined, options)
        for label, svm in mined.items():
            model = svm.fit()
            logger.info(
                "Class %d: %d positives, %d hard negatives, objective %.5g.",
                label,
                len(svm.positives),
                len(svm.negatives),
                model.objective,
            )
    return _stacked(mined, num_classes, scaled.num_features, scale)


def _mine(scaled: _Scaled, image: int, mined: dict[int, MinedSvm], options: FitOptions) -> None:
    """Hand the negatives of an image to all classes."""
    entry = scaled.store.read(image)
    features = scaled.rows(entry, slice(None)).astype(np.float32)
    # 2^32 regions of an image are more than there are.
    keys = image * 2**32 + np.arange(len(features))
    for label, svm in mined.items():
        negative = svm_negatives(entry.iou, entry.classes, label, options.negative_iou)
        svm.add(features, keys, negative.numpy())


def _mean_norm(store: FeatureStore, rng: np.random.Generator) -> float:
    total, count = 0.0, 0
    for image in rng.permutation(store.num_images)[:_NORM_IMAGES]:
        features = store.read(int(image)).features
        rows = np.sort(rng.permutation(len(features))[:_NORM_REGIONS])
        total += float(np.linalg.norm(features[rows].astype(np.float32), axis=1).sum())
        count += len(rows)
    return total / max(count, 1)


class _Scaled:
    """The features of a store times a number, as float16."""

    def __init__(self, store: FeatureStore, scale: float) -> None:
        self.store, self.scale = store, scale
        self.num_features = store.read(0).features.shape[1]

    def rows(self, entry: ImageFeatures, rows: np.ndarray | slice) -> np.ndarray:
        """Return some rows of an image."""
        return (entry.features[rows].astype(np.float32) * self.scale).astype(np.float16)

    def objects(self, num_classes: int) -> dict[int, np.ndarray]:
        """Return the features of the objects of each class that there is."""
        found: dict[int, list[np.ndarray]] = {}
        for entry in self.store:
            features = self.rows(entry, slice(0, len(entry.classes)))
            for label in entry.classes.unique().tolist():
                found.setdefault(label, []).append(features[(entry.classes == label).numpy()])
        return {k: np.concatenate(found[k]) for k in range(num_classes) if k in found}

    def latent(self, models: dict[int, LinearSvm], min_iou: float) -> dict[int, np.ndarray]:
        """Return the features of the best region of each object; a class keeps what it has."""
        found: dict[int, list[np.ndarray]] = {}
        for entry in self.store:
            features = self.rows(entry, slice(None))
            single = features.astype(np.float32)
            for label in entry.classes.unique().tolist():
                # The bias is the same for all.
                scores = torch.from_numpy(single @ models[label].weight.astype(np.float32))
                rows = latent_positives(entry.iou, entry.classes, label, scores, min_iou)
                if len(rows):
                    found.setdefault(label, []).append(features[rows.numpy()])
        return {label: np.concatenate(parts) for label, parts in found.items()}


def _stacked(
    mined: dict[int, MinedSvm], num_classes: int, num_features: int, scale: float
) -> SvmModels:
    weight = torch.zeros(num_classes, num_features)
    # A class that nothing is known of must not be found.
    bias = torch.full((num_classes,), -1e4)
    for label, svm in mined.items():
        weight[label] = torch.from_numpy(svm.model.weight)
        bias[label] = svm.model.bias
    return SvmModels(weight, bias, torch.tensor(scale, dtype=torch.float32))


# --- refinement ----------------------------------------------------------------------------------


class _Samples(NamedTuple):
    """The regions of an image that a class's refinement learns from."""

    image: int
    rows: Tensor
    objects: Tensor


def fit_refiner_class(
    store: FeatureStore, refiner: Refiner, label: int, options: RefineOptions, seed: int
) -> bool:
    """Fit the two regressions of a class in place.

    Args:
        store: of the training set.
        refiner: of all classes, on the CPU.
        label: the class.
        options: settings.
        seed: of the choice among too many regions.

    Returns:
        Whether there was a region to learn from; without one nothing changes.
    """
    samples = _good_regions(store, label, options, seed)
    if not samples:
        return False
    inputs, labels = zip(*(_cell_samples(store, refiner, s) for s in samples), strict=True)
    inputs, labels = torch.cat(inputs), torch.cat(labels)
    weight, bias = fit_logistic(inputs, labels, options.c)
    refiner.coarse_weight[label], refiner.coarse_bias[label] = weight, bias
    coarse = (inputs @ weight.T + bias).sigmoid()
    parts = coarse.split([len(s.rows) for s in samples])
    found = [
        _superpixel_samples(store, refiner, sample, part, options)
        for sample, part in zip(samples, parts, strict=True)
    ]
    pairs, members = (torch.cat(part)[:_MAX_SUPERPIXELS] for part in zip(*found, strict=True))
    if len(pairs):
        weight, bias = fit_logistic(pairs.double(), members[:, None], options.superpixel_c)
        refiner.superpixel_weight[label], refiner.superpixel_bias[label] = weight[0], bias[0]
    logger.info("Class %d: refinement learned from %d regions.", label, len(inputs))
    return True


def _good_regions(
    store: FeatureStore, label: int, options: RefineOptions, seed: int
) -> list[_Samples]:
    """Find the regions that overlap an object of a class well, and which object it is."""
    found = []
    for image, entry in enumerate(store):
        of_class = (entry.classes == label).nonzero().flatten()
        if not len(of_class):
            continue
        best, which = entry.iou[:, of_class].max(dim=1)
        best[: len(entry.classes)] = -1
        rows = (best >= options.min_iou).nonzero().flatten()
        if len(rows):
            found.append(_Samples(image, rows, of_class[which[rows]]))
    total = sum(len(sample.rows) for sample in found)
    if total <= options.max_samples:
        return found
    keep = torch.zeros(total, dtype=torch.bool)
    drawn = np.random.default_rng([seed, label]).permutation(total)[: options.max_samples]
    keep[torch.from_numpy(drawn)] = True
    parts = keep.split([len(sample.rows) for sample in found])
    return [
        _Samples(sample.image, sample.rows[part], sample.objects[part])
        for sample, part in zip(found, parts, strict=True)
        if part.any()
    ]


def _cell_samples(store: FeatureStore, refiner: Refiner, sample: _Samples) -> tuple[Tensor, Tensor]:
    """Return (N, D + S * S) inputs and (N, S * S) bool labels of the regions of an image."""
    regions = store.regions(sample.image)
    chosen, objects = regions[sample.rows], regions[sample.objects]
    features = torch.from_numpy(store.read(sample.image).features[sample.rows.numpy()]).float()
    boxes = enlarge(chosen.boxes, refiner.margin)
    labels = mask_cells(objects, boxes, refiner.size) > 0.5
    return refiner.cell_inputs(chosen, features), labels


def _superpixel_samples(
    store: FeatureStore,
    refiner: Refiner,
    sample: _Samples,
    coarse: Tensor,
    options: RefineOptions,
) -> tuple[Tensor, Tensor]:
    """Return (M, 2) mean coarse value and membership of superpixels, and (M,) bool labels."""
    regions = store.regions(sample.image)
    chosen = regions[sample.rows]
    means = refiner.project(coarse, chosen)
    members, truth = chosen.members.T, regions.members[:, sample.objects].T
    large = regions.superpixel_sizes() > options.min_pixels
    use = large & ((means > options.min_coarse) | members)
    return torch.stack([means[use], members[use].float()], dim=1), truth[use]
