"""Metrics: is the explanation faithful, does it find the object, is it stable? One
family a file.
"""
