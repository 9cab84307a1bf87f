"""What the demo runs on: photographs that scikit-image carries, and the embedded model."""

from __future__ import annotations

from pathlib import Path

from consilience.runs.explain import Job, job_from_specs
from consilience.types import ConsilienceError

PICTURES = ("chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "astronaut.png")
BY = ("gradcam", "lime:samples=700,seed=1")


def pictures() -> list[Path]:
    """The photographs' files inside the installed scikit-image."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    there = [folder / name for name in PICTURES if (folder / name).is_file()]
    if not there:
        raise ConsilienceError(f"scikit-image carries none of {', '.join(PICTURES)} in {folder}; install a release that does")
    return there


def job() -> Job:
    """Grad-CAM against LIME on the embedded model."""
    return job_from_specs(BY, title="Demo: do Grad-CAM and LIME agree?")
