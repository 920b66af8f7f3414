"""What the tests of every method's configs and project page have in common."""

import re

import torch
import torchvision
import yaml
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY

import instseg_ext
from instseg_ext import resources
from instseg_ext.config import config_names


class Project:
    """A folder of ``projects``.

    Attributes:
        name: of the folder.
        text: of its README.md.
        models: the entries of its metafile.yml.
        configs: names of its configs, without the folder; those for the bundled nuclei too.
    """

    def __init__(self, name):
        folder = resources.root() / "projects" / name
        self.name = name
        self.text = (folder / "README.md").read_text()
        self.models = yaml.safe_load((folder / "metafile.yml").read_text())["Models"]
        of_project = (full.partition("/") for full in config_names())
        self.configs = [config for project, _, config in of_project if project == name]

    @property
    def published(self):
        """Names of the configs that are not for the bundled nuclei."""
        return [name for name in self.configs if not name.startswith("nuclei")]

    def config(self, name, *opts):
        """Return the config of this name with ``opts`` as typed overrides."""
        return instseg_ext.get_config(f"{self.name}/{name}", opts)

    def rows(self, first_cell):
        """Return the cells of the page's table rows whose first cell matches."""
        lines = self.text.splitlines()
        rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
        return [row for row in rows if re.match(first_cell, row[0])]


def build(cfg):
    """Return the model on the meta device: shapes only."""
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)


def count(*modules):
    """Return the number of parameters of all of them."""
    return sum(p.numel() for module in modules for p in module.parameters())


def assert_key_table_equals_the_config(project, add_config, node):
    """Every key of ``MODEL.<node>`` stands on the page with its default, and no other."""
    cfg = get_cfg()
    add_config(cfg)
    rows = project.rows("`[A-Z]")
    table = {row[0].strip("`"): yaml.safe_load(row[1].strip("`")) for row in rows}
    assert table == dict(_leaves(cfg.MODEL[node]))


def assert_initial_weights_have_their_command(project, names, others=()):
    """The page has the command that makes each of torchvision's files from which a config starts.

    Args:
        project: whose configs.
        names: of torchvision's models.
        others: files of another origin from which a config starts.
    """
    files = {project.config(name).MODEL.WEIGHTS for name in project.configs}
    local = {file for file in files if file and "://" not in file}
    assert local == {*others, *(f"weights/{name}_torchvision.pth" for name in names)}
    for name in names:
        url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
        command = f"instseg convert --from torchvision {url} weights/{name}_torchvision.pth\n"
        assert command in project.text


def assert_nuclei_protocol(cfg):
    """The config has the baseline's budget, data, widths and size of the images in evaluation."""
    baseline = instseg_ext.get_config("MaskRCNN/nuclei_mask_rcnn_R_18_FPN")
    assert cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH == 960
    assert cfg.MODEL.WEIGHTS == baseline.MODEL.WEIGHTS == ""
    for key in ("TRAIN", "TEST"):
        assert cfg.DATASETS[key] == baseline.DATASETS[key]
    assert cfg.MODEL.RESNETS.DEPTH == baseline.MODEL.RESNETS.DEPTH
    assert cfg.MODEL.FPN.OUT_CHANNELS == baseline.MODEL.FPN.OUT_CHANNELS
    shown = cfg.INSTSEG.STRETCH if any(cfg.INSTSEG.STRETCH) else [cfg.INPUT.MIN_SIZE_TEST] * 2
    assert shown == [baseline.INPUT.MIN_SIZE_TEST] * 2
    assert count(build(cfg)) < 15e6


def _leaves(node, prefix=""):
    for key, value in node.items():
        if hasattr(value, "items"):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
