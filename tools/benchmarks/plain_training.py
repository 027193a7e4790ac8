"""Train a ViT of vitds' in a plain PyTorch loop, and print its losses and accuracy: python plain_training.py JSON

It shares two things with a run of vitds: the model, and which sample comes when. Shards are read with tarfile, images
decoded by Pillow; schedule, loss, clipping, update and evaluation are written out here, without DeepSpeed.

JSON is an object with the fields of `Recipe`; the answer is {"losses": {STEP: LOSS}, "top1": FRACTION} on a line.
"""

from __future__ import annotations

import io
import json
import math
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # as a program it is alone

from vitds.data.order import sample_at
from vitds.weights.create import create_model


@dataclass(frozen=True)
class Recipe:
    """What both loops are given. Units: `image_size` in pixels, which every image has; `warmup` in steps."""

    data: str
    model: str
    image_size: int
    seed: int
    steps: int
    batch: int
    lr: float
    warmup: int
    weight_decay: float
    clip: float
    log_every: int


def train(recipe: Recipe) -> dict[str, object]:
    """Train and evaluate."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = read_split(Path(recipe.data), "train")
    torch.manual_seed(recipe.seed)
    num_classes = len(json.loads((Path(recipe.data) / "_info.json").read_text())["splits"]["train"]["class_counts"])
    model = create_model(recipe.model, image_size=recipe.image_size, num_classes=num_classes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    losses = {}
    model.train()
    for step in range(recipe.steps):
        positions = np.arange(step * recipe.batch, (step + 1) * recipe.batch)
        _, ids = sample_at(positions, recipe.seed, len(images))
        optimizer.param_groups[0]["lr"] = recipe.lr * rate(step, recipe.warmup, recipe.steps)
        logits = model(pixels([images[i] for i in ids]).to(device))
        loss = nn.functional.cross_entropy(logits, torch.tensor([labels[i] for i in ids], device=device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        if (step + 1) % recipe.log_every == 0:
            losses[step + 1] = loss.item()
    return {"losses": losses, "top1": accuracy(model, recipe, device)}


def rate(step: int, warmup: int, steps: int) -> float:
    """Of the base rate: a line up from 0, then half a cosine down to 0."""
    return step / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


@torch.no_grad()
def accuracy(model: nn.Module, recipe: Recipe, device: torch.device) -> float:
    """The share of the validation split that is right."""
    model.eval()
    images, labels = read_split(Path(recipe.data), "val")
    num_right = 0
    for start in range(0, len(images), 500):
        guesses = model(pixels(images[start : start + 500]).to(device)).argmax(dim=1).tolist()
        num_right += sum(guess == label for guess, label in zip(guesses, labels[start:], strict=False))
    return num_right / len(images)


def read_split(data: Path, split: str) -> tuple[list[bytes], list[int]]:
    """Encoded images and labels of all samples, in the order of the shards."""
    images, labels = [], []
    for name in json.loads((data / "_info.json").read_text())["splits"][split]["filenames"]:
        with tarfile.open(data / name) as shard:
            for member in shard:
                content = shard.extractfile(member)
                assert content is not None
                if member.name.endswith(".cls"):
                    labels.append(int(content.read()))
                else:
                    images.append(content.read())
    return images, labels


def pixels(encoded: list[bytes]) -> Tensor:
    """Shapes: B images -> (B, 3, H, W) float32 in [-1, 1]."""
    decoded = [np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in encoded]
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).float() / 127.5 - 1


if __name__ == "__main__":
    print(json.dumps(train(Recipe(**json.loads(sys.argv[1])))))
