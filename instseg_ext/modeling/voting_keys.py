"""The rule of mask voting from the keys that its methods have in common."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.config import CfgNode

from instseg_ext.config import check_range
from instseg_ext.layers.mask_voting import VotingRule

__all__ = ["voting_rule"]


def voting_rule(cfg: CfgNode, method: str, rule: Callable[..., VotingRule]) -> VotingRule:
    """Return how masks are voted, or that they are not.

    Args:
        cfg: reads ``VOTE``, ``VOTE_*`` and ``BINARY_THRESH`` of ``MODEL.<method>``, and
            ``TEST.DETECTIONS_PER_IMAGE``.
        method: name of the node.
        rule: makes the rule of the method, of ``VotingRule``'s attributes.

    Raises:
        ValueError: naming the first key whose value is not allowed.
    """
    node, most = cfg.MODEL[method], cfg.TEST.DETECTIONS_PER_IMAGE
    for key, allowed in (
        ("VOTE_NMS", "[0, 1)"),
        ("VOTE_IOU", "[0, 1)"),
        ("BINARY_THRESH", "(0, 1)"),
    ):
        check_range(f"MODEL.{method}.{key}", node[key], allowed)
    if most < 1:
        raise ValueError(f"TEST.DETECTIONS_PER_IMAGE must be positive, not {most}.")
    options = {
        "nms_threshold": node.VOTE_NMS,
        "mask_threshold": node.BINARY_THRESH,
        "min_score": node.VOTE_MIN_SCORE,
        "max_detections": most,
    }
    if not node.VOTE:
        return VotingRule.own_masks(**options)
    return rule(voter_iou=node.VOTE_IOU, reencode=node.VOTE_REENCODE, **options)
