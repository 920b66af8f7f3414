"""The four steps of alternating training (Sec. 3.2 of arXiv:1506.01497) as configs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import GeneralizedRCNN

__all__ = [
    "FINAL",
    "STEPS",
    "Step",
    "check_two_stage",
    "plan_steps",
    "proposal_files",
    "unfinished_files",
]

# Name of a step's last checkpoint, and of the joined model.
FINAL = "model_final.pth"


@dataclass(frozen=True)
class Step:
    """What one step trains, and from where it starts.

    Attributes:
        number: 1 to 4; its folder is ``step<number>``.
        proposes: it trains the RPN, and then writes proposals; else it trains the detector on the
            proposals of the step before.
        starts_from: the step whose weights it starts from; 0 = ``MODEL.WEIGHTS``.
        title: for reports.
    """

    number: int
    proposes: bool
    starts_from: int
    title: str

    @property
    def frozen(self) -> bool:
        """Whether the backbone stays as the earlier step left it."""
        return self.starts_from > 0

    @property
    def folder(self) -> str:
        """Name of its folder in ``OUTPUT_DIR``."""
        return f"step{self.number}"


STEPS = (
    Step(1, True, 0, "RPN from MODEL.WEIGHTS"),
    Step(2, False, 0, "detector from MODEL.WEIGHTS, on the proposals of step 1"),
    Step(3, True, 2, "new RPN on the frozen backbone of step 2"),
    Step(4, False, 2, "detector of step 2, its backbone frozen, on the proposals of step 3"),
)


def check_two_stage(cfg: CfgNode) -> None:
    """Refuse a model that has no proposals to alternate with.

    Raises:
        ValueError: naming the key.
    """
    name, generator = cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.PROPOSAL_GENERATOR.NAME
    architecture = META_ARCH_REGISTRY.get(name)
    if not (isinstance(architecture, type) and issubclass(architecture, GeneralizedRCNN)):
        raise ValueError(
            f"MODEL.META_ARCHITECTURE {name} is no two-stage model: only one with an RPN and a "
            "detector can be trained alternately. Use train_net.py."
        )
    if cfg.MODEL.LOAD_PROPOSALS or generator == "PrecomputedProposals":
        raise ValueError(
            f"MODEL.PROPOSAL_GENERATOR.NAME {generator} with MODEL.LOAD_PROPOSALS "
            f"{cfg.MODEL.LOAD_PROPOSALS} leaves no RPN to train: use the config of the whole model."
        )


def plan_steps(cfg: CfgNode, iterations: Sequence[int] | None = None) -> list[CfgNode]:
    """Return the config of each step, frozen.

    The learning rate's steps move with the length, the warm-up is at most the length. No step
    evaluates; the joined model is evaluated. Proposals are as many as the RPN gives in training.

    Args:
        cfg: of the whole model; not modified.
        iterations: of each step; None = ``SOLVER.MAX_ITER`` for each.

    Raises:
        ValueError: if a length is not positive, or there is not one for each step.
    """
    lengths = [cfg.SOLVER.MAX_ITER] * len(STEPS) if iterations is None else list(iterations)
    if len(lengths) != len(STEPS) or min(lengths) < 1:
        raise ValueError(f"--iterations needs {len(STEPS)} positive numbers, not {lengths}.")
    return [_step_config(cfg, step, n) for step, n in zip(STEPS, lengths, strict=True)]


def proposal_files(cfg: CfgNode, step: Step) -> list[Path]:
    """Return the files into which a step writes proposals, one for each training set.

    Args:
        cfg: of the whole model.
        step: one that proposes.
    """
    folder = Path(cfg.OUTPUT_DIR) / step.folder
    return [folder / f"proposals_{index}.pth" for index in range(len(cfg.DATASETS.TRAIN))]


def unfinished_files(file: Path) -> list[Path]:
    """Return what a process that was killed while it wrote ``file`` has left beside it.

    Args:
        file: of proposals; each process may write a part of it first.
    """
    return sorted(file.parent.glob(f".{file.name}.*"))


def _step_config(cfg: CfgNode, step: Step, iterations: int) -> CfgNode:
    whole, cfg = cfg, cfg.clone()
    cfg.defrost()
    output = Path(whole.OUTPUT_DIR)
    cfg.OUTPUT_DIR = str(output / step.folder)
    if step.frozen:
        cfg.MODEL.WEIGHTS = str(output / STEPS[step.starts_from - 1].folder / FINAL)
    if step.proposes:
        cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN
        cfg.MODEL.RPN.POST_NMS_TOPK_TEST = cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN
    else:
        files = proposal_files(whole, STEPS[step.number - 2])
        cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
        cfg.MODEL.LOAD_PROPOSALS = True
        cfg.DATASETS.PROPOSAL_FILES_TRAIN = tuple(map(str, files))
    _set_length(cfg.SOLVER, iterations)
    # Half a model has nothing to compare with the test set, and nothing to draw.
    cfg.DATASETS.TEST = ()
    cfg.TEST.EVAL_PERIOD = 0
    cfg.VIS_PERIOD = 0
    cfg.INSTSEG.BEST.METRIC = ""
    cfg.INSTSEG.BEST.PATIENCE = 0
    cfg.freeze()
    return cfg


def _set_length(solver: CfgNode, iterations: int) -> None:
    if iterations == solver.MAX_ITER:
        return
    solver.STEPS = tuple(round(step * iterations / solver.MAX_ITER) for step in solver.STEPS)
    solver.WARMUP_ITERS = min(solver.WARMUP_ITERS, iterations)
    solver.MAX_ITER = iterations
