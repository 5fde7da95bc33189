# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quantize your own network
#
# **Question.** I have a trained network and a folder of images. What do I call, and what do I get?
#
# **Answer.** Three calls: `choose_bits`, `quantize_model`, `save_network`. On this page a network of torchvision goes all the way, from a folder of images to a file of
# {glue:text}`own_share:.0f` % of its size that predicts the same as the network in memory.
#
# | you need | |
# |---|---|
# | earlier chapters | none; [02](02_proxies.ipynb), [04](04_allocation.ipynb) and [05](05_quantization.ipynb) explain what happens inside |
# | files read | none; images and files are written to a temporary folder |

# %% tags=["parameters"]
PROFILE: str = "cifar10-resnet20"  # not used: this page makes its own network
REBUILD: bool = False  # this page always computes
SEED: int = 0  # another number: another draw of all that is random

# %% tags=["hide-input"]
import pathlib
import tempfile

import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import binomtest
from torchvision import models, transforms
from torchvision.datasets import ImageFolder

from book.making.chapter import start_chapter
from book.making.tables import show_table
from book.studies.images import load_dataset
from emq_lib.quantization import onnx_export, packed
from emq_lib.quantization.brecq import Settings
from emq_lib.quantization.choose import choose_bits
from emq_lib.quantization.quantize import quantize_model

chapter = start_chapter("your_network", PROFILE, REBUILD, SEED)
torch.manual_seed(SEED)
folder = pathlib.Path(tempfile.mkdtemp())

# %% [markdown]
# ## A folder of images and a network
#
# The page has to work without a network connection, so it writes the digits into a folder of images, one folder per class, and trains torchvision's ResNet-18 on them for a few
# epochs. You have both already: read your folder, and take a trained network, for example
#
# ```python
# weights = models.MobileNet_V2_Weights.DEFAULT
# model = models.mobilenet_v2(weights=weights)
# images = ImageFolder("your/images", transform=weights.transforms())
# ```

# %% tags=["hide-input"]
digits = load_dataset(chapter.study("digits-resnet8"))
for part, split in (("train", digits.train), ("test", digits.test)):
    pairs = zip(split.images, split.labels.tolist(), strict=True)
    for number, (image, label) in enumerate(pairs):
        place = folder / part / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(place / f"{number}.png")

# %%
as_inputs = transforms.Compose(
    [
        transforms.Grayscale(3),
        transforms.Resize(32),
        transforms.ToTensor(),
        transforms.Normalize([0.3] * 3, [0.35] * 3),
    ]
)
train, test = (
    ImageFolder(folder / part, transform=as_inputs)
    for part in ("train", "test")
)


def stacked(images: ImageFolder) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all inputs and labels of a folder."""
    inputs, labels = zip(*images, strict=True)
    return torch.stack(inputs), torch.tensor(labels)


# %% tags=["hide-input"]
inputs, labels = stacked(train)
model = models.resnet18(num_classes=10)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for _ in range(6):
    for rows in torch.randperm(len(inputs)).split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[rows]), labels[rows]).backward()
        optimizer.step()
model = model.eval()

# %% [markdown]
# ## Choose the bits
#
# A few hundred training images without labels are enough. `choose_bits` rounds one layer at a time to each width, looks at how far the predictions move (the one-layer KL of chapter 02),
# and allocates widths exactly within a size. The first and the last layer are left out: `quantize_model` keeps them at 8 bits unless told otherwise.

# %%
calibration = inputs[torch.randperm(len(inputs))[:256]]
bits = {
    average: choose_bits(model, calibration, average_bits=average)
    for average in (3, 2.5, 2.25)
}
show_table(pd.DataFrame(bits).rename_axis("layer").reset_index(), decimals=0)

# %% [markdown]
# ## Quantize
#
# The plan is printed before anything runs. What cannot be quantized stays in floating point and is named.

# %%
network = quantize_model(model, calibration, bits=bits[2.5])

# %% [markdown]
# Is it still good? Measure it on images that nobody chose anything on. `"brecq"` learns how to round, here with fifty steps per block instead of the paper's 20,000.

# %%
held_out, truth = stacked(test)


@torch.inference_mode()
def accuracy(network: torch.nn.Module) -> dict[str, float]:
    """Return top-1 on the test images with Wilson's 95 % interval, in percent."""
    right = int((network(held_out).argmax(dim=1) == truth).sum())
    ends = binomtest(right, len(truth)).proportion_ci(method="wilson")
    return {
        "top1": 100 * right / len(truth),
        "lo": 100 * ends.low,
        "hi": 100 * ends.high,
    }


quiet = {"settings": Settings(50, 25), "verbose": False}
tried = {
    "float": model,
    "uniform 3": quantize_model(model, calibration, default=3, **quiet),
    "chosen, 3": quantize_model(model, calibration, bits=bits[3], **quiet),
    "chosen, 2.5": network,
    "chosen, 2.25": quantize_model(
        model, calibration, bits=bits[2.25], **quiet
    ),
    "chosen, 2.25, brecq": quantize_model(
        model, calibration, bits=bits[2.25], method="brecq", **quiet
    ),
}
found = pd.DataFrame({name: accuracy(one) for name, one in tried.items()}).T
show_table(found.rename_axis("network").reset_index(), decimals=1)

# %% tags=["hide-input"]
chapter.claim(
    "own_top1_float",
    "The float network has {:.1f} % top-1.",
    found.loc["float", "top1"],
    within=(80, 100),
    interval=tuple(found.loc["float", ["lo", "hi"]]),
    n=len(truth),
)

# %% tags=["hide-input"]
chapter.claim(
    "own_top1_chosen",
    "With 2.5 bits on average between the ends it has {:.1f} %.",
    found.loc["chosen, 2.5", "top1"],
    within=(50, 100),
    interval=tuple(found.loc["chosen, 2.5", ["lo", "hi"]]),
    n=len(truth),
)

# %% [markdown]
# ## Save, and run elsewhere
#
# The file holds codes, scales, biases and whatever stays in floating point. It is read into a network of the same architecture, whatever its weights.

# %%
path = folder / "network.safetensors"
packed.save_network(path, network)
again = packed.load_network(path, models.resnet18(num_classes=10))
with torch.inference_mode():
    assert torch.equal(again(held_out), network(held_out))
exact = sum(value.nbytes for value in model.state_dict().values())
chapter.claim(
    "own_share",
    "The file has {:.1f} % of the bytes of the float network.",
    100 * path.stat().st_size / exact,
    within=(5, 15),
)

# %% [markdown]
# For other runtimes there is ONNX. `exact=True` gives the same sums everywhere; without it the scales stand where runtimes look for them.

# %%
import onnxruntime

onnx_path = folder / "network.onnx"
onnx_export.save_onnx(onnx_path, network, calibration[:1], exact=True)
session = onnxruntime.InferenceSession(
    str(onnx_path), providers=["CPUExecutionProvider"]
)
logits = torch.from_numpy(session.run(None, {"images": held_out.numpy()})[0])
with torch.inference_mode():
    same = logits.argmax(dim=1) == network(held_out).argmax(dim=1)
chapter.claim(
    "own_onnx",
    "onnxruntime gives the same class for {:.1f} % of the test images.",
    100 * same.double().mean(),
    within=(99, 100),
    n=len(truth),
)

# %% [markdown]
# ## What could be wrong
#
# - `choose_bits` looks at one layer at a time and at rounding to nearest. Chapter 02 shows what that misses, chapter 05 how little it matters once rounding is learned.
# - A few hundred images bound what can be known about rare classes. Look at the accuracy per class of your own data.
# - The network of this page is small and hardly trained; its numbers say that the path works, not how good the method is. Chapter 05 has measurements with intervals.
# - Below 8 bits the file gets smaller, but nothing gets faster on a CPU: chapter 05 has the measurement.
