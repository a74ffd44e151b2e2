"""Mutated files: the only outcomes are a result and an error of our own."""

import copy
import io
import os
import time
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from PIL import Image

import checkpoint
import resume
import train
from cli import RunError, UsageError
from image import ImageError, check_header, default_preprocessing, load_rgb, resize_and_crop
from model import build_model

EXAMPLES = int(os.environ.get("FUZZ", "15"))  # of each test; FUZZ=100000 for a night
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=EXAMPLES <= 1000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SECONDS = 20  # a small picture or checkpoint must not take longer, whatever is written in it


def either(errors, function, *args):
    """What a function returns; None where it raises one of these errors, of one line."""
    try:
        return function(*args)
    except errors as error:
        text = str(error)
    assert "\n" not in text
    return None


@st.composite
def mutations(draw):
    """A function of bytes that damages them in a few places."""
    places = st.floats(0, 1, exclude_max=True)
    steps = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["set", "flip", "cut", "drop", "insert", "repeat"]),
                places,
                st.binary(min_size=1, max_size=8),
            ),
            min_size=1,
            max_size=6,
        )
    )

    def mutate(data: bytes) -> bytes:
        for kind, place, value in steps:
            at = int(place * len(data))
            if kind == "set":
                data = data[:at] + value + data[at + len(value) :]
            elif kind == "flip" and data:
                data = data[:at] + bytes([data[at] ^ (1 << value[0] % 8)]) + data[at + 1 :]
            elif kind == "cut":
                data = data[:at]
            elif kind == "drop":
                data = data[:at] + data[at + value[0] :]
            elif kind == "insert":
                data = data[:at] + value + data[at:]
            elif kind == "repeat":
                data = data[:at] + data[at : at + 64] * value[0] + data[at:]
        return data

    return mutate


def encoded(form, **options):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    if form in ("JPEG", "PNG", "WEBP", "TIFF"):
        options["exif"] = exif
    image.save(file, form, **options)
    return file.getvalue()


PICTURES = {form: encoded(form) for form in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")}
PICTURES["progressive JPEG"] = encoded("JPEG", progressive=True)
PICTURES["animation"] = encoded("GIF", save_all=True, append_images=[Image.new("RGB", (40, 24))])


@pytest.mark.parametrize("form", PICTURES)
def test_pictures(tmp_path, form):
    path = tmp_path / "picture.jpg"
    ran = 0

    @FUZZ
    @given(mutations())
    def run(mutate):
        nonlocal ran
        ran += 1
        path.write_bytes(mutate(PICTURES[form]))
        start = time.perf_counter()
        image = either(ImageError, load_rgb, path)
        if image is not None:
            assert image.mode == "RGB"
            assert resize_and_crop(image, 40, 32).shape == (32, 32, 3)
            check_header(path)  # refuses nothing that can be read
        either(ImageError, check_header, path)
        assert time.perf_counter() - start < SECONDS

    run()
    assert ran >= EXAMPLES


@pytest.fixture(scope="module")
def checkpoint_bytes(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("fuzz") / "small.pth"
    name = "shufflenet_v1_x0_25_g3"
    state = {
        "model": build_model(name, 3).state_dict(),
        "model_name": name,
        "classes": ["a", "b", "c"],
        "preprocessing": default_preprocessing(name),
        "args": {"seed": 0},
    }
    checkpoint.save(state, path)
    return path.read_bytes()


def test_checkpoints(tmp_path, checkpoint_bytes):
    path = tmp_path / "best.pth"

    @FUZZ
    @given(mutations())
    def run(mutate):
        path.write_bytes(mutate(checkpoint_bytes))
        start = time.perf_counter()
        trained = either((RunError, UsageError), checkpoint.load_classifier, path)
        if trained is not None:
            assert len(trained.classes) == 3
            assert all(value.isfinite().all() for value in trained.model.state_dict().values())
        assert time.perf_counter() - start < SECONDS

    run()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.builds(lambda n: torch.zeros(n), st.integers(0, 3)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.integers(-1, 2), inner, max_size=4)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize(
    "field",
    [
        "model",
        "model_name",
        "classes",
        "preprocessing",
        "args",
        "preprocessing/mean",
        "model/fc.bias",
    ],
)
def test_fields_of_a_checkpoint(tmp_path, checkpoint_bytes, field):
    """Well-formed files in which a field holds anything."""
    path = tmp_path / "best.pth"

    @FUZZ
    @given(VALUES)
    def run(value):
        state = torch.load(io.BytesIO(checkpoint_bytes), weights_only=True)
        *outer, name = field.split("/")
        (state[outer[0]] if outer else state)[name] = value
        torch.save(state, path)
        either((RunError, UsageError), checkpoint.load_classifier, path)

    run()


@pytest.mark.parametrize(
    "field",
    [
        "args",
        "args/epochs",
        "args/data_path",
        "args/amp",
        "history",
        "history/0",
        "history/0/val_loss",
        "best",
        "best/confusion",
        "position",
        "position/step",
        "optimizer",
        "optimizer/state",
        "optimizer/state/0",
        "optimizer/state/0/momentum_buffer",
        "scaler",
        "head",
        "head/mean",
        "pictures",
    ],
)
def test_what_resume_reads(field):
    """Well-formed checkpoints to resume from, in which a field holds anything."""
    head = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(head.parameters(), 0.1, momentum=0.9)
    groups = optimizer.state_dict()["param_groups"]
    now = {"head": {"weights": head.state_dict(), "mean": torch.zeros(4)}, "scaler": {"scale": 2.0}}
    parser = train.build_parser()
    shapes = [parameter.shape for parameter in head.parameters()]

    @FUZZ
    @given(VALUES)
    def run(value):
        state = {
            "args": {"epochs": 9, "data_path": "sample", "amp": None},
            "history": [dict.fromkeys(resume.FIGURES, 0.5) | {"epoch": 1}],
            "best": {"accuracy": 0.5, "epoch": 1, "confusion": torch.eye(3, dtype=torch.int64)},
            "position": {"step": 1, "seen": 3, "sums": torch.zeros(2)},
            "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3, 4)}}},
            "pictures": "",
            **now,
        }
        *outer, name = (int(key) if key.isdigit() else key for key in field.split("/"))
        state[field.partition("/")[0]] = copy.deepcopy(state[field.partition("/")[0]])
        place = state
        for key in outer:
            place = place[key]
        place[name] = value
        either((RunError, UsageError), read, state)

    def read(state):
        # What `resume.load` has looked at is a list.
        if not isinstance(state["history"], list):
            return
        path = Path("last.pth")
        resume.options_of_run(parser, parser.parse_args([]), state, path)
        resume.check(state, now, shapes, 3, path)
        optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        for parameter in head.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    run()


@FUZZ
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8")))
def test_class_indices(tmp_path, data):
    path = tmp_path / "class_indices.json"
    path.write_bytes(data)
    assert isinstance(either(UsageError, checkpoint.read_class_indices, path), list | None)
