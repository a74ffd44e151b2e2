"""Weight files: write them atomically, read them without running what is in them.

A checkpoint of ours is a dict of tensors and primitives:

    model          state dict
    model_name     a name of model.VARIANTS
    classes        class names, in the order of the outputs
    preprocessing  {"resize", "crop", "mean", "std"}
    epoch          epochs trained
    metrics        the figures of that epoch
    args           the options of train.py

`last.pth` holds beside these what `--resume` needs (run_folder.py). Bare state dicts are read too:
torchvision's, the tutorial's, and those wrapped by DataParallel, torch.compile, EMA or Lightning.
"""

import argparse
import contextlib
import io
import json
import re
import sys
import warnings
import zipfile
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn

from model import VARIANTS, build_model, default_preprocessing
from shufflenet.common.files import replacing
from shufflenet.common.messages import RunError, UsageError, notice
from shufflenet.inference.metadata import Metadata

FC = ("fc.weight", "fc.bias")
CLASS_INDICES = Path(__file__).parents[2] / "class_indices.json"  # of the repository


def save(state: dict, path: str | Path) -> None:
    """Write a dict of tensors and primitives, as `replacing` does."""
    buffer = io.BytesIO()  # torch reports a full disk as an error of its own, a buffer as OSError
    torch.save(state, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def load(path: str | Path) -> dict:
    """Read a weight file to the CPU; RunError if it is none, is damaged, or would run code."""
    try:
        if zipfile.is_zipfile(path):  # else of an older format
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} is not what was written")
        # torchvision's training script saves its options in one of these: a holder of values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about other kinds of files
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # the unpickler raises nearly anything on damaged bytes
        reason = str(error).partition("\n")[0] or type(error).__name__
        if "eights only load failed" in reason or "weights_only" in reason:
            reason = "it may hold Python objects, which are never run"  # torch says how to run them
        raise RunError(f"{path}: not a weight file, or damaged: {reason}") from None
    if not isinstance(state, dict):
        raise RunError(f"{path}: holds a {type(state).__name__}, expected a state dict")
    return state


def state_dict_of(file: dict, path: str | Path) -> dict[str, Tensor]:
    """The weights in a file, without the prefixes of wrappers; UsageError if there are none."""
    keys = ("model", "state_dict", "model_state_dict", "net")
    state = next((file[key] for key in keys if isinstance(file.get(key), dict)), file)
    weights = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UsageError(f"{path}: {name!r} is no tensor; expected a state dict"[:200])
        weights[re.sub(r"^((module|_orig_mod|model)\.)+", "", name)] = value
    weights.pop("n_averaged", None)  # of torch.optim.swa_utils
    if not weights:
        raise UsageError(f"{path}: holds no weights")
    return weights


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], source: str | Path, *, new_fc: bool = False
) -> tuple[list[str], list[str]]:
    """Load a state dict; with `new_fc` the model's own last layer stays. Returns missing and
    unexpected keys; UsageError if anything else is missing, unexpected or of another shape."""
    if new_fc:
        weights = {name: value for name, value in weights.items() if name not in FC}
    ours, theirs = _shapes(model.state_dict(), fc=not new_fc), _shapes(weights)
    if wrong := sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name)):
        name = _variant_of(weights)
        hint = f"use --model {name}" if name else "it fits no network of this repository"
        first = f"{wrong[0]}: {theirs.get(wrong[0], 'missing')} for {ours.get(wrong[0], 'none')}"
        raise UsageError(f"{source}: {len(wrong)} tensors differ, for example {first}; {hint}")
    return tuple(model.load_state_dict(weights, strict=False))


def load_pretrained(model: nn.Module, model_name: str, weights: str, classes: list[str]) -> bool:
    """Start from torchvision's weights ("imagenet") or a file, and say what was loaded. The last
    layer is loaded only if it has as many outputs, and was trained on no other classes; returns
    whether it stays as it was, new."""
    file = load(imagenet_file(model_name) if weights == "imagenet" else weights)
    state, trained_on = state_dict_of(file, weights), file.get("classes")
    fits = all(state[name].shape == model.state_dict()[name].shape for name in FC if name in state)
    new_fc = not fits or FC[0] not in state or trained_on not in (None, classes)
    missing, unexpected = load_weights(model, state, weights, new_fc=new_fc)
    new = f"; fc is new, for {len(classes)} classes" if new_fc else ""
    notice(f"loaded {weights}: missing keys {missing}, unexpected keys {unexpected}{new}")
    return new_fc


def imagenet_file(model_name: str = "shufflenet_v2_x1_0") -> Path:
    """The file of torchvision's ImageNet weights of a v2 network, downloaded once. UsageError if
    none are published; RunError if they cannot be had, with which file to put where."""
    from torchvision.models import get_model_weights, list_models

    if model_name not in list_models(include="shufflenet_v2_*"):
        raise UsageError(f"--weights imagenet: torchvision has none for {model_name}, only for v2")
    published = get_model_weights(model_name).IMAGENET1K_V1
    place = Path(torch.hub.get_dir(), "checkpoints", published.url.rpartition("/")[2])
    if place.exists():
        return place
    try:
        with contextlib.redirect_stdout(sys.stderr):  # only results belong on stdout
            published.get_state_dict(check_hash=True, weights_only=True)
        return place
    except Exception as error:  # no network, or a wrong hash
        reason = str(getattr(error, "reason", error)).splitlines()[0]
        todo = f"fetch it and put it at {place}, or name it with --weights"
        raise RunError(f"{published.url} cannot be had ({reason}): {todo}") from None


def is_of_small_images(path: str | Path) -> bool:
    """Whether a network in a file was made with --small-images."""
    args = load(path).get("args")
    return isinstance(args, dict) and args.get("small_images", False)


def load_trained(path: str | Path) -> tuple[nn.Module, Metadata]:
    """Read a checkpoint of ours or a bare state dict; returns the network, in eval mode on the CPU,
    and what is known of it.

    A bare state dict tells its variant by its shapes; its class names come from a
    class_indices.json beside it, else from the one of the repository (with a notice), else, for
    1000 classes, from torchvision. RunError if the file is damaged, UsageError if it fits no
    network of ours or has no class names.
    """
    path = imagenet_file() if str(path) == "imagenet" else path
    file = load(path)
    weights = state_dict_of(file, path)
    if "model_name" in file:
        try:
            about = {field.name: file[field.name] for field in fields(Metadata)}
            metadata = Metadata(**about)
            small_images = metadata.args.get("small_images", False)
            model = build_model(metadata.model_name, len(metadata.classes), small_images)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"{path}: not a checkpoint of train.py ({error!r})") from None
    else:
        name = _variant_of(weights)
        if name is None or "fc.weight" not in weights:
            raise UsageError(f"{path}: its weights fit no network of this repository")
        classes = _class_names(path, len(weights["fc.weight"]))
        metadata = Metadata(name, classes, default_preprocessing(name))
        model = build_model(name, len(classes))
    load_weights(model, weights, path)
    return model.eval(), metadata


def _shapes(weights: dict[str, Tensor], fc: bool = True) -> dict[str, tuple]:
    """Shapes, with or without `fc`; not of batch counters, which torch before 0.4.1 lacked."""
    return {
        name: tuple(value.shape)
        for name, value in weights.items()
        if not name.endswith("num_batches_tracked") and (fc or name not in FC)
    }


def _variant_of(weights: dict[str, Tensor]) -> str | None:
    """The name of the variant whose shapes, those of `fc` aside, the state dict has."""
    for name in VARIANTS:
        try:
            with torch.device("meta"):
                model = build_model(name)
        except Exception:  # a network of one's own that computes with values when it is built
            continue
        if _shapes(model.state_dict(), fc=False) == _shapes(weights, fc=False):
            return name
    return None


def _class_names(path: str | Path, count: int) -> list[str]:
    """Names for the outputs of a bare state dict."""
    beside = Path(path).parent / CLASS_INDICES.name
    for place in (beside, CLASS_INDICES):
        if place.exists() and len(names := read_class_indices(place)) == count:
            if place != beside:
                notice(f"no {place.name} beside {path}: its {count} classes may be {names}")
            return names
    if count == 1000:
        from torchvision.models import ShuffleNet_V2_X1_0_Weights

        return ShuffleNet_V2_X1_0_Weights.IMAGENET1K_V1.meta["categories"]
    raise UsageError(f"{path}: names for its {count} classes are missing; put a {beside} there")


def read_class_indices(path: str | Path) -> list[str]:
    """Class names in the order of their index, from {"0": "daisy", ...}; else UsageError."""
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        return [str(table[str(index)]) for index in range(len(table))]
    except (ValueError, KeyError, TypeError) as error:
        form = '{"0": "NAME", "1": ...} without a gap'
        raise UsageError(f"{path}: expected {form} ({error!r})") from None
