"""Readers of concept sets, one format a file."""
