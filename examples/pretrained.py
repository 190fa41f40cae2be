"""A trained network: keep its best blocks in one shot, fine-tune what is left, run it fast.

Run: python examples/pretrained.py
"""

import argparse

import torch
from images import DATA, accuracy, train_epoch

import lhc_triton as lhc
from lhc_triton.models import load_pretrained

parser = argparse.ArgumentParser()
parser.add_argument("--images", type=int, default=12000, help="for training")
parser.add_argument("--test-images", type=int, default=10000)
parser.add_argument("--epochs", type=int, default=4, help="of fine-tuning")
parser.add_argument("--budget", type=float, default=0.2, help="share of the weights that stays")
options = parser.parse_args()

torch.manual_seed(0)
model = load_pretrained("dense")
x = torch.zeros(8, 1, DATA.format.size, DATA.format.size)
print(f"trained: {accuracy(model, options.test_images):.2%} of the test images")

lhc.prune(model, x, budget=options.budget, report=print)  # frozen layers: dead weights stay dead
print(f"pruned:  {accuracy(model, options.test_images):.2%}")

weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimiser = torch.optim.SGD(weights, lr=0.01, momentum=0.9, nesterov=True)
for epoch in range(options.epochs):
    loss = train_epoch(model, optimiser, options.images, epoch)
    print(f"epoch {epoch}: loss {loss:.3f}, {accuracy(model, options.test_images):.2%}")

fast = lhc.accelerate(model.eval(), x)
print(fast.explain())
print(f"accelerated: {accuracy(fast, options.test_images):.2%}")
lhc.save(fast, "pretrained.safetensors")
