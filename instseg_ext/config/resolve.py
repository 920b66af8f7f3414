"""Turn what a config leaves open (device, precision) into concrete values."""

from __future__ import annotations

import logging
from collections.abc import Collection

import torch
from detectron2.config import CfgNode

__all__ = ["PRECISIONS", "check_choice", "check_range", "resolve_device", "resolve_precision"]

PRECISIONS = ("fp32", "fp16", "bf16")

logger = logging.getLogger(__name__)


def check_choice(key: str, value: str, allowed: Collection[str]) -> str:
    """Return ``value`` if it is allowed.

    Raises:
        ValueError: naming ``key``, the value and what is allowed.
    """
    if value not in allowed:
        raise ValueError(f"{key} must be one of {', '.join(allowed)}, not {value!r}.")
    return value


def check_range(key: str, value: float, allowed: str) -> None:
    """Make sure that a number is in an interval.

    Args:
        key: of the config.
        value: of the key.
        allowed: as in mathematics: "[0, 1)" is from 0 to below 1; the upper end may be "inf".

    Raises:
        ValueError: naming ``key``, the value and what is allowed.
    """
    low, high = (float(end) for end in allowed[1:-1].split(","))
    above = value >= low if allowed[0] == "[" else value > low
    below = value <= high if allowed[-1] == "]" else value < high
    if not (above and below):
        raise ValueError(f"{key} must be in {allowed}, not {value}.")


def resolve_device(cfg: CfgNode, typed: Collection[str] = ()) -> None:
    """Write a concrete device into ``MODEL.DEVICE``.

    ``auto`` becomes ``cuda`` where there is one, else ``cpu``; so does detectron2's default
    ``cuda`` on a machine without one, unless it was typed.

    Args:
        cfg: changed in place.
        typed: keys the user typed.

    Raises:
        ValueError: if CUDA was asked for by name and is not available.
    """
    device = cfg.MODEL.DEVICE
    has_cuda = torch.cuda.is_available()
    if device == "auto":
        cfg.MODEL.DEVICE = "cuda" if has_cuda else "cpu"
    elif device.startswith("cuda") and not has_cuda:
        if "MODEL.DEVICE" in typed:
            raise ValueError(
                f"MODEL.DEVICE {device} was asked for, but torch sees no CUDA device; "
                "`instseg doctor` says why."
            )
        cfg.MODEL.DEVICE = "cpu"


def resolve_precision(cfg: CfgNode) -> str:
    """Return the precision that ``INSTSEG.PRECISION`` and ``SOLVER.AMP.ENABLED`` ask for together.

    Raises:
        ValueError: if the value is unknown, or fp16 is asked for on a CPU.
    """
    precision = check_choice("INSTSEG.PRECISION", cfg.INSTSEG.PRECISION, PRECISIONS)
    on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
    if precision == "fp32" and cfg.SOLVER.AMP.ENABLED:
        return "bf16" if on_cpu else "fp16"
    if precision == "fp16" and on_cpu:
        raise ValueError("INSTSEG.PRECISION fp16 needs CUDA; on a CPU use bf16.")
    return precision
