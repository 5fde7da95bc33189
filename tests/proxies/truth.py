"""The truth about statistics: plain autograd and plain passes on a copy of a network without in-place operations."""

from __future__ import annotations

import copy
import functools
import operator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


def without_in_place(model: nn.Module) -> nn.Module:
    """Return a copy in which nothing that torchvision's networks do works in place."""
    model = copy.deepcopy(model).requires_grad_()
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    if isinstance(model, torch.fx.GraphModule):
        for node in model.graph.nodes:
            if node.target is operator.iadd:
                node.target = operator.add
        model.recompile()
    return model


class Truth:
    """The numbers of a network on a few images.

    Args:
        model: the network.
        names: layers.
        split: images and labels.
        in_place: whether operations in place stay, because without them it would be another function.
    """

    def __init__(self, model, names, split, *, in_place=False):
        self.model = copy.deepcopy(model) if in_place else without_in_place(model)
        self.names, self.split = list(names), split
        self.weights = [self.model.get_submodule(name).weight for name in names]

    def observe(self, inputs):
        """Run once; return logits, and by name the inputs, the outputs, and zeros that were added to the outputs."""
        received, sent, zeros = {}, {}, {}

        def before(name, _module, inputs):
            received[name] = inputs[0].detach().clone()

        def after(name, _module, _inputs, output):
            sent[name], zeros[name] = output.detach().clone(), torch.zeros_like(output, requires_grad=True)
            return output + zeros[name]

        handles = []
        for name in self.names:
            module = self.model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(functools.partial(before, name)))
            handles.append(module.register_forward_hook(functools.partial(after, name)))
        logits = self.model(inputs)
        for handle in handles:
            handle.remove()
        return logits, received, sent, zeros

    def images(self):
        return [self.split[i : i + 1] for i in range(len(self.split))]

    def loss(self, split, model=None, weights=None):
        weights = weights or {}
        with sdpa_kernel(SDPBackend.MATH):
            return F.cross_entropy(functional_call(model or self.model, weights, (split.inputs(),)), split.labels)

    @functools.cached_property
    def outputs(self):
        """Name -> output on all images."""
        with torch.no_grad():
            return self.observe(self.split.inputs())[2]

    @functools.cached_property
    def inputs(self):
        with torch.no_grad():
            return self.observe(self.split.inputs())[1]

    @functools.cached_property
    def gradients(self):
        """Per layer the gradients of every single image, (N, C_out, K)."""
        single = [torch.autograd.grad(self.loss(image), self.weights) for image in self.images()]
        return [torch.stack([g.flatten(1) for g in layer]) for layer in zip(*single, strict=True)]

    @functools.cached_property
    def products(self):
        """Per layer sum_p a g of every single image, (C_out, N)."""
        found = {name: [] for name in self.names}
        for image in self.images():
            logits, _, sent, zeros = self.observe(image.inputs())
            at = torch.autograd.grad(F.cross_entropy(logits, image.labels), list(zeros.values()))
            for (name, output), gradient in zip(sent.items(), at, strict=True):
                product = (output * gradient)[0]
                if product.ndim == 3:
                    found[name].append(product.sum(dim=(1, 2)))
                else:
                    found[name].append(product.reshape(-1, product.shape[-1]).sum(dim=0))
        return [torch.stack(found[name], dim=1) for name in self.names]

    @functools.cached_property
    def rows(self):
        """Per layer sqrt(p_k) (J_k - sum_j p_j J_j) of every image and class k, (N, classes, parameters)."""
        rows = [[] for _ in self.names]
        for image in self.images():
            logits = self.model(image.inputs())[0]
            single = [torch.autograd.grad(logit, self.weights, retain_graph=True) for logit in logits]
            p = logits.detach().softmax(dim=0)
            for layer, gradients in zip(rows, zip(*single, strict=True), strict=True):
                jacobian = torch.stack([g.flatten() for g in gradients])
                layer.append(p.sqrt()[:, None] * (jacobian - p @ jacobian))
        return [torch.stack(layer) for layer in rows]

    @functools.cached_property
    def double(self):
        """The network in double precision, which takes float32 images."""
        return copy.deepcopy(self.model).double()

    def hessian_products(self, split, directions):
        """Return the products of the Hessian of the layers in `directions`, name -> vector, with it; in double."""
        weights = [self.double.get_submodule(name).weight for name in directions]
        with sdpa_kernel(SDPBackend.MATH):
            loss = F.cross_entropy(self.double(split.inputs().double()), split.labels)
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        return torch.autograd.grad(gradients, weights, grad_outputs=[v.double() for v in directions.values()])

    def logits(self, split, weights):
        """Return float64 logits with some weights replaced, name -> weight."""
        with torch.no_grad():
            replaced = {f"{name}.weight": weight for name, weight in weights.items()}
            return functional_call(self.model, replaced, (split.inputs(),)).double()

    def positive(self, shape):
        """Return the gradients of the all-positive network."""
        model = copy.deepcopy(self.model).double()
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.ReLU6):
                    setattr(module, name, nn.ReLU())
        state = {key: value.double().abs() for key, value in model.state_dict().items()}
        model.load_state_dict(state)
        weights = [model.get_submodule(name).weight for name in self.names]
        return torch.autograd.grad(model(torch.ones(1, *shape, dtype=torch.float64)).sum(), weights)


def cka(outputs):
    """Return centred linear CKA of outputs on N images, in double precision."""
    n = len(outputs[0])
    centre = np.eye(n) - 1 / n
    grams = [centre @ (x := y.flatten(1).double().numpy()) @ x.T @ centre for y in outputs]
    return np.array([[np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b)) for b in grams] for a in grams])
