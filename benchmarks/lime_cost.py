"""How many draws bring LIME as close to its limit as `lime`'s 700 do, and what they cost?
Run by hand:

    python benchmarks/lime_cost.py IMAGES CACHE [--images 10] [--seeds 4] [--cost .53]

IMAGES and CACHE are those of `lime_designs.py`, whose kept scores are used. Each design is
read at several lengths (the first of its draws), asked of the exact network alone, and with
most of them asked of the copy in bf16 (`fidelity=bf16`), whose scores of the very draws are
kept too. Printed, over all images and seeds, beside `lime`'s own draws:

    iou, weight, error   as in `lime_designs.py`; error in parts of that of lime's 700
    passes               what the draws cost in passes of the exact network: those of the
                         copy count ``--cost`` each, which `Cheaper.cost` says of a machine
"""

import argparse
from dataclasses import dataclass

import numpy as np
from lime_designs import REFERENCE_SEED, Image, arguments, scored, weights_of

import consilience as cs
from consilience import data
from consilience.perturb.fidelity import ask
from consilience.perturb.surrogate import falling, least_squares
from consilience.types import Cheaper, Model

LENGTHS = (128, 256, 320, 384, 448, 512)
LIME = 700


def main() -> None:
    """Score what is not there yet, then print the table."""
    parser = arguments(__doc__, 4, ("antithetic", "hadamard"))
    parser.add_argument("--cost", type=float, default=0.53)
    asked = parser.parse_args()
    model: Model | None = None
    rows: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    for number, path in enumerate(
        data.find_images([str(asked.folder)])[: asked.images], 1
    ):
        image, cheap = Image(path, asked), Image(path, cheap_of(asked))
        for one, precision in ((image, "f32"), (cheap, "bf16")):
            missing = [
                run
                for run in wanted(asked, precision)
                if not one.file(*run).is_file()
            ]
            if missing:
                model = model or cs.load_model(asked.model)
                one.score(
                    model.using(precision=precision),
                    missing,
                    f"[{number}] {path.stem} {precision}",
                )
        reference = weights_of(
            image.read("independent", REFERENCE_SEED, asked.reference), asked
        )
        for seed in range(asked.seeds):
            run = image.read("lime", seed, LIME)
            add(rows, ("lime", LIME, "exact"), held(run, LIME, reference), LIME)
            for design in asked.designs.split(","):
                for length in LENGTHS:
                    exact = image.read(design, seed, max(LENGTHS))
                    said = cheap.read(design, seed, max(LENGTHS))[1]
                    add(
                        rows,
                        (design, length, "exact"),
                        held(exact, length, reference),
                        length,
                    )
                    mixed, passes = together(exact, said, length, seed, asked.cost)
                    if passes < length:
                        add(
                            rows,
                            (design, length, "bf16"),
                            held(mixed, length, reference),
                            passes,
                        )
    report(rows, asked)


def cheap_of(asked: argparse.Namespace) -> argparse.Namespace:
    """Where the copy's scores are kept."""
    return argparse.Namespace(**{**vars(asked), "cache": asked.cache / "bf16"})


def wanted(asked: argparse.Namespace, precision: str) -> list[tuple[str, int, int]]:
    runs = [
        (design, seed, max(LENGTHS))
        for design in asked.designs.split(",")
        for seed in range(asked.seeds)
    ]
    if precision == "bf16":
        return runs
    lime = [("lime", seed, LIME) for seed in range(asked.seeds)]
    return [("independent", REFERENCE_SEED, asked.reference), *lime, *runs]


@dataclass
class Told:
    """A network whose answers to all draws are known."""

    says: np.ndarray
    copy: Cheaper | None = None

    def cheaper(self, _fidelity: str) -> Cheaper | None:
        return self.copy


Run = tuple[np.ndarray, np.ndarray, np.ndarray]


def together(
    exact: Run, cheap: np.ndarray, length: int, seed: int, cost: float
) -> tuple[Run, float]:
    """A run as ``fidelity=bf16`` has it, and its cost."""
    on, scores, pairs = exact
    pairs = pairs[(pairs < length).all(axis=1)]
    model = Told(scores[:length])
    model.copy = Cheaper("bf16", Told(cheap[:length]), cost)
    found = ask(
        "bf16", model, lambda told, rows: told.says[rows], on[:length], pairs, seed
    )
    facts = found.facts["fidelity"]
    passes = facts.get("exact_passes", length) + cost * facts.get("cheap_passes", 0)
    return (on[:length], found.scores, pairs), passes


def held(run: Run, length: int, reference: np.ndarray) -> dict[str, float]:
    """The first draws of a run against the reference of its image."""
    k = min(10, len(reference))
    true = set(falling(reference)[:k].tolist())
    weights = least_squares(scored(run, length), 0.01).coefficients
    mine = falling(weights)[:k].tolist()
    return {
        "iou": len(true & set(mine)) / len(true | set(mine)),
        "weight": np.abs(reference[mine]).sum() / np.abs(reference[list(true)]).sum(),
        "error": float(((weights - reference) ** 2).mean() / (reference**2).mean()),
    }


def add(rows, key, found: dict[str, float], passes: float) -> None:
    rows.setdefault(key, []).append({**found, "passes": passes})


def report(rows, asked: argparse.Namespace) -> None:
    print(
        f"{asked.model}, {asked.images} images, {asked.seeds} seeds, a pass in bf16 costs "
        f"{asked.cost}"
    )
    print("| draw | draws | asked | passes | iou | weight held | error |")
    print("|---|--:|---|--:|--:|--:|--:|")
    of = lambda key, name: np.array([row[name] for row in rows[key]])  # noqa: E731
    lime = of(("lime", LIME, "exact"), "error")
    for key in rows:
        # an image's own error differs by orders of magnitude: compared image by image
        relative = of(key, "error").reshape(-1, asked.seeds).mean(1)
        relative = relative / lime.reshape(-1, asked.seeds).mean(1)
        print(
            f"| `{key[0]}` | {key[1]} | {key[2]} | {of(key, 'passes').mean():.0f} | "
            f"{of(key, 'iou').mean():.3f} | {of(key, 'weight').mean():.3f} | "
            f"{np.sqrt(np.exp(np.log(relative).mean())):.2f} |"
        )


if __name__ == "__main__":
    main()
