"""Optimisers, learning rates and what a user should know about them."""

from __future__ import annotations

import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import (
    LRMultiplier,
    LRScheduler,
    WarmupParamScheduler,
    build_lr_scheduler,
)
from detectron2.solver.build import (
    get_default_optimizer_params,
    maybe_add_gradient_clipping,
    reduce_param_groups,
)
from detectron2.utils import comm
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler
from torch import nn

from instseg_ext.config import check_choice
from instseg_ext.engine.distributed import plain_batch_norms
from instseg_ext.modeling.dilated_resnet import FixedBatchNorm2d

__all__ = [
    "TINY_BATCH",
    "build_optimizer",
    "build_scheduler",
    "effective_lr_report",
    "effective_rate",
    "micro_batch",
    "warn_tiny_batch_norm",
]

logger = logging.getLogger(__name__)

# What WEIGHT_DECAY_NORM holds for: norms that detectron2 knows, and one more.
_NORMS = (
    FixedBatchNorm2d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
)

# Exponent of the rate of WarmupPolyLR, DeepLab's.
_POLY_POWER = 0.9

# Statistics of fewer images than this make batch normalisation unreliable.
TINY_BATCH = 4


def effective_rate(cfg: CfgNode) -> float:
    """Return the base learning rate after scaling by batch size.

    ``SOLVER.BASE_LR * SOLVER.IMS_PER_BATCH / INSTSEG.SCALE_LR_BATCH`` (linear rule of
    arXiv:1706.02677), or ``SOLVER.BASE_LR`` where no reference batch is given. The config keeps
    the unscaled rate, so that a dumped config is not scaled again.
    """
    reference = cfg.INSTSEG.SCALE_LR_BATCH
    if reference < 0:
        raise ValueError(f"INSTSEG.SCALE_LR_BATCH must not be negative, but is {reference}.")
    if reference == 0:
        return cfg.SOLVER.BASE_LR
    return cfg.SOLVER.BASE_LR * cfg.SOLVER.IMS_PER_BATCH / reference


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build SGD or AdamW with the parameter groups that ``SOLVER`` asks for.

    ``WEIGHT_DECAY_NORM`` and ``WEIGHT_DECAY_BIAS`` replace the weight decay of their parameters;
    ``BIAS_LR_FACTOR`` and, where the config has it, ``BACKBONE_MULTIPLIER`` multiply the rate, and
    so does ``lr_factor`` of a module, an attribute, for all parameters in it.
    ``INSTSEG.NORM_BIASES_ARE_BIASES`` says which of them hold for biases of normalisation layers.
    ``SOLVER.CLIP_GRADIENTS`` clips per parameter, as in detectron2.

    Args:
        cfg: needs ``SOLVER`` and ``INSTSEG``.
        model: parameters of its ``backbone`` get the backbone's rate.

    Raises:
        ValueError: if ``INSTSEG.OPTIMIZER`` is unknown.
    """
    kind = check_choice("INSTSEG.OPTIMIZER", cfg.INSTSEG.OPTIMIZER, ("sgd", "adamw"))
    rate, decay = effective_rate(cfg), cfg.SOLVER.WEIGHT_DECAY
    groups = _parameter_groups(cfg, model, rate)
    if kind == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=decay)
    else:
        optimizer = torch.optim.SGD(
            groups,
            lr=rate,
            momentum=cfg.SOLVER.MOMENTUM,
            nesterov=cfg.SOLVER.NESTEROV,
            weight_decay=decay,
        )
    return maybe_add_gradient_clipping(cfg, optimizer)


def _parameter_groups(cfg: CfgNode, model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Return the trainable parameters with their rates and weight decays."""
    solver = cfg.SOLVER
    backbone = solver.get("BACKBONE_MULTIPLIER", 1.0)
    norm_biases = {}
    if not cfg.INSTSEG.NORM_BIASES_ARE_BIASES:
        norm_biases = {
            f"{name}.bias": module.bias
            for name, module in model.named_modules()
            if isinstance(module, _NORMS) and module.bias is not None and module.bias.requires_grad
        }

    of_modules = _module_factors(model)

    def factor(name: str) -> float:
        is_bias = name.rpartition(".")[2] == "bias" and name not in norm_biases
        of_bias = solver.BIAS_LR_FACTOR if is_bias else 1.0
        of_part = backbone if name.startswith("backbone.") else 1.0
        return of_bias * of_part * of_modules.get(name, 1.0)

    groups = get_default_optimizer_params(
        model,
        base_lr=rate,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=factor,
    )
    of_norms = norm_biases | _fixed_norms(model, with_biases=solver.WEIGHT_DECAY_BIAS is None)
    if not of_norms:
        return groups
    decay = solver.WEIGHT_DECAY if solver.WEIGHT_DECAY_NORM is None else solver.WEIGHT_DECAY_NORM
    # detectron2 knows the biases' decay by the parameter's name alone, and not all norms; of two
    # values for one parameter the later one holds.
    return reduce_param_groups(
        [*groups, {"params": list(of_norms.values()), "weight_decay": decay}]
    )


def _fixed_norms(model: nn.Module, with_biases: bool) -> dict[str, nn.Parameter]:
    """Return the trained scales, and biases, of norms with fixed statistics by name."""
    return {
        f"{name}.{part}": parameter
        for name, module in model.named_modules()
        if isinstance(module, FixedBatchNorm2d)
        for part, parameter in module.named_parameters()
        if parameter.requires_grad and (with_biases or part != "bias")
    }


def _module_factors(model: nn.Module) -> dict[str, float]:
    """Return, by parameter, the product of ``lr_factor`` of the modules that it is in."""
    factors: dict[str, float] = {}
    for module_name, module in model.named_modules():
        own = getattr(module, "lr_factor", 1.0)
        if own == 1.0:
            continue
        for name, _ in module.named_parameters(prefix=module_name):
            factors[name] = factors.get(name, 1.0) * own
    return factors


def build_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Build detectron2's learning rate schedule, or DeepLab's ``WarmupPolyLR``.

    The latter falls with ``(1 - iteration / MAX_ITER) ** 0.9`` after the warm-up.
    ``SOLVER.STEPS`` at or after ``SOLVER.MAX_ITER`` are left out, so that any config can be run
    shorter (detectron2 leaves out later ones and fails on an equal one).

    Args:
        cfg: full config; not changed.
        optimizer: gets the rate of the first iteration at once.
    """
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupPolyLR":
        return _poly_scheduler(cfg, optimizer)
    steps = cfg.SOLVER.STEPS
    kept = tuple(step for step in steps if step < cfg.SOLVER.MAX_ITER)
    if len(kept) < len(steps):
        logger.info("SOLVER.STEPS in use: %s (before SOLVER.MAX_ITER).", kept)
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.STEPS = kept
    return build_lr_scheduler(cfg, optimizer)


def _poly_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
    solver = cfg.SOLVER
    multiplier = WarmupParamScheduler(
        PolynomialDecayParamScheduler(1.0, _POLY_POWER),
        solver.WARMUP_FACTOR,
        min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        solver.WARMUP_METHOD,
        solver.RESCALE_INTERVAL,
    )
    return LRMultiplier(optimizer, multiplier=multiplier, max_iter=solver.MAX_ITER)


def micro_batch(cfg: CfgNode) -> int:
    """Return the number of images in one forward pass of one process.

    Raises:
        ValueError: if the batch cannot be split evenly.
    """
    batch, parts = cfg.SOLVER.IMS_PER_BATCH, cfg.INSTSEG.ACCUMULATE
    processes = comm.get_world_size()
    if parts < 1:
        raise ValueError(f"INSTSEG.ACCUMULATE must be at least 1, not {parts}.")
    if batch < 1 or batch % (processes * parts):
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {batch} must be a multiple of {processes * parts}: {processes} "
            f"process(es) times INSTSEG.ACCUMULATE {parts}."
        )
    return batch // (processes * parts)


def effective_lr_report(cfg: CfgNode, model: nn.Module) -> str:
    """Say in one line what the optimiser does per step and per image.

    Args:
        cfg: full config.
        model: counted parameters are those with ``requires_grad``.
    """
    rate = effective_rate(cfg)
    batch = cfg.SOLVER.IMS_PER_BATCH
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    scaled = ""
    if rate != cfg.SOLVER.BASE_LR:
        reference = cfg.INSTSEG.SCALE_LR_BATCH
        scaled = f" (SOLVER.BASE_LR {cfg.SOLVER.BASE_LR:g} scaled from a batch of {reference})"
    return (
        f"{cfg.INSTSEG.OPTIMIZER} on {trainable / 1e6:.2f} M parameters: learning rate {rate:g}"
        f"{scaled} for {batch} images per step = {rate / batch:.3g} per image; "
        f"{comm.get_world_size()} process(es) x {cfg.INSTSEG.ACCUMULATE} micro-batch(es) x "
        f"{micro_batch(cfg)} image(s)."
    )


def warn_tiny_batch_norm(cfg: CfgNode, model: nn.Module) -> None:
    """Warn once if batch normalisation is trained on very few images per process."""
    layers = plain_batch_norms(model)
    images = micro_batch(cfg)
    if layers and images < TINY_BATCH:
        logger.warning(
            "%d batch normalisation layers (first: %s) are trained on the statistics of only %d "
            "image(s) per process: use FrozenBN, GN or SyncBN (MODEL.RESNETS.NORM, "
            "MODEL.FPN.NORM), or more images per process.",
            len(layers),
            layers[0],
            images,
        )
