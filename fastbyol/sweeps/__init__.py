"""Sweeps: any keys of the configuration crossed, trained by workers, and shown as a heat map."""
