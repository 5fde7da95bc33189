"""Networks by name, checkpoints, the ordered table of quantizable layers, batch-norm folding, and prediction."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.optimization import fuse

from emq_lib.datasets import Split
from emq_lib.errors import CorruptArtefactError, InvalidParameterError, UnsupportedModelError
from emq_lib.profiles import Profile


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


def load_pretrained(profile: Profile) -> nn.Module:
    """Return an ImageNet profile's network with torchvision's first published weights, which torchvision downloads."""
    from torchvision.models import get_model_weights

    model = build_model(profile)
    weights = get_model_weights(profile.model.removeprefix("imagenet-"))["IMAGENET1K_V1"]
    model.load_state_dict(weights.get_state_dict(progress=True, check_hash=True, weights_only=True))
    return model.eval()


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
    """
    MODELS[name] = build


def build_model(profile: Profile) -> nn.Module:
    """Return the profile's network with fresh random weights, drawn from the profile's seed."""
    if profile.model not in MODELS:
        raise InvalidParameterError(
            f"profile {profile.name!r} names the model {profile.model!r}; known models: {', '.join(sorted(MODELS))}."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(profile.rng("init").integers(2**62)))
        return MODELS[profile.model]().to(memory_format=torch.channels_last)


def load_checkpoint(profile: Profile, path: pathlib.Path) -> nn.Module:
    """Return the profile's trained network in evaluation mode.

    Raises:
        CorruptArtefactError: the file is truncated, or holds other tensors than the network's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model = build_model(profile)
    try:
        model.load_state_dict(load_file(str(path)))
    except (SafetensorError, RuntimeError) as error:
        raise CorruptArtefactError(
            f"{path} is not a checkpoint of {profile.model!r} ({error}). Restore it, or train again with REBUILD=True."
        ) from error
    return model.eval()


def fold_batchnorm(model: nn.Module) -> torch.fx.GraphModule:
    """Return a traced copy in evaluation mode whose convolutions carry the batch norms' scale and shift.

    The folded network computes the same function; its layers keep their names. Folding multiplies each output channel
    of a weight by a constant, so per-channel quantization is unaffected by it.
    """
    return fuse(model.eval())


def layer_table(model: nn.Module, profile: Profile) -> pd.DataFrame:
    """Return one row per quantizable layer of a study's network: see :func:`describe_layers`.

    Args:
        model: the network, batch norm folded (so that biases are what the packed file holds).
        profile: gives the input shape, the pinned and the tied layers.

    Raises:
        UnsupportedModelError: see :func:`describe_layers`; the message names the profile.
    """
    reference = next(model.parameters())
    example = torch.zeros(1, *INPUT_SHAPES[profile.dataset], device=reference.device)
    try:
        return describe_layers(model, example, pinned=dict(profile.pinned), tied=dict(profile.tied))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"profile {profile.name!r}: {error}") from error


def describe_layers(
    model: nn.Module, example: torch.Tensor, *, pinned: Mapping[str, int], tied: Mapping[str, str]
) -> pd.DataFrame:
    """Return one row per convolution and linear layer in forward order.

    Args:
        model: the network.
        example: an input of one image, shape (1, C, H, W).
        pinned: layer name -> bits, of the layers outside the search.
        tied: layer name -> layer that it takes its bits from.

    Returns:
        Columns name, kind ("Conv2d" or "Linear"), shape (text), parameters (weights), channels (outputs), biases, macs
        (multiply-accumulates for one image), searchable, slot (position in a configuration, -1 if pinned; a tied layer
        has the slot of the layer that it is tied to), pinned_bits.

    Raises:
        UnsupportedModelError: a layer that runs twice in one pass, two layers that share one weight, or a pinned or
            tied layer that the network does not have.
    """
    calls: list[tuple[str, nn.Module, int]] = []

    def record(name: str) -> Callable:
        def hook(module: nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
            positions = output[0, 0].numel() if isinstance(module, nn.Conv2d) else output[0].numel() // output.shape[-1]
            calls.append((name, module, positions * module.weight.numel()))

        return hook

    handles = [
        module.register_forward_hook(record(name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    try:
        with torch.inference_mode():
            model.eval()(example)
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, _, _ in calls]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UnsupportedModelError(f"Layers {repeated} run more than once in a pass; give each use its own layer.")
    weights = [module.weight for _, module, _ in calls]
    if shared := [name for name, weight in zip(names, weights, strict=True) if sum(weight is w for w in weights) > 1]:
        raise UnsupportedModelError(f"Layers {shared} share one weight; give each its own.")
    if unknown := sorted({*pinned, *tied, *tied.values()} - set(names)):
        raise UnsupportedModelError(f"{unknown} are to be pinned or tied, but the network has the layers {names}.")
    free = [name for name in names if name not in pinned and name not in tied]
    slots = {name: slot for slot, name in enumerate(free)}
    if homeless := sorted(set(tied.values()) - set(free)):
        raise UnsupportedModelError(f"Layers are tied to {homeless}, which have no bits to share.")
    slots |= {name: slots[target] for name, target in tied.items()}
    rows = []
    for name, module, macs in calls:
        rows.append(
            {
                "name": name,
                "kind": type(module).__name__,
                "shape": "x".join(map(str, module.weight.shape)),
                "parameters": module.weight.numel(),
                "channels": module.weight.shape[0],
                "biases": 0 if module.bias is None else module.bias.numel(),
                "macs": macs,
                "searchable": name in slots,
                "slot": slots.get(name, -1),
                "pinned_bits": pinned.get(name, 0),
            }
        )
    columns = ["name", "kind", "shape", "parameters", "channels", "biases", "macs", "searchable", "slot", "pinned_bits"]
    return pd.DataFrame(rows, columns=columns)


_LINEAR_MODULES = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.Identity, nn.Flatten, nn.Dropout)
_PIECEWISE_MODULES = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_PIECEWISE_NAMES = "add cat flatten pad getitem relu relu6 max_pool2d avg_pool2d adaptive_avg_pool2d mean view dropout"


def is_piecewise_linear(model: torch.fx.GraphModule) -> bool:
    """Return whether the logits are known to be piecewise linear in the weight of any one layer.

    So they are if the traced network in evaluation mode has nothing but linear layers, ReLUs, pooling, sums and
    changes of shape. An operation that is not on this list counts as not piecewise linear.

    >>> is_piecewise_linear(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
    True
    >>> is_piecewise_linear(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.GELU())))
    False
    """
    names = _PIECEWISE_NAMES.split()
    for node in model.graph.nodes:
        if node.op == "call_module":
            known = isinstance(model.get_submodule(node.target), _LINEAR_MODULES + _PIECEWISE_MODULES)
        elif node.op in ("call_function", "call_method"):
            known = getattr(node.target, "__name__", node.target) in names
        else:
            known = True
        if not known:
            return False
    return True


def segments(model: torch.fx.GraphModule, layers: Sequence[str]) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """Cut a traced network into the shortest consecutive pieces that begin with a layer and pass on a single tensor.

    Args:
        model: traced network.
        layers: names of its quantizable layers.

    Returns:
        (piece, names of its layers) in forward order; applying the pieces one after another is applying the network.
    """
    nodes = list(model.graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    last_use = [max((position[user] for user in node.users), default=index) for index, node in enumerate(nodes)]
    part, parts, held = 0, {}, [[]]
    for index, node in enumerate(nodes):
        parts[node] = part
        if node.op == "call_module" and node.target in layers:
            held[part].append(node.target)
        alive = [other for other in range(index + 1) if last_use[other] > index]
        following = nodes[min(index + 1, len(nodes) - 1)]
        goes_on = following.op == "get_attr" or (last_use[index] == index + 1 and following.target not in layers)
        if alive == [index] and held[part] and following.op != "output" and not goes_on:
            part += 1
            held.append([])
    if not held[-1]:
        held.pop()
        parts = {node: min(number, len(held) - 1) for node, number in parts.items()}
    pieces = [[node for node in nodes if parts[node] == number] for number in range(len(held))]
    return [(_piece(model, part), tuple(names)) for part, names in zip(pieces, held, strict=True)]


def _piece(model: torch.fx.GraphModule, nodes: Sequence[torch.fx.Node]) -> torch.fx.GraphModule:
    """Return consecutive nodes of a traced network as a module of the one tensor that they take from before."""
    graph, copies = torch.fx.Graph(), {}

    def copy_of(node: torch.fx.Node) -> torch.fx.Node:
        return copies[node] if node in copies else copies.setdefault(node, graph.placeholder("x"))

    for node in nodes:
        copies[node] = graph.node_copy(node, copy_of)
    if nodes[-1].op != "output":
        graph.output(copies[nodes[-1]])
    return torch.fx.GraphModule(model, graph)


@contextlib.contextmanager
def pre_hooks(model: nn.Module, hooks: Mapping[str, Callable]) -> Iterator[None]:
    """Register forward pre-hooks by layer name for the duration of the block."""
    handles = [model.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def predict(model: nn.Module, split: Split, *, batch_size: int = 250) -> torch.Tensor:
    """Return float32 logits (N, classes) of every image of a split, in its order."""
    starts = range(0, len(split), batch_size)
    return torch.cat([model(split[start : start + batch_size].inputs()).float() for start in starts])


def top1(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the top-1 accuracy in percent, 0 to 100.

    >>> top1(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
    50.0
    """
    return 100 * (logits.argmax(dim=1) == labels).double().mean().item()
