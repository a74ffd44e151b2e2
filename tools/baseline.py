"""The plain way of most tutorials, for benchmark.py to compare with: torchvision's network and
transforms, PIL images in a DataLoader, float32 on the CPU, SGD, batch norm in train mode.

    python tools/baseline.py train DIR WEIGHTS MODEL LAYERS EPOCHS SEED WORKERS
    python tools/baseline.py classify PATH WEIGHTS MODEL WORKERS

Prints one JSON object. Only split and learning rate are this repository's, to be the same.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torchvision
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets.folder import ImageFolder, default_loader


class Images(Dataset):
    def __init__(self, paths, labels, transform):
        self.paths, self.labels, self.transform = paths, labels, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(default_loader(self.paths[index])), self.labels[index]


def train(data_path, weights, model_name, layers, epochs, seed, workers):
    """Train `fc` or all layers, from `weights` or from scratch ("")."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from utils import cosine_lr, read_split_data

    epochs, seed, workers = int(epochs), int(seed), int(workers)
    torch.manual_seed(seed)
    *train_split, val_paths, val_labels = read_split_data(data_path, seed=seed)
    centre = torchvision.models.get_model_weights(model_name).IMAGENET1K_V1.transforms()
    augment = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    augment += [transforms.ToTensor(), transforms.Normalize(centre.mean, centre.std)]
    train_set = Images(*train_split, transforms.Compose(augment))
    train_loader = DataLoader(train_set, 16, shuffle=True, num_workers=workers)
    val_loader = DataLoader(Images(val_paths, val_labels, centre), 16, num_workers=workers)
    model = getattr(torchvision.models, model_name)(num_classes=len(set(val_labels)))
    if weights:
        state = torch.load(weights, weights_only=True)
        if state["fc.bias"].shape != model.fc.bias.shape:
            del state["fc.weight"], state["fc.bias"]
        model.load_state_dict(state, strict=False)
    if layers == "fc":
        model.requires_grad_(False).fc.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=4e-5)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = cosine_lr(0.01, 0.1, epoch, epochs)
        model.train()
        start = time.perf_counter()
        for images, labels in train_loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        rate = len(train_set) / (time.perf_counter() - start)
        model.eval()
        with torch.no_grad():
            correct = sum((model(x).argmax(1) == y).sum().item() for x, y in val_loader)
    return {"img/s": rate, "accuracy": correct / len(val_paths)}


@torch.no_grad()
def classify(path, weights, model_name, workers):
    """Classify an image, or a folder of class folders; returns {path: probabilities}."""
    state = torch.load(weights, weights_only=True)
    model = getattr(torchvision.models, model_name)(num_classes=len(state["fc.bias"])).eval()
    model.load_state_dict(state)
    paths = [name for name, _ in ImageFolder(path).samples] if Path(path).is_dir() else [path]
    centre = torchvision.models.get_model_weights(model_name).IMAGENET1K_V1.transforms()
    loader = DataLoader(Images(paths, paths, centre), 64, num_workers=int(workers))
    rows = [row for images, _ in loader for row in model(images).softmax(1).tolist()]
    return dict(zip(paths, rows, strict=True))


if __name__ == "__main__":
    print(json.dumps({"train": train, "classify": classify}[sys.argv[1]](*sys.argv[2:])))
