"""From scratch: a network that learns its weights together with its topology.

Run: python examples/from_scratch.py (`lhc-triton train` does the same with more care)
"""

import argparse

import torch
from images import DATA, accuracy, train_epoch
from torch import nn

import lhc_triton as lhc

parser = argparse.ArgumentParser()
parser.add_argument("--images", type=int, default=12000, help="for training")
parser.add_argument("--test-images", type=int, default=10000)
parser.add_argument("--epochs", type=int, default=12, help="of each stage")
options = parser.parse_args()

torch.manual_seed(0)
layers = []
for width, before in ((32, 1), (64, 32), (128, 64)):
    layers += [
        nn.Conv2d(before, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 9, 10))
x = torch.zeros(8, 1, DATA.format.size, DATA.format.size)

# The coarse stage: topology and weights learn. The optimiser comes after convert, which adds parameters.
lhc.convert(model, lhc.LHCConfig(density=0.2, in_block=16, out_block=16))
optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
ramp = max(1, options.epochs // 3)
schedule = lhc.TopologySchedule(model, x, warmup_epochs=ramp, penalty_epochs=ramp)
for epoch in range(options.epochs):
    schedule.start_epoch(epoch)
    loss = train_epoch(model, optimiser, options.images, epoch, schedule.penalty)
    schedule.end_epoch(task_loss=loss)
    print(f"coarse epoch {epoch}: loss {loss:.3f}, density {schedule.density:.3f}")
lhc.freeze(model)

# The fine stage: the topology is fixed, what is left of the weights trains on.
for group in optimiser.param_groups:
    group["lr"] = 0.01
for epoch in range(options.epochs):
    loss = train_epoch(model, optimiser, options.images, options.epochs + epoch)
    print(f"fine epoch {epoch}: loss {loss:.3f}")

print(lhc.summary(model, (1, DATA.format.size, DATA.format.size)))
fast = lhc.accelerate(model.eval(), x)
print(fast.explain())
print(f"{accuracy(fast, options.test_images):.2%} of the test images")
lhc.save(fast, "from_scratch.safetensors")
