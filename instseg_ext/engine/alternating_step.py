"""One step of alternating training: a part of a two-stage model, and the proposals of an RPN."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils import comm
from torch import Tensor, nn

from instseg_ext import data
from instseg_ext.checkpoint import InstSegCheckpointer
from instseg_ext.engine.alternating_plan import FINAL, Step, unfinished_files
from instseg_ext.engine.distributed import unwrap
from instseg_ext.engine.proposing import Found, write_found
from instseg_ext.engine.trainer import Trainer
from instseg_ext.evaluation import inference_mode, show_progress
from instseg_ext.method import Method

__all__ = ["NoHeads", "ProposalSummary", "StepTrainer", "propose"]

# Overlap from which an object counts as covered by a proposal.
_COVERED_IOU = 0.5


class NoHeads(nn.Module):
    """Takes the place of the RoI heads in a model that only proposes.

    Args:
        used: names of the features that the proposal generator looks at.
    """

    def __init__(self, used: Collection[str]) -> None:
        super().__init__()
        self._used = frozenset(used)

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Return the proposals as they are.

        In training, features that nobody looks at join the loss with weight zero: parallel training
        waits for a gradient of every parameter.
        """
        idle = [f for n, f in features.items() if n not in self._used and f.requires_grad]
        if not (self.training and idle):
            return proposals, {}
        # Before the sum, which would overflow in half precision.
        return proposals, {"loss_idle_features": sum((f * 0.0).sum() for f in idle)}


class StepTrainer(Trainer):
    """Trains the part of a two-stage model that a step is about.

    Args:
        cfg: of the step.
        method: record of the configured method.
        step: which one.
        **kwargs: further arguments of ``Trainer``.
    """

    def __init__(self, cfg: CfgNode, method: Method, step: Step, **kwargs: Any) -> None:
        self._step = step  # the base class builds the model
        super().__init__(cfg, method, **kwargs)

    def build_model(self) -> nn.Module:
        """Build the model without the other part, its backbone frozen if the step says so."""
        model = super().build_model()
        if self._step.proposes:
            _drop_heads(model)
        if self._step.frozen:
            model.backbone.requires_grad_(False)
            model.backbone.eval()
        return model

    def _build_hooks(self) -> list[HookBase | None]:
        hooks = super()._build_hooks()
        return [_FrozenBackbone(), *hooks] if self._step.frozen else hooks


class _FrozenBackbone(HookBase):
    """Keeps the statistics of the backbone's norms: whoever calls ``train`` would set them free."""

    def before_step(self) -> None:
        """Put the backbone back into evaluation mode."""
        backbone = unwrap(self.trainer.model).backbone
        if backbone.training:
            backbone.eval()


def _drop_heads(model: nn.Module) -> None:
    model.roi_heads = NoHeads(getattr(model.proposal_generator, "in_features", ()))


@dataclass(frozen=True)
class ProposalSummary:
    """How good the proposals of a training set are.

    Attributes:
        images: number of images.
        proposals: number of proposals.
        objects: number of annotated objects that are no crowds.
        covered: of these, those that a proposal overlaps with an IoU of at least 0.5.
    """

    images: int
    proposals: int
    objects: int
    covered: int

    def __str__(self) -> str:
        mean = self.proposals / max(self.images, 1)
        share = 100 * self.covered / max(self.objects, 1)
        return (
            f"{mean:.0f} proposals per image for {self.images} images, which cover {share:.1f} % "
            f"of {self.objects} objects at IoU {_COVERED_IOU}"
        )


def propose(
    cfg: CfgNode, method: Method, files: list[Path], limit: int | None = None
) -> ProposalSummary:
    """Write the proposals of a step's RPN for the training sets; every process must call it.

    Images are read as in evaluation, without augmentation; boxes are stored at the size of the
    image file.

    Args:
        cfg: of a step that proposes and whose training is finished.
        method: record of the configured method.
        files: to be written, one for each training set.
        limit: use only the first images of each set; None = all.

    Returns:
        The summary over all sets and processes.
    """
    model = build_model(cfg)
    _drop_heads(model)
    InstSegCheckpointer(model).load(str(Path(cfg.OUTPUT_DIR) / FINAL), checkpointables=[])
    build_mapper = method.build_mapper or data.build_mapper
    mapper = build_mapper(cfg, False)
    counts = torch.zeros(4, dtype=torch.int64)
    if comm.is_main_process():
        for path in (path for file in files for path in unfinished_files(file)):
            path.unlink()
    comm.synchronize()
    for name, file in zip(cfg.DATASETS.TRAIN, files, strict=True):
        dicts = data.training_dicts(cfg, [name], limit, may_be_empty=True)
        # A loader cannot be without images.
        loader = data.build_inference_loader(cfg, dicts, mapper) if dicts else []
        annotations = {str(d["image_id"]): d["annotations"] for d in dicts}
        with inference_mode(model):
            write_found(file, _counted(_proposals(model, loader, name), annotations, counts))
    return ProposalSummary(*torch.stack(comm.all_gather(counts)).sum(0).tolist())


def _proposals(model: nn.Module, loader: Any, name: str) -> Iterator[Found]:
    """Yield what is found in each image of a data set."""
    with show_progress(len(loader), "Proposed regions for", name) as advance:
        for batch in loader:
            results = model.inference(batch, do_postprocess=False)
            for item, result in zip(batch, results, strict=True):
                height, width = result.image_size
                boxes = result.proposal_boxes.clone()
                boxes.scale(item["width"] / width, item["height"] / height)
                yield str(item["image_id"]), boxes.tensor.cpu(), result.objectness_logits.cpu()
            advance()


def _counted(
    found: Iterator[Found], annotations: Mapping[str, list[dict]], counts: Tensor
) -> Iterator[Found]:
    """Pass on what is found in each image, and add to the four numbers of ``ProposalSummary``."""
    for image_id, boxes, logits in found:
        counts += torch.tensor([1, len(boxes), *_coverage(boxes, annotations[image_id])])
        yield image_id, boxes, logits


def _coverage(boxes: Tensor, annotations: list[dict]) -> tuple[int, int]:
    """Return the number of objects of an image, and of those that a box covers."""
    objects = [a for a in annotations if not a.get("iscrowd", 0)]
    if not objects or not len(boxes):
        return len(objects), 0
    truth = torch.from_numpy(data.annotation_boxes(objects)).float()
    overlap = pairwise_iou(Boxes(truth), Boxes(boxes)).amax(dim=1)
    return len(objects), int((overlap >= _COVERED_IOU).sum())
