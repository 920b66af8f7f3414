"""Data: registration, checks, augmentation, and the loaders of training and testing."""

from instseg_ext.data.check import Report, cheap_check, check_dataset
from instseg_ext.data.config import add_data_config
from instseg_ext.data.loader import (
    TrainLoader,
    build_inference_loader,
    build_test_loader,
    build_train_loader,
)
from instseg_ext.data.mapper import (
    InstSegDatasetMapper,
    KeypointDatasetMapper,
    annotation_boxes,
    build_mapper,
)
from instseg_ext.data.proposal_exchange import (
    read_foreign_proposals,
    write_coco_results,
    write_detectron2_pickle,
)
from instseg_ext.data.proposal_mapper import (
    ProposalMapper,
    assign_proposals,
    check_proposal_files,
    transform_proposals,
)
from instseg_ext.data.proposals import ProposalFile, write_proposals
from instseg_ext.data.registration import (
    add_registrations,
    dataset_classes,
    dataset_files,
    ensure_files,
    free_name,
    is_semantic,
    parse_register_flag,
    register,
    register_bundled,
    register_from_config,
    require_source,
)
from instseg_ext.data.semantic import SemanticDatasetMapper, check_annotation_kind
from instseg_ext.data.shapes import make_shapes
from instseg_ext.data.training_sets import load_training_dicts, training_dicts

__all__ = [
    "InstSegDatasetMapper",
    "KeypointDatasetMapper",
    "ProposalFile",
    "ProposalMapper",
    "Report",
    "SemanticDatasetMapper",
    "TrainLoader",
    "add_data_config",
    "add_registrations",
    "annotation_boxes",
    "assign_proposals",
    "build_inference_loader",
    "build_mapper",
    "build_test_loader",
    "build_train_loader",
    "cheap_check",
    "check_annotation_kind",
    "check_dataset",
    "check_proposal_files",
    "dataset_classes",
    "dataset_files",
    "ensure_files",
    "free_name",
    "is_semantic",
    "load_training_dicts",
    "make_shapes",
    "parse_register_flag",
    "read_foreign_proposals",
    "register",
    "register_bundled",
    "register_from_config",
    "require_source",
    "training_dicts",
    "transform_proposals",
    "write_coco_results",
    "write_detectron2_pickle",
    "write_proposals",
]
