"""Files of weights and of class names: found, fetched, read without unpickling
anything, and fitted to a module.
"""

from __future__ import annotations

import os
import pickle
import re
import socket
import urllib.error
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from consilience.files import read_csv_records, read_json_data, read_text
from consilience.progress import say
from consilience.types import ConsilienceError

TIMEOUT = 3.0
_NESTS = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model_state_dict",
    "model",
    "net",
)
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_PLACE = re.compile(r"/[a-z]/(?P<name>\S.*?)\s+(?P<index>\d+)")
"""A line of ``categories_places365.txt``: the class's folder by its first letter, and
its index.
"""

_PICKLED = re.compile(r"GLOBAL ([\w.]+)")
"""What torch says a pickled file holds."""

State = dict[str, Tensor]


# ---- reading weights


def read_weights(path: str | Path) -> State:
    """The tensors of a .pth, .pt, .bin or .safetensors file by name, out of the usual
    nests and prefixes.

    A file that needs unpickling of anything but tensors is refused: unpickling runs
    code.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConsilienceError(f"weights {str(path)!r}: no such file")
    return _bare(_nested(_content(file), file), file)


def _content(file: Path) -> Any:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except SafetensorError as error:
            raise ConsilienceError(
                f"{file}: not a safetensors file ({error})"
            ) from None
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = _PICKLED.search(str(error))
        named = f" ({found[1]})" if found else ""
        raise ConsilienceError(
            f"{file}: holds more than tensors{named} and is not unpickled, because that could "
            f"run code; where it was made, save its weights alone: "
            f"torch.save(model.state_dict(), FILE), best as .safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ConsilienceError(
            f"{file}: not a file of torch weights, or damaged ({str(error).splitlines()[0]})"
        ) from None


def _nested(content: Any, file: Path) -> dict[str, Any]:
    met: set[int] = set()
    while isinstance(content, Mapping):
        if id(content) in met:
            raise ConsilienceError(f"{file}: a state dict that holds itself")
        met.add(id(content))
        inner = next(
            (content[key] for key in _NESTS if isinstance(content.get(key), Mapping)),
            None,
        )
        if inner is None:
            return dict(content)
        content = inner
    raise ConsilienceError(
        f"{file}: holds a {type(content).__name__}; weights are a state dict, name to tensor"
    )


def _bare(state: dict[str, Any], file: Path) -> State:
    tensors = {
        name: value for name, value in state.items() if isinstance(value, Tensor)
    }
    if not tensors:
        there = ", ".join(map(str, list(state)[:8])) or "nothing"
        raise ConsilienceError(f"{file}: no tensors in it; it has {there}")
    return tensors


# ---- fitting them to a module


def fit_weights(module: nn.Module, state: State, source: str) -> None:
    """Load ``state`` into ``module``, or say which keys differ first."""
    own = module.state_dict()
    state = _stripped(state, set(own))
    problems = _differences(own, state)
    if problems:
        raise ConsilienceError(
            f"{source} does not fit {type(module).__name__}: {'; '.join(problems)}"
        )
    module.load_state_dict(state, strict=False)


def _stripped(state: State, names: set[str]) -> State:
    """The state under the prefix that makes the most of its names known."""
    prefixes = [
        "",
        *_PREFIXES,
        *(first + second for first in _PREFIXES for second in _PREFIXES),
    ]

    def stripped(prefix: str) -> State:
        return {name.removeprefix(prefix): value for name, value in state.items()}

    return max(
        (stripped(prefix) for prefix in prefixes),
        key=lambda found: len(names & found.keys()),
    )


def _differences(own: Mapping[str, Tensor], state: State) -> list[str]:
    missing = [name for name in own if name not in state and not _optional(name)]
    unexpected = [name for name in state if name not in own and not _optional(name)]
    shapes = [
        f"{name} is {tuple(state[name].shape)} in the file and {tuple(own[name].shape)} in "
        f"the model"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    listed = [
        f"{kind} {_some(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    return listed + ([_some(shapes)] if shapes else [])


def _optional(name: str) -> bool:
    """Counters, and heads that run in training only: their absence changes no score."""
    return name.startswith(_AUXILIARY) or name.endswith(
        ("num_batches_tracked", "total_ops", "total_params")
    )


def _some(items: list[str], limit: int = 3) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def last_size(module: nn.Module, state: State) -> int | None:
    """How many classes ``state`` has: rows of what the module's last weight matrix with
    its own bias is called there.
    """
    own = module.state_dict()
    state = _stripped(state, set(own))
    differing = [
        name
        for name in own
        if name in state and state[name].shape[:1] != own[name].shape[:1]
    ]
    heads = [
        name
        for name in differing
        if name.endswith("weight") and state[name].shape[1:] == own[name].shape[1:]
    ]
    return int(state[heads[-1]].shape[0]) if heads else None


# ---- fetching


def fetch(url: str, name: str) -> Path:
    """The file behind a url in torch hub's folder of checkpoints, downloaded if it is
    not there yet.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if file.is_file():
        return file
    with network(
        url,
        f"the weights of {name}: {url}",
        f"put it at {file}, or give weights=FILE",
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        say(f"downloading {url}")
        stem = file.stem.rpartition("-")[2]
        hashed = (
            stem
            if len(stem) == 8 and all(letter in "0123456789abcdef" for letter in stem)
            else None
        )
        torch.hub.download_url_to_file(
            url, str(file), hash_prefix=hashed, progress=False
        )
    return file


def fetch_hub(repository: str, files: tuple[str, ...], name: str) -> Path:
    """The first of ``files`` in a Hugging Face repository, from its cache or
    downloaded.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    for file in files:
        cached = try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached)
    wanted = (
        f"the weights of {name}: {constants.ENDPOINT}/{repository}, file {files[0]}"
    )
    remedy = f"put it in the cache {constants.HF_HUB_CACHE}, or give weights=FILE"
    with network(
        constants.ENDPOINT, wanted, remedy, offline=constants.HF_HUB_OFFLINE
    ):
        for file in files:
            try:
                say(f"downloading {repository}/{file}")
                return Path(hf_hub_download(repository, file))
            except EntryNotFoundError:
                continue
    raise ConsilienceError(f"{repository} has none of {', '.join(files)}")


@contextmanager
def network(
    url: str, wanted: str, remedy: str, offline: bool = False
) -> Iterator[None]:
    """Do what needs the network; without one, say at once what to get and where to put
    it.
    """
    if offline or not reachable(url):
        raise ConsilienceError(
            f"no network, and not on this machine yet: {wanted}; {remedy}"
        )
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30.0)
    try:
        yield
    except (OSError, urllib.error.URLError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConsilienceError(
            f"could not download {wanted} ({reason}); {remedy}"
        ) from None
    finally:
        socket.setdefaulttimeout(before)


def reachable(url: str) -> bool:
    """Whether a connection to the url's host opens within a few seconds; a proxy is
    taken at its word.
    """
    if any(
        os.environ.get(key)
        for key in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
    ):
        return True
    parts = urlparse(url)
    try:
        with socket.create_connection(
            (parts.hostname or "", parts.port or 443), timeout=TIMEOUT
        ):
            return True
    except OSError:
        return False


# ---- class names


def read_labels(path: str | Path) -> tuple[str, ...]:
    """Class names in order, from a file: one a line, Places365's own (``/a/airfield
    0``), a JSON list, JSON ``{index: name}`` or ``{index: [wnid, name]}``, or a CSV
    whose header has a column of indices and one of names.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConsilienceError(f"labels {str(path)!r}: no such file")
    readers: dict[str, Callable[[Path], dict[int, str]]] = {
        ".json": _json_labels,
        ".csv": _csv_labels,
    }
    names = readers.get(file.suffix.lower(), _line_labels)(file)
    gaps = sorted(set(range(len(names))) - names.keys())
    if gaps or not names:
        raise ConsilienceError(
            f"{file}: {len(names)} class names, and none for class {gaps[0] if gaps else 0}"
        )
    return tuple(names[index] for index in range(len(names)))


def _line_labels(file: Path) -> dict[int, str]:
    said = read_text(file, "labels").splitlines()
    lines = [line.strip() for line in said if line.strip()]
    places = [_PLACE.fullmatch(line) for line in lines]
    if lines and all(places):
        return {int(place["index"]): place["name"] for place in places if place}
    return dict(enumerate(lines))


def _json_labels(file: Path) -> dict[int, str]:
    content = read_json_data(file, "labels")
    items = (
        enumerate(content)
        if isinstance(content, list)
        else content.items()
        if isinstance(content, dict)
        else ()
    )
    try:
        return {int(index): _json_name(name) for index, name in items}
    except (ValueError, TypeError, IndexError):
        raise ConsilienceError(
            f"{file}: labels in JSON are a list, or an object of class index to name"
        ) from None


def _json_name(name: Any) -> str:
    """A name, alone or after its WordNet id."""
    last = name[-1] if isinstance(name, list) else name
    if not isinstance(last, str):
        raise TypeError(f"a class name is text; got {last!r}")
    return last


def _csv_labels(file: Path) -> dict[int, str]:
    rows = read_csv_records(file, "labels")
    columns = list(rows[0]) if rows else []
    index = next(
        (
            column
            for column in columns
            if column.strip().lower() in ("class_index", "index", "class", "id")
        ),
        None,
    )
    name = next(
        (
            column
            for column in columns
            if column.strip().lower() in ("name", "label", "class_name")
        ),
        None,
    )
    if index is None or name is None:
        raise ConsilienceError(
            f"{file}: a CSV of labels has the columns class_index and name; this has "
            f"{', '.join(columns)}"
        )
    try:
        return {int(row[index]): str(row[name]) for row in rows}
    except (TypeError, ValueError):
        raise ConsilienceError(
            f"{file}: the column {index} holds whole numbers"
        ) from None
