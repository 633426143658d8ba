"""A run on disk: folder, lock, inputs, metrics, layers, checkpoints, which alone import torch."""
