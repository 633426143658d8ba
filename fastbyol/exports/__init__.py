"""A run's encoder in files that other libraries load, with a model card."""
