"""The plain way of most tutorials, for benchmark.py to compare with: torchvision's network and
transforms, PIL images in a DataLoader, float32 on the CPU, SGD, batch norm in train mode.

    python tools/baseline.py train FOLDER WEIGHTS MODEL LAYERS EPOCHS SEED WORKERS
    python tools/baseline.py classify FOLDER WEIGHTS MODEL WORKERS

FOLDER holds a folder per class. Prints what train.py and predict.py --json print, and the seconds
of every epoch with its validation. Only the split is this repository's, to be the same.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder


def train(folder, weights, model_name, layers, epochs, seed, workers):
    """Train `fc` or all layers; prints the accuracy of the best epoch."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from utils import read_split_data

    epochs, seed, workers = int(epochs), int(seed), int(workers)
    torch.manual_seed(seed)
    train_paths, _, val_paths, _ = read_split_data(folder, seed=seed)
    centre = torchvision.models.get_model_weights(model_name).IMAGENET1K_V1.transforms()
    augment = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    augment += [transforms.ToTensor(), transforms.Normalize(centre.mean, centre.std)]
    augment = transforms.Compose(augment)
    train_set = ImageFolder(folder, augment, is_valid_file=set(train_paths).__contains__)
    val_set = ImageFolder(folder, centre, is_valid_file=set(val_paths).__contains__)
    train_loader = DataLoader(train_set, 16, shuffle=True, num_workers=workers)
    val_loader = DataLoader(val_set, 16, num_workers=workers)

    model = torchvision.models.get_model(model_name, num_classes=len(train_set.classes))
    state = torch.load(weights, weights_only=True)
    if state["fc.bias"].shape != model.fc.bias.shape:
        del state["fc.weight"], state["fc.bias"]
    model.load_state_dict(state, strict=False)
    if layers == "fc":
        model.requires_grad_(False).fc.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=4e-5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=0.001)
    best, seconds = 0, []
    for _ in range(epochs):
        start = time.perf_counter()
        model.train()
        for images, labels in train_loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        scheduler.step()
        model.eval()
        with torch.no_grad():
            correct = sum((model(x).argmax(1) == y).sum().item() for x, y in val_loader)
        best = max(best, correct / len(val_set))
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"best_accuracy": best, "epoch_seconds": seconds}))


@torch.no_grad()
def classify(folder, weights, model_name, workers):
    """Classify all images; prints a line each."""
    state = torch.load(weights, weights_only=True)
    model = torchvision.models.get_model(model_name, num_classes=len(state["fc.bias"])).eval()
    model.load_state_dict(state)
    centre = torchvision.models.get_model_weights(model_name).IMAGENET1K_V1.transforms()
    images = ImageFolder(folder, centre)
    loader = DataLoader(images, 64, num_workers=int(workers))
    rows = [row for batch, _ in loader for row in model(batch).softmax(1).tolist()]
    for (path, _), row in zip(images.samples, rows, strict=True):
        guesses = [{"class": str(index), "prob": prob} for index, prob in enumerate(row)]
        print(json.dumps({"path": path, "predictions": guesses}))


if __name__ == "__main__":
    {"train": train, "classify": classify}[sys.argv[1]](*sys.argv[2:])
