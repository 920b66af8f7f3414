"""Keys that several methods share: the ``INSTSEG`` node and those of the shared backbones."""

from __future__ import annotations

from detectron2.config import CfgNode

__all__ = ["add_missing", "add_shared_config"]


def add_missing(cfg: CfgNode, defaults: CfgNode) -> None:
    """Copy into ``cfg``, node by node, the keys of ``defaults`` that it lacks.

    Args:
        cfg: changed in place; values it holds already are kept.
        defaults: a config tree with default values.
    """
    for key, value in defaults.items():
        if key not in cfg:
            cfg[key] = value.clone() if isinstance(value, CfgNode) else value
        elif isinstance(value, CfgNode) and isinstance(cfg[key], CfgNode):
            add_missing(cfg[key], value)


def add_shared_config(cfg: CfgNode) -> None:
    """Define the ``INSTSEG`` node and the backbones' nodes with their defaults.

    Args:
        cfg: changed in place.
    """
    _add_backbone_config(cfg)
    _C = cfg
    _C.INSTSEG = CfgNode()

    # Name of the config this one was loaded from; written by get_config, shown in results.json.
    _C.INSTSEG.CONFIG = ""
    # Data sets declared by the config itself: a list of {"NAME": ..., "JSON": ..., "IMAGES": ...},
    # COCO format. Command-line registrations are written here, so that a dumped config can be used
    # alone.
    _C.INSTSEG.DATASETS = []
    # Names of the training set's classes in contiguous order; written by training, read by
    # prediction.
    _C.INSTSEG.CLASS_NAMES = []
    # Size (height, width) to which images are stretched without keeping their aspect ratio; [0, 0]
    # = off. Goes with INPUT.MIN_SIZE_TEST 0, so that detectron2's own predictor leaves the resize
    # to the model.
    _C.INSTSEG.STRETCH = [0, 0]
    # Training only: [low, high], both included; each image is stretched to a height drawn from
    # these whole numbers instead of STRETCH's, to the same width. [] = off. For methods that train
    # at several sizes.
    _C.INSTSEG.STRETCH_HEIGHTS = []

    # Arithmetic of training and inference: fp32, fp16 (CUDA only), bf16. Losses, NMS and geometry
    # stay in fp32. SOLVER.AMP.ENABLED, detectron2's key, is read as fp16 on CUDA and bf16 on CPU
    # when this one says fp32.
    _C.INSTSEG.PRECISION = "fp32"
    # channels_last or contiguous.
    _C.INSTSEG.MEMORY_FORMAT = "channels_last"
    # Largest working set, in MiB, while low-resolution masks become full-size ones.
    _C.INSTSEG.MASK_BUDGET_MB = 256
    # bool: pred_masks (N, H, W). rle: pred_masks_rle, COCO run lengths, memory independent of the
    # image size.
    _C.INSTSEG.MASK_OUTPUT = "bool"

    # local: each process divides its losses by its own counts, as the authors' code does.
    # global: counts are averaged over processes, so that the loss does not depend on their number.
    _C.INSTSEG.LOSS_NORMALIZER = "local"
    # sgd (SOLVER.MOMENTUM, SOLVER.NESTEROV) or adamw. Learning rate and weight decay come from
    # SOLVER.
    _C.INSTSEG.OPTIMIZER = "sgd"
    # True, as in detectron2: SOLVER.BIAS_LR_FACTOR and WEIGHT_DECAY_BIAS hold for the biases of
    # normalisation layers, too. False, as in mmdetection: these biases are treated like the weights
    # beside them, at the plain rate and WEIGHT_DECAY_NORM.
    _C.INSTSEG.NORM_BIASES_ARE_BIASES = True
    # L2 norm to which the gradient of the whole model is clipped; 0.0 = off.
    # (SOLVER.CLIP_GRADIENTS with type "norm" clips every parameter by itself.)
    _C.INSTSEG.CLIP_GRAD_NORM = 0.0
    # Micro-batches per optimiser step. SOLVER.IMS_PER_BATCH stays the batch of one step and is
    # split.
    _C.INSTSEG.ACCUMULATE = 1
    # Batch for which SOLVER.BASE_LR is meant: the rate is multiplied by IMS_PER_BATCH / this. 0 =
    # leave it alone.
    _C.INSTSEG.SCALE_LR_BATCH = 0

    # Evaluation of COCO-style data sets also gives Boundary AP (task "boundary"), which compares
    # masks by the smaller one of mask IoU and boundary IoU (arXiv:2103.16562). Needs
    # faster-coco-eval.
    _C.INSTSEG.BOUNDARY_AP = False
    # Evaluation of COCO-style data sets also gives AP of regions as SDS, MNC and FCIS report it
    # (task "map_r": mAP50, mAP70, mAPvol). The data sets sbd_* and voc_2012_inst_* always do.
    _C.INSTSEG.MAP_R = False
    # AP of regions also says what kinds of wrong detections cost how much (gain_localisation, ...);
    # MAP_R need not be typed then.
    _C.INSTSEG.MAP_R_ERRORS = False

    # Evaluation also gives the recall of proposals (task "proposals": AR@10, AR@100, AR@1000 of
    # masks and boxes, classes ignored). Methods that propose always do.
    _C.INSTSEG.PROPOSAL_RECALL = False
    # With MODEL.LOAD_PROPOSALS, inputs at test time also get the masks of their proposals
    # ("proposal_rles", COCO run lengths at the size of the image file).
    _C.INSTSEG.PROPOSAL_MASKS = False

    # Exponential moving average of the weights; evaluation uses it when enabled.
    _C.INSTSEG.EMA = CfgNode()
    _C.INSTSEG.EMA.ENABLED = False
    _C.INSTSEG.EMA.DECAY = 0.9998
    # The decay at step t is min(DECAY, (1 + t) / (WARMUP + t)).
    _C.INSTSEG.EMA.WARMUP = 10

    # Best checkpoint and early stop.
    _C.INSTSEG.BEST = CfgNode()
    # Such as "segm/AP" (first test set) or "nuclei_val/segm/AP"; "" = off. Kept as model_best.pth.
    _C.INSTSEG.BEST.METRIC = ""
    # Evaluations without a better value before training stops; 0 = never.
    _C.INSTSEG.BEST.PATIENCE = 0
    # Periodic checkpoints to keep; 0 = all.
    _C.INSTSEG.KEEP_CHECKPOINTS = 0

    # Metrics to Weights & Biases beside TensorBoard and metrics.json (needs the extra "logging").
    _C.INSTSEG.WANDB = CfgNode()
    _C.INSTSEG.WANDB.ENABLED = False
    _C.INSTSEG.WANDB.PROJECT = "instseg_ext"


def _add_backbone_config(cfg: CfgNode) -> None:
    _C = cfg

    # build_vgg16_backbone. MODEL.BACKBONE.FREEZE_AT k keeps conv1 to conv<k> as they are.
    _C.MODEL.VGG = CfgNode()
    # Of conv1 to conv5 (strides 1, 2, 4, 8, 16), each after its stage's last ReLU.
    _C.MODEL.VGG.OUT_FEATURES = ["conv5"]
    # Channels of conv1; the later stages have 2, 4, 8 and 8 times as many.
    _C.MODEL.VGG.WIDTH = 64
    # "" as published, or BN, FrozenBN, SyncBN, GN after each convolution.
    _C.MODEL.VGG.NORM = ""
    # Pooling of odd sizes: True rounds up as Caffe, False down as torchvision.
    _C.MODEL.VGG.CEIL_MODE = True

    # build_mobilenetv2_backbone. MODEL.BACKBONE.FREEZE_AT 1 keeps the stem, 2 also stage1, ...
    _C.MODEL.MOBILENET = CfgNode()
    # Of stage1 to stage7 (strides 2, 4, 8, 16, 16, 32, 32).
    _C.MODEL.MOBILENET.OUT_FEATURES = ["stage3", "stage4", "stage6"]
    # BN, FrozenBN, SyncBN, GN, or "" for none.
    _C.MODEL.MOBILENET.NORM = "FrozenBN"
    # Multiplies all channel counts (alpha in the paper); weights are published for 1.0.
    _C.MODEL.MOBILENET.WIDTH_MULTIPLIER = 1.0

    # build_darknet53_backbone. MODEL.BACKBONE.FREEZE_AT 1 keeps the stem, 2 also stage1, ...
    _C.MODEL.DARKNET = CfgNode()
    # Of stage1 to stage5 (strides 2, 4, 8, 16, 32).
    _C.MODEL.DARKNET.OUT_FEATURES = ["stage3", "stage4", "stage5"]
    # BN, FrozenBN, SyncBN, GN, or "" for none.
    _C.MODEL.DARKNET.NORM = "BN"
    # Channels of the stem; the stages have 2, 4, 8, 16 and 32 times as many.
    _C.MODEL.DARKNET.WIDTH = 32

    # build_instseg_resnet_*backbone. In the stages that MODEL.RESNETS.DEFORM_ON_PER_STAGE turns on,
    # the blocks whose index, from 0, is a multiple of this are deformable.
    _C.MODEL.RESNETS.DEFORM_INTERVAL = 1
    # A learned bias on the deformable convolutions, as in YOLACT++, although a norm follows.
    _C.MODEL.RESNETS.DEFORM_BIAS = False
