"""Containers and encodings that detectron2 lacks."""
