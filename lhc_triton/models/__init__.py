"""Networks to convert and train."""

from lhc_triton.models.pretrained import load_pretrained, load_vgg, save_vgg
from lhc_triton.models.resnet import ResNet, resnet34, resnet50
from lhc_triton.models.vgg import VGG, small_vgg, vgg16, vgg19

__all__ = [
    "VGG",
    "ResNet",
    "load_pretrained",
    "load_vgg",
    "resnet34",
    "resnet50",
    "save_vgg",
    "small_vgg",
    "vgg16",
    "vgg19",
]
