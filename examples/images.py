"""What the examples share: batches of the packaged images, an epoch of training, an accuracy."""

import torch
import torch.nn.functional as F

from lhc_triton.training import open_data

DATA = open_data("fashion-mnist")
BATCH = 128


def batches(source, images, seed=None):
    """Yield normalised images [N, 1, 28, 28] and labels of the first so many images, shuffled by a seed."""
    order = torch.arange(min(images, len(source)))
    if seed is not None:
        order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))]
    yield from source.batches(order.split(BATCH))


def train_epoch(model, optimiser, images, epoch, penalty=None):
    """Train for one epoch; return the mean loss, penalty not counted."""
    model.train()
    losses = []
    for x, labels in batches(DATA.train, images, seed=epoch):
        loss = F.cross_entropy(model(x), labels)
        losses.append(loss.item())
        if penalty is not None:
            loss = loss + penalty()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return sum(losses) / len(losses)


@torch.inference_mode()
def accuracy(model, images):
    """Return the share of the test images that a model classifies rightly."""
    model.eval()
    found = [(model(x).argmax(1) == labels).float() for x, labels in batches(DATA.test, images)]
    return torch.cat(found).mean().item()
