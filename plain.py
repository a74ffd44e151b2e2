"""The plain way of most tutorials, for benchmark.py to compare with: torchvision's network and
transforms on PIL pictures, a DataLoader, float32, and in training batch norm in train mode.

    python plain.py train DIR WEIGHTS MODEL LAYERS EPOCHS SEED WORKERS
    python plain.py classify DIR WEIGHTS MODEL WORKERS
    python plain.py classify IMAGE WEIGHTS MODEL 0

Prints one JSON object. No part of the project uses it.
"""

import json
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt  # noqa: F401 (as such scripts do, to show the picture)
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision import transforms

from folders import find_pictures
from utils import cosine_lr, read_split_data


class Pictures(torch.utils.data.Dataset):
    """Paths and labels to normalised pictures (3, 224, 224)."""

    def __init__(self, paths, labels, transform):
        self.paths, self.labels, self.transform = paths, labels, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        picture = Image.open(self.paths[index]).convert("RGB")
        return self.transform(picture), self.labels[index]


def train(data_path, weights, model_name, layers, epochs, seed, workers):
    """Train `fc` alone (layers "fc") or all of them ("all"), from nothing if weights is ""."""
    epochs, seed = int(epochs), int(seed)
    torch.manual_seed(seed)
    train_paths, train_labels, val_paths, val_labels = read_split_data(data_path, seed=seed)
    augment = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    augment = transforms.Compose([*augment, *_normalized(model_name)])
    options = {"batch_size": 16, "num_workers": int(workers)}
    train_loader = torch.utils.data.DataLoader(
        Pictures(train_paths, train_labels, augment), shuffle=True, **options
    )
    val_loader = torch.utils.data.DataLoader(
        Pictures(val_paths, val_labels, _centre(model_name)), **options
    )

    model = getattr(torchvision.models, model_name)(num_classes=len(set(train_labels)))
    if weights:
        state = torch.load(weights, weights_only=True)
        own = model.state_dict()
        state = {k: v for k, v in state.items() if v.shape == own[k].shape}
        model.load_state_dict(state, strict=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(layers == "all" or name.startswith("fc."))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.01, momentum=0.9, weight_decay=4e-5)

    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(0.01, 0.1, epoch, epochs)
        model.train()
        start = time.perf_counter()
        for images, labels in train_loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        rate = len(train_paths) / (time.perf_counter() - start)
        model.eval()
        correct = 0
        with torch.no_grad():
            for images, labels in val_loader:
                correct += (model(images).argmax(1) == labels).sum().item()
    return {"accuracy": correct / len(val_paths), "images_per_second": rate}


def classify(place, weights, model_name, workers):
    """Probabilities of every picture, by a checkpoint of train.py."""
    state = torch.load(weights, weights_only=True)["model"]
    model = getattr(torchvision.models, model_name)(num_classes=len(state["fc.bias"]))
    model.load_state_dict(state)
    model.eval()
    centre = _centre(model_name)
    with torch.no_grad():
        if not Path(place).is_dir():
            image = centre(Image.open(place).convert("RGB"))
            return {place: model(image[None]).softmax(1)[0].tolist()}
        paths = [path for found in find_pictures(place).values() for path in found]
        loader = torch.utils.data.DataLoader(
            Pictures(paths, paths, centre), batch_size=64, num_workers=int(workers)
        )
        return {
            path: row
            for images, names in loader
            for path, row in zip(names, model(images).softmax(1).tolist(), strict=True)
        }


def _normalized(model_name):
    published = torchvision.models.get_model_weights(model_name).IMAGENET1K_V1.transforms()
    return [transforms.ToTensor(), transforms.Normalize(published.mean, published.std)]


def _centre(model_name):
    published = torchvision.models.get_model_weights(model_name).IMAGENET1K_V1.transforms()
    sizes = [transforms.Resize(published.resize_size), transforms.CenterCrop(224)]
    return transforms.Compose([*sizes, *_normalized(model_name)])


if __name__ == "__main__":
    print(json.dumps({"train": train, "classify": classify}[sys.argv[1]](*sys.argv[2:])))
