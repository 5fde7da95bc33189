"""Any network quantized by a plan, and configurations chosen within budgets."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from book.studies import allocation, bench, networks
from book.studies.networks import build_network
from book.studies.proxies import load_statistics
from book.studies.study import checked_path
from emq_lib.core import graphs, models
from emq_lib.core.configs import parse_bits
from emq_lib.core.costs import size_cost
from emq_lib.core.errors import InfeasibleBudgetError, InvalidParameterError, UnsupportedModelError
from emq_lib.core.quantizers import fake_quantize
from emq_lib.proxies.handmade import score_table
from emq_lib.quantization import choose, quantize
from emq_lib.quantization.brecq import LAPTOP
from emq_lib.quantization.qat import QatRecipe


@pytest.fixture
def model(study, profile):
    return networks.load_checkpoint(profile, checked_path(profile, "model.safetensors"))


def test_to_nearest_is_what_the_bench_measures(model, data, profile):
    network, layers = build_network(profile, data)
    config = (4, 3, 2, 3, 4, 2)
    names = list(layers.loc[layers["searchable"], "name"])
    found = quantize.quantize_model(
        model.train(), data.calibration, bits=dict(zip(names, config, strict=True)), verbose=False
    )
    assert model.training
    assert torch.equal(models.predict(found, data.test), models.predict(network.select(config), data.test))


@pytest.mark.slow
def test_chosen_bits_are_the_best_of_all_within_the_size(model, data):
    """Independent truth: divergences by plain passes through changed copies, and every configuration tried."""
    images, choices = data.calibration[:64], (2, 3, 4)
    bits = choose.choose_bits(model, images, average_bits=2.6, choices=choices)
    folded = graphs.fold_batchnorm(copy.deepcopy(model))
    wanted, kl = models.predict(folded, images).log_softmax(dim=1), np.zeros((len(bits), len(choices)))
    sizes = np.array([folded.get_submodule(name).weight.numel() for name in bits])
    for slot, name in enumerate(bits):
        for choice, width in enumerate(choices):
            changed = copy.deepcopy(folded)
            weight = changed.get_submodule(name).weight
            weight.data = fake_quantize(weight.data, width)
            found = models.predict(changed, images).log_softmax(dim=1)
            kl[slot, choice] = F.kl_div(found, wanted, log_target=True, reduction="batchmean")
    configs = np.array(list(itertools.product(range(3), repeat=len(bits))))
    fits = configs[(np.ceil(np.array(choices)[configs] * sizes / 8)).sum(axis=1) <= 2.6 * sizes.sum() / 8]
    totals = kl[np.arange(len(bits)), fits].sum(axis=1)
    assert tuple(bits.values()) == tuple(np.array(choices)[fits[totals.argmin()]])
    assert not {"conv1", "fc"} & set(bits)
    assert set(choose.choose_bits(model, images, average_bits=3, ends=None)) == {"conv1", *bits, "fc"}
    with pytest.raises(InfeasibleBudgetError, match="smallest choice is 2"):
        choose.choose_bits(model, images, average_bits=1.9)


@pytest.mark.slow
def test_learned_rounding_changes_logits_less_than_rounding_to_nearest(model, data):
    before = copy.deepcopy(model.state_dict())
    exact = models.predict(model.eval(), data.test)
    lost = {}
    for method in quantize.METHODS:
        found = quantize.quantize_model(
            model,
            data.calibration,
            default=2,
            method=method,
            settings=LAPTOP,
            training=data.train,
            recipe=QatRecipe(epochs=6, batch_size=64, crop_padding=1, flip=False, distillation=1.0),
            verbose=False,
        )
        lost[method] = (models.predict(found, data.test) - exact).square().mean().item()
    assert lost["brecq"] < lost["adaround"] < lost["rtn"]
    assert lost["qat"] < lost["adaround"]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_the_plan_is_printed_and_other_layers_stay_in_floating_point(capsys):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 8 * 8, 2))
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="left in floating point: 1"):
        found = quantize.quantize_model(network, images, bits={"0": 8})
    assert "left in floating point: 1 (ConvTranspose2d" in capsys.readouterr().out
    assert isinstance(found.model.get_submodule("1"), nn.ConvTranspose2d)
    exact = network.eval()(images)
    assert (found(images) - exact).abs().max() < 0.05 * exact.abs().max()


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else -self.fc(x)


def test_what_cannot_be_done_is_named(model, data):
    images = data.calibration.inputs()
    spoilt = images.clone()
    spoilt[3, 0, 0, 0] = torch.nan
    with pytest.raises(InvalidParameterError, match="unknown method 'gptq'"):
        quantize.quantize_model(model, images, method="gptq")
    with pytest.raises(InvalidParameterError, match="pass the images and labels"):
        quantize.quantize_model(model, images, method="qat")
    with pytest.raises(InvalidParameterError, match="hold no NaN"):
        quantize.quantize_model(model, spoilt)
    with pytest.raises(InvalidParameterError, match=r"does not take calibration images of shape \(3, 16, 16\)"):
        quantize.quantize_model(model, images.expand(-1, 3, -1, -1))
    with pytest.raises(UnsupportedModelError, match="cannot trace"):
        quantize.quantize_model(Branching(), torch.ones(2, 4))


@pytest.fixture
def size(study, profile):
    return size_cost(bench.load_layers(profile), profile.choices)


def test_choices_keep_their_budgets_and_name_every_method(size, profile, study):
    statistics = load_statistics(profile)
    names = ("bit sum", "one-layer KL")
    facts = {"variant": "x", "seconds": 1.0, "aggregation": "sum", "separable": True}
    tables = {name: facts | {"table": score_table(name, statistics)} for name in names}
    tables["CLADO"] = facts | {"table": score_table("CLADO", statistics), "separable": False}
    chosen = allocation.choose_configurations(profile, tables, size)
    configs = np.array([parse_bits(text) for text in chosen["bits"]])
    assert (size.total(configs, profile.choices) <= chosen["budget_bytes"]).all()
    assert set(chosen["proxy"]) == {*names, "CLADO", "random"}
    assert set(chosen.query("proxy == 'one-layer KL'")["average_bits"]) == set(profile.budgets)
    assert set(chosen.query("proxy == 'bit sum'")["average_bits"]) == {*profile.budgets, *allocation.FRONT}
    assert (chosen.groupby(["proxy", "average_bits"]).size()["random"] == allocation.RANDOM_DRAWS).all()
