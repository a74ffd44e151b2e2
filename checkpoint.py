"""Weight files: write them atomically, read them without running what is in them.

A checkpoint of ours is a dict of tensors and primitives:

    model          state dict
    model_name     a name of model.VARIANTS
    classes        class names, in the order of the outputs
    preprocessing  {"resize", "crop", "mean", "std"}
    epoch          epochs trained
    metrics        the figures of that epoch
    args           the options of train.py

`last.pth` holds beside these what `--resume` needs. Bare state dicts are read too: torchvision's,
the tutorial's, and those wrapped by DataParallel or torch.compile.
"""

import io
import json
import os
import re
import zipfile
from pathlib import Path
from reprlib import repr  # short, also of a list that holds a list twice, that ...
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from cli import RunError, UsageError, notice
from files import replacing
from image import check_classes, check_preprocessing, default_preprocessing, is_name
from model import VARIANTS, build_model

HEAD = ("fc.weight", "fc.bias")


def save(state: dict, path: str | Path, previous: Path | None = None) -> None:
    """Write a dict of tensors and primitives atomically; what was at `path` goes to `previous`.

    Raises:
        OSError: the disk is full or not writable; both files are what they were.
    """
    buffer = io.BytesIO()  # torch reports a full disk as an error of its own, a buffer as OSError
    torch.save(state, buffer)
    with replacing(path, previous=previous) as file:
        file.write(buffer.getbuffer())


def load(path: str | Path) -> dict:
    """Read a weight file to the CPU with `weights_only=True`.

    Raises:
        RunError: not a weight file, damaged, or in need of unpickling code.
        FileNotFoundError: no such file.
    """
    try:
        _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # the unpickler raises nearly anything on damaged bytes
        raise RunError(
            f"{path}: damaged, or not a file of torch.save(model.state_dict(), FILE) "
            f"({_reason(error)})"
        ) from None
    if not isinstance(state, dict):
        raise RunError(f"{path}: holds a {type(state).__name__}, expected a state dict")
    return state


def _check_archive(path: str | Path) -> None:
    """Raise an error if a bit of the archive is another than was written, or if it grows when
    unpacked, which those of torch do not: it could fill the memory."""
    with open(path, "rb") as file:
        if file.read(2) != b"PK":  # of an older format
            return
    with zipfile.ZipFile(path) as archive:
        unpacked, size = sum(e.file_size for e in archive.infolist()), os.path.getsize(path)
        if unpacked > size:
            raise ValueError(f"{size:,} bytes that unpack to {unpacked:,}")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is not what was written")


def _reason(error: Exception) -> str:
    text = str(getattr(error, "reason", error)) or repr(error)
    if "Weights only load failed" in text:  # torch goes on to say how to run them nevertheless
        return "it is damaged, or holds Python objects, which are never run"
    return text.partition("\n")[0]


def state_dict_of(file: dict, path: str | Path) -> dict[str, Tensor]:
    """The weights in what `load` returned, without the prefixes of wrappers.

    Raises:
        UsageError: there are none, or one of them holds a value that is not finite.
    """
    state = file
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(file.get(key), dict):
            state = file[key]
            break
    weights = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UsageError(f"{path}: {repr(name)} is no tensor; expected a state dict")
        if not is_plain(value):
            raise UsageError(f"{path}: {name} is not stored as it is, value by value")
        if value.is_floating_point() and not value.isfinite().all():
            raise UsageError(f"{path}: {name} holds values that are not finite")
        weights[re.sub(r"^(module\.|_orig_mod\.)+", "", name)] = value
    if not weights:
        raise UsageError(f"{path}: holds no weights")
    return weights


def is_plain(value: Tensor) -> bool:
    """Neither sparse, quantized or without values, nor a few bytes that claim to be many."""
    dense = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    return dense and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def head_fits(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    """Whether the state dict holds a head (`fc`) of the model's size."""
    own = model.state_dict()
    return all(name in weights and weights[name].shape == own[name].shape for name in HEAD)


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], source: str | Path, *, new_head: bool = False
) -> _IncompatibleKeys:
    """Load a state dict into `model`.

    Args:
        model: any network of `model.py`.
        weights: the state dict.
        source: where it comes from, for messages.
        new_head: leave the model's own head (`fc`) in place.

    Returns:
        missing_keys and unexpected_keys, as torch reports them.

    Raises:
        UsageError: anything else is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    if new_head:
        weights = {name: value for name, value in weights.items() if name not in HEAD}
    wrong = [
        f"{name} is {tuple(weights[name].shape)}, the model's {tuple(value.shape)}"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    # Files of torch before 0.4.1 lack the batch counters, which no computation here reads.
    wrong += [
        f"{name} is missing"
        for name in own
        if name not in weights
        and not name.endswith("num_batches_tracked")
        and not (new_head and name in HEAD)
    ]
    wrong += [f"{name} is unexpected" for name in weights if name not in own]
    if wrong:
        name = _variant_of(weights)
        raise UsageError(
            f"{source} does not fit the model: {'; '.join(wrong[:3])}"
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}; "
            + (f"it is a {name}: use --model {name}" if name else "it fits no network here")
        )
    return model.load_state_dict(weights, strict=False)


def imagenet_weights(model_name: str) -> tuple[dict[str, Tensor], str]:
    """torchvision's ImageNet weights of a v2 network, downloaded once, and their URL.

    Raises:
        UsageError: none are published for this network.
        RunError: they cannot be downloaded, and the message says which file to put where; or the
            file from an earlier time is damaged.
    """
    import socket

    from torchvision.models import get_model_weights

    if not model_name.startswith("shufflenet_v2_"):
        raise UsageError(
            f"--weights imagenet: torchvision publishes none for {model_name}, only for "
            "shufflenet_v2_x0_5, _x1_0, _x1_5 and _x2_0"
        )
    url = get_model_weights(model_name).IMAGENET1K_V1.url
    place = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not place.exists():
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            start_of_hash = place.stem.rpartition("-")[2]
            torch.hub.download_url_to_file(url, str(place), start_of_hash)
        except Exception as error:  # no network, or a wrong hash
            raise RunError(
                f"cannot get {url} ({_reason(error)}); fetch it by other means and put it at "
                f"{place}, or pass it with --weights FILE"
            ) from None
        finally:
            socket.setdefaulttimeout(timeout)
    return state_dict_of(load(place), place), url


class Classifier(NamedTuple):
    """A trained network with what is needed to use it."""

    model: nn.Module  # in eval mode, on the CPU
    model_name: str
    classes: list[str]
    preprocessing: dict
    args: dict  # of train.py; empty for a bare state dict


def load_classifier(path: str | Path) -> Classifier:
    """Read a checkpoint of ours or a bare state dict and build its network.

    A bare state dict tells its variant by its shapes; its class names come from a
    class_indices.json beside it, else from the one beside this file, else, for 1000 classes, from
    torchvision.

    Raises:
        RunError: the file is damaged.
        UsageError: it fits no network of ours, or there are no class names for it.
    """
    file = load(path)
    weights = state_dict_of(file, path)
    if "model_name" in file:
        classifier = _own_fields(file, path)
        beside = Path(path).parent / "class_indices.json"
        if beside.exists() and read_class_indices(beside) != classifier.classes:
            notice(f"{beside} names other classes than {path}; those in the checkpoint are used")
    else:
        name = _variant_of(weights)
        if name is None or "fc.weight" not in weights:
            raise UsageError(f"{path}: its weights fit no network of this repository")
        classes = _class_names(Path(path), len(weights["fc.weight"]))
        model = build_model(name, len(classes))
        classifier = Classifier(model, name, classes, default_preprocessing(name), {})
    load_weights(classifier.model, weights, path)
    classifier.model.eval()
    return classifier


def _own_fields(file: dict, path: str | Path) -> Classifier:
    """What a checkpoint of ours says of itself, its types checked."""
    fields = {"model_name": str, "classes": list, "preprocessing": dict, "args": dict}
    for name, kind in fields.items():
        if not isinstance(file.get(name), kind):
            raise RunError(f"{path}: {name} is missing or no {kind.__name__}; train again")
    preprocessing, classes = file["preprocessing"], file["classes"]
    check_classes(classes, path)
    check_preprocessing(preprocessing, path)
    try:
        model = build_model(file["model_name"], len(classes))
    except ValueError as error:
        raise RunError(f"{path}: {error}") from None
    args = {k: v for k, v in file["args"].items() if isinstance(v, str | float | int | None)}
    return Classifier(model, file["model_name"], classes, preprocessing, args)


def _variant_of(weights: dict[str, Tensor]) -> str | None:
    """The name of the variant whose shapes, the head's aside, are those of the state dict."""

    def shapes(state: dict[str, Tensor]) -> dict:
        return {
            name: tuple(value.shape)
            for name, value in state.items()
            if name not in HEAD and not name.endswith("num_batches_tracked")
        }

    found = shapes(weights)
    for name in VARIANTS:
        with torch.device("meta"):
            model = build_model(name)
        if shapes(model.state_dict()) == found:
            return name
    return None


def _class_names(path: Path, count: int) -> list[str]:
    beside = path.parent / "class_indices.json"
    if beside.exists():
        names = read_class_indices(beside)
        if len(names) == count:
            return names
        notice(f"{beside} names {len(names)} classes, {path} has {count}: not used")
    names = read_class_indices(Path(__file__).parent / "class_indices.json")
    if len(names) == count:
        return names
    if count == 1000:
        from torchvision.models import ShuffleNet_V2_X1_0_Weights

        return ShuffleNet_V2_X1_0_Weights.IMAGENET1K_V1.meta["categories"]
    raise UsageError(
        f"{path} has {count} classes and no names; put a class_indices.json beside it: "
        '{"0": "NAME", "1": ...}'
    )


def read_class_indices(path: str | Path) -> list[str]:
    """Class names in the order of their index, from {"0": "daisy", ...}.

    Raises:
        UsageError: not such a file.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        names = [table[str(index)] for index in range(len(table))]
        if not all(map(is_name, names)):
            raise ValueError("a name is no text")
        return names
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f'{path}: expected {{"0": "NAME", "1": ...}} without a gap ({error!r})'
        ) from None
