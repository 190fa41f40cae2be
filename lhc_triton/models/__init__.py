"""Networks to convert and train."""

from lhc_triton.models.pretrained import load_pretrained, load_vgg, save_vgg
from lhc_triton.models.vgg import VGG, small_vgg

__all__ = ["VGG", "load_pretrained", "load_vgg", "save_vgg", "small_vgg"]
