"""Parameter names of detectron2's first PointRend models."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["rename_old_names"]

# Behind the prefix of the ROI heads, where the two heads stood at first.
_MOVED = {
    "mask_coarse_head.": "mask_head.coarse_head.",
    "mask_point_head.": "mask_head.point_head.",
}


def rename_old_names(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_arguments: Any
) -> None:
    """Rename in place; a load pre-hook for the ROI heads and for the mask head.

    torch shows a module only what is stored below its own name. The two heads that stood beside
    the mask head can therefore be found only from the ROI heads, their layers from both.

    Args:
        module: not used.
        state_dict: what is about to be loaded into ``module``, changed in place.
        prefix: in front of the names in ``state_dict`` that belong to ``module``.
        *_arguments: what else torch hands to the hook.
    """
    for old in list(state_dict):
        if not old.startswith(prefix):
            continue
        name = old.removeprefix(prefix)
        for before, after in _MOVED.items():
            if name.startswith(before):
                name = after + name.removeprefix(before)
        name = name.replace("coarse_head.coarse_mask_fc", "coarse_head.fc")
        if prefix + name != old:
            state_dict[prefix + name] = state_dict.pop(old)
