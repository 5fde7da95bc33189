"""Learned roundings that are kept on disk layer by layer, so that a bank that was interrupted goes on.

The file is a journal: one line for each layer at each width, with its codes, packed. It lasts until the table that
needs the bank is written.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import pathlib
from collections.abc import Iterator, Mapping, MutableMapping

import numpy as np
import torch
from torch import nn

from emq_lib.core.datasets import Split
from emq_lib.core.errors import CorruptArtefactError, InvalidBitsError, InvalidParameterError
from emq_lib.core.files import to_json
from emq_lib.core.journal import Journal
from emq_lib.core.sources import code_hash
from emq_lib.core.training import state_digest, tensors_digest
from emq_lib.quantization.packing import pack_codes, unpack_codes

PREFIX, SUFFIX = "adaround-", ".partial.jsonl"


class KeptRoundings(MutableMapping[tuple[str, int], torch.Tensor]):
    """Finished roundings, (layer name, bits) -> codes; what is entered stays on disk.

    Args:
        folder: where the file stands; its name holds a hash of all that the codes depend on.
        model: the folded network.
        calibration: the calibration images.

    Raises:
        CorruptArtefactError: the file holds a line that no run wrote.
    """

    def __init__(self, folder: pathlib.Path, model: nn.Module, calibration: Split) -> None:
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        identity = _identity(model, calibration)
        self._journal = Journal(folder / f"{PREFIX}{identity}{SUFFIX}", {"roundings of": identity})
        self._codes = dict(self._read(line, row) for row, line in enumerate(self._journal.lines, start=2))

    def _read(self, line: Mapping[str, object], row: int) -> tuple[tuple[str, int], torch.Tensor]:
        try:
            name, bits, packed = line["layer"], line["bits"], base64.b64decode(line["codes"], validate=True)
            shape = self._shapes[f"{name}.weight"]
            codes = unpack_codes(np.frombuffer(packed, np.uint8), bits, math.prod(shape))
        except (KeyError, TypeError, binascii.Error, InvalidBitsError, InvalidParameterError) as error:
            raise CorruptArtefactError(
                f"{self._journal.path}, line {row}, was written by no run ({error}). Delete the file to start afresh."
            ) from error
        return (name, bits), torch.from_numpy(codes).view(shape)

    def __getitem__(self, entry: tuple[str, int]) -> torch.Tensor:
        """Return the codes of a layer at a width, uint8, in the shape of the weight."""
        return self._codes[entry]

    def __setitem__(self, entry: tuple[str, int], codes: torch.Tensor) -> None:
        """Keep the codes of a layer at a width.

        Raises:
            DiskFullError, UnwritablePathError: they cannot be written; what was finished is kept.
        """
        name, bits = entry
        packed = pack_codes(codes.cpu().contiguous().flatten().numpy(), bits)
        self._journal.append({"layer": name, "bits": bits, "codes": base64.b64encode(packed).decode()})
        self._codes[entry] = codes

    def __delitem__(self, entry: tuple[str, int]) -> None:
        """Refuse: what was finished stays."""
        raise TypeError("finished roundings are not taken back")

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Return the layers and widths that are finished."""
        return iter(self._codes)

    def __len__(self) -> int:
        """Return how many are finished."""
        return len(self._codes)


def remove_roundings(folder: pathlib.Path) -> None:
    """Remove the files of finished roundings of a study: its table is written."""
    for path in folder.glob(f"{PREFIX}*{SUFFIX}"):
        path.unlink(missing_ok=True)


def _identity(model: nn.Module, calibration: Split) -> str:
    """Return a hash of everything that a rounding depends on beside its layer and width."""
    seen = tensors_digest(calibration.images, calibration.mean, calibration.std)
    facts = [state_digest(model), repr(model), seen, code_hash("emq_lib.quantization.adaround:build_adaround_bank")]
    return hashlib.blake2b(to_json(facts).encode(), digest_size=12).hexdigest()
