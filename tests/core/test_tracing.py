"""Traced networks have no in-place operation, compute the same, and write to nobody's tensor."""

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

from emq_lib.core import graphs, tracing
from emq_lib.core.errors import UnsupportedModelError
from tests.networks import REGISTERED, networks, pictures, registered, spread_batchnorms


def _assert_out_of_place(graph_module):
    for node in graph_module.graph.nodes:
        assert not node.kwargs.get("inplace"), node.format_node()
        assert "out" not in node.kwargs, node.format_node()
        assert node.target not in tracing._AUGMENTED, node.format_node()
        if node.op in ("call_function", "call_method") and node.target not in (operator.and_, operator.or_):
            assert not getattr(node.target, "__name__", node.target).endswith("_"), node.format_node()
    assert not any(getattr(module, "inplace", False) for module in graph_module.modules())


def _assert_folds_to_the_same_function(model, x, *, rtol):
    """The truth is an untouched copy, on inputs of its own, because it may write to them."""
    untouched, images = copy.deepcopy(model), x.clone()
    with torch.inference_mode():
        truth = copy.deepcopy(model)(x.clone())
        folded = graphs.fold_batchnorm(model)
        found = folded(images)
    _assert_out_of_place(folded)
    assert torch.equal(images, x)
    scale = truth.abs().max()
    assert (found - truth).abs().max() <= rtol * scale
    before, after = untouched.state_dict(), model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    flags = [
        [(type(m), m.training, getattr(m, "inplace", None)) for m in each.modules()] for each in (untouched, model)
    ]
    assert flags[0] == flags[1]
    return folded


@pytest.mark.parametrize("name", REGISTERED)
def test_every_registered_model_folds_to_the_same_function(name):
    folded = _assert_folds_to_the_same_function(*registered(name), rtol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(model=networks())
def test_random_networks_fold_to_the_same_function(model):
    _assert_folds_to_the_same_function(model, pictures(2), rtol=1e-4)


def test_the_callers_mode_stays():
    model = registered("resnet8")[0].train()
    folded = graphs.fold_batchnorm(model)
    assert model.training
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in folded.modules())


class Net(nn.Module):
    """Two convolutions and a function in between."""

    def __init__(self, body):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.act, self.drop, self.same = nn.Hardswish(inplace=True), nn.Dropout(0.5, inplace=True), nn.Identity()
        self.scale, self.body = nn.Parameter(torch.ones(8, 1, 1)), body

    def forward(self, x):
        return self.body(self, x)


def _aliased_sum(net, x):
    y = net.conv1(x)
    other = y
    y += net.conv2(y)
    return y * other


def _aliased_activation(net, x):
    x = net.conv1(x)
    return x + net.conv2(net.act(x))


def _through_an_identity(net, x):
    y = net.conv1(x)
    other = net.same(y)
    y.mul_(2)
    return other + y


def _through_a_dropout(net, x):
    y = net.conv1(x)
    other = net.drop(y)
    F.relu_(other)
    return y - net.conv2(other)


def _unused_result(net, x):
    y = net.conv1(x)
    F.relu(y, inplace=True)
    torch.relu_(net.conv2(y))
    y.add_(1)
    return y


def _chain(net, x):
    return net.conv1(x).clamp_(-1, 1).mul_(2).sub_(0.5).abs_().sqrt_().unsqueeze_(1).squeeze_(1)


def _written_out(net, x):
    y = net.conv1(x)
    torch.add(y, 1, out=y)
    return y


def _filled(net, x):
    y, z = net.conv1(x), net.conv2(net.conv1(x))
    z.zero_()
    return y.fill_(0.5) + z


def _numbers(net, x):
    y = net.conv1(x)
    n = y.size(1)
    half = n
    n *= 2
    half //= 2
    y = y.unflatten(1, (half, 2))
    y /= n
    return y.flatten(1, 2)


def _both_halves(net, x):
    first, second = net.conv1(x).chunk(2, dim=1)
    return torch.cat([first.relu(), second.add_(1)], dim=1)


def _bits(net, x):
    y = net.conv1(x)
    mask = y > 0
    mask &= y < 1
    mask |= y > 2
    return y.masked_fill_(mask, 0.0)


def _view_last(net, x):
    y = net.conv1(x)
    y.relu_()
    return y.flatten(2)


def _type_of_a_weight(net, x):
    y = net.conv1(x.to(net.conv1.weight.dtype))
    return y.view(-1, net.conv2.weight.shape[0]) / net.scale.ndim


def _input(_net, x):
    return x.sub_(0.5).div_(0.25)


def _input_read_again(net, x):
    other = x
    x -= 0.5
    return net.conv1(x) + other.mean()


SAME = (_aliased_sum, _aliased_activation, _through_an_identity, _through_a_dropout, _unused_result, _chain, _bits)
SAME += (_written_out, _filled, _numbers, _both_halves, _view_last, _input, _input_read_again)
SAME += (_type_of_a_weight,)


@pytest.mark.parametrize("body", SAME, ids=lambda body: body.__name__)
def test_who_holds_an_overwritten_tensor_sees_the_new_one(body):
    _assert_folds_to_the_same_function(Net(body).eval(), pictures(2), rtol=0)


@pytest.mark.parametrize("target", tracing._AUGMENTED, ids=lambda target: target.__name__)
def test_every_augmented_assignment_has_its_plain_form(target):
    """The truth is Python's own: on numbers, `x += y` and `x + y` give the same."""
    sides = (torch.eye(3), torch.ones(3, 3)) if target is operator.imatmul else (13, 3)
    plain, augmented = tracing._AUGMENTED[target](*sides), target(copy.copy(sides[0]), sides[1])
    assert torch.equal(plain, augmented) if target is operator.imatmul else plain == augmented


def _view_before(net, x):
    y = net.conv1(x)
    other = y.flatten(1)
    y.relu_()
    return other


def _part_changed(net, x):
    y = net.conv1(x)
    y[:, :1] += 1
    return y


def _part_assigned(net, x):
    y = net.conv1(x)
    y[:, 0] = 0
    return y


def _part_written(net, x):
    y = net.conv1(x)
    y.narrow(1, 0, 1).zero_()
    return y


def _other_half_read(net, x):
    first, second = net.conv1(x).chunk(2, dim=1)
    return torch.cat([first.relu_(), second], dim=1)


def _maybe_a_view(net, x):
    y = net.conv1(x)
    flat = y.reshape(2, -1)
    flat.relu_()
    return y


def _detached(net, x):
    y = net.conv1(x)
    y.detach().relu_()
    return y


def _parameter(net, x):
    net.scale.data.mul_(0.5)
    return net.conv1(x) * net.scale


def _random(net, x):
    return net.conv1(x).normal_()


def _random_initialization(net, x):
    return nn.init.normal_(net.conv1(x))


def _copied(net, x):
    y = net.conv1(x)
    y.copy_(net.conv2(y))
    return y


def _two_written_out(net, x):
    y = net.conv1(x)
    torch.max(y, 1, out=(y, y))
    return y


def _branch_on_a_value(net, x):
    return net.conv1(x) if x.sum() > 0 else x


def _length(net, x):
    return net.conv1(x).view(len(x), -1)


REFUSED = (_view_before, _part_changed, _part_assigned, _part_written, _other_half_read, _maybe_a_view, _detached)
REFUSED += (_parameter, _random, _random_initialization, _copied, _two_written_out)


@pytest.mark.parametrize("body", REFUSED, ids=lambda body: body.__name__)
def test_what_cannot_be_made_out_of_place_is_refused_with_its_line(body):
    model = Net(body).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=rf"test_tracing\.py:{_line_range(body)}"):
        graphs.fold_batchnorm(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def _line_range(function):
    first = function.__code__.co_firstlineno
    return "(" + "|".join(str(line) for line in range(first + 1, first + 5)) + ")"


@pytest.mark.parametrize("body", [_branch_on_a_value, _length], ids=lambda body: body.__name__)
def test_what_cannot_be_traced_is_refused(body):
    with pytest.raises(UnsupportedModelError, match=r"torch\.fx cannot trace the network"):
        graphs.fold_batchnorm(Net(body).eval())


@pytest.mark.parametrize("count", [0, 2])
def test_a_network_takes_one_tensor(count):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        forward = (lambda self: self.fc(torch.ones(1, 3))) if count == 0 else (lambda self, x, y: self.fc(x) + y)

    with pytest.raises(UnsupportedModelError, match="cannot trace"):
        graphs.fold_batchnorm(Other().eval())


def test_further_arguments_take_their_defaults():
    class Tempered(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x, temperature=None, *, targets=None):
            y = self.fc(x)
            if targets is not None:
                return y, F.cross_entropy(y, targets)
            return y if temperature is not None else y.softmax(1)

    model, x = Tempered().eval(), torch.randn(2, 3)
    assert torch.equal(graphs.fold_batchnorm(model)(x), model(x))


def _weight(net, x):
    y = net.conv1(x)
    return net.conv2(y) / net.conv2.weight.norm()


def test_a_network_that_reads_a_layers_weight_folds_to_the_same_but_is_not_described():
    model = Net(_weight).eval()
    folded = _assert_folds_to_the_same_function(model, pictures(2), rtol=0)
    with pytest.raises(UnsupportedModelError, match=r"test_tracing\.py:.*itself reads conv2\.weight"):
        graphs.describe_layers(folded, pictures(1), pinned={}, tied={})


def test_a_norm_behind_a_weight_that_the_network_reads_is_not_folded_into_it():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.norm(self.conv(x)) / self.conv.weight.norm()

    _assert_folds_to_the_same_function(spread_batchnorms(Reading()).eval(), pictures(2), rtol=0)


def test_a_layer_with_two_norms_is_folded_into_neither():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm1, self.norm2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm2(self.conv(self.norm1(self.conv(x))))

    _assert_folds_to_the_same_function(spread_batchnorms(Twice()).eval(), pictures(2), rtol=0)
