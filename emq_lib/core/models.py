"""Networks by name, their weights, and prediction."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from emq_lib.core.checks import whole_number
from emq_lib.core.datasets import Split
from emq_lib.core.errors import CorruptArtefactError, InvalidParameterError


class _Block(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut (option A of He et al. 2016: subsample, pad with zeros)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride, self.extra = stride, (out_channels - in_channels) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """The residual network for small images of He et al. 2016, section 4.2: 6n + 2 layers in three stages.

    Args:
        depth: 6n + 2.
        in_channels: 3 for colour, 1 for grey images.
        classes: number of outputs.
        width: channels of the first stage; later stages double it.
    """

    def __init__(self, depth: int, *, in_channels: int = 3, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for stage, stride in enumerate((1, 2, 2), start=1):
            blocks = []
            for index in range((depth - 2) // 6):
                out_channels = width * 2 ** (stage - 1)
                blocks.append(_Block(channels, out_channels, stride if index == 0 else 1))
                channels = out_channels
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, classes) of inputs (N, C, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class _TransformerBlock(nn.Module):
    """Self-attention and a perceptron, each behind a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """A small vision transformer (Dosovitskiy et al. 2021) for 32 x 32 images: learned positions, mean of the tokens.

    Args:
        depth: number of blocks.
        width: size of a token.
        heads: attention heads per block.
        patch: side of a patch in pixels.
    """

    def __init__(self, *, depth: int = 6, width: int = 128, heads: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (32 // patch) ** 2, width))
        self.blocks = nn.Sequential(*(_TransformerBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, 10) of inputs (N, 3, 32, 32)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))


def resnet18_half() -> nn.Module:
    """Return torchvision's ResNet-18 at half width for 32 x 32 images: a 3x3 stem of stride 1, no max pooling."""
    from torchvision.models import resnet

    width, model = 32, resnet.resnet18(num_classes=10)
    model.inplanes, model.maxpool = width, nn.Identity()
    model.conv1, model.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
    for stage, stride in enumerate((1, 2, 2, 2)):
        layer = model._make_layer(resnet.BasicBlock, width * 2**stage, 2, stride=stride)
        setattr(model, f"layer{stage + 1}", layer)
    model.fc = nn.Linear(8 * width, 10)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def mobilenetv2_half() -> nn.Module:
    """Return torchvision's MobileNetV2 at width 0.5 for 32 x 32 images: the first two strides are 1."""
    from torchvision.models import mobilenet_v2

    setting = [
        [1, 16, 1, 1],
        [6, 24, 2, 1],
        [6, 32, 3, 2],
        [6, 64, 4, 2],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    model = mobilenet_v2(num_classes=10, width_mult=0.5, inverted_residual_setting=setting)
    model.features[0][0].stride = (1, 1)
    return model


def _imagenet_model(name: str) -> nn.Module:
    from torchvision.models import get_model

    return get_model(name)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet8": lambda: CifarResNet(8, in_channels=1, width=8),
    "resnet20": lambda: CifarResNet(20),
    "resnet18-half": resnet18_half,
    "mobilenetv2-half": mobilenetv2_half,
    "vit-tiny": VisionTransformer,
    **{
        f"imagenet-{name}": functools.partial(_imagenet_model, name)
        for name in ("resnet18", "resnet50", "mobilenet_v2")
    },
}
INPUT_SHAPES: dict[str, tuple[int, int, int]] = {
    "digits": (1, 16, 16),
    "cifar10": (3, 32, 32),
    "imagenet": (3, 224, 224),
}


def register_model(name: str, build: Callable[[], nn.Module]) -> None:
    """Let profiles use a network by name.

    Args:
        name: what a profile's `model` says.
        build: returns the network with fresh weights. `torch.fx` must be able to trace it.

    Raises:
        InvalidParameterError: a name that is no text, or nothing to call.
    """
    if not (isinstance(name, str) and name and callable(build)):
        raise InvalidParameterError(f"register_model(name, function) takes a text and a function; got {name!r:.60}.")
    MODELS[name] = build


@torch.inference_mode()
def predict(model: nn.Module, split: Split, *, batch_size: int = 250) -> torch.Tensor:
    """Return float32 logits (N, classes) of every image of a split, in its order.

    Args:
        model: the network.
        split: the images.
        batch_size: images per forward pass.

    Raises:
        InvalidParameterError: no images, or a batch size that is no whole number from 1.
    """
    batch_size = whole_number(batch_size, "batch_size", 1)
    if not len(split):
        raise InvalidParameterError("There are no images to predict.")
    starts = range(0, len(split), batch_size)
    return torch.cat([model(split[start : start + batch_size].inputs()).float() for start in starts])


def top1(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the top-1 accuracy in percent, 0 to 100.

    Args:
        logits: shape (N, classes).
        labels: int64, shape (N,).

    Raises:
        InvalidParameterError: no images, or logits and labels of different numbers.

    >>> top1(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
    50.0
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise InvalidParameterError(
            f"top-1 takes logits (N, classes) and labels (N,); got {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    return 100 * (logits.argmax(dim=1) == labels).double().mean().item()


def build_model(name: str, *, seed: int) -> nn.Module:
    """Return a network with fresh random weights.

    Args:
        name: a key of :data:`MODELS`.
        seed: of the weights; PyTorch's own stream is left as it was.

    Raises:
        InvalidParameterError: no such network, or a seed that is no whole number from 0.
    """
    seed = whole_number(seed, "seed", 0)
    if not isinstance(name, str) or name not in MODELS:
        raise InvalidParameterError(f"unknown model {name!r:.60}; known models: {', '.join(sorted(MODELS))}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name]().to(memory_format=torch.channels_last)


def load_weights(model: nn.Module, path: pathlib.Path) -> nn.Module:
    """Fill a network from a safetensors file, put it into evaluation mode, and return it.

    Args:
        model: the network; it is changed.
        path: the file.

    Raises:
        CorruptArtefactError: the file is truncated, or holds other tensors than the network's, or NaN or infinity.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        found = load(path.read_bytes())
        if odd := [name for name, tensor in found.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{odd[0]} holds NaN or infinity")
        wanted = model.state_dict()
        if odd := [
            name
            for name in wanted.keys() & found.keys()
            if found[name].is_floating_point() != wanted[name].is_floating_point()
        ]:
            raise ValueError(f"{odd[0]} holds {found[odd[0]].dtype} numbers")
        model.load_state_dict(found)
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise CorruptArtefactError(
            f"{path} is not a checkpoint of {type(model).__name__} ({error}). Restore it, or train again."
        ) from error
    return model.eval()
