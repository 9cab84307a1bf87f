"""Marks that are planted in images to ask whether a network uses them: one a file."""
