"""The images of a study."""

from __future__ import annotations

from emq_lib.core.datasets import ImageData, load_images
from emq_lib.core.profiles import Profile


def load_dataset(profile: Profile) -> ImageData:
    """Load a profile's images and cut them into its fixed splits: see :func:`emq_lib.core.datasets.load_images`."""
    return load_images(
        profile.dataset,
        validation_images=profile.validation_images,
        calibration_images=profile.calibration_images,
        rng=profile.rng("calibration images"),
    )
