"""The command line: one module for each group of commands. torch is imported inside commands only."""
