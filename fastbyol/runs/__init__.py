"""A run on disk: its folder, lock, configuration, metrics, layers and checkpoints. Only ``checkpoint`` imports torch."""
