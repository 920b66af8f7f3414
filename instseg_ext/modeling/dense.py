"""The base of all full-image methods: one way from loader dicts to losses or instances."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import move_device_like
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from instseg_ext.layers.stretch import stretch
from instseg_ext.modeling.runtime import RuntimeMixin, RuntimeOptions

__all__ = [
    "DenseInstanceSegmenter",
    "dense_arguments",
    "one_stretch_size",
    "output_size",
    "register_meta_architecture",
]


def register_meta_architecture(cls: type) -> type:
    """Register a meta-architecture under its class name.

    Raises:
        RuntimeError: if another package has taken the name.
    """
    name = cls.__name__
    if name in META_ARCH_REGISTRY:
        other = META_ARCH_REGISTRY.get(name).__module__.split(".")[0]
        raise RuntimeError(
            f"The meta-architecture name {name!r} is registered by both {other!r} and "
            f"{cls.__module__.split('.')[0]!r}; import only one of the two packages in a process."
        )
    META_ARCH_REGISTRY.register(cls)
    return cls


def dense_arguments(cfg: CfgNode, *, random_heights: bool = False) -> dict[str, Any]:
    """Return the constructor arguments that every dense model reads from a config the same way.

    All of ``DenseInstanceSegmenter.__init__`` but ``head``.

    Args:
        cfg: full config.
        random_heights: the method trains at the heights of ``INSTSEG.STRETCH_HEIGHTS``, too. Then
            the result has ``stretch_in_training``.

    Raises:
        ValueError: if ``INSTSEG.STRETCH_HEIGHTS`` is set without ``random_heights``.
    """
    arguments = {
        "backbone": build_backbone(cfg),
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
        "runtime": RuntimeOptions.from_config(cfg),
    }
    if not random_heights:
        return {**arguments, "stretch_size": one_stretch_size(cfg)}
    return {
        **arguments,
        "stretch_size": tuple(cfg.INSTSEG.STRETCH),
        "stretch_in_training": len(cfg.INSTSEG.STRETCH_HEIGHTS) == 0,
    }


def one_stretch_size(cfg: CfgNode) -> tuple[int, int]:
    """Return ``INSTSEG.STRETCH`` for a model that also trains at that size.

    Raises:
        ValueError: if ``INSTSEG.STRETCH_HEIGHTS`` asks for other sizes in training.
    """
    if len(cfg.INSTSEG.STRETCH_HEIGHTS):
        raise ValueError(
            f"INSTSEG.STRETCH_HEIGHTS must be [] for {cfg.MODEL.META_ARCHITECTURE}, which trains "
            f"at the one size INSTSEG.STRETCH, but is {list(cfg.INSTSEG.STRETCH_HEIGHTS)}."
        )
    return tuple(cfg.INSTSEG.STRETCH)


def output_size(batched_input: dict, image_size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of the results: the original image's, or else the network input's."""
    return batched_input.get("height", image_size[0]), batched_input.get("width", image_size[1])


class DenseInstanceSegmenter(RuntimeMixin, nn.Module, ABC):
    """Normalise, batch, run backbone and head, then losses or instances.

    A subclass supplies ``losses`` and ``inference``. ``head(features)`` gives the same raw outputs
    in training and inference, up to, not including, per-instance masks.

    Note:
        An image's result may depend on the padding its batch gives it where a method uses
        coordinate channels or group normalisation; each method says so.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        stretch_size: tuple[int, int] = (0, 0),
        stretch_in_training: bool = True,
        runtime: RuntimeOptions | None = None,
    ) -> None:
        """Keep the parts.

        Args:
            backbone: maps (N, C, H, W) to a dict of features.
            head: maps that dict to raw outputs.
            pixel_mean: per channel, in the channel order of the input.
            pixel_std: likewise.
            stretch_size: (height, width) to which each image is stretched before batching; (0, 0) =
                off.
            stretch_in_training: False leaves training images as the mapper gives them.
            runtime: precision, memory format, mask options; default options if None.
        """
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.register_buffer(
            "pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False
        )
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.stretch_size = stretch_size
        self.stretch_in_training = stretch_in_training
        self.init_runtime(runtime or RuntimeOptions())

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.pixel_mean.device

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise, stretch if so configured, pad and batch.

        Args:
            batched_inputs: loader dicts with ``image``: (C, H, W) uint8 or float, values 0..255.

        Returns:
            A batch padded at the bottom and right with zeros, which is the mean colour, in the
            model's memory format; ``image_sizes`` are the sizes before padding.
        """
        images = [move_device_like(x["image"], self.pixel_mean) for x in batched_inputs]
        if any(self.stretch_size) and (self.stretch_in_training or not self.training):
            # Stretch before normalising, as the training mapper does: both then give the same
            # tensor.
            images = [stretch(image, self.stretch_size) for image in images]
        images = [(image - self.pixel_mean) / self.pixel_std for image in images]
        batch = ImageList.from_tensors(
            images,
            self.backbone.size_divisibility,
            padding_constraints=self.backbone.padding_constraints,
        )
        return ImageList(self.to_memory_format(batch.tensor), batch.image_sizes)

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """Return the losses in training, else ``[{"instances": ...}, ...]`` at the original sizes.

        Args:
            batched_inputs: dicts with ``image``, and ``instances`` in training, ``height`` and
                ``width`` (the output size) in inference.

        Raises:
            ValueError: if an image has no ``instances`` in training.
        """
        images = self.preprocess_image(batched_inputs)
        with self.precision():
            raw = self.head(self.backbone(images.tensor))
        if self.training:
            return self.losses(raw, images, self._ground_truth(batched_inputs))
        results = self.inference(raw, images, batched_inputs)
        return [{"instances": instances} for instances in results]

    def _ground_truth(self, batched_inputs: list[dict]) -> list[Instances]:
        for x in batched_inputs:
            if "instances" not in x:
                name = x.get("file_name", x.get("image_id", "an image"))
                raise ValueError(
                    f"Training needs 'instances' for every image, but {name} has none."
                )
        return [x["instances"].to(self.device) for x in batched_inputs]

    @abstractmethod
    def losses(
        self, raw: Any, images: ImageList, gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        """Return the terms to be summed, scalars in fp32.

        Args:
            raw: what ``head`` returned.
            images: the padded batch.
            gt_instances: per image ``gt_boxes``, ``gt_classes``, ``gt_masks``, at the network
                input's scale.
        """

    @abstractmethod
    def inference(self, raw: Any, images: ImageList, batched_inputs: list[dict]) -> list[Instances]:
        """Return per image ``pred_boxes, scores, pred_classes`` and masks, at the original size.

        Args:
            raw: what ``head`` returned.
            images: the padded batch.
            batched_inputs: the loader dicts, for ``height`` and ``width``.
        """
