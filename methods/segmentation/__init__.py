"""Segmentation: matching, losses of masks, vocabularies, metrics."""
