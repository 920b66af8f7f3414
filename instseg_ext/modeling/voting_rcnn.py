"""Two-stage models whose masks are voted by all candidates of an image (MNC, FCIS).

Shapes: C candidates with masks of m x m, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.structures import Boxes, Instances
from fvcore.common.registry import Registry
from torch import Tensor, nn

from instseg_ext.layers.mask_voting import VotingRule, vote_masks
from instseg_ext.modeling.dense import output_size
from instseg_ext.modeling.rcnn import InstSegRCNN
from instseg_ext.structures.legacy_boxes import Frame, add_last_pixel, clip_to_pixels

__all__ = ["VotingRCNN", "original_boxes", "require_voting"]


class VotingRCNN(InstSegRCNN):
    """``InstSegRCNN`` whose region heads return candidates instead of detections.

    In inference the heads give, for each image, ``Instances`` with ``candidate_boxes`` (``Boxes``
    of the network input, continuous), ``candidate_masks`` (C, m, m), probabilities that fill their
    boxes, and ``candidate_scores`` (C, K) without the background. ``inference`` with
    ``do_postprocess=False`` returns these.

    Attributes:
        heads_class: the region heads of a method's models, or their base.
    """

    heads_class: ClassVar[type[nn.Module]] = nn.Module

    @configurable
    def __init__(
        self,
        *,
        voting: VotingRule | None = None,
        legacy_boxes: bool = False,
        max_size: int = 0,
        **kwargs: Any,
    ) -> None:
        """Keep the parts.

        Args:
            voting: how masks are voted; None for suppression and each detection's own mask.
            legacy_boxes: whether boxes are scaled and clipped with their last pixels, as the
                authors do.
            max_size: ``INPUT.MAX_SIZE_TEST``, see ``Frame.of``; used with ``legacy_boxes`` only.
            **kwargs: the arguments of ``InstSegRCNN``.

        Raises:
            ValueError: if legacy boxes meet images that are stretched.
        """
        super().__init__(**kwargs)
        if legacy_boxes and any(self.stretch_size):
            raise ValueError(
                "Legacy boxes need images scaled by one factor: set INSTSEG.STRETCH to (0, 0)."
            )
        self.voting = voting or VotingRule.own_masks()
        self.legacy_boxes, self.max_size = legacy_boxes, max_size

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor arguments; a method adds ``voting`` and ``legacy_boxes``.

        Raises:
            ValueError: if the heads give no candidates, or the outputs cannot be chosen so.
        """
        arch, heads = cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ROI_HEADS.NAME
        if not _fits(ROI_HEADS_REGISTRY, heads, cls.heads_class):
            raise ValueError(
                f"MODEL.ROI_HEADS.NAME {heads} does not fit MODEL.META_ARCHITECTURE {arch}: set it "
                f"to {cls.heads_class.__name__} or a class derived from it."
            )
        if not cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON:
            raise ValueError(f"{arch} needs MODEL.MASK_ON True and MODEL.KEYPOINT_ON False.")
        if cfg.TEST.AUG.ENABLED:
            raise ValueError(
                f"{arch} has no test-time augmentation, which adds masks to given boxes: here a "
                "mask is made of all candidates around it. Set TEST.AUG.ENABLED to False."
            )
        return {**super().from_config(cfg), "max_size": cfg.INPUT.MAX_SIZE_TEST}

    def inference(
        self,
        batched_inputs: list[dict],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[dict[str, Instances]] | list[Instances]:
        """Detect; see ``InstSegRCNN.inference``.

        Raises:
            ValueError: if boxes are given: a mask is made of all candidates around it.
        """
        if detected_instances is not None:
            raise ValueError(
                f"{type(self).__name__} cannot add masks to given boxes, as test-time augmentation "
                "does; set TEST.AUG.ENABLED to False."
            )
        return super().inference(batched_inputs, None, do_postprocess)

    def postprocess(
        self, results: Sequence[Instances], batched_inputs: list[dict]
    ) -> list[dict[str, Instances]]:
        """Vote at the original image sizes; the arguments are left as they are.

        Args:
            results: candidates, one ``Instances`` per image.
            batched_inputs: loader dicts.

        Returns:
            For each image ``pred_boxes``, ``scores``, ``pred_classes`` and ``pred_masks`` or
            ``pred_masks_rle``, by falling score.
        """
        return [
            {"instances": self._detections(result, output_size(item, result.image_size))}
            for result, item in zip(results, batched_inputs, strict=True)
        ]

    def _detections(self, candidates: Instances, image_size: tuple[int, int]) -> Instances:
        """Vote on the candidates of one image of the original (height, width)."""
        boxes = original_boxes(
            candidates.candidate_boxes.tensor.float(),
            candidates.image_size,
            image_size,
            legacy_max_size=self.max_size if self.legacy_boxes else None,
        )
        voted = vote_masks(
            boxes,
            candidates.candidate_masks,
            candidates.candidate_scores,
            image_size,
            self.voting,
            self.mask_budget_mb,
            output=self.mask_output,
        )
        detections = Instances(
            image_size,
            pred_boxes=Boxes(voted.boxes),
            scores=voted.scores,
            pred_classes=voted.classes,
        )
        detections.set(
            "pred_masks" if self.mask_output == "bool" else "pred_masks_rle", voted.masks
        )
        return detections


def require_voting(cfg: CfgNode, usual: str) -> None:
    """Make sure that region heads that give candidates are in a model that votes on them.

    Args:
        cfg: the config.
        usual: the architecture that the heads were written for.

    Raises:
        ValueError: if ``MODEL.META_ARCHITECTURE`` is no ``VotingRCNN``.
    """
    arch = cfg.MODEL.META_ARCHITECTURE
    if not _fits(META_ARCH_REGISTRY, arch, VotingRCNN):
        raise ValueError(
            f"MODEL.META_ARCHITECTURE {arch} does not fit MODEL.ROI_HEADS.NAME "
            f"{cfg.MODEL.ROI_HEADS.NAME}, whose candidates have to be voted on: set it to {usual}."
        )


def _fits(registry: Registry, name: str, parent: type) -> bool:
    """Return whether a name stands for ``parent`` or a class derived from it.

    A name that nobody registered fits: detectron2 tells so when it builds the part.
    """
    if name not in registry:
        return True
    found = registry.get(name)
    return isinstance(found, type) and issubclass(found, parent)


def original_boxes(
    boxes: Tensor,
    image_size: Sequence[int],
    original_size: Sequence[int],
    *,
    legacy_max_size: int | None = None,
) -> Tensor:
    """Bring boxes from the network input to the original image, and clip them to it.

    Args:
        boxes: (C, 4) XYXY, pixels of the network input, continuous.
        image_size: (H, W) of the network input without padding.
        original_size: (H0, W0).
        legacy_max_size: None for continuous boxes. Otherwise, the first and the last pixel are
            scaled by the factor that ``Frame.of`` finds with this limit, and clipped, as the
            authors do.

    Returns:
        (C, 4), continuous.
    """
    height, width = int(original_size[0]), int(original_size[1])
    if legacy_max_size is not None:
        frame = Frame.of(image_size, (height, width), legacy_max_size)
        last_pixels = add_last_pixel(boxes, -1.0) / frame.pixel
        return clip_to_pixels(add_last_pixel(last_pixels, 1.0), (height, width), 1.0)
    scale = boxes.new_tensor([width / image_size[1], height / image_size[0]]).repeat(2)
    scaled = Boxes(boxes * scale)
    scaled.clip((height, width))
    return scaled.tensor
