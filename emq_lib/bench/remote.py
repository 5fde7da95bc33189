"""Measuring configurations on several machines."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from emq_lib.bench.engine import Measurement, _blocks, _engine, check_images, measure
from emq_lib.core.datasets import Split
from emq_lib.core.networks import QuantizedNetwork


def measure_anywhere(
    network: QuantizedNetwork,
    split: Split,
    configs: np.ndarray,
    *,
    model: torch.fx.GraphModule | None = None,
    scheduler: str | None = None,
) -> Iterator[list[Measurement]]:
    """Yield measured blocks from this process, or from the workers of a scheduler as they finish.

    Args:
        network: the quantized network.
        split: images and labels.
        configs: bits, shape (N, S).
        model: the float network that it was made from, which goes to the workers.
        scheduler: address of a ``dask.distributed`` scheduler; None: this process measures.

    Raises:
        InvalidParameterError, ConfigLengthError, InvalidBitsError, UnsupportedModelError: see
            :func:`emq_lib.bench.engine.measure`.
    """
    if not len(configs):
        return
    if scheduler is None:
        yield from measure(network, split, configs)
        return
    from distributed import Client, as_completed

    check_images(network, split)
    blocks = _blocks(network, configs)
    with Client(scheduler) as client:
        parts = pickle.dumps((model, network.bank, network.activation_ranges, split))  # workers pass it on as it is
        shared = client.scatter(parts, broadcast=True, hash=False)
        futures = [client.submit(_measure_remotely, shared, block, pure=False, retries=3) for block in blocks]
        for _, block in as_completed(futures, with_results=True):
            yield block


_ON_WORKER: dict[str, object] = {}  # the parts that this worker received last, and the network built from them
_ONE_AT_A_TIME = threading.Lock()  # a network has one selected configuration


def _measure_remotely(parts: bytes, block: Sequence[tuple[int, ...]]) -> list[Measurement]:
    """Measure one block on a worker, which builds the network from its parts once."""
    with _ONE_AT_A_TIME:
        if _ON_WORKER.get("parts") is not parts:
            model, bank, activation_ranges, split = pickle.loads(parts)
            network = QuantizedNetwork(model, bank, activation_ranges)
            _ON_WORKER.update(parts=parts, split=split, engine=_engine(network, split))
        return _ON_WORKER["engine"].measure(_ON_WORKER["split"], block)
