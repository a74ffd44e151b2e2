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

import numpy as np
import torch
from torch import Tensor, nn

from model import VARIANTS, build_model, default_preprocessing
from shufflenet.common.files import kind_of, replacing
from shufflenet.common.messages import RunError, UsageError, listed, notice
from shufflenet.inference.metadata import Metadata
from shufflenet.reading.folders import nfc

FC = ("fc.weight", "fc.bias")
WRAPPERS = ("model", "state_dict", "model_state_dict", "net")  # looked into before, say, "ema"
START = "conv1.0.weight"  # the first key of all networks of model.py
# What a file may hold beside tensors: values, no code. torchvision's training script saves its
# options in a Namespace, others their best accuracy as a number of NumPy.
VALUES = [argparse.Namespace, np.dtype, np.ndarray, np._core.multiarray.scalar]
VALUES += [np._core.multiarray._reconstruct, *map(type, map(np.dtype, "?bBhHiIlLqQefdgFDUSMm"))]
VALUES += [(np._core.multiarray.scalar, "numpy.core.multiarray.scalar")]
VALUES += [(np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct")]
CLASS_INDICES = Path(__file__).parents[2] / "class_indices.json"  # of the repository


def save(state: dict, path: str | Path) -> None:
    """Write a dict of tensors and primitives, as `replacing` does."""
    buffer = io.BytesIO()  # torch reports a full disk as an error of its own, a buffer as OSError
    torch.save(state, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def load(path: str | Path) -> dict:
    """Read a weight file to the CPU; RunError if it is none, is damaged, or would run code."""
    if Path(path).suffix.lower() == ".onnx":
        raise UsageError(f"{path} is exported already; name the .pth that it was made of")
    try:
        if zipfile.is_zipfile(path):  # else of an older format
            _check_sums(path)
        with torch.serialization.safe_globals(VALUES), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about other kinds of files
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # the unpickler raises nearly anything on damaged bytes
        reason = (str(error).partition("\n")[0] or type(error).__name__)[:200]
        if "eights only load failed" in reason or "weights_only" in reason:
            reason = "it may hold Python objects, which are never run"  # torch says how to run them
        with open(path, "rb") as file:
            head = file.read(512)
        if head[:2] != b"PK" and head[:1] != b"\x80":  # neither a zip archive nor a pickle
            raise RunError(f"{path}: no weight file, but {kind_of(head)}") from None
        raise RunError(f"{path}: not a weight file, or damaged: {reason}") from None
    if not isinstance(state, dict):
        raise RunError(f"{path}: holds a {type(state).__name__}, expected a state dict")
    return state


def _check_sums(path: str | Path) -> None:
    """Raise BadZipFile unless the archive holds what was written; torch may save without sums."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.CRC:
                with archive.open(member) as file:
                    while file.read(1 << 20):
                        pass


def state_dict_of(file: dict, path: str | Path, start: str = START) -> dict[str, Tensor]:
    """The weights in a file, wherever in it they lie: what precedes the key `start`, by which a
    network of ours begins, is a prefix of wrappers. Tensors beside them keep their names.
    UsageError if there are none."""
    found = [file]
    for state in found:  # which grows: the dicts in the dicts
        key = next((k for k in state if str(k).endswith(start)), None)
        if key is not None:
            break
        if len(found) < 1000:  # a damaged one may hold itself
            inner = [state[key] for key in WRAPPERS if key in state] + [*state.values()]
            found += [value for value in inner if isinstance(value, dict)]
    else:
        raise UsageError(f"{path}: holds no weights of a network of this repository, no {start}")
    prefix, weights = key.removesuffix(start), {}
    tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    for name in sorted(tensors, key=lambda name: name.startswith(prefix)):
        weights[name.removeprefix(prefix)] = tensors[name]  # with the prefix last: they win
    last = [name for name in weights if re.fullmatch(r"fc\.\d+\.(weight|bias)", name)]
    if len(last) == 2:  # fc is a Sequential of dropout and a layer
        for name in last:
            weights[re.sub(r"\d+\.", "", name)] = weights.pop(name)
    return weights


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], source: str | Path, *, new_fc: bool = False
) -> tuple[list[str], list[str]]:
    """Load a state dict; with `new_fc` the model's own last layer stays. Returns missing and
    unexpected keys; those that the model does not have are left. UsageError if a key is missing or
    has another shape."""
    if new_fc:
        weights = {name: value for name, value in weights.items() if name not in FC}
    ours, theirs = _shapes(model.state_dict(), fc=not new_fc), _shapes(weights)
    if wrong := [name for name in ours if ours[name] != theirs.get(name)]:
        name = _variant_of(weights)
        hint = f"use --model {name}" if name else "it fits no network of this repository"
        hint = "outputs and classes must be as many" if wrong[0] in FC else hint
        first = f"{wrong[0]}: {theirs.get(wrong[0], 'missing')} for {ours[wrong[0]]}"
        raise UsageError(f"{source}: {len(wrong)} tensors differ, for example {first}; {hint}")
    try:
        return tuple(model.load_state_dict(weights, strict=False))
    except RuntimeError:
        kinds = "sparse, quantized or without values"
        raise UsageError(f"{source}: its tensors cannot be copied, such as {kinds}") from None


def load_pretrained(model: nn.Module, model_name: str, weights: str, classes: list[str]) -> bool:
    """Start from torchvision's weights ("imagenet") or a file, and say what was loaded. The last
    layer is loaded only if it has as many outputs, and was trained on no other classes; returns
    whether it stays as it was, new."""
    file = load(imagenet_file(model_name) if weights == "imagenet" else weights)
    own = model.state_dict()
    state, trained_on = state_dict_of(file, weights, next(iter(own))), file.get("classes")
    fits = all(name in state and state[name].shape == own[name].shape for name in FC)
    new_fc = not fits or trained_on not in (None, classes)
    missing, unexpected = load_weights(model, state, weights, new_fc=new_fc)
    new = f"fc is new, for {len(classes)} classes; " if new_fc else ""
    surplus = listed(unexpected)
    notice(f"loaded {weights}: {new}missing keys {missing}, unexpected keys [{surplus}]")
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
    if file.keys() >= {"model_name", "classes", "preprocessing"}:
        try:
            names = {field.name for field in fields(Metadata)} & file.keys()
            metadata = Metadata(**{name: file[name] for name in names})
            metadata.check()
            small_images = metadata.args.get("small_images", False)
            model = build_model(metadata.model_name, len(metadata.classes), small_images)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"{path}: not a checkpoint of train.py ({error!s:.200})") from None
        weights = state_dict_of(file, path, next(iter(model.state_dict())))
    else:
        weights = state_dict_of(file, path)
        name = _variant_of(weights)
        if name is None or "fc.weight" not in weights:
            raise UsageError(f"{path}: its weights fit no network of this repository")
        classes = _class_names(path, len(weights["fc.weight"]))
        metadata = Metadata(name, classes, default_preprocessing(name))
        model = build_model(name, len(classes))
    _, unexpected = load_weights(model, weights, path)
    if unexpected:
        notice(f"{path}: left what the network does not have, {listed(unexpected)}")
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
        if _shapes(model.state_dict(), fc=False).items() <= _shapes(weights, fc=False).items():
            return name
    return None


def _class_names(path: str | Path, count: int) -> list[str]:
    """Names for the outputs of a bare state dict."""
    beside = Path(path).parent / CLASS_INDICES.name
    place = beside if beside.exists() else CLASS_INDICES
    names = read_class_indices(place) if place.exists() else []
    ours = place.exists() and place.samefile(CLASS_INDICES)
    if len(names) == count:
        if ours:
            notice(f"no {place.name} of its own beside {path}: its classes may be {listed(names)}")
        return names
    if count == 1000 and (ours or not names):
        from torchvision.models import ShuffleNet_V2_X1_0_Weights

        return ShuffleNet_V2_X1_0_Weights.IMAGENET1K_V1.meta["categories"]
    if place == beside:
        raise UsageError(f"{beside} names {len(names)} classes, but {path} has {count} outputs")
    raise UsageError(f"{path}: names for its {count} classes are missing; put a {beside} there")


def read_class_indices(path: str | Path) -> list[str]:
    """Class names in the order of their index, from {"0": "daisy", ...}, {"daisy": 0, ...} or
    ["daisy", ...], in UTF-8, UTF-16 or GBK; else UsageError."""
    data = Path(path).read_bytes()
    encodings = ["utf-16"] if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ["utf-8-sig", "gb18030"]
    for encoding in encodings:
        with contextlib.suppress(ValueError, IndexError, RecursionError):
            return _names_in(json.loads(data.decode(encoding)))
    form = '{"0": "NAME", "1": "NAME", ...} without a gap'
    raise UsageError(f"{path}: not the names of classes; expected {form}")


def _names_in(table: object) -> list[str]:
    if isinstance(table, list):
        table = dict(enumerate(table))
    if not isinstance(table, dict):
        raise ValueError
    pairs = table.items()
    if all(isinstance(value, int) for value in table.values()):
        pairs = [(index, name) for name, index in pairs]
    pairs = sorted((int(index), name) for index, name in pairs)
    # Keras has ["n02119789", "kit_fox"] for a name.
    names = [name[-1] if isinstance(name, list) else name for _, name in pairs]
    gap = [index for index, _ in pairs] != list(range(len(pairs)))
    if gap or not all(isinstance(name, str) for name in names):
        raise ValueError
    return [nfc(name) for name in names]
