"""An RPN that clips and filters all boxes before it ranks them, as the first Faster R-CNN codes do.

Shapes: N images, L levels, A anchors of all levels of an image, P proposals of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import _dense_box_regression_loss
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from torch import Tensor

from instseg_ext.layers.box_nms import class_nms
from instseg_ext.layers.gradient_limit import GradientLimit
from instseg_ext.modeling.features import check_features

__all__ = ["AnchorOverride", "ClipFirstRPN", "RPNState", "clip_boxes", "inside_image"]

NORMALIZERS = ("constant", "labelled", "mixed")


class AnchorOverride(NamedTuple):
    """Anchors of one image whose labels somebody else decides.

    Attributes:
        background: int64 indices into the image's anchors.
        foreground: likewise; where both name an anchor, this one counts.
    """

    background: Tensor
    foreground: Tensor


@dataclass(frozen=True)
class RPNState:
    """What the losses need of a forward pass.

    Attributes:
        anchors: of each level, the same for all images.
        logits: of each level, (N, A_l).
        deltas: of each level, (N, A_l, 4).
        image_sizes: (height, width) of each image.
    """

    anchors: list[Boxes]
    logits: list[Tensor]
    deltas: list[Tensor]
    image_sizes: list[tuple[int, int]]


def clip_boxes(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Clip (..., 4) continuous boxes to (height, width); differentiable, not in place."""
    height, width = image_size
    high = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), high)


def inside_image(boxes: Tensor, image_size: tuple[int, int], border: float = 0.0) -> Tensor:
    """Return (...) bool: which (..., 4) boxes reach at most ``border`` beyond the image."""
    height, width = image_size
    high = boxes.new_tensor([width, height, width, height]) + border
    return ((boxes >= -border) & (boxes <= high)).all(dim=-1)


class ClipFirstRPN(RPN):
    """``RPN`` in the order of the first codes: decode, clip, drop small boxes, then top-k and NMS.

    detectron2 takes the top-k before it clips. Other differences: each proposal has an
    ``anchor_index`` into the anchors of all levels; boxes can keep their graph; the best anchor of
    an object is looked for among the anchors that may be used, not among all; ``forward`` can be
    had in two parts, with a decision about labels in between.
    """

    @configurable
    def __init__(
        self,
        *,
        normalizer: str = "constant",
        whole_cells: bool = False,
        extra_pixel: bool = False,
        **kwargs: Any,
    ) -> None:
        """Keep the options.

        Args:
            normalizer: what the losses of an image are divided by: "constant",
                ``batch_size_per_image``; "labelled", the anchors that have a label; "mixed", the
                class loss by these and the box loss by the constant.
            whole_cells: propose nothing at cells of which a part is outside the image.
            extra_pixel: boxes end one pixel further right and down than decoded, as in codes that
                take a decoded width for the distance of the first and the last pixel.
            **kwargs: the arguments of ``RPN``.

        Raises:
            ValueError: if the normaliser is unknown.
        """
        super().__init__(**kwargs)
        if normalizer not in NORMALIZERS:
            raise ValueError(f"normalizer must be one of {NORMALIZERS}, not {normalizer!r}.")
        self.normalizer, self.whole_cells = normalizer, whole_cells
        self.extra_pixel = extra_pixel

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor arguments.

        Raises:
            ValueError: if a feature map does not exist.
        """
        check_features("MODEL.RPN.IN_FEATURES", cfg.MODEL.RPN.IN_FEATURES, input_shape)
        return super().from_config(cfg, input_shape)

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Propose and, in training, return the losses; see ``RPN.forward``."""
        proposals, state = self.propose(images, features)
        return proposals, self.losses(state, gt_instances) if self.training else {}

    def propose(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        limit: GradientLimit | None = None,
    ) -> tuple[list[Instances], RPNState]:
        """Return the proposals of each image, best first.

        Args:
            images: the batch. If it has ``min_sides``, a number for each image, these are the
                shortest sides of a box there, network input; else ``min_box_size`` is.
            features: maps by name.
            limit: bounds the gradient that reaches the deltas through boxes, and stops it where the
                anchor or the box was not inside the image. None: boxes have no gradient.

        Returns:
            Instances with ``proposal_boxes``, ``objectness_logits`` and ``anchor_index``, and what
            ``losses`` needs.

        Raises:
            FloatingPointError: in training, if predictions are not finite. Else such boxes are left
                out.
        """
        maps = [features[name] for name in self.in_features]
        logits, deltas = self.rpn_head(maps)
        state = RPNState(
            self.anchor_generator(maps),
            [level.permute(0, 2, 3, 1).flatten(1).float() for level in logits],
            [level.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)) for level in deltas],
            images.image_sizes,
        )
        anchors = Boxes.cat(state.anchors).tensor
        all_deltas = torch.cat(state.deltas, dim=1)
        if self.training and not all(x.isfinite().all() for x in (*state.logits, all_deltas)):
            raise FloatingPointError("RPN predictions are not finite: training has diverged.")
        min_sides = getattr(images, "min_sides", [self.min_box_size] * len(state.image_sizes))
        proposals = []
        for n, (size, min_side) in enumerate(zip(state.image_sizes, min_sides, strict=True)):
            boxes = self._usable_boxes(anchors, all_deltas[n], size, min_side)
            if self.whole_cells:
                boxes[~self._in_whole_cells(maps, size)] = torch.nan
            scores = [level[n].detach() for level in state.logits]
            index = self._select(boxes, scores)
            boxes = boxes[index]
            if limit is not None:
                boxes = self._live_boxes(anchors[index], all_deltas[n, index], size, limit)
            fields = {"objectness_logits": torch.cat(scores)[index], "anchor_index": index}
            proposals.append(Instances(size, proposal_boxes=Boxes(boxes), **fields))
        return proposals, state

    @torch.no_grad()
    def _usable_boxes(
        self, anchors: Tensor, deltas: Tensor, size: tuple[int, int], min_side: float
    ) -> Tensor:
        """Return the boxes (A, 4), clipped; NaN where they are too small or not finite."""
        boxes = self._decode(deltas, anchors)
        finite = boxes.isfinite().all(dim=1)
        boxes = clip_boxes(boxes, size)
        sides = (boxes[:, 2:] - boxes[:, :2]).amin(dim=1)
        boxes[~(finite & (sides >= min_side) & (sides > 0))] = torch.nan
        return boxes

    def _select(self, boxes: Tensor, scores: list[Tensor]) -> Tensor:
        """Return which anchors (P,) are proposals, best first.

        Args:
            boxes: (A, 4); NaN where there is none.
            scores: logits of each level, (A_l,).
        """
        ranked = torch.cat(scores)
        ranked = ranked.masked_fill(boxes[:, 0].isnan() | ~ranked.isfinite(), -torch.inf)
        chosen, levels, start = [], [], 0
        for number, level in enumerate(ranked.split([len(x) for x in scores])):
            best = level.topk(min(len(level), self.pre_nms_topk[self.training])).indices
            best = best[level[best].isfinite()]
            chosen.append(best + start)
            levels.append(torch.full_like(best, number))
            start += len(level)
        rows, most = torch.cat(chosen), self.post_nms_topk[self.training]
        kept = class_nms(boxes[rows], ranked[rows], torch.cat(levels), self.nms_thresh, most)
        return rows[kept]

    def _in_whole_cells(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return (A,) bool: which anchors stand on cells that are inside the image."""
        generator, inside = self.anchor_generator, []
        for level, stride, count in zip(
            maps, generator.strides, generator.num_anchors, strict=True
        ):
            rows, columns = (
                torch.arange(cells, device=level.device) < side // stride
                for cells, side in zip(level.shape[-2:], size, strict=True)
            )
            inside.append((rows[:, None] & columns).flatten().repeat_interleave(count))
        return torch.cat(inside)

    def _decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Return the boxes (R, 4), not clipped."""
        boxes = self.box2box_transform.apply_deltas(deltas, anchors)
        return boxes + boxes.new_tensor([0.0, 0.0, 1.0, 1.0]) if self.extra_pixel else boxes

    def _live_boxes(
        self, anchors: Tensor, deltas: Tensor, size: tuple[int, int], limit: GradientLimit
    ) -> Tensor:
        """Decode and clip the chosen boxes once more, this time with gradients."""
        with torch.no_grad():
            passes = inside_image(anchors, size) & inside_image(self._decode(deltas, anchors), size)
        # These deltas feed the boxes alone, so that the regression loss is not limited.
        return clip_boxes(self._decode(limit.apply(deltas, passes), anchors), size)

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Label anchors as ``RPN`` does, with the matching among usable anchors only.

        With ``anchor_boundary_thresh`` not negative, usable are those that do not reach further
        beyond the image. An object that overlaps none of them makes no anchor positive.
        """
        boxes = Boxes.cat(anchors)
        labels, matched = [], []
        for instances in gt_instances:
            label, objects = self._label_anchors(boxes, instances)
            labels.append(self._subsample_labels(label))
            matched.append(objects)
        return labels, matched

    def _label_anchors(self, anchors: Boxes, instances: Instances) -> tuple[Tensor, Tensor]:
        """Return labels (A,), 1, 0 or -1, of one image and the box of the best object, (A, 4)."""
        usable = self._usable(anchors, instances.image_size)
        overlap = pairwise_iou(instances.gt_boxes, Boxes(anchors.tensor[usable]))
        matched, usable_labels = self.anchor_matcher(overlap)
        labels = torch.full_like(usable, -1, dtype=torch.int8)
        objects = torch.zeros_like(anchors.tensor)
        if len(instances):
            usable_labels[overlap.gather(0, matched[None])[0] == 0] = 0
            objects[usable] = instances.gt_boxes.tensor[matched].to(objects)
        labels[usable] = usable_labels
        return labels, objects

    def _usable(self, anchors: Boxes, size: tuple[int, int]) -> Tensor:
        """Return (A,) bool."""
        if self.anchor_boundary_thresh < 0:
            return torch.ones(len(anchors), dtype=torch.bool, device=anchors.device)
        return inside_image(anchors.tensor, size, self.anchor_boundary_thresh)

    def losses(
        self,
        state: RPNState,
        gt_instances: list[Instances],
        overrides: Sequence[AnchorOverride] | None = None,
    ) -> dict[str, Tensor]:
        """Return the losses, averaged over images.

        Args:
            state: of ``propose``.
            gt_instances: the objects of each image.
            overrides: labels that replace those of sampled and other usable anchors of each image;
                the number of labelled anchors may grow by them. The box target is always the
                object the anchor itself overlaps most.

        Returns:
            ``loss_rpn_cls`` and ``loss_rpn_loc``, float32 scalars.
        """
        labels, matched = self.label_and_sample_anchors(state.anchors, gt_instances)
        anchors = Boxes.cat(state.anchors)
        if overrides is not None:
            for label, size, override in zip(labels, state.image_sizes, overrides, strict=True):
                usable = self._usable(anchors, size)
                for value, index in ((0, override.background), (1, override.foreground)):
                    label[index[usable[index]]] = value
        storage = get_event_storage()
        stacked = torch.stack(labels)
        counts = torch.stack([(stacked == value).sum() for value in (1, 0)]).tolist()
        for kind, number in zip(("pos", "neg"), counts, strict=True):
            storage.put_scalar(f"rpn/num_{kind}_anchors", number / len(labels))
        logits, deltas = torch.cat(state.logits, dim=1), torch.cat(state.deltas, dim=1)
        objectness, location = zip(
            *(
                self._image_losses(anchors.tensor, *image)
                for image in zip(logits, deltas, labels, matched, strict=True)
            ),
            strict=True,
        )
        losses = {
            "loss_rpn_cls": torch.stack(objectness).mean(),
            "loss_rpn_loc": torch.stack(location).mean(),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def _image_losses(
        self, anchors: Tensor, logits: Tensor, deltas: Tensor, labels: Tensor, objects: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return both losses of one image: (A, 4), (A,), (A, 4), (A,), (A, 4)."""
        labelled, positive = labels >= 0, (labels == 1).nonzero()[:, 0]
        # Weights instead of a choice, so that nobody waits for the device to count.
        objectness = F.binary_cross_entropy_with_logits(
            logits, (labels == 1).to(logits), weight=labelled.to(logits), reduction="sum"
        )
        location = _dense_box_regression_loss(
            [anchors[positive]],
            self.box2box_transform,
            [deltas[positive][None].float()],
            [objects[positive]],
            torch.ones_like(positive, dtype=torch.bool)[None],
            box_reg_loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        number, constant = labelled.sum().clamp(min=1), self.batch_size_per_image
        return (
            objectness / (constant if self.normalizer == "constant" else number),
            location / (number if self.normalizer == "labelled" else constant),
        )
