"""PolarMask's head: class, quality, box and rays of every location.

Shape shorthand: N images, L levels, (h_l, w_l) size of level l, P locations of all levels, K
classes, R rays. Locations are level-major, then row-major.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from detectron2.layers import ShapeSpec, get_norm
from torch import Tensor, nn

from instseg_ext.config import check_choice
from instseg_ext.modeling.towers import DeformOptions, build_predictor, build_tower

__all__ = ["PolarMaskHead", "PolarMaskOutputs", "distances", "to_reference_layout"]


class PolarMaskOutputs(NamedTuple):
    """Raw outputs of the head, in the precision it computed in.

    Attributes:
        class_logits: (N, P, K).
        ctr_logits: (N, P), None without the quality branch.
        box_logs: (N, P, 4), logarithms of the distances in pixels to the left, top, right and
            bottom side; None without the box branch.
        ray_logs: (N, P, R), logarithms of the lengths in pixels; None without the mask branch.
        level_sizes: (height, width) of each level.
    """

    class_logits: Tensor
    ctr_logits: Tensor | None
    box_logs: Tensor | None
    ray_logs: Tensor | None
    level_sizes: tuple[tuple[int, int], ...]


def distances(logs: Tensor) -> Tensor:
    """Return the float32 lengths in pixels of logarithms in any precision."""
    return logs.float().exp()


def to_reference_layout(raw: PolarMaskOutputs) -> dict[str, list[Tensor]]:
    """Return raw outputs as the authors' head gives them, under its names and in its order.

    Returns:
        Per level ``cls_scores`` (N, K, h_l, w_l) logits, ``bbox_preds`` (N, 4, h_l, w_l) pixels,
        ``centernesses`` (N, 1, h_l, w_l) logits and ``mask_preds`` (N, R, h_l, w_l) pixels, as far
        as the head has these branches.
    """
    flat = {
        "cls_scores": raw.class_logits,
        "bbox_preds": None if raw.box_logs is None else distances(raw.box_logs),
        "centernesses": None if raw.ctr_logits is None else raw.ctr_logits[..., None],
        "mask_preds": None if raw.ray_logs is None else distances(raw.ray_logs),
    }
    sizes = raw.level_sizes
    counts = [height * width for height, width in sizes]
    return {
        name: [
            level.unflatten(1, size).permute(0, 3, 1, 2)
            for level, size in zip(x.split(counts, dim=1), sizes, strict=True)
        ]
        for name, x in flat.items()
        if x is not None
    }


class _Scale(nn.Module):
    """A factor that is learned, 1 at the start."""

    def __init__(self) -> None:
        """Create the parameter, a tensor without dimensions."""
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply, in the precision of ``x``."""
        return x * self.scale


class PolarMaskHead(nn.Module):
    """Towers for classes, boxes and rays (Sec. 3 of arXiv:1909.13226), shared over levels.

    Only the factors of the logarithms differ from level to level. The box branch has a tower of its
    own, as in the authors' code and the published weights, where the paper draws two towers.
    """

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        in_features: Sequence[str],
        num_classes: int,
        num_convs: int = 4,
        width: int = 256,
        norm: str = "GN",
        num_rays: int = 36,
        deform: bool = False,
        prior_prob: float = 0.01,
        init_length: float = 1.0,
        with_box: bool = True,
        with_mask: bool = True,
        with_centerness: bool = True,
    ) -> None:
        """Create the layers and initialise them as the authors do.

        Args:
            input_shape: channels of every pyramid level.
            in_features: levels that are read, finest first; their channels must be equal.
            num_classes: K.
            num_convs: 3x3 convolutions of each tower.
            width: channels of the towers.
            norm: normalisation layer of the towers.
            num_rays: R.
            deform: deformable convolutions v2 in the towers.
            prior_prob: probability of every class at the start.
            init_length: distance of every side and length of every ray at the start, in pixels.
            with_box: whether to have the box branch.
            with_mask: whether to have the rays.
            with_centerness: whether to have the quality branch.

        Raises:
            ValueError: naming the config key, if one of these does not make a head.
        """
        super().__init__()
        channels = _check_features(input_shape, in_features)
        _check_numbers(num_classes, num_convs, num_rays, prior_prob, init_length)
        _check_norm(norm, width)
        if not (with_box or with_mask):
            raise ValueError(
                "MODEL.POLARMASK.WITH_BOX and MODEL.POLARMASK.WITH_MASK cannot both be False: "
                "nothing would be predicted but classes."
            )
        self.in_features = tuple(in_features)
        where = DeformOptions("all" if deform else "none", modulated=True, bias=True)
        self.cls_tower = build_tower(channels, width, num_convs, norm, where)
        self.cls_logits = build_predictor(
            width, num_classes, -math.log((1 - prior_prob) / prior_prob)
        )
        self.ctrness = build_predictor(width, 1, 0.0) if with_centerness else None
        self.box_tower = self.box_pred = self.scales_box = None
        if with_box:
            self.box_tower = build_tower(channels, width, num_convs, norm, where)
            self.box_pred = build_predictor(width, 4, math.log(init_length))
            self.scales_box = nn.ModuleList(_Scale() for _ in in_features)
        self.mask_tower = self.ray_pred = self.scales_ray = None
        if with_mask:
            self.mask_tower = build_tower(channels, width, num_convs, norm, where)
            self.ray_pred = build_predictor(width, num_rays, math.log(init_length))
            self.scales_ray = nn.ModuleList(_Scale() for _ in in_features)

    def forward(self, features: Mapping[str, Tensor]) -> PolarMaskOutputs:
        """Compute the raw outputs.

        Args:
            features: pyramid levels by name, (N, D, h_l, w_l).
        """
        levels = [features[name] for name in self.in_features]
        maps = [self.cls_tower(x) for x in levels]
        ctr_logits = None if self.ctrness is None else _predict(self.ctrness, maps).squeeze(2)
        return PolarMaskOutputs(
            class_logits=_predict(self.cls_logits, maps),
            ctr_logits=ctr_logits,
            box_logs=_logs(levels, self.box_tower, self.box_pred, self.scales_box),
            ray_logs=_logs(levels, self.mask_tower, self.ray_pred, self.scales_ray),
            level_sizes=tuple((x.shape[-2], x.shape[-1]) for x in levels),
        )


def _rows(x: Tensor) -> Tensor:
    """Return a (N, D, h, w) map as (N, h * w, D), a view of it in channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _predict(layer: nn.Module, maps: Sequence[Tensor]) -> Tensor:
    """Return the (N, P, D) predictions from the maps of all levels."""
    return torch.cat([_rows(layer(x)) for x in maps], dim=1)


def _logs(
    levels: Sequence[Tensor],
    tower: nn.Module | None,
    layer: nn.Module | None,
    scales: nn.ModuleList | None,
) -> Tensor | None:
    """Return the (N, P, D) scaled predictions of a branch; None if there is none."""
    if tower is None:
        return None
    pairs = zip(levels, scales, strict=True)
    return torch.cat([_rows(scale(layer(tower(x)))) for x, scale in pairs], dim=1)


def _check_features(input_shape: Mapping[str, ShapeSpec], in_features: Sequence[str]) -> int:
    """Return the channels that all levels have."""
    key = "MODEL.POLARMASK.IN_FEATURES"
    if not in_features:
        raise ValueError(f"{key} must name at least one pyramid level.")
    for name in in_features:
        check_choice(key, name, input_shape)
    channels = [input_shape[name].channels for name in in_features]
    if len(set(channels)) > 1:
        raise ValueError(
            f"{key} must name levels of equal channels, since the towers are shared; those of "
            f"{', '.join(in_features)} are {channels}."
        )
    return channels[0]


def _check_numbers(
    num_classes: int, num_convs: int, num_rays: int, prior_prob: float, init_length: float
) -> None:
    """Refuse numbers that no head can have."""
    least = {
        "NUM_CLASSES": (num_classes, 1),
        "NUM_CONVS": (num_convs, 1),
        "NUM_RAYS": (num_rays, 3),
    }
    for key, (value, minimum) in least.items():
        if value < minimum:
            raise ValueError(f"MODEL.POLARMASK.{key} must be at least {minimum}, not {value}.")
    if not 0 < prior_prob < 1:
        raise ValueError(
            f"MODEL.POLARMASK.PRIOR_PROB must be between 0 and 1, both excluded, not {prior_prob}."
        )
    if init_length <= 0:
        raise ValueError(f"MODEL.POLARMASK.INIT_LENGTH must be positive, not {init_length}.")


def _check_norm(norm: str, width: int) -> None:
    """Refuse a normalisation that is unknown or does not fit the width."""
    try:
        get_norm(norm, width)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"MODEL.POLARMASK.NORM {norm!r} cannot be used with MODEL.POLARMASK.WIDTH {width}: "
            f"{error}."
        ) from error
