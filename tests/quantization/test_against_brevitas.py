"""Rounding, learned rounding and learned steps against brevitas, where both do the same."""

import pytest
import torch
from brevitas.core.function_wrapper import Identity, RoundSte, TensorClamp
from brevitas.core.function_wrapper.learned_round import LearnedRoundHardSigmoid
from brevitas.core.quant import IntQuant
from torch import nn

from emq_lib.core import quantizers
from emq_lib.core.quantizers import ActivationRange
from emq_lib.quantization.adaround import Rounding
from emq_lib.quantization.brecq import learned_step
from emq_lib.quantization.qat import LearnedLayer


def _peer(bits, scale, zero_point, x):
    rounding = IntQuant(False, False, Identity(), RoundSte(), TensorClamp())
    return rounding(scale, zero_point, torch.tensor(float(bits)), x)


def _weight(seed=0):
    return torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_to_nearest(bits):
    found = quantizers.quantize(_weight(), bits)
    channel = (-1, 1, 1, 1)
    truth = _peer(bits, found.scale.view(channel), found.zero_point.float().view(channel), _weight())
    torch.testing.assert_close(found.dequantize(), truth, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("bits", "zero_point"), [(8, 0), (8, 7), (4, 3)])
def test_rounding_of_activations_and_the_gradient_of_their_step(bits, zero_point):
    seen, x = ActivationRange(0.07, zero_point, bits), 3 * _weight(1)
    upstream, gradients = _weight(2), []
    for ours in (True, False):
        step, values = torch.tensor([seen.scale], requires_grad=True), x.clone().requires_grad_()
        if ours:
            (rounded,) = learned_step(seen, step)(None, (values,))
            gain = (x.numel() * (2**bits - 1)) ** -0.5
        else:
            rounded, gain = _peer(bits, step, torch.tensor(float(zero_point)), values), 1.0
        torch.testing.assert_close(rounded, seen.fake_quantize(x), rtol=0, atol=1e-6)
        (rounded * upstream).sum().backward()
        gradients.append((step.grad / gain, values.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def test_the_direction_of_a_learned_rounding():
    rounding, peer = Rounding(_weight(3), 3), LearnedRoundHardSigmoid()
    torch.testing.assert_close(rounding.up(), peer(rounding.variable))
    hard = peer.eval()(rounding.variable).float()
    integers = rounding.rounded(hard) / rounding.nearest.scale.view(-1, 1, 1, 1)
    torch.testing.assert_close(rounding.hardened().integers().float(), integers)


def test_gradients_of_a_trained_layers_weight_and_steps():
    layer = nn.Conv2d(4, 6, 3)
    layer.weight.data = _weight(4)
    learned = LearnedLayer(layer, quantizers.quantize(layer.weight, 2), ActivationRange(0.1, 0, 8))
    (learned.rounded() * _weight(5)).sum().backward()
    scale, weight = learned.start.scale.clone().requires_grad_(), layer.weight.detach().clone().requires_grad_()
    zero_point = learned.start.zero_point.float().view(-1, 1, 1, 1)
    (_peer(2, scale.view(-1, 1, 1, 1), zero_point, weight) * _weight(5)).sum().backward()
    torch.testing.assert_close(learned.layer.weight.grad, weight.grad)
    of_logarithm = scale.grad * scale.detach()
    torch.testing.assert_close(learned.log_weight_steps.grad, of_logarithm, rtol=1e-4, atol=1e-5)
