"""Runs: explaining, evaluating, dissecting and comparing into a folder that can be
continued.
"""
