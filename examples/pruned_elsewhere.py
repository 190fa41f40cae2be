"""A network that another tool pruned: its zeros are found, and it runs fast as it is.

Run: python examples/pruned_elsewhere.py
"""

import torch
from torch.nn.utils import prune

import lhc_triton as lhc
from lhc_triton.models import load_pretrained

torch.manual_seed(0)
model = load_pretrained("dense")

# Somebody's pruning: torch.nn.utils.prune, here by masks of 16 filters x 16 channels.
for conv in list(model.modules()):
    if isinstance(conv, torch.nn.Conv2d) and conv.in_channels >= 32:
        o, i, kh, kw = conv.weight.shape
        blocks = conv.weight.detach().view(o // 16, 16, i // 16, 16, kh, kw).square().sum((1, 3))
        mask = (blocks > blocks.flatten().quantile(0.7)).repeat_interleave(16, 0).repeat_interleave(16, 1)
        prune.custom_from_mask(conv, "weight", mask)

x = torch.randn(8, 1, 28, 28)
fast = lhc.accelerate(model, x)  # no conversion: plain convolutions with zeros in blocks are enough
print(fast.explain())

lhc.save(fast, "pruned.safetensors")
again = lhc.load("pruned.safetensors")  # needs neither the model's class nor torch.nn.utils.prune
difference = (again(x) - model(x)).abs().max().item()
print(f"largest difference from the pruned model: {difference:.1e}")
