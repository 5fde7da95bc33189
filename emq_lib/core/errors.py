"""Named errors: each says what is wrong and what to do about it."""

from __future__ import annotations


class EMQError(Exception):
    """Base of every error that this library raises on purpose."""


class UnknownProfileError(EMQError, KeyError):
    """A profile name that is not registered."""

    def __str__(self) -> str:
        """Return the message as written (``KeyError`` would print it in quotes)."""
        return self.args[0]


class InvalidParameterError(EMQError, ValueError):
    """A chapter parameter or function argument outside its documented range."""


class DatasetNotFoundError(EMQError, FileNotFoundError):
    """The images that a step needs are not on this machine."""


class DatasetMismatchError(EMQError, ValueError):
    """Images were found, but they are not the ones that the study was measured on."""


class UnsupportedModelError(EMQError, ValueError):
    """A network whose layers cannot be quantized as they stand."""


class MissingArtefactError(EMQError, FileNotFoundError):
    """A file of a study that is absent, or that no manifest vouches for: make it, or do without."""


class CorruptArtefactError(EMQError, ValueError):
    """A file that is truncated, altered, of something else, or not as its manifest says: restore or remove it."""


class StaleArtefactError(EMQError, ValueError):
    """A file of a study that was made from other files, settings or code than those there now: make it again.

    It is there, so it is no :class:`MissingArtefactError`: whoever can do without a file cannot do with a wrong one.
    """


class UnwritablePathError(EMQError, OSError):
    """A place where nothing can be written: a folder, one without permission, a name too long."""


class DiskFullError(EMQError, OSError):
    """No room for a file that is being written, on the disk or in a quota; what was there before is untouched."""


class StudyBusyError(EMQError, RuntimeError):
    """Two runs, threads or workers that want to write the same study at once."""


class WorkerLostError(EMQError, RuntimeError):
    """A process that shared the work of a study and was ended from outside."""


class InvalidBitsError(EMQError, ValueError):
    """A bit width outside the profile's choices."""


class ConfigLengthError(EMQError, ValueError):
    """A configuration whose length differs from the number of searchable layers."""


class ConfigNotFoundError(EMQError, LookupError):
    """A configuration that was not measured."""


class InvalidScoreError(EMQError, ValueError):
    """A proxy that returned NaN, infinity, a constant or the wrong shape."""


class InfeasibleBudgetError(EMQError, ValueError):
    """A budget below the smallest network that the choices can reach."""


class UnsolvedAllocationError(EMQError, RuntimeError):
    """A solver that stopped without any configuration."""


class TrainingDivergedError(EMQError, RuntimeError):
    """A training whose numbers ran away."""


class GenotypeSyntaxError(EMQError, ValueError):
    """A text that is not a genotype."""


class ClaimError(EMQError, AssertionError):
    """A stated number that the computation does not support."""
