"""PANet's frame: the shared two-stage model, and the authors' geometry on demand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList, Instances
from torch import Tensor

from instseg_ext.methods.panet.legacy import (
    FramedImageList,
    legacy_config,
    paste_legacy_instances,
)
from instseg_ext.methods.panet.legacy_parts import with_pixel
from instseg_ext.modeling.dense import output_size
from instseg_ext.modeling.rcnn import InstSegRCNN
from instseg_ext.structures.legacy_boxes import Frame

__all__ = ["PANetRCNN"]


@META_ARCH_REGISTRY.register()
class PANetRCNN(InstSegRCNN):
    """``InstSegRCNN`` that takes ``MODEL.PANET.LEGACY_D1``; without it there is no difference."""

    @configurable
    def __init__(self, *, legacy: bool = False, max_size: int = 0, **kwargs: Any) -> None:
        """Keep the parts.

        Args:
            legacy: whether the parts see boxes as the authors' code does.
            max_size: ``INPUT.MAX_SIZE_TEST``, see ``Frame.of``.
            **kwargs: the arguments of ``InstSegRCNN``.
        """
        super().__init__(**kwargs)
        self.legacy, self.max_size = legacy, max_size

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor arguments."""
        legacy = cfg.MODEL.PANET.LEGACY_D1
        return {
            **super().from_config(legacy_config(cfg) if legacy else cfg),
            "legacy": legacy,
            "max_size": cfg.INPUT.MAX_SIZE_TEST,
        }

    def _frame(self, item: dict, image_size: tuple[int, int]) -> Frame:
        """Return the frame of a loader dict's image, (H, W) at the scale of the network."""
        return Frame.of(image_size, output_size(item, image_size), self.max_size)

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """See ``InstSegRCNN.forward``.

        Raises:
            ValueError: in training with the authors' geometry.
        """
        if self.training and self.legacy:
            raise ValueError(
                "MODEL.PANET.LEGACY_D1 is for inference with the authors' weights; set it to False "
                "to train."
            )
        return super().forward(batched_inputs)

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise, pad and batch; see ``InstSegRCNN.preprocess_image``."""
        images = super().preprocess_image(batched_inputs)
        if not self.legacy:
            return images
        pairs = zip(batched_inputs, images.image_sizes, strict=True)
        frames = [self._frame(item, size) for item, size in pairs]
        return FramedImageList(images.tensor, images.image_sizes, frames)

    def inference(
        self,
        batched_inputs: list[dict],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[dict[str, Instances]] | list[Instances]:
        """Detect, or only add masks to given boxes; see ``InstSegRCNN.inference``."""
        if self.legacy and detected_instances is not None:
            detected_instances = [
                with_pixel(found, self._frame(item, found.image_size))
                for item, found in zip(batched_inputs, detected_instances, strict=True)
            ]
        return super().inference(batched_inputs, detected_instances, do_postprocess)

    def postprocess(
        self, results: Sequence[Instances], batched_inputs: list[dict]
    ) -> list[dict[str, Instances]]:
        """Bring results to the original image sizes; the arguments are left as they are."""
        if not self.legacy:
            return super().postprocess(results, batched_inputs)
        return [
            {
                "instances": paste_legacy_instances(
                    result,
                    self._frame(item, result.image_size),
                    budget_mb=self.mask_budget_mb,
                    output=self.mask_output,
                )
            }
            for result, item in zip(results, batched_inputs, strict=True)
        ]
