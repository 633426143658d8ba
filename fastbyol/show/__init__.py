"""Pictures, pages and screens of runs and data sets."""
