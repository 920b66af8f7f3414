"""What the base of full-image methods does with the size of its input."""

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

import instseg_ext
from instseg_ext.layers.stretch import stretch
from instseg_ext.modeling.dense import DenseInstanceSegmenter, dense_arguments

TINY = [
    "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.FPN.OUT_CHANNELS", 32,
    "INPUT.MIN_SIZE_TRAIN", (0,), "INPUT.MIN_SIZE_TEST", 0, "INSTSEG.STRETCH", [64, 96],
]  # fmt: skip
HEIGHTS = ["INSTSEG.STRETCH_HEIGHTS", [40, 80]]


class Model(DenseInstanceSegmenter):
    def losses(self, raw, images, gt_instances):
        return {}

    def inference(self, raw, images, batched_inputs):
        return []


def config(*opts, name="SOLO/nuclei_solov2_R_18_FPN"):
    return instseg_ext.get_config(name, [*TINY, *opts])


@pytest.mark.parametrize(
    ("opts", "in_training"), [([], (64, 96)), (HEIGHTS, (50, 96))], ids=["fixed", "random height"]
)
def test_training_images_of_random_height_are_left_alone(opts, in_training):
    arguments = dense_arguments(config(*opts), random_heights=True)
    model = Model(**arguments, head=nn.Identity())
    image = torch.randint(0, 256, (3, 50, 96)).float()
    assert model.preprocess_image([{"image": image}]).image_sizes == [in_training]
    images = model.eval().preprocess_image([{"image": image}])
    assert images.image_sizes == [(64, 96)]
    expected = (stretch(image, (64, 96)) - model.pixel_mean) / model.pixel_std
    assert torch.equal(images.tensor[0, :, :64, :96], expected)


@pytest.mark.parametrize(
    "name",
    [
        "SOLO/nuclei_solov2_R_18_FPN",
        "YOLACT/nuclei_yolact_R_18",
        "MaskRCNN/nuclei_mask_rcnn_R_18_FPN",
    ],
)
def test_models_of_one_size_refuse_random_heights(name):
    cfg = config(*HEIGHTS, name=name)
    message = rf"STRETCH_HEIGHTS must be \[\] for {cfg.MODEL.META_ARCHITECTURE}.*\[40, 80\]"
    with pytest.raises(ValueError, match=message):
        build_model(cfg)
