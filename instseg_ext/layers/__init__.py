"""Pure tensor functions and small modules without knowledge of detectron2 models."""
