"""Memory format and precision, the same for dense and two-stage models."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from torch import Tensor

from instseg_ext.config import check_choice, resolve_precision
from instseg_ext.layers.folded_conv import fold_norms

__all__ = ["RuntimeMixin", "RuntimeOptions"]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True)
class RuntimeOptions:
    """How a model computes, as opposed to what.

    Attributes:
        precision: ``fp32``, ``fp16`` or ``bf16``.
        memory_format: ``channels_last`` or ``contiguous``.
        mask_budget_mb: working memory, in MiB, of the full-size mask post-processing.
        mask_output: ``bool`` (``pred_masks``) or ``rle`` (``pred_masks_rle``).
        loss_normalizer: ``local`` or ``global``.
    """

    precision: str = "fp32"
    memory_format: str = "channels_last"
    mask_budget_mb: int = 256
    mask_output: str = "bool"
    loss_normalizer: str = "local"

    @classmethod
    def from_config(cls, cfg: CfgNode) -> RuntimeOptions:
        """Read the options from ``INSTSEG``.

        Raises:
            ValueError: if a value is not allowed; the message names the key.
        """
        node = cfg.INSTSEG
        if node.MASK_BUDGET_MB <= 0:
            raise ValueError(f"INSTSEG.MASK_BUDGET_MB must be positive, not {node.MASK_BUDGET_MB}.")
        return cls(
            precision=resolve_precision(cfg),
            memory_format=check_choice("INSTSEG.MEMORY_FORMAT", node.MEMORY_FORMAT, _FORMATS),
            mask_budget_mb=node.MASK_BUDGET_MB,
            mask_output=check_choice("INSTSEG.MASK_OUTPUT", node.MASK_OUTPUT, ("bool", "rle")),
            loss_normalizer=check_choice(
                "INSTSEG.LOSS_NORMALIZER", node.LOSS_NORMALIZER, ("local", "global")
            ),
        )


class RuntimeMixin:
    """Adds precision, memory format and mask options to an ``nn.Module`` that has a ``device``."""

    mask_output: str
    mask_budget_mb: int
    loss_normalizer: str

    def init_runtime(self, options: RuntimeOptions) -> None:
        """Store the options and lay out the layers; call it at the end of ``__init__``."""
        self.memory_format = _FORMATS[options.memory_format]
        self._dtype = _DTYPES[options.precision]
        self.mask_output = options.mask_output
        self.mask_budget_mb = options.mask_budget_mb
        self.loss_normalizer = options.loss_normalizer
        self.to(memory_format=self.memory_format)
        fold_norms(self)

    def precision(self) -> AbstractContextManager:
        """Return the context under which backbone and head run, also outside ``forward``."""
        device_type = self.device.type
        if device_type == "meta" or self._dtype is torch.float32:
            # An explicit fp32 context also shields a model from an autocast that a caller left on.
            return torch.autocast("cpu" if device_type == "meta" else device_type, enabled=False)
        return torch.autocast(device_type, dtype=self._dtype)

    def to_memory_format(self, images: Tensor) -> Tensor:
        """Return a batch (N, C, H, W) in the model's memory format."""
        return images.contiguous(memory_format=self.memory_format)
