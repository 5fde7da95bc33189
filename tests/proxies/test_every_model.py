"""Every statistic on the model of every profile, folded, with in-place operations, and as it stands."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from emq_lib.core.datasets import Split
from emq_lib.core.errors import UnsupportedModelError
from emq_lib.core.graphs import fold_batchnorm
from emq_lib.core.models import MODELS
from emq_lib.core.quantizers import fake_quantize
from emq_lib.proxies import curvature, measuring, passes, saliency
from emq_lib.proxies.layer_statistics import sampled
from tests.networks import registered
from tests.proxies.truth import Truth, cka

IMAGES, CLASSES, SIDE = 4, 10, 16
QUICK = (("resnet8", "folded"), ("mobilenetv2-half", "folded, in place"))
CASES = [(name, "folded") for name in MODELS]
CASES += [(name, "folded, in place") for name in ("resnet18-half", "mobilenetv2-half", "imagenet-resnet50")]
CASES += [("mobilenetv2-half", "as it stands")]


def _generator(seed=7):
    return torch.Generator().manual_seed(seed)


class Case:
    """A network, a few of its layers and images, and the truth about them."""

    def __init__(self, name, variant):
        model, inputs = registered(name)
        if name.startswith("imagenet"):
            _give_ten_classes(model)
        if name != "vit-tiny":  # which has as many positions as 32 x 32 images have patches
            inputs = inputs[:, :, :SIDE, :SIDE]
        if variant == "folded":
            model = fold_batchnorm(model)
        if variant == "folded, in place":
            from torch.fx.experimental.optimization import fuse

            model = fuse(model)
        self.model, self.shape = model, tuple(inputs.shape[1:])
        layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        self.names = [layers[i] for i in np.unique(np.linspace(0, len(layers) - 1, 6).round().astype(int))]
        self.few = [self.names[0], self.names[len(self.names) // 2], self.names[-1]]
        images = torch.randint(0, 256, (IMAGES, *self.shape), generator=_generator(), dtype=torch.uint8)
        channels = self.shape[0]
        labels = torch.randint(0, CLASSES, (IMAGES,), generator=_generator())
        self.split = Split(images, labels, torch.full((channels,), 0.5), torch.full((channels,), 0.3))
        self.piecewise, self.traced = name != "vit-tiny", variant != "as it stands"
        if not (self.piecewise and self.traced):  # a product with the Hessian takes two passes, for each probe
            self.few = self.few[-1:]
        self.truth = Truth(model, self.names, self.split)
        self.truth_of_few = Truth(model, self.few, self.split[:2])


def _give_ten_classes(model):
    """Give a network of 1,000 classes 10: what is by class takes a pass for each."""
    last = model.fc if hasattr(model, "fc") else model.classifier[1]
    head = nn.Linear(last.in_features, CLASSES).eval()
    head.load_state_dict({"weight": last.weight[:CLASSES].detach(), "bias": last.bias[:CLASSES].detach()})
    if hasattr(model, "fc"):
        model.fc = head
    else:
        model.classifier[1] = head


@pytest.fixture(
    scope="module",
    params=[pytest.param(each, id=", ".join(each), marks=[] if each in QUICK else pytest.mark.slow) for each in CASES],
)
def case(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Case(*request.param)


def _moments(case):
    first, second = curvature.gradient_moments(case.model, case.names, case.split, batch_size=3)
    truth = case.truth.gradients
    return [*first, *second], [*(g.mean(dim=0) for g in truth), *(g.square().mean(dim=0) for g in truth)]


def _traces(case):
    few = case.split[:2]
    if case.piecewise and case.traced:
        found, _ = curvature.hessian_traces(case.model, case.few, few, combinations=None, generator=_generator())
        return found, [rows.double().square().sum(dim=(1, 2)).mean() for rows in case.truth_of_few.rows]
    found, _ = curvature.hessian_traces(case.model, case.few, few, generator=_generator())
    generator, truth = _generator(), []
    for name in case.few:
        shape = (curvature.PROBES, *case.model.get_submodule(name).weight.shape)
        signs = 2.0 * torch.randint(0, 2, shape, generator=generator) - 1
        products = [case.truth.hessian_products(few, {name: v})[0] for v in signs]
        truth.append(sum((v * p).sum() for v, p in zip(signs, products, strict=True)) / len(signs))
    return found, truth


def _drawn_traces(case):
    """The same signs, drawn once more, combine the rows of the classes."""
    if not (case.piecewise and case.traced):
        pytest.skip("has no rows of classes")
    few, generator = case.split[:2], _generator()
    found, _ = curvature.hessian_traces(case.model, case.few, few, combinations=3, generator=_generator())
    signs = 2.0 * torch.randint(0, 2, (3, 2, CLASSES), generator=generator) - 1
    rows = case.truth_of_few.rows
    combined = [torch.einsum("cnk,nkp->cnp", signs / 3**0.5, layer) for layer in rows]
    return found, [layer.double().square().sum(dim=(0, 2)).mean() for layer in combined]


def _eigenvalues(case):
    few = case.split[:2]
    if case.piecewise:
        found = curvature.top_eigenvalues(case.model, case.few, few)
        rows = [layer.flatten(0, 1).double() for layer in case.truth_of_few.rows]
        return found, [torch.linalg.eigvalsh(layer @ layer.T)[-1] / 2 for layer in rows]
    name = case.few[-1]
    weight = case.model.get_submodule(name).weight
    found = curvature.top_eigenvalues(case.model, [name], few)
    v = torch.randn(weight.shape, generator=_generator(), dtype=torch.float64)
    for _ in range(60):
        (product,) = case.truth.hessian_products(few, {name: v / v.norm()})
        v, value = product, product.norm()
    return found, [value]


def _virtual_gradients(case):
    found = saliency.virtual_gradients(case.model, case.names, case.shape, images=2)
    total = case.truth.model(torch.ones(2, *case.shape)).sum()
    return found, [g.flatten(1) for g in torch.autograd.grad(total, case.truth.weights)]


def _positive_gradients(case):
    found = saliency.positive_gradients(case.model, case.names, case.shape)
    return found, [g.flatten(1) for g in case.truth.positive(case.shape)]


def _synflow(case):
    pairs = zip(case.truth.weights, case.truth.positive(case.shape), strict=True)
    return saliency.synflow(case.model, case.names, case.shape), [(w * g).abs().sum() for w, g in pairs]


def _channel_products(case):
    return saliency.channel_products(case.model, case.names, case.split), case.truth.products


def _channel_fisher(case):
    found = saliency.channel_fisher(case.model, case.names, case.split)
    return found, [p.double().square().sum() / 2 / IMAGES for p in case.truth.products]


def _grasp(case):
    mean = [g.mean(dim=0).double() for g in case.truth.gradients]
    g = {name: m.view_as(w) for name, m, w in zip(case.names, mean, case.truth.weights, strict=True)}
    pairs = zip(case.truth.weights, case.truth.hessian_products(case.split, g), strict=True)
    return saliency.grasp(case.model, case.names, case.split), [-(w * hg).sum() for w, hg in pairs]


def _zico(case):
    found = saliency.zico(case.model, case.names, case.split, batch_size=2)
    halves = [torch.autograd.grad(case.truth.loss(case.split[i : i + 2]), case.truth.weights) for i in (0, 2)]
    truth = []
    for pair in zip(*halves, strict=True):
        g = torch.stack(pair).double()
        e, std = g.abs().mean(dim=0), g.std(dim=0, correction=0)
        truth.append((e[std > 0] / std[std > 0]).sum().log())
    return found, truth


def _zen(case):
    found = saliency.zen(case.model, case.names, case.shape, images=3, generator=_generator())
    generator = _generator()
    x, z = (torch.randn(3, *case.shape, generator=generator) for _ in range(2))
    with torch.no_grad():
        one, two = (case.truth.observe(inputs)[2] for inputs in (x, x + 0.01 * z))
    return found, [(two[name].double() - one[name].double()).abs().mean() / 0.01 for name in case.names]


def _nwot(case):
    truth = []
    for name in case.names:
        codes = np.unique((case.truth.outputs[name].flatten(1) > 0).numpy(), axis=0)
        truth.append(np.linalg.slogdet([[np.sum(a == b) for b in codes] for a in codes])[1])
    return saliency.nwot(case.model, case.names, case.split), truth


def _cka(case):
    return saliency.linear_cka(case.model, case.names, case.split), cka([case.truth.outputs[n] for n in case.names])


def _errors(case, names):
    weights = {name: case.model.get_submodule(name).weight.detach() for name in names}
    return {name: [fake_quantize(w.contiguous(), bits) - w for bits in (2, 3)] for name, w in weights.items()}


def _output_errors(case):
    errors, truth = _errors(case, case.names), []
    for name in case.names:
        layer = copy.deepcopy(case.truth.model.get_submodule(name)).double()
        layer.bias = None
        energies = []
        with torch.no_grad():
            for weight in (layer.weight.clone(), *errors[name]):
                layer.weight.copy_(weight)
                energies.append(layer(case.truth.inputs[name].double()).square().sum())
        truth += [energy / energies[0] for energy in energies[1:]]
    return measuring.output_errors(case.model, errors, case.split, batch_size=3), truth


def _activations(case):
    truth = []
    for name in case.names:
        x = case.truth.inputs[name]
        x = x if x.ndim == 4 else x.reshape(len(x), -1, x.shape[-1]).transpose(1, 2)
        truth.append(sampled(x.transpose(0, 1).flatten(1)))
    return measuring.activation_samples(case.model, case.names, case.split), truth


def _options(case):
    """Two slots, the first of two layers, at two widths each."""
    names = [case.names[0], case.names[2], case.names[-1]]
    weights = {name: case.model.get_submodule(name).weight.detach() for name in names}
    errors = _errors(case, names)
    return [names[:2], names[2:]], {name: [w + error for error in errors[name]] for name, w in weights.items()}


def _replaced(members, quantized, *options):
    return {name: quantized[name][choice] for slot, choice in options for name in members[slot]}


def _one_slot(case):
    members, quantized = _options(case)
    plain, logits = passes.one_slot_logits(case.model, members, quantized, case.split, batch_size=3)
    truth = [
        case.truth.logits(case.split, _replaced(members, quantized, (slot, choice)))
        for slot in range(2)
        for choice in range(2)
    ]
    return [plain, *logits.flatten(0, 1)], [case.truth.logits(case.split, {}), *truth]


def _pairs(case):
    members, quantized = _options(case)

    def loss(*options):
        logits = case.truth.logits(case.split, _replaced(members, quantized, *options))
        return F.cross_entropy(logits, case.split.labels).item()

    alone = np.array([[loss((slot, choice)) - loss() for choice in range(2)] for slot in range(2)])
    truth = np.diag(alone.ravel())
    for i in range(2):
        for j in range(2):
            both = loss((0, i), (1, j)) - loss() - alone[0, i] - alone[1, j]
            truth[i, 2 + j] = truth[2 + j, i] = both
    return passes.pair_losses(case.model, members, quantized, case.split), truth


# found and truth, and how far they may be apart, as a share of the largest entry of each statistic of a layer
CHECKS = {
    "gradient moments": (_moments, 2e-4),
    "Hessian traces": (_traces, 2e-3),
    "Hessian traces, drawn": (_drawn_traces, 1e-3),
    "top eigenvalues": (_eigenvalues, 2e-3),
    "virtual gradients": (_virtual_gradients, 1e-4),
    "positive gradients": (_positive_gradients, 1e-9),
    "Synflow": (_synflow, 1e-9),
    "channel products": (_channel_products, 2e-4),
    "channel Fisher": (_channel_fisher, 2e-4),
    "GraSP": (_grasp, 2e-3),
    "ZiCo": (_zico, 1e-4),
    "Zen": (_zen, 1e-3),
    "NWOT": (_nwot, 1e-6),
    "CKA": (_cka, 1e-4),
    "output errors": (_output_errors, 1e-4),
    "activations": (_activations, 1e-6),
    "one slot": (_one_slot, 1e-4),
    "pairs": (_pairs, 1e-3),
}


@pytest.mark.parametrize("check", CHECKS)
def test_statistic_is_that_of_plain_passes(case, check):
    compute, tolerance = CHECKS[check]
    if check in ("one slot", "pairs") and not case.traced:
        with pytest.raises(UnsupportedModelError, match="must be traced"):
            compute(case)
        return
    before = _everything(case)
    found, truth = compute(case)
    after = _everything(case)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    found, truth = (_rows(values) for values in (found, truth))
    assert len(found) == len(truth)
    for one, other in zip(found, truth, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max() + 1e-12


def _rows(values):
    rows = values if isinstance(values, list) else list(np.asarray(values).reshape(-1))
    return [np.asarray(row.detach() if isinstance(row, torch.Tensor) else row, dtype=np.float64) for row in rows]


def _everything(case):
    """Copies of what no statistic may change: weights, images, labels, and the global random streams."""
    kept = {f"model {key}": value for key, value in case.model.state_dict().items()}
    kept |= {"images": case.split.images, "labels": case.split.labels, "torch": torch.get_rng_state()}
    kept |= {key: value.grad for key, value in case.model.named_parameters() if value.grad is not None}
    kept = {key: value.detach().clone().numpy() for key, value in kept.items()}
    _, words, *place = np.random.get_state()  # noqa: NPY002
    return kept | {"numpy": words.copy(), "place": np.array(place, dtype=np.float64)}
