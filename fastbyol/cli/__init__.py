"""The command line: a module for each group of commands. torch is imported inside commands only."""
