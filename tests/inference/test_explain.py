"""Where a network looked: predict.py --explain."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from sample_flowers import draw_bloom

import predict
from model import build_model, default_preprocessing
from shufflenet.common.messages import UsageError
from shufflenet.inference import checkpoint, plots
from shufflenet.inference.classifier import Classifier
from shufflenet.inference.pytorch import Normalize

SIDE = 224


def picture(seed, bloom_at=None):
    """A patch of ground, with a bloom on a quarter of it if that is given, (0, 0) to (1, 1)."""
    rng = random.Random(seed)
    image = Image.new("RGB", (256, 256), rng.choice(["olivedrab", "steelblue", "dimgray"]))
    if bloom_at:
        bloom = draw_bloom("daisy", rng).resize((100, 100))
        image.paste(bloom, (20 + 116 * bloom_at[0], 20 + 116 * bloom_at[1]), bloom)
    return image


@pytest.fixture(scope="module", params=["shufflenet_v2_x0_5", "shufflenet_v1_x0_5_g3"])
def weights(request, tmp_path_factory):
    """A checkpoint that tells a bloom from ground: without training, but fc is fitted (ridge
    regression) to what each place of the feature map should say."""
    torch.manual_seed(0)
    model = build_model(request.param, 2)
    about = default_preprocessing(request.param)
    normalize = Normalize(about)
    corners = [(seed % 2, seed // 2 % 2) for seed in range(16)]
    images = [picture(seed, corner) for seed, corner in enumerate(corners)]
    pixels = np.stack([np.array(image)[16:240, 16:240] for image in images])
    x = normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    here = torch.zeros(16, 7, 7)
    for truth, (column, row) in zip(here, corners, strict=True):
        truth[4 * row : 4 * row + 3, 4 * column : 4 * column + 3] = 1
    with torch.no_grad():
        for module in model.modules():
            module.momentum = None
        model.train()(x)  # the statistics of batch norm
        places = model.eval().feature_map(x).movedim(1, 3).flatten(0, 2)  # (16*7*7, C)
        kernel = places @ places.T
        kernel += 0.01 * kernel.trace() / len(kernel) * torch.eye(len(kernel))
        weight = places.T @ torch.linalg.solve(kernel, here.flatten() - 0.05)
        model.fc.weight.copy_(torch.stack([weight, -weight]))
        model.fc.bias.zero_()
    file = {"model": model.state_dict(), "model_name": request.param, "classes": ["bloom", "none"]}
    path = tmp_path_factory.mktemp("explain") / "best.pth"
    checkpoint.save(file | {"preprocessing": about, "args": {}}, path)
    return path


def test_the_mean_of_the_heat_is_the_logit(weights, tmp_path):
    classify, model = Classifier(weights), checkpoint.load_trained(weights)[0]
    picture(1, (0, 1)).save(path := tmp_path / "a.png")
    x = Normalize(classify.metadata.preprocessing)(
        torch.from_numpy(np.array(Image.open(path))[None, 16:240, 16:240]).permute(0, 3, 1, 2)
    )
    logits = model(x)[0].tolist()
    for name, logit in zip(("bloom", "none"), logits, strict=True):
        pixels, heat = classify.explain(path, name)
        assert (pixels.shape, heat.shape) == ((SIDE, SIDE, 3), (7, 7))
        assert heat.mean() == pytest.approx(logit, rel=1e-4, abs=1e-5)


def test_the_heat_lies_where_the_flower_is(weights, tmp_path):
    classify, ends = Classifier(weights), (slice(0, 3), slice(4, 7))
    corners = [(0, 0), (1, 0), (0, 1), (1, 1)]
    for corner in corners:
        picture(99, corner).save(path := tmp_path / "a.png")
        assert classify(path)[0]["class"] == "bloom"
        _, heat = classify.explain(path, "bloom")
        warmth = {(x, y): heat[ends[y], ends[x]].mean() for x, y in corners}
        assert max(warmth, key=warmth.get) == corner


@pytest.mark.usefixtures("elsewhere")
def test_it_is_drawn_beside_the_image(weights, tmp_path, onnx_file):
    picture(99, (1, 1)).save("a.png")
    predict.main(["a.png", "--weights", weights, "--explain"])
    assert Image.open("explain.png").size == (1000, 565)
    for number in range(3):
        picture(number).save(f"{number}.png")
    predict.main([".", "--weights", weights, "--explain", "--save-plot", "several.jpg"])
    assert Image.open("several.jpg").width == 1200
    with pytest.raises(UsageError, match="^--explain: .* has no feature maps; use a .pth file"):
        predict.main(["a.png", "--weights", onnx_file, "--explain"])


def test_bright_is_what_speaks_for_the_class():
    pixels = np.full((64, 64, 3), 100, np.uint8)
    heat = np.full((8, 8), -1.0, np.float32)
    heat[6, 1] = 5
    drawn = plots.beside_heat(pixels, heat)
    assert drawn.shape == (64, 128, 3)
    assert (drawn[:, :64] == pixels).all()
    light = drawn[:, 64:].sum(2)
    assert np.unravel_index(light.argmax(), light.shape) in [
        (r, c) for r in range(48, 56) for c in range(8, 16)
    ]
    assert light[0, 60] < 200
