"""Measuring configurations on several machines."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np

from book.studies.study import checked_path
from emq_lib.bench.engine import Measurement, _blocks, _engine, measure
from emq_lib.core.datasets import Split
from emq_lib.core.graphs import fold_batchnorm
from emq_lib.core.models import build_model, load_checkpoint
from emq_lib.core.networks import QuantizedNetwork
from emq_lib.core.profiles import Profile


def measure_anywhere(
    profile: Profile, network: QuantizedNetwork, split: Split, configs: np.ndarray, scheduler: str | None
) -> Iterator[list[Measurement]]:
    """Yield measured blocks from this process, or from the workers of a scheduler as they finish.

    Args:
        profile: the study; its checkpoint goes to the workers.
        network: its quantized network.
        split: images and labels.
        configs: bits, shape (N, S).
        scheduler: address of a ``dask.distributed`` scheduler, or None.
    """
    if not len(configs):
        return
    if scheduler is None:
        yield from measure(network, split, configs)
        return
    from distributed import Client, as_completed

    state = load_checkpoint(profile, checked_path(profile, "model.safetensors")).state_dict()
    with Client(scheduler) as client:
        parts = (profile, state, network.bank, network.activation_ranges, split)
        shared = client.scatter(parts, broadcast=True, hash=False)
        blocks = _blocks(network, configs)
        futures = [client.submit(_measure_remotely, shared, block, pure=False, retries=3) for block in blocks]
        for _, block in as_completed(futures, with_results=True):
            yield block


_ON_WORKER: dict[str, object] = {}  # the parts that this worker received last, and the network built from them
_ONE_AT_A_TIME = threading.Lock()  # a network has one selected configuration


def _measure_remotely(parts: tuple, block: Sequence[tuple[int, ...]]) -> list[Measurement]:
    """Measure one block on a worker, which builds the network from its parts once."""
    profile, state, bank, activation_ranges, split = parts
    with _ONE_AT_A_TIME:
        if _ON_WORKER.get("parts") is not parts:
            model = build_model(profile)
            model.load_state_dict(state)
            folded = fold_batchnorm(model).to(split.images.device)
            _ON_WORKER.update(parts=parts, engine=_engine(QuantizedNetwork(folded, bank, activation_ranges), split))
        return _ON_WORKER["engine"].measure(split, block)
