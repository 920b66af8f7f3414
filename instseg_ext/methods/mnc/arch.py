"""MNC's frame: stage 1 learns from what stage 3 sampled, and masks vote at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from instseg_ext.layers.mask_voting import VotingRule
from instseg_ext.methods.mnc.roi_heads import MNCROIHeads
from instseg_ext.methods.mnc.rpn import MNCRPN
from instseg_ext.methods.mnc.sampling import anchor_overrides
from instseg_ext.modeling.dense import output_size
from instseg_ext.modeling.voting_keys import voting_rule
from instseg_ext.modeling.voting_rcnn import VotingRCNN

__all__ = ["MNCRCNN"]


class SizedImageList(ImageList):
    """An ``ImageList`` that knows the shortest side of a proposal in each image."""

    def __init__(
        self, tensor: Tensor, image_sizes: list[tuple[int, int]], min_sides: list[float]
    ) -> None:
        """Keep the batch, see ``ImageList``, and ``min_sides``, in pixels of the network input."""
        super().__init__(tensor, image_sizes)
        self.min_sides = min_sides


@META_ARCH_REGISTRY.register()
class MNCRCNN(VotingRCNN):
    """Multi-task network cascades (arXiv:1512.04412) of three or five stages.

    With loaded proposals there is no stage 1: boxes have no gradient there, and no label of an
    anchor to change.
    """

    heads_class: ClassVar[type[nn.Module]] = MNCROIHeads

    @configurable
    def __init__(self, *, mix_index: bool = True, min_side: float = 0.0, **kwargs: Any) -> None:
        """Keep the parts.

        Args:
            mix_index: anchors take the labels of the regions that they became.
            min_side: shortest side of a proposal in pixels of the original image; 0: the RPN's own
                option, in pixels of the network input.
            **kwargs: the arguments of ``VotingRCNN``.
        """
        super().__init__(**kwargs)
        self.mix_index, self.min_side = mix_index, min_side
        self.register_load_state_dict_pre_hook(_take_imagenet_layers)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor arguments.

        Raises:
            ValueError: if the proposal generator is not MNC's.
        """
        name = cfg.MODEL.PROPOSAL_GENERATOR.NAME
        if name not in ("MNCRPN", "PrecomputedProposals"):
            raise ValueError(
                f"MODEL.PROPOSAL_GENERATOR.NAME must be MNCRPN or PrecomputedProposals, not {name}:"
                " the cascade trains stage 1 through its boxes. MODEL.MNC.BOX_GRAD False and "
                "MIX_INDEX False turn that off."
            )
        node = cfg.MODEL.MNC
        return {
            **super().from_config(cfg),
            "voting": voting_rule(cfg, "MNC", VotingRule.mnc),
            "legacy_boxes": node.LEGACY_BOXES,
            "mix_index": node.MIX_INDEX,
            "min_side": node.MIN_SIDE,
        }

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise, pad and batch; see ``InstSegRCNN.preprocess_image``."""
        images = super().preprocess_image(batched_inputs)
        if not self.min_side:
            return images
        pairs = zip(batched_inputs, images.image_sizes, strict=True)
        scales = [size[0] / output_size(item, size)[0] for item, size in pairs]
        return SizedImageList(
            images.tensor, images.image_sizes, [self.min_side * scale for scale in scales]
        )

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """See ``InstSegRCNN.forward``."""
        if not self.training or not isinstance(self.proposal_generator, MNCRPN):
            return super().forward(batched_inputs)
        with self.precision():
            losses = self._cascade_losses(batched_inputs)
        return {name: value.float() for name, value in losses.items()}

    def _cascade_losses(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        """Run all stages; the loss of the first comes when the others have drawn their sample."""
        images = self.preprocess_image(batched_inputs)
        targets = [item["instances"].to(self.device) for item in batched_inputs]
        features = self.backbone(images.tensor)
        limit = self.roi_heads.box_limit(len(targets))
        proposals, state = self.proposal_generator.propose(images, features, limit)
        samples = self.roi_heads.sample(proposals, targets)
        overrides = anchor_overrides(samples, proposals) if self.mix_index else None
        losses = self.proposal_generator.losses(state, targets, overrides)
        losses |= self.roi_heads.losses(features, samples, targets, limit)
        if limit is not None:
            limit.watch(*losses.values())
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self.visualize_training(batched_inputs, _without_graph(proposals))
        return losses


def _without_graph(proposals: Sequence[Instances]) -> list[Instances]:
    """Return the proposals with boxes that can be drawn."""
    plain = []
    for proposal in proposals:
        fields = dict(proposal.get_fields())
        fields["proposal_boxes"] = type(proposal.proposal_boxes)(
            proposal.proposal_boxes.tensor.detach()
        )
        plain.append(Instances(proposal.image_size, **fields))
    return plain


def _take_imagenet_layers(model: MNCRCNN, weights: dict[str, Any], prefix: str, *_: Any) -> None:
    model.roi_heads.take_imagenet_layers(weights, f"{prefix}roi_heads.")
