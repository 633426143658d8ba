"""Measurements of fastbyol: the source of every figure in its README and in bench/results."""
