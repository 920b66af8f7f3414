"""Accuracy and speed of trained models."""

from instseg_ext.evaluation.build import build_evaluator
from instseg_ext.evaluation.coco import InstSegCOCOEvaluator, instances_to_results
from instseg_ext.evaluation.coco_ap import (
    average_precision,
    average_precision_backend,
    load_ground_truth,
)
from instseg_ext.evaluation.progress import show_progress
from instseg_ext.evaluation.proposals import ProposalEvaluator
from instseg_ext.evaluation.report import write_json
from instseg_ext.evaluation.runner import evaluate, inference_mode, run_inference
from instseg_ext.evaluation.sbd import InstSegSBDEvaluator
from instseg_ext.evaluation.timing import STAGES, StageTimer, stage_modules
from instseg_ext.evaluation.voc_ap import region_average_precision

__all__ = [
    "STAGES",
    "InstSegCOCOEvaluator",
    "InstSegSBDEvaluator",
    "ProposalEvaluator",
    "StageTimer",
    "average_precision",
    "average_precision_backend",
    "build_evaluator",
    "evaluate",
    "inference_mode",
    "instances_to_results",
    "load_ground_truth",
    "region_average_precision",
    "run_inference",
    "show_progress",
    "stage_modules",
    "write_json",
]
