"""Explainers: one family a file; every module here is found by its presence."""
