"""Perturbations: what the model says of edited images, and how the edits are drawn."""
