"""Two-stage models: detectron2's R-CNN with shared precision, poolers and bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, ROIMasks
from torch import Tensor, nn

from instseg_ext.layers.mask_paste import iter_pasted_masks
from instseg_ext.layers.reduce import mean_over_processes
from instseg_ext.layers.stretch import stretch
from instseg_ext.modeling.dense import one_stretch_size, output_size
from instseg_ext.modeling.features import check_features
from instseg_ext.modeling.masks import collect_masks
from instseg_ext.modeling.poolers import build_pooler
from instseg_ext.modeling.runtime import RuntimeMixin, RuntimeOptions
from instseg_ext.structures.matched_masks import MatchedBitMasks

__all__ = ["InstSegRCNN", "InstSegROIHeads", "paste_instances", "share_masks"]


@META_ARCH_REGISTRY.register()
class InstSegRCNN(RuntimeMixin, GeneralizedRCNN):
    """``GeneralizedRCNN`` with memory format, precision, stretch and mask output of the config.

    Parameter names are those of ``GeneralizedRCNN``, so that model-zoo weights load. In float32 the
    detections and losses are those of ``GeneralizedRCNN`` too.
    """

    @configurable
    def __init__(
        self,
        *,
        runtime: RuntimeOptions | None = None,
        stretch_size: tuple[int, int] = (0, 0),
        **kwargs: Any,
    ) -> None:
        """Keep the parts.

        Args:
            runtime: precision, memory format, mask options; default options if None.
            stretch_size: (height, width) to which each image is stretched before batching; (0, 0) =
                off.
            **kwargs: the arguments of ``GeneralizedRCNN``.
        """
        super().__init__(**kwargs)
        self.stretch_size = tuple(stretch_size)
        for module in self._logit_modules():
            module.register_forward_hook(_to_float32)
        keypoint_head = getattr(self.roi_heads, "keypoint_head", None)
        if hasattr(keypoint_head, "score_lowres"):
            keypoint_head.score_lowres.register_forward_hook(_to_plain_float32)
        self.init_runtime(runtime or RuntimeOptions())

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor arguments.

        Raises:
            ValueError: naming the key whose value is not allowed.
        """
        _check_region_keys(cfg)
        arguments = super().from_config(cfg)
        arguments["runtime"] = RuntimeOptions.from_config(cfg)
        arguments["stretch_size"] = one_stretch_size(cfg)
        return arguments

    def _logit_modules(self) -> Iterator[nn.Module]:
        """Yield the modules whose outputs go into losses, softmax, box decoding or NMS.

        Autocast on the CPU leaves softmax and cross entropy in bfloat16, whose three digits would
        tie scores; so their inputs are made float32. Heads without such parts bring their own care.
        """
        yield from filter(
            None,
            (
                getattr(self.proposal_generator, "rpn_head", None),
                getattr(self.roi_heads, "box_predictor", None),
                getattr(getattr(self.roi_heads, "mask_head", None), "predictor", None),
            ),
        )

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Stretch if so configured, normalise, pad and batch, in the model's memory format."""
        if any(self.stretch_size):
            batched_inputs = [
                {**x, "image": stretch(x["image"], self.stretch_size)} for x in batched_inputs
            ]
        batch = super().preprocess_image(batched_inputs)
        return ImageList(self.to_memory_format(batch.tensor), batch.image_sizes)

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """Return the losses in training, else ``[{"instances": Instances}, ...]``.

        Args:
            batched_inputs: as ``GeneralizedRCNN`` takes them.

        Returns:
            float32 scalars, or per image ``pred_boxes``, ``scores``, ``pred_classes`` and, with a
            mask head, ``pred_masks`` or ``pred_masks_rle``, at the original image size.

        Raises:
            ValueError: if boxes are proposed neither by the model nor with the inputs.
        """
        if not self.training:
            return self.inference(batched_inputs)
        self._require_proposals(batched_inputs)
        with self.precision():
            losses = super().forward(batched_inputs)
        return {name: value.float() for name, value in losses.items()}

    def inference(
        self,
        batched_inputs: list[dict],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[dict[str, Instances]] | list[Instances]:
        """Detect, or only add masks to given boxes; see ``GeneralizedRCNN.inference``.

        Args:
            batched_inputs: loader dicts.
            detected_instances: known boxes, at the scale of the network input.
            do_postprocess: rescale to the original size and paste masks.

        Raises:
            ValueError: if boxes are given in no way.
        """
        if detected_instances is None:
            self._require_proposals(batched_inputs)
        with self.precision():
            results = super().inference(batched_inputs, detected_instances, do_postprocess=False)
        if not do_postprocess:
            return results
        return self.postprocess(results, batched_inputs)

    def _require_proposals(self, batched_inputs: list[dict]) -> None:
        """Make sure that there are proposals, of the model or loaded ones."""
        if self.proposal_generator is None and any("proposals" not in x for x in batched_inputs):
            raise ValueError(
                "Inputs carry no proposals, and MODEL.PROPOSAL_GENERATOR.NAME "
                "PrecomputedProposals makes none: for training and evaluation set "
                "MODEL.LOAD_PROPOSALS True and DATASETS.PROPOSAL_FILES_TRAIN and _TEST; for single "
                "pictures name a generator such as RPN."
            )

    def postprocess(
        self, results: Sequence[Instances], batched_inputs: list[dict]
    ) -> list[dict[str, Instances]]:
        """Bring results to the original image sizes; the arguments are left as they are."""
        return [
            {
                "instances": paste_instances(
                    result,
                    output_size(item, result.image_size),
                    budget_mb=self.mask_budget_mb,
                    output=self.mask_output,
                )
            }
            for result, item in zip(results, batched_inputs, strict=True)
        ]


def _check_region_keys(cfg: CfgNode) -> None:
    """Refuse what detectron2 accepts and then fails on in training.

    Raises:
        ValueError: naming the key.
    """
    classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if classes < 1:
        raise ValueError(f"MODEL.ROI_HEADS.NUM_CLASSES must be positive, not {classes}.")
    weights = cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS
    if len(weights) != 4 or min(weights) <= 0:
        raise ValueError(
            "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS must be four positive numbers, for dx, dy, dw and "
            f"dh, not {tuple(weights)}."
        )


def _to_float32(module: nn.Module, arguments: Any, outputs: Any) -> Any:
    """Forward hook: return the tensors of ``outputs``, also in lists and tuples, as float32."""
    if isinstance(outputs, list | tuple):
        return type(outputs)(_to_float32(module, arguments, value) for value in outputs)
    return outputs.float()


def _to_plain_float32(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
    """Forward hook for heat maps, which detectron2's keypoint loss views cell by cell.

    The upsampling that follows keeps the memory format, so that it must not be channels_last.
    """
    return output.float().contiguous()


def paste_instances(
    results: Instances,
    image_size: tuple[int, int],
    *,
    threshold: float = 0.5,
    budget_mb: float = 256,
    output: str = "bool",
) -> Instances:
    """Rescale detections to the original image and paste their masks in bounded memory.

    Does what detectron2's ``detector_postprocess`` does, bit for bit, but changes no input, keeps
    the working memory under a budget and gives bool masks for no detections too.

    Args:
        results: detections at the scale of the network input: ``pred_boxes``; optionally
            ``pred_masks`` as probabilities (N, 1, m, m) or ``ROIMasks``, ``pred_keypoints``,
            anything else.
        image_size: (H0, W0) of the original image.
        threshold: inclusive lower bound of a mask pixel.
        budget_mb: MiB of working memory of the pasting.
        output: "bool" (``pred_masks``) or "rle" (``pred_masks_rle``).

    Returns:
        The detections whose clipped box is not empty, at ``image_size``.
    """
    height, width = int(image_size[0]), int(image_size[1])
    scale_x, scale_y = width / results.image_size[1], height / results.image_size[0]
    fields = dict(results.get_fields())
    boxes = Boxes(fields.pop("pred_boxes").tensor.float().clone())
    boxes.scale(scale_x, scale_y)
    boxes.clip((height, width))
    roi_masks = fields.pop("pred_masks", None)
    # pred_boxes go first: they tell the length should everything else be missing
    scaled = Instances((height, width), pred_boxes=boxes, **fields)
    keep = boxes.nonempty()
    scaled = scaled[keep]
    if scaled.has("pred_keypoints"):
        factor = scaled.pred_keypoints.new_tensor([scale_x, scale_y, 1])
        scaled.pred_keypoints = scaled.pred_keypoints * factor
    if roi_masks is not None:
        probs = roi_masks.tensor if isinstance(roi_masks, ROIMasks) else roi_masks[:, 0]
        chunks = iter_pasted_masks(
            probs[keep], scaled.pred_boxes.tensor, (height, width), threshold, budget_mb, reuse=True
        )
        masks, _ = collect_masks(
            chunks, len(scaled), (height, width), output=output, device=probs.device
        )
        scaled.set("pred_masks" if output == "bool" else "pred_masks_rle", masks)
    return scaled


@ROI_HEADS_REGISTRY.register()
class InstSegROIHeads(StandardROIHeads):
    """``StandardROIHeads`` with poolers from ``build_pooler`` and a choice of loss normaliser.

    detectron2 divides the box losses by the regions sampled in this process, the mask loss by those
    of them that are foreground, and the keypoint loss by the labelled points in these. With
    ``loss_normalizer="global"`` the counts are averaged over the processes, so that the mean over
    processes of a loss is the loss of all their regions together. The RPN needs no change: it
    divides by a constant per image.

    Note:
        Two processes equal one only as far as they look at the same regions. Anchors and regions
        are subsampled with the random numbers of each process, so that exact equality needs samples
        that nothing is dropped from (``BATCH_SIZE_PER_IMAGE`` of RPN and ROI_HEADS no smaller than
        what there is, both ``POSITIVE_FRACTION`` 1.0); elsewhere it holds in expectation.
    """

    @configurable
    def __init__(self, *, loss_normalizer: str = "local", **kwargs: Any) -> None:
        """Keep the parts.

        Args:
            loss_normalizer: "local" or "global".
            **kwargs: the arguments of ``StandardROIHeads``.
        """
        super().__init__(**kwargs)
        self.loss_normalizer = loss_normalizer

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor arguments."""
        check_features("MODEL.ROI_HEADS.IN_FEATURES", cfg.MODEL.ROI_HEADS.IN_FEATURES, input_shape)
        arguments = super().from_config(cfg, input_shape)
        arguments["loss_normalizer"] = RuntimeOptions.from_config(cfg).loss_normalizer
        return arguments

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        return _with_pooler("box", super()._init_box_head, cfg, input_shape)

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        return _with_pooler("mask", super()._init_mask_head, cfg, input_shape)

    @classmethod
    def _init_keypoint_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        return _with_pooler("keypoint", super()._init_keypoint_head, cfg, input_shape)

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """Match and sample as ``ROIHeads`` does, without copying a mask for every sample."""
        return super().label_and_sample_proposals(
            proposals, [share_masks(target) for target in targets]
        )

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """See ``StandardROIHeads.forward``."""
        instances, losses = super().forward(images, features, proposals, targets)
        if not self.training or self.loss_normalizer == "local":
            return instances, losses
        counts = self.loss_counts(instances)
        # Sorted: processes must average the same counts at the same time.
        for name in sorted(losses.keys() & counts.keys()):
            local = max(float(counts[name]), 1.0)
            everywhere = mean_over_processes(losses[name].new_tensor(float(counts[name])))
            losses[name] = losses[name] * (local / everywhere.clamp(min=1e-6))
        return instances, losses

    def loss_counts(self, sampled: list[Instances]) -> dict[str, int]:
        """Return by what this process divided each loss.

        Every process must return the same names. Losses that are not named are left alone.

        Args:
            sampled: per image the sampled regions with ``gt_classes``.
        """
        regions = sum(len(x) for x in sampled)
        foreground = sum(int((x.gt_classes < self.num_classes).sum()) for x in sampled)
        counts = {"loss_cls": regions, "loss_box_reg": regions, "loss_mask": foreground}
        if self.keypoint_on and self.keypoint_head.loss_normalizer == "visible":
            counts["loss_keypoint"] = sum(_count_keypoints(x, self.num_classes) for x in sampled)
        return counts


def _count_keypoints(sampled: Instances, num_classes: int) -> int:
    """Return how many labelled keypoints lie in the sampled foreground regions of one image."""
    foreground = sampled[sampled.gt_classes < num_classes]
    # The number of cells does not matter here: a point is in the box or not.
    _, valid = foreground.gt_keypoints.to_heatmap(foreground.proposal_boxes.tensor, 56)
    return int(valid.sum())


def _with_pooler(
    part: str, build: Any, cfg: CfgNode, input_shape: dict[str, ShapeSpec]
) -> dict[str, Any]:
    """Let detectron2 build one head and put our pooler in place of its own."""
    node_name = f"ROI_{part.upper()}_HEAD"
    kind = cfg.MODEL[node_name].POOLER_TYPE
    if not kind:
        if part == "box":
            raise ValueError(
                "MODEL.ROI_BOX_HEAD.POOLER_TYPE must name a pooler; only mask and keypoint heads "
                "may read the maps themselves."
            )
        return build(cfg, input_shape)
    known = cfg.clone()
    known.defrost()
    known.MODEL[node_name].POOLER_TYPE = "ROIAlignV2"  # detectron2 refuses kinds it does not know
    arguments = build(known, input_shape)
    if f"{part}_pooler" in arguments:
        names = cfg.MODEL.ROI_HEADS.IN_FEATURES
        arguments[f"{part}_pooler"] = build_pooler(
            kind,
            cfg.MODEL[node_name].POOLER_RESOLUTION,
            [1.0 / input_shape[name].stride for name in names],
            cfg.MODEL[node_name].POOLER_SAMPLING_RATIO,
        )
    return arguments


def share_masks(target: Instances) -> Instances:
    """Return the ground truth with bit masks that can be indexed without copies."""
    if not target.has("gt_masks") or not isinstance(target.gt_masks, BitMasks):
        return target
    fields = dict(target.get_fields())
    fields["gt_masks"] = MatchedBitMasks(target.gt_masks)
    return Instances(target.image_size, **fields)
