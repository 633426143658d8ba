"""Runs and data sets as pictures and pages, and runs on the screen."""
