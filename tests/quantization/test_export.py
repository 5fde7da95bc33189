"""Packed files: every bit comes back, the size is the size claimed, damage is noticed. ONNX: another runtime agrees."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from torch import nn

from book.studies.networks import build_network, fresh_model, layer_table
from emq_lib.core import models
from emq_lib.core.bank import build_weight_bank
from emq_lib.core.costs import size_cost
from emq_lib.core.errors import CorruptArtefactError, InvalidBitsError, InvalidParameterError, MissingArtefactError
from emq_lib.core.graphs import fold_batchnorm
from emq_lib.core.quantizers import QuantizedWeight, quantize
from emq_lib.quantization import onnx_export
from emq_lib.quantization.packed import (
    header_bytes,
    load_network,
    load_packed,
    pack_codes,
    payload_bytes,
    save_network,
    save_packed,
    unpack_codes,
)
from emq_lib.quantization.quantize import quantize_model


def small_network() -> tuple[dict[str, QuantizedWeight], dict[str, torch.Tensor | None]]:
    """Three layers at 8, 3 and 2 bits, the second without biases, no size a multiple of a byte."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"conv1": ((5, 3, 3, 3), 8), "layer1.0.conv1": ((7, 5, 3, 3), 3), "fc": ((3, 7), 2)}
    weights = {name: quantize(torch.randn(shape, generator=generator), bits) for name, (shape, bits) in shapes.items()}
    biases = {"conv1": torch.randn(5, generator=generator), "layer1.0.conv1": None, "fc": torch.randn(3)}
    return weights, biases


@pytest.fixture
def packed(tmp_path) -> pathlib.Path:
    weights, biases = small_network()
    path = tmp_path / "network.safetensors"
    save_packed(path, weights, biases, metadata={"profile": "digits-resnet8", "note": 'bits "3, 2" \N{EM DASH} é'})
    return path


@st.composite
def codes_and_bits(draw) -> tuple[np.ndarray, int]:
    bits = draw(st.integers(1, 8))
    return np.array(draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), dtype=np.uint8), bits


@settings(max_examples=200, deadline=None)
@given(codes_and_bits())
def test_packing_is_the_binary_number_of_the_codes(drawn):
    """Independent truth: the packed bytes are the little-endian integer sum_i codes[i] * 2^(i * bits)."""
    codes, bits = drawn
    packed = pack_codes(codes, bits)
    number = sum(int(code) << (index * bits) for index, code in enumerate(codes))
    assert packed.dtype == np.uint8
    assert packed.tobytes() == number.to_bytes(-(-len(codes) * bits // 8), "little")
    np.testing.assert_array_equal(unpack_codes(packed, bits, len(codes)), codes)


def test_packing_refuses_what_would_not_come_back():
    with pytest.raises(InvalidParameterError, match="Code 4 does not fit into 2 bits"):
        pack_codes(np.array([1, 4], dtype=np.uint8), bits=2)
    with pytest.raises(InvalidParameterError, match="flat uint8"):
        pack_codes(np.array([1.0, 2.0]), bits=2)
    with pytest.raises(InvalidParameterError, match="take 3 bytes; got 2"):
        unpack_codes(np.zeros(2, np.uint8), bits=3, count=8)
    for bits in (0, 9):
        with pytest.raises(InvalidBitsError, match="1 to 8"):
            pack_codes(np.zeros(3, np.uint8), bits)


def test_loaded_network_is_the_saved_one_bit_for_bit(packed):
    weights, biases = small_network()
    loaded_weights, loaded_biases, _, _, metadata = load_packed(packed)
    assert list(loaded_weights) == list(weights)
    assert metadata == {"profile": "digits-resnet8", "note": 'bits "3, 2" \N{EM DASH} é'}
    for name, weight in weights.items():
        loaded = loaded_weights[name]
        assert loaded.bits == weight.bits
        for part in ("codes", "scale", "zero_point"):
            before, after = getattr(weight, part), getattr(loaded, part)
            assert before.dtype == after.dtype
            assert torch.equal(before, after)
        assert torch.equal(loaded.dequantize(), weight.dequantize())
    assert loaded_biases["layer1.0.conv1"] is None
    assert torch.equal(loaded_biases["conv1"], biases["conv1"])


def test_file_is_the_claimed_size_and_a_header(packed):
    # conv1: 135 bytes + 5 scales, zero points and biases; layer1: ceil(315 * 3 / 8) = 119; fc: ceil(21 * 2 / 8) = 6.
    claimed = (135 + 5 * 9) + (119 + 7 * 5) + (6 + 3 * 9)
    assert payload_bytes(*small_network()) == claimed
    assert packed.stat().st_size == claimed + header_bytes(packed)
    assert set(load_file(packed)) == {"payload"}
    assert load_file(packed)["payload"].nbytes == claimed


@pytest.mark.parametrize("config", [(2,) * 6, (3,) * 6, (4, 2, 3, 3, 2, 4)])
def test_claimed_size_is_the_one_that_allocation_bounds(profile, config, tmp_path):
    model = fold_batchnorm(fresh_model(profile))
    layers = layer_table(model, profile)
    weights = build_weight_bank(model, layers, profile.choices).select(config)
    biases = {name: model.get_submodule(name).bias.detach() for name in weights}
    claimed = payload_bytes(weights, biases)
    assert claimed == size_cost(layers, profile.choices).total([config], profile.choices)[0]
    save_packed(tmp_path / "network.safetensors", weights, biases)
    assert (tmp_path / "network.safetensors").stat().st_size - header_bytes(tmp_path / "network.safetensors") == claimed


def test_layers_without_any_bias_cost_none():
    weight = quantize(nn.Linear(8, 4).weight, 4)
    frame = pd.DataFrame(
        [{"parameters": 32, "channels": 4, "biases": 0, "macs": 32, "searchable": True, "slot": 0, "pinned_bits": 0}]
    )
    assert payload_bytes({"fc": weight}, {}) == size_cost(frame, (4,)).total([[4]], (4,))[0] == 16 + 4 * 5


def test_same_network_gives_the_same_bytes(packed, tmp_path):
    weights, biases = small_network()
    biases["fc"] = load_packed(packed).biases["fc"]
    for order in (("profile", "note"), ("note", "profile")):
        metadata = load_packed(packed).metadata
        save_packed(tmp_path / "again.safetensors", weights, biases, metadata={key: metadata[key] for key in order})
        assert (tmp_path / "again.safetensors").read_bytes() == packed.read_bytes()


def test_memory_layout_of_the_codes_does_not_matter(packed, tmp_path):
    weights, biases, *_ = load_packed(packed)
    first = weights["conv1"]
    strided = first.codes.contiguous(memory_format=torch.channels_last)
    weights["conv1"] = QuantizedWeight(strided, first.scale, first.zero_point, first.bits)
    save_packed(tmp_path / "strided.safetensors", weights, biases)
    assert torch.equal(load_packed(tmp_path / "strided.safetensors").weights["conv1"].codes, first.codes)


def test_every_altered_byte_is_noticed_or_harmless(packed):
    """Flip each byte of the file in turn: it is refused, or (white space of the header) reads as before."""
    original, whole = packed.read_bytes(), load_packed(packed)
    start, refused = header_bytes(packed), 0
    for position in range(len(original)):
        altered = bytearray(original)
        altered[position] ^= 0x01
        packed.write_bytes(altered)
        try:
            again = load_packed(packed)
        except CorruptArtefactError:
            refused += 1
            continue
        assert position < start
        assert again.metadata == whole.metadata
        for name, weight in whole.weights.items():
            assert torch.equal(again.weights[name].dequantize(), weight.dequantize())
        assert torch.equal(again.biases["fc"], whole.biases["fc"])
    assert refused > 0.95 * len(original)


def test_truncated_files_are_refused(packed):
    original = packed.read_bytes()
    for length in (0, 1, 8, 40, header_bytes(packed), len(original) // 2, len(original) - 1):
        packed.write_bytes(original[:length])
        with pytest.raises(CorruptArtefactError, match=r"Restore the file, or pack the network again"):
            load_packed(packed)
    packed.write_bytes(original[:20])
    with pytest.raises(CorruptArtefactError, match="truncated"):
        header_bytes(packed)
    packed.write_bytes(original + b"\0")
    with pytest.raises(CorruptArtefactError):
        load_packed(packed)


def test_other_files_are_not_taken_for_packed_networks(tmp_path):
    with pytest.raises(MissingArtefactError, match="does not exist"):
        load_packed(tmp_path / "absent.safetensors")
    with pytest.raises(MissingArtefactError, match="does not exist"):
        header_bytes(tmp_path / "absent.safetensors")
    path = tmp_path / "checkpoint.safetensors"
    for tensors, metadata in (
        ({"conv1.weight": np.zeros(3, np.float32)}, None),
        ({"payload": np.zeros(3, np.uint8)}, {"emq-packed": "not JSON"}),
        ({"payload": np.zeros(3, np.float32)}, {"emq-packed": "{}"}),
        ({"payload": np.zeros(3, np.uint8)}, {"emq-packed": "[]"}),
    ):
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(CorruptArtefactError, match="not a packed network"):
            load_packed(path)
    save_file({"payload": np.zeros(3, np.uint8)}, path, metadata={"emq-packed": '{"format_version": 99}'})
    with pytest.raises(CorruptArtefactError, match="format version 99"):
        load_packed(path)


def test_bad_networks_are_refused_and_the_old_file_stays(packed):
    before = packed.read_bytes()
    weights, biases = small_network()
    fc = weights["fc"]
    none = torch.zeros_like(fc.zero_point)
    cases = [
        (weights, biases | {"head": torch.zeros(3)}, r"without a weight: \['head'\]"),
        (weights, biases | {"fc": torch.zeros(4)}, "bias of layer 'fc'"),
        (weights, biases | {"fc": torch.zeros(3, dtype=torch.float64)}, "bias of layer 'fc'"),
        (weights | {"fc": QuantizedWeight(fc.codes, fc.scale.double(), fc.zero_point, 2)}, biases, "scale of layer"),
        (weights | {"fc": QuantizedWeight(fc.codes, fc.scale, fc.zero_point, 1)}, biases, "beyond the codes of 1 bits"),
        (weights | {"fc": QuantizedWeight(fc.codes, fc.scale, none, 1)}, biases, "does not fit into 1 bits"),
    ]
    for bad_weights, bad_biases, message in cases:
        with pytest.raises(InvalidParameterError, match=message):
            save_packed(packed, bad_weights, bad_biases)
    assert packed.read_bytes() == before
    assert [path.name for path in packed.parent.iterdir()] == [packed.name]


@pytest.fixture
def network(study, profile, data):
    return build_network(profile, data)[0].select((4, 3, 2, 3, 4, 2))


def test_the_file_alone_gives_a_network_with_the_same_numbers(network, profile, data, tmp_path):
    path = tmp_path / "network.safetensors"
    save_network(path, network, metadata={"profile": profile.name})
    again = load_network(path, fresh_model(profile))  # of random weights
    assert torch.equal(models.predict(again, data.test), models.predict(network, data.test))
    assert load_packed(path).metadata == {"profile": profile.name}


class Mixed(nn.Module):
    """Quantized layers beside some that stay in floating point."""

    def __init__(self):
        super().__init__()
        self.first, self.normalize = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)
        self.up, self.head = nn.ConvTranspose2d(8, 4, 2), nn.Linear(4, 5, bias=False)
        self.register_buffer("offset", torch.randn(4))

    def forward(self, x):
        return self.head(self.up(self.normalize(self.first(x)).relu()).mean(dim=(2, 3)) + self.offset)


def test_layers_in_floating_point_and_narrow_inputs_come_back(tmp_path):
    images, path = torch.randn(6, 3, 8, 8), tmp_path / "network.safetensors"
    model = Mixed().eval()
    with pytest.warns(UserWarning, match="left in floating point: up"):
        network = quantize_model(model, images, default=2, activation_bits=4, verbose=False)
    save_network(path, network)
    again = load_network(path, Mixed())
    with torch.inference_mode():
        assert torch.equal(again(images), network(images))
    rest = {name: value for name, value in model.state_dict().items() if name.split(".")[0] not in ("first", "head")}
    assert sum(value.nbytes for value in rest.values()) == 4 * (8 + 8 + 8 * 4 * 4 + 4 + 4)
    packed = load_packed(path)
    assert set(packed.rest) == set(rest)
    assert path.stat().st_size == header_bytes(path) + payload_bytes(packed.weights, packed.biases, rest)


def test_a_file_of_another_network_is_refused(network, packed, profile, tmp_path):
    with pytest.raises(InvalidParameterError, match="no ranges of inputs"):
        load_network(packed, fresh_model(profile))
    path = tmp_path / "whole.safetensors"
    save_network(path, network)
    with pytest.raises(InvalidParameterError, match=r"(?s)another architecture .*up\.weight"):
        load_network(path, Mixed())
    with pytest.raises(InvalidParameterError, match="cannot be written"):
        save_packed(path, *small_network(), rest={"half": torch.zeros(2, dtype=torch.bfloat16)})


def _run(path, split):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": split.inputs().contiguous().numpy()})[0])


def test_another_runtime_predicts_the_same_from_the_onnx_file(network, data, tmp_path):
    path = tmp_path / "network.onnx"
    onnx_export.save_onnx(path, network, data.test[:1].inputs())
    mine, found = models.predict(network, data.test), _run(path, data.test)
    assert (found.argmax(dim=1) == mine.argmax(dim=1)).float().mean() >= 0.98
    assert abs(models.top1(found, data.test.labels) - models.top1(mine, data.test.labels)) < 1
    assert (found - mine).abs().mean() < 0.02 * mine.abs().mean()


def test_with_exact_sums_another_runtime_computes_the_same_numbers(network, data, tmp_path):
    path = tmp_path / "network.onnx"
    onnx_export.save_onnx(path, network, data.test[:1].inputs(), exact=True)
    mine, found = models.predict(network, data.test), _run(path, data.test)
    assert torch.equal(found.argmax(dim=1), mine.argmax(dim=1))
    assert (found == mine).all(dim=1).float().mean() > 0.95


def test_the_onnx_file_holds_the_codes_in_4_or_8_bits(network, data, tmp_path):
    path = tmp_path / "network.onnx"
    onnx_export.save_onnx(path, network, data.test[:1].inputs())
    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    for name, layer in network.layers.items():
        tensor = stored[f"{name}.codes"]
        four = layer.weight.bits <= 4
        assert tensor.data_type == (onnx.TensorProto.UINT4 if four else onnx.TensorProto.UINT8)
        assert len(tensor.raw_data) == (layer.weight.codes.numel() + four) // (2 if four else 1)
        assert np.array_equal(onnx.numpy_helper.to_array(tensor).astype(np.uint8), layer.weight.codes.numpy())


def test_what_onnx_cannot_hold_is_named_and_nothing_is_written(network, data, tmp_path):
    for layer in network.layers.values():
        layer.activation_range = dataclasses.replace(layer.activation_range, zero_point=0, bits=6)
    with pytest.raises(InvalidParameterError, match="'conv1' with inputs of 6 bits"):
        onnx_export.save_onnx(tmp_path / "network.onnx", network, data.test[:1].inputs())
    assert not list(tmp_path.iterdir())


def test_a_dequantized_network_has_the_selected_weights_and_leaves_the_network_alone(network, data):
    before = models.predict(network, data.test)
    plain = network.dequantized()
    for name, layer in network.layers.items():
        assert torch.equal(plain.get_submodule(name).weight, layer.weight.dequantize())
    assert torch.equal(models.predict(network, data.test), before)
