"""What cannot be quantized is refused by name, by every function that takes it, and nothing passed in changes."""

import copy
import dataclasses
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from emq_lib.core.datasets import Inputs, Split
from emq_lib.core.errors import (
    ConfigLengthError,
    InfeasibleBudgetError,
    InvalidBitsError,
    InvalidParameterError,
    UnsupportedModelError,
)
from emq_lib.core.graphs import describe_layers, fold_batchnorm
from emq_lib.core.quantizers import choose_activation_ranges, quantize
from emq_lib.quantization import adaround
from emq_lib.quantization.adaround import build_adaround_bank
from emq_lib.quantization.brecq import Settings, reconstruct_in_order
from emq_lib.quantization.choose import choose_bits
from emq_lib.quantization.packed import save_network
from emq_lib.quantization.planning import plan_bits
from emq_lib.quantization.qat import LearnedLayer, QatRecipe, train_quantized
from emq_lib.quantization.quantize import METHODS, quantize_model

SHORT, BRIEF = Settings(2, 1, 4), QatRecipe(epochs=1, batch_size=4, precision="float32")


class Network(nn.Module):
    """Three convolutions and a classifier of four classes."""

    def __init__(self, **last):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.c3, self.fc = nn.Conv2d(4, 4, 3, padding=1, **last), nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(F.relu(self.c3(F.relu(self.c2(F.relu(self.c1(x)))))).mean((2, 3)))


def _built(make):
    """Return a module with fresh weights, always the same; PyTorch's own stream is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def _network(**last):
    return _built(lambda: Network(**last))


def _split(count=6):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 6, 6), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(count) % 4, torch.full((3,), 0.5), torch.full((3,), 0.25))


MODEL, SPLIT = _network(), _split()
IMAGES = SPLIT.inputs()
QUANTIZED = quantize_model(MODEL, IMAGES, verbose=False)


def _name(value):
    try:
        return f"{value!r:.30}"
    except ValueError:
        return "huge"


def _quantize(model=MODEL, images=IMAGES, **how):
    return quantize_model(model, images, **({"verbose": False, "settings": SHORT, "recipe": BRIEF} | how))


@pytest.fixture(autouse=True)
def _briefly(monkeypatch):
    monkeypatch.setattr(adaround, "ITERATIONS", 20)


@pytest.fixture(autouse=True)
def _unchanged():
    """Nothing that was passed in changes, whatever happens."""
    before = copy.deepcopy((MODEL.state_dict(), IMAGES, SPLIT, QUANTIZED(IMAGES)))
    stream = torch.get_rng_state()
    yield
    assert all(torch.equal(MODEL.state_dict()[name], tensor) for name, tensor in before[0].items())
    assert torch.equal(IMAGES, before[1])
    assert all(torch.equal(*pair) for pair in zip(vars(SPLIT).values(), vars(before[2]).values(), strict=True))
    assert torch.equal(QUANTIZED(IMAGES), before[3])
    assert torch.equal(torch.get_rng_state(), stream)


def _spoilt(value):
    images = IMAGES.clone()
    images[3, 0, 0, 0] = value
    return images


NO_IMAGES = {
    "list": IMAGES.tolist(),
    "None": None,
    "array": IMAGES.numpy(),
    "text": "images",
    "number": 3,
    "float64": IMAGES.double(),
    "float16": IMAGES.half(),
    "uint8": SPLIT.images,
    "complex": IMAGES + 0j,
    "none": IMAGES[:0],
    "no images in a split": SPLIT[:0],
    "NaN": _spoilt(float("nan")),
    "infinity": _spoilt(float("inf")),
    "two channels": IMAGES[:, :2],
    "flat": IMAGES.flatten(1),
    "pair": (IMAGES, SPLIT.labels),
}


@pytest.mark.parametrize("images", NO_IMAGES.values(), ids=NO_IMAGES)
@pytest.mark.parametrize("function", ["quantize", "choose"])
def test_calibration_images_that_are_none(function, images):
    call = {"quantize": _quantize, "choose": lambda images: choose_bits(MODEL, images, average_bits=3)}[function]
    with pytest.raises(InvalidParameterError, match="calibration"):
        call(images=images)


class Dictionary(Network):
    def forward(self, x):
        return {"out": super().forward(x)}


class Pair(Network):
    def forward(self, x):
        return super().forward(x), x


class FirstRow(Network):
    def forward(self, x):
        return super().forward(x).mean(0)


def _with_nan(part):
    model = _network()
    with torch.no_grad():
        getattr(model.c2, part).view(-1)[0] = float("nan")
    return model


def _changed_afterwards():
    """Return a folded network whose layers a quantized one has taken."""
    folded = fold_batchnorm(_network())
    layers = describe_layers(folded, IMAGES[:1], pinned={}, tied={})
    ranges = choose_activation_ranges(folded, layers, Inputs(IMAGES), bits=8)
    generator = torch.Generator()
    reconstruct_in_order(folded, layers, (2,) * 4, SPLIT, ranges, generator=generator, settings=SHORT)
    return QUANTIZED.model


NO_NETWORKS = {
    "None": (None, InvalidParameterError, "torch.nn.Module"),
    "function": (F.relu, InvalidParameterError, "torch.nn.Module"),
    "class": (Network, InvalidParameterError, "torch.nn.Module"),
    "state": (MODEL.state_dict(), InvalidParameterError, "torch.nn.Module"),
    "quantized": (QUANTIZED, UnsupportedModelError, "quantized layers already"),
    "its inner part": (_changed_afterwards(), UnsupportedModelError, "quantized layers already"),
    "float64": (_network().double(), UnsupportedModelError, "float32"),
    "float16": (_network().half(), UnsupportedModelError, "float32"),
    "bfloat16": (_network().bfloat16(), UnsupportedModelError, "float32"),
    "dictionary": (Dictionary().eval(), UnsupportedModelError, "one tensor with a row per image, and returns a dict"),
    "pair": (Pair().eval(), UnsupportedModelError, "one tensor with a row per image"),
    "no rows": (FirstRow().eval(), UnsupportedModelError, "one tensor with a row per image"),
    "nothing to quantize": (nn.Sequential(nn.Flatten(), nn.ReLU()), UnsupportedModelError, "no convolution or linear"),
    "NaN weight": (_with_nan("weight"), UnsupportedModelError, "weight of layer 'c2' holds NaN"),
    "NaN bias": (_with_nan("bias"), UnsupportedModelError, "bias of layer 'c2' holds NaN"),
}


@pytest.mark.parametrize(("model", "error", "message"), NO_NETWORKS.values(), ids=NO_NETWORKS)
@pytest.mark.parametrize("function", ["quantize", "choose"])
def test_networks_that_cannot_be_quantized(function, model, error, message):
    call = {"quantize": _quantize, "choose": lambda model: choose_bits(model, IMAGES, average_bits=3)}[function]
    with pytest.raises(error, match=message):
        call(model=model)


@pytest.mark.slow
def test_pruned_and_parametrized_networks_are_quantized_as_they_compute(tmp_path):
    for change in (lambda c: parametrizations.weight_norm(c), lambda c: prune.l1_unstructured(c, "weight", 0.5)):
        model = _network()
        with torch.no_grad():
            change(model.c2)
        model.c2.requires_grad_(False)
        plain = _network()
        plain.c2.weight.data = model.c2.weight.detach().clone()
        for method in ("rtn", "brecq"):
            found, expected = (_quantize(network, method=method) for network in (model, plain))
            assert torch.equal(found(IMAGES), expected(IMAGES))
        save_network(tmp_path / "network.safetensors", _quantize(model))


def test_a_pruned_network_that_cannot_be_copied_is_named():
    model = _network()
    prune.l1_unstructured(model.c2, "weight", 0.5)
    model(IMAGES)
    with pytest.raises(UnsupportedModelError, match="Make pruning permanent first"):
        _quantize(model)


@pytest.mark.parametrize(
    "choices",
    [
        (4, 3, 2),
        (2, 2, 3),
        (2.5, 3),
        (True, 2),
        (),
        None,
        "234",
        3,
        (0, 2),
        (2, 9),
        (2, None),
        ("2", "3"),
        (2, 10**400),
    ],
    ids=_name,
)
def test_choices_that_are_no_increasing_widths(choices):
    with pytest.raises(InvalidBitsError, match="choices"):
        choose_bits(MODEL, IMAGES, average_bits=4, choices=choices)
    folded = fold_batchnorm(MODEL)
    with pytest.raises(InvalidBitsError, match="choices"):
        build_adaround_bank(folded, describe_layers(folded, IMAGES[:1], pinned={}, tied={}), choices, SPLIT)


@pytest.mark.parametrize("average", [None, "3", float("nan"), float("inf"), 10**400, True, 3j, [3]], ids=_name)
def test_averages_that_are_no_finite_number(average):
    with pytest.raises(InvalidParameterError, match="average_bits must be a finite number"):
        choose_bits(MODEL, IMAGES, average_bits=average)


def test_averages_below_the_smallest_choice():
    with pytest.raises(InfeasibleBudgetError, match="smallest choice is 2"):
        choose_bits(MODEL, IMAGES, average_bits=1.9)


@pytest.mark.parametrize(
    "width", [0, 9, -1, 2.5, 3.0, True, "3", None, float("nan"), 10**400, [3], torch.tensor(3)], ids=_name
)
@pytest.mark.parametrize("argument", ["default", "ends", "activation_bits", "bits"])
def test_widths_that_are_none(argument, width):
    if argument == "ends" and width is None:
        pytest.skip("without ends all layers are alike")
    how = {argument: {"c2": width} if argument == "bits" else width}
    with pytest.raises(InvalidBitsError, match="c2" if argument == "bits" else argument):
        plan_bits(MODEL, IMAGES[:1], **how)
    with pytest.raises(InvalidBitsError):
        _quantize(**how)


@pytest.mark.parametrize("kind", [np.int64, np.int8, np.uint8])
def test_widths_of_other_whole_number_types_are_taken(kind):
    found = plan_bits(MODEL, IMAGES[:1], bits={"c2": kind(4)}, default=kind(3), ends=kind(6), activation_bits=kind(8))
    assert found.bits == {"c1": 6, "c2": 4, "c3": 3, "fc": 6}
    assert {type(width) for width in (*found.bits.values(), found.activation_bits)} == {int}


@pytest.mark.parametrize(
    "bits", [5, "c2", [("c2", 3)], {3: 3}, {None: 3}, {("c2",): 3}, {"c9": 3}, {"c*": 3, "*2": 3}], ids=_name
)
def test_patterns_that_are_none(bits):
    with pytest.raises(InvalidParameterError, match=r"[Pp]attern"):
        plan_bits(MODEL, IMAGES[:1], bits=bits)


def test_the_name_of_a_layer_means_that_layer():
    """Names may hold what means something in patterns; what choose_bits answers is always taken."""
    names = ("a", "fc[1]", "fc1", "z")
    model = _built(lambda: nn.Sequential(OrderedDict((name, nn.Linear(8, 8)) for name in names)))
    images = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    bits = choose_bits(model, images, average_bits=3)
    assert set(bits) == {"fc[1]", "fc1"}
    assert plan_bits(model, images[:1], bits={"fc[1]": 2, "fc1": 5}).bits == {"a": 8, "fc[1]": 2, "fc1": 5, "z": 8}
    quantize_model(model, images, bits=bits, verbose=False)


@pytest.mark.parametrize(
    "how",
    [{"method": method} for method in ("gptq", None, 5, ["rtn"], b"rtn", "RTN")]
    + [{"settings": settings} for settings in (None, "laptop", {"iterations": 5}, BRIEF)]
    + [{"recipe": recipe} for recipe in (None, "short", {"epochs": 1}, SHORT)]
    + [{"seed": seed} for seed in (-1, 2.5, None, "0", True, 2**64, 10**400)]
    + [{"method": "qat", "training": training} for training in (None, IMAGES, [SPLIT], SPLIT.images)]
    + [{"method": "qat", "training": SPLIT, "resume": resume} for resume in (5, b"file", ["file"])],
    ids=_name,
)
def test_odd_arguments_of_quantize_model(how):
    with pytest.raises(InvalidParameterError):
        _quantize(**how)


@pytest.mark.parametrize("label", [4, 5, 2**40])
def test_labels_beyond_the_classes(label):
    labels = SPLIT.labels.clone()
    labels[2] = label
    with pytest.raises(InvalidParameterError, match="labels must lie in 0 to 3"):
        _quantize(method="qat", training=dataclasses.replace(SPLIT, labels=labels))


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("iterations", "activation_iterations", "batch") for value in (-1, 2.5, None, "9", True)]
    + [("batch", 0)]
    + [("activation_rate", value) for value in (0, -1.0, float("nan"), float("inf"), None, "1", 1j)],
)
def test_settings_outside_their_range(name, value):
    with pytest.raises(InvalidParameterError, match=name):
        dataclasses.replace(SHORT, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("distillation", value) for value in (-0.1, 1.1, float("nan"), None, "half", True, 1j)]
    + [
        ("epochs", 0),
        ("epochs", 1.5),
        ("batch_size", 0),
        ("max_lr", float("nan")),
        ("max_lr", -1),
        ("precision", "int8"),
    ],
)
def test_recipes_outside_their_range(name, value):
    with pytest.raises(InvalidParameterError, match=name):
        dataclasses.replace(BRIEF, **{name: value})


class One(Network):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 1)


@pytest.mark.parametrize(
    "model", [One().eval(), nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 5, 1)).eval()]
)
def test_predictions_without_a_divergence_are_named(model):
    with pytest.raises(UnsupportedModelError, match="logits of two or more classes"):
        choose_bits(model, IMAGES, average_bits=3)
    assert _quantize(model)(IMAGES).isfinite().all()


FOLDED = fold_batchnorm(MODEL)
LAYERS = describe_layers(FOLDED, IMAGES[:1], pinned={}, tied={})
RANGES = choose_activation_ranges(FOLDED, LAYERS, Inputs(IMAGES), bits=8)


def _in_order(**changed):
    given = {"model": FOLDED, "layers": LAYERS, "config": (3,) * 4, "images": SPLIT, "ranges": RANGES} | changed
    generator = given.pop("generator", torch.Generator().manual_seed(0))
    return reconstruct_in_order(*given.values(), generator=generator, settings=SHORT)


def _train(**changed):
    given = {"model": FOLDED, "layers": LAYERS, "config": (3,) * 4, "images": SPLIT, "ranges": RANGES} | changed
    generator = given.pop("generator", torch.Generator().manual_seed(0))
    return train_quantized(*given.values(), generator=generator, recipe=BRIEF)


OTHER = describe_layers(fold_batchnorm(One().eval()), IMAGES[:1], pinned={}, tied={}).replace({"name": {"c2": "c9"}})
WRONG = {
    "no network": ({"model": None}, InvalidParameterError),
    "a quantized network": ({"model": QUANTIZED}, UnsupportedModelError),
    "a network whose layers another took": ({"model": QUANTIZED.model}, UnsupportedModelError),
    "half precision": ({"model": fold_batchnorm(_network().half())}, UnsupportedModelError),
    "the table of another network": ({"layers": OTHER}, UnsupportedModelError),
    "a short configuration": ({"config": (3,) * 3}, ConfigLengthError),
    "a long configuration": ({"config": (3,) * 5}, ConfigLengthError),
    "a fraction": ({"config": (3, 3, 2.5, 3)}, InvalidBitsError),
    "a flag": ({"config": (3, 3, True, 3)}, InvalidBitsError),
    "a text": ({"config": "3333"}, InvalidBitsError),
    "nine bits": ({"config": (3, 3, 9, 3)}, InvalidBitsError),
    "no images": ({"images": SPLIT[:0]}, InvalidParameterError),
    "no images at all": ({"images": None}, InvalidParameterError),
    "no ranges": ({"ranges": {}}, InvalidParameterError),
    "a range is absent": ({"ranges": {k: v for k, v in RANGES.items() if k != "c2"}}, InvalidParameterError),
    "no generator": ({"generator": None}, InvalidParameterError),
    "a seed": ({"generator": 0}, InvalidParameterError),
    "a generator of NumPy": ({"generator": np.random.default_rng(0)}, InvalidParameterError),
}


@pytest.mark.parametrize(("changed", "error"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("function", [_in_order, _train])
def test_what_reconstruction_and_training_refuse(function, changed, error):
    with pytest.raises(error):
        function(**changed)


class Chunk(Network):
    """Passes on pairs of tensors."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        first, second = self.c1(x).chunk(2, 1)
        return self.fc(F.relu(first + self.c2(second)).mean((2, 3)))


class SequenceFirst(nn.Module):
    """Passes on tensors whose first dimension is not that of images."""

    def __init__(self):
        super().__init__()
        self.patches, self.linear, self.fc = nn.Conv2d(3, 4, 3, 3), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).permute(2, 0, 1)
        return self.fc((tokens + self.linear(tokens)).mean(0))


def test_blocks_that_pass_on_pairs_are_reconstructed():
    assert _quantize(_built(Chunk), method="brecq")(IMAGES).shape == (6, 4)


def test_blocks_that_pass_on_other_rows_are_named():
    with pytest.raises(UnsupportedModelError, match="row per image"):
        _quantize(_built(SequenceFirst), method="brecq")


@pytest.mark.slow
@pytest.mark.parametrize(
    "padding", [{"padding_mode": mode} for mode in ("reflect", "replicate", "circular")] + ["same"]
)
def test_other_padding_is_kept_by_every_method_and_refused_where_it_would_not_be(padding):
    """The float network is the truth: at 8 bits every method is close to it."""
    model = _network(**padding) if isinstance(padding, dict) else _network()
    if padding == "same":
        model.c3 = _built(lambda: nn.Conv2d(4, 4, 3, padding="same"))
    exact = model(IMAGES)
    for method in METHODS:
        found = _quantize(model, method=method, default=8, training=SPLIT)
        assert (found(IMAGES) - exact).abs().max() < 0.1 * exact.abs().max()
    for function in (_in_order, _train):
        with pytest.raises(UnsupportedModelError, match="padding of layer 'c3'"):
            function(model=model)
    with pytest.raises(UnsupportedModelError, match="padding of layer 'c3'"):
        build_adaround_bank(model, LAYERS, (2, 3), SPLIT)


def test_a_trained_layer_pads_as_its_float_layer_does():
    layer = _built(lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(2))
    learned, rounded = LearnedLayer(layer, quantize(layer.weight, 8), RANGES["c3"]), copy.deepcopy(layer)
    rounded.weight.data = learned.rounded().detach()
    torch.testing.assert_close(learned(x), rounded(RANGES["c3"].fake_quantize(x)), rtol=1e-4, atol=1e-5)
