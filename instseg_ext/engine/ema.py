"""Exponential moving average of a model's parameters and buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn

__all__ = ["EmaHook", "ModelEma"]


class ModelEma:
    """Shadow weights s that follow the trained weights w: s <- d * s + (1 - d) * w.

    The decay ramps up, d = min(decay, (1 + t) / (warmup + t)) at step t = 0, 1, ..., so that a
    short training is not dominated by its initial weights. Floating point parameters and buffers
    are averaged; integer buffers are copied.

    Args:
        model: not wrapped by DDP. Its tensors must stay where they are (no ``.to()`` later on).
        decay: final decay, in [0, 1).
        warmup: length of the ramp in steps, >= 1; 1 means no ramp.

    Raises:
        ValueError: if ``decay`` or ``warmup`` is out of range.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: int) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"INSTSEG.EMA.DECAY must be in [0, 1), not {decay}.")
        if warmup < 1:
            raise ValueError(f"INSTSEG.EMA.WARMUP must be at least 1, not {warmup}.")
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        # state_dict() gives detached views of the model's own storage: they stay up to date.
        self._model = dict(model.state_dict())
        self._shadow = {key: value.clone() for key, value in self._model.items()}
        floating = [key for key, value in self._model.items() if value.is_floating_point()]
        self._integer = [key for key in self._model if key not in set(floating)]
        self._pairs = (
            [self._shadow[key] for key in floating],
            [self._model[key] for key in floating],
        )

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's present weights."""
        decay = min(self.decay, (1 + self.updates) / (self.warmup + self.updates))
        shadow, model = self._pairs
        torch._foreach_lerp_(shadow, model, 1.0 - decay)
        for key in self._integer:
            self._shadow[key].copy_(self._model[key])
        self.updates += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Put the shadow weights into the model inside the block, the trained ones back after it.

        Both are exchanged in place, tensor by tensor, so that no third copy of the model is needed
        and both are bit-equal afterwards.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for key, value in self._model.items():
            trained = value.clone()
            value.copy_(self._shadow[key])
            self._shadow[key].copy_(trained)

    def weights(self) -> dict[str, Tensor]:
        """Return the shadow weights by name (not copied)."""
        return dict(self._shadow)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy shadow weights from a checkpoint.

        Raises:
            ValueError: if a name is missing.
        """
        missing = sorted(self._shadow.keys() - weights.keys())
        if missing:
            raise ValueError(
                f"the averaged weights of the checkpoint lack {', '.join(missing[:4])}."
            )
        for key, value in self._shadow.items():
            value.copy_(weights[key])

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the model's present weights."""
        self.updates = 0
        for key, value in self._shadow.items():
            value.copy_(self._model[key])

    def state_dict(self) -> dict[str, Any]:
        """Return the step counter; the weights themselves are the checkpoint's ``model`` entry."""
        return {"updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the step counter."""
        self.updates = int(state["updates"])


class EmaHook(HookBase):
    """Updates a ``ModelEma`` after each step."""

    def __init__(self, ema: ModelEma) -> None:
        self._ema = ema

    def after_step(self) -> None:
        """Take in the new weights."""
        self._ema.update()
