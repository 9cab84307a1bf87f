"""CLIP as a classifier of what is written: ``open_clip:NAME,pretrained=FILE,prompts=...``
(extra ``clip``).

A prompt is a class; its logit is the scaled cosine of image and prompt (Radford et al.
2021, section 3.1), so that every method and metric takes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from consilience import registry
from consilience.files import read_text
from consilience.models import weights as files
from consilience.models.network import Recipe, TorchNetwork, wrap
from consilience.models.sources import (
    ModuleOptions,
    as_its_source_says,
    configured,
    filled,
    told,
)
from consilience.registry import Spec, option
from consilience.types import ConsilienceError


@dataclass(frozen=True)
class ZeroShotClip(ModuleOptions):
    """``open_clip:NAME`` by open_clip's name; ``prompts`` are a file with one a line, or
    prompts joined with +.
    """

    name: str
    pretrained: str | None = option(
        None, help="a file of weights, a tag of open_clip, or random"
    )
    prompts: tuple[str, ...] | None = option(
        None, help="a file with one a line, or prompts joined with +"
    )
    seed: int = option(0, help="of pretrained=random", least=0)

    spelled = "open_clip"


class ZeroShot(nn.Module):
    """An image encoder and the embeddings of prompts (K, d): cosines times the scale."""

    prompts: Tensor
    scale: Tensor

    def __init__(self, visual: nn.Module, prompts: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.visual = visual
        self.register_buffer("prompts", functional.normalize(prompts, dim=-1))
        self.register_buffer("scale", scale.detach().clone())

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (N, K)."""
        found = self.visual(pixels)
        found = found[0] if isinstance(found, tuple) else found
        return self.scale * functional.normalize(found, dim=-1) @ self.prompts.T


def load_zero_shot(spec: Spec) -> TorchNetwork:
    """The network of an ``open_clip:`` spelling; raises `ConsilienceError` in one line."""
    options: ZeroShotClip = registry.construct(ZeroShotClip, spec)
    prompts = read_prompts(options.prompts)
    if options.labels or options.classes:
        raise ConsilienceError("open_clip: its prompts are its classes")
    clip = _clip_of(options)
    library = _library()
    tokens = library.get_tokenizer(options.name)(list(prompts))
    with torch.no_grad():
        texts = clip.encode_text(tokens)
    module = ZeroShot(clip.visual, texts, clip.logit_scale.exp()).eval()
    recipe = clip_recipe(clip.visual)
    given = told(options)
    network = wrap(
        module,
        name=f"open_clip:{options.name}",
        **{**filled(given, recipe), "classes": prompts},
    )
    network = as_its_source_says(network, given, recipe, "preprocessing")
    network = replace(network, weights=options.pretrained or "random")
    return configured(network, options, registry.render(spec))


def read_prompts(given: tuple[str, ...] | None) -> tuple[str, ...]:
    """Prompts, of a file with one a line or as they are given; two at least, each once."""
    if not given:
        raise ConsilienceError(
            "open_clip: prompts= names the classes: a file with one a line, or 'a dog+a cat'"
        )
    found = given
    if len(given) == 1:
        file = Path(given[0]).expanduser()
        if file.is_file():
            lines = read_text(file, "prompts").splitlines()
            found = tuple(line.strip() for line in lines if line.strip())
        elif "+" in given[0]:
            found = tuple(part.strip() for part in given[0].split("+"))
    if len(found) < 2:
        raise ConsilienceError(
            f"open_clip: a zero-shot classifier needs two prompts or more; got "
            f"{', '.join(map(repr, found)) or 'none'}"
        )
    twice = sorted({one for one in found if found.count(one) > 1})
    if twice:
        raise ConsilienceError(f"open_clip: the prompt {twice[0]!r} is there twice")
    return found


def _library() -> Any:
    try:
        import open_clip
    except ImportError:
        raise ConsilienceError(
            "open_clip: needs open_clip, which is not installed; pip install "
            "'consilience[clip]'"
        ) from None
    return open_clip


def _clip_of(options: ZeroShotClip) -> Any:
    library = _library()
    if options.name not in library.list_models():
        raise ConsilienceError(
            registry.unknown(
                "open_clip model", options.name, library.list_models(), limit=12
            )
        )
    if options.pretrained is None:
        raise ConsilienceError(
            "open_clip: pretrained= is a file of weights, a tag of open_clip, or random"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        clip = library.create_model(options.name, pretrained=None)
    if options.pretrained == "random":
        return clip.float().eval()
    file = Path(options.pretrained).expanduser()
    if not file.is_file():
        file = _fetched(library, options)
    files.fit_weights(clip, files.read_weights(file), f"weights {file.name!r}")
    return clip.float().eval()


def _fetched(library: Any, options: ZeroShotClip) -> Path:
    """The file of a tag, downloaded where there is a network."""
    tags = library.list_pretrained_tags_by_model(options.name)
    if options.pretrained not in tags:
        raise ConsilienceError(
            f"open_clip: there is no file {options.pretrained!r}, and "
            f"{registry.unknown('tag', str(options.pretrained), tags)}"
        )
    config: Any = library.get_pretrained_cfg(options.name, options.pretrained)
    name = f"open_clip:{options.name} ({options.pretrained})"
    if config.get("hf_hub"):
        repository, _, file = str(config["hf_hub"]).rpartition("/")
        wanted = (file,) if file else _HUB_FILES
        return files.fetch_hub(repository.rstrip("/"), wanted, name)
    return files.fetch(str(config["url"]), name)


_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def clip_recipe(visual: Any) -> Recipe:
    """How open_clip shows images to an encoder (its ``preprocess_cfg``)."""
    said = dict(getattr(visual, "preprocess_cfg", None) or {})
    size: Any = said.get("size") or getattr(visual, "image_size", 224)
    frame = (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))
    crop: dict[str, Any] = {"shortest": "short", "longest": "long", "squash": "exact"}
    fill = float(said.get("fill_color", 0) or 0) / 255
    return Recipe(
        size=frame,
        resized=frame,
        crop=crop[said.get("resize_mode") or "shortest"],
        interpolation="bilinear"
        if said.get("interpolation") == "bilinear"
        else "bicubic",
        mean=tuple(said.get("mean") or CLIP_MEAN),
        std=tuple(said.get("std") or CLIP_STD),
        pad=(fill,) * 3,
    )


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""OpenAI's, of the data that CLIP was trained on."""
