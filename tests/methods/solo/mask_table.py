"""A source of masks that lie ready."""

from instseg_ext.methods.solo.mask_source import MaskSource


class MaskTable(MaskSource):
    """Masks (C, h, w), by cell."""

    def __init__(self, masks):
        super().__init__(tuple(masks.shape[1:]))
        self.masks = masks

    def __call__(self, cells):
        return self.masks[cells]
