"""Measurements of fastbyol: what its README and bench/results say was made by the modules here."""
