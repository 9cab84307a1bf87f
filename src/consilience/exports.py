"""Explanations handed to other tools."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from consilience.types import Array, ConsilienceError, Explanation


def shares(values: Array) -> Array:
    """A map (H, W) scaled to [0, 1] for the eye, 0 where the model did not look; one
    that is the same everywhere is 0.
    """
    seen = np.isfinite(values)
    if not seen.any():
        return np.zeros(values.shape, dtype=np.float32)
    low, high = float(values[seen].min()), float(values[seen].max())
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return np.where(seen, scaled, 0.0).astype(np.float32)


def to_fiftyone(
    explanations: Sequence[Explanation], dataset: Any, field: str | None = None
) -> None:
    """Maps as heat maps of a FiftyOne data set's samples (`Explanations.to_fiftyone`)."""
    try:
        import fiftyone
    except ImportError:
        raise ConsilienceError(
            "to_fiftyone needs FiftyOne: pip install fiftyone"
        ) from None
    by_path = {str(Path(sample.filepath).resolve()): sample for sample in dataset}
    by_name: dict[str, list[Any]] = {}
    for path, sample in by_path.items():
        by_name.setdefault(Path(path).stem, []).append(sample)
    for one in explanations:
        source = one.sample.source
        found = by_path.get(str(Path(source).resolve())) if source else None
        named = by_name.get(one.sample.name, [])
        found = found or (named[0] if len(named) == 1 else None)
        if found is None:
            raise ConsilienceError(
                f"the data set has no sample for {source or one.sample.name}, by its file or "
                f"its name"
            )
        found[field or field_name(one)] = fiftyone.Heatmap(
            map=shares(one.to_image()), range=[0, 1]
        )
        found.save()


def field_name(explanation: Explanation) -> str:
    """An explainer's name as a field may be called: ``gradcam++`` is ``gradcam_plus_plus``."""
    return explanation.name.replace("++", "_plus_plus").replace("-", "_")
