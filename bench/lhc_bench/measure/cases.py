"""The convolutions that are measured: the layers of VGG16 and ResNets in CIFAR and ImageNet shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lhc_triton.planning.schema import ConvGeometry

CPU_BATCH = {"cifar": 8, "imagenet": 1}
GPU_BATCH = {"cifar": 256, "imagenet": 64}
IMAGE_SIZE = {"cifar": 32, "imagenet": 224}
VGG16_WIDTHS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
NETWORKS = ("vgg16", "resnet34", "resnet50")
RESNET_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # of ResNet34 and ResNet50 alike: filters, blocks
WIDE = 128  # input channels from which a layer has much to skip


@dataclass(frozen=True)
class LayerCase:
    """One convolution of a network, with the input it sees there.

    Attributes:
        model: the network and its input, for example "vgg16-imagenet".
        layer: name of the first layer of this shape in the network.
        in_channels, out_channels: I, O.
        height, width: H, W of the layer's input.
        kernel: side of the square kernel.
        stride: step in both directions; the zero border is ``kernel // 2`` all around.
        count: how often the shape occurs in the network.
        ineligible: why the layer is left dense; "" where it may be sparse.
    """

    model: str
    layer: str
    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel: int = 3
    stride: int = 1
    count: int = 1
    ineligible: str = ""

    @property
    def name(self) -> str:
        """Model and layer, for example "vgg16-imagenet/conv3_2"."""
        return f"{self.model}/{self.layer}"

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """What makes two layers the same case: I, O, H, W, kernel, stride."""
        return (self.in_channels, self.out_channels, self.height, self.width, self.kernel, self.stride)

    def geometry(self, batch: int) -> ConvGeometry:
        """Return the call's shapes at a batch size."""
        border = self.kernel // 2
        return ConvGeometry(
            batch=batch,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            height=self.height,
            width=self.width,
            kernel=(self.kernel, self.kernel),
            stride=(self.stride, self.stride),
            padding=(border, border, border, border),
        )


def model_names() -> tuple[str, ...]:
    """Names of the networks whose layers are known."""
    return tuple(f"{network}-{images}" for network in NETWORKS for images in IMAGE_SIZE)


def batch_of(model: str, device: str) -> int:
    """Images in a batch for a model: 64 (ImageNet) or 256 (CIFAR) on "cuda", 1 or 8 on "cpu"."""
    images = model.rpartition("-")[2]
    return (GPU_BATCH if device == "cuda" else CPU_BATCH)[images]


def layer_cases(model: str) -> tuple[LayerCase, ...]:
    """Distinct convolutions of a network, in the order of their first use, ineligible ones included.

    Args:
        model: one of ``model_names()``.

    Returns:
        One case per distinct shape, with its ``count``. The counts add up to the network's convolutions.

    Raises:
        ValueError: the model is not known.
    """
    if model not in model_names():
        raise ValueError(f"unknown model {model!r}; known: {', '.join(model_names())}")
    network, _, images = model.rpartition("-")
    if network == "vgg16":
        layers = _vgg16(model, images)
    else:
        layers = _resnet(model, images, bottleneck=network == "resnet50")
    merged: dict[tuple[int, ...], LayerCase] = {}
    for case in layers:
        seen = merged.get(case.shape)
        count = 1 if seen is None else seen.count + 1
        merged[case.shape] = replace(seen or case, count=count)
    return tuple(merged.values())


def eligible_cases(models: tuple[str, ...] = model_names()) -> tuple[LayerCase, ...]:
    """Cases of several networks that may be sparse: the distinct 3x3 layers after the stem of each."""
    return tuple(case for model in models for case in layer_cases(model) if not case.ineligible)


def distinct_cases(models: tuple[str, ...], device: str) -> tuple[LayerCase, ...]:
    """Eligible cases of several networks; a shape that comes again at the same batch is left to the first."""
    found: dict[tuple[int, ...], LayerCase] = {}
    for case in eligible_cases(models):
        found.setdefault((*case.shape, batch_of(case.model, device)), case)
    return tuple(found.values())


def cpu_cases() -> tuple[LayerCase, ...]:
    """The layers of VGG16 and ResNet34, at both image sizes."""
    networks = ("vgg16", "resnet34")
    return distinct_cases(tuple(f"{n}-{images}" for images in ("imagenet", "cifar") for n in networks), "cpu")


def gpu_cases() -> tuple[LayerCase, ...]:
    """The layers of all networks at ImageNet's size, those with many channels first."""
    cases = distinct_cases(tuple(f"{network}-imagenet" for network in NETWORKS), "cuda")
    return tuple(sorted(cases, key=lambda case: case.in_channels < WIDE))


def question_cases() -> tuple[LayerCase, ...]:
    """Four wide layers from large images to small ones, one of them with few pixels."""
    wanted = ("conv3_2", "conv4_2", "conv5_1", "layer4.0.conv2")
    return tuple(case for case in gpu_cases() if case.layer in wanted and case.stride == 1)


def first_cases() -> tuple[LayerCase, ...]:
    """Four wide 3x3 layers over images of 56, 28 and 14 pixels a side: with three widths of tiles, twelve."""
    by_name = {case.name: case for case in eligible_cases()}
    names = ("vgg16-imagenet/conv3_2", "vgg16-imagenet/conv4_2", "vgg16-imagenet/conv5_1")
    return (*(by_name[name] for name in names), by_name["resnet34-imagenet/layer3.0.conv2"])


def quick_cases() -> tuple[LayerCase, ...]:
    """Four layers that span the range: both networks, both image sizes, wide and narrow."""
    wanted = (
        "vgg16-imagenet/conv3_2",
        "vgg16-imagenet/conv5_1",
        "resnet34-imagenet/layer2.0.conv2",
        "vgg16-cifar/conv4_2",
    )
    by_name = {case.name: case for case in eligible_cases()}
    return tuple(by_name[name] for name in wanted)


def _vgg16(model: str, images: str) -> list[LayerCase]:
    """The 13 convolutions of configuration D of arXiv 1409.1556."""
    size, channels, stage, step = IMAGE_SIZE[images], 3, 1, 0
    cases = []
    for width in VGG16_WIDTHS:
        if isinstance(width, str):
            size, stage, step = size // 2, stage + 1, 0
            continue
        step += 1
        stem = "first convolution" if channels == 3 else ""
        cases.append(LayerCase(model, f"conv{stage}_{step}", channels, width, size, size, ineligible=stem))
        channels = width
    return cases


def _resnet(model: str, images: str, bottleneck: bool) -> list[LayerCase]:
    """The convolutions of ResNet34, or of ResNet50 (arXiv 1512.03385).

    On CIFAR the stem is 3x3 and does not shrink. A bottleneck strides in its 3x3 convolution.
    """
    size, channels = IMAGE_SIZE[images], 64
    stem = "first convolution"
    if images == "imagenet":
        cases = [LayerCase(model, "conv1", 3, 64, size, size, kernel=7, stride=2, ineligible=stem)]
        size //= 4
    else:
        cases = [LayerCase(model, "conv1", 3, 64, size, size, ineligible=stem)]

    def add(name: str, inputs: int, outputs: int, side: int, stride: int = 1, pointwise: str = "") -> None:
        kernel = 1 if pointwise else 3
        cases.append(
            LayerCase(model, name, inputs, outputs, side, side, kernel, stride, ineligible=pointwise)
        )

    for stage, (width, blocks) in enumerate(RESNET_STAGES, start=1):
        outputs = 4 * width if bottleneck else width
        for block in range(blocks):
            stride = 2 if block == 0 and stage > 1 else 1
            name, small = f"layer{stage}.{block}", size // stride
            if bottleneck:
                add(f"{name}.conv1", channels, width, size, pointwise="1x1 convolution")
                add(f"{name}.conv2", width, width, size, stride)
                add(f"{name}.conv3", width, outputs, small, pointwise="1x1 convolution")
            else:
                add(f"{name}.conv1", channels, width, size, stride)
                add(f"{name}.conv2", width, width, small)
            if stride == 2 or channels != outputs:
                add(f"{name}.downsample", channels, outputs, size, stride, pointwise="1x1 downsample")
            channels, size = outputs, small
    return cases
