"""The image share of a run's training set, which the ablations say before they begin."""

from __future__ import annotations

from fastbyol.config import Resolved
from fastbyol.data import embedded, loader
from fastbyol.engine.device import pick_device
from fastbyol.evaluation.marker import measure

IMAGES, SEEDS = 2048, (0, 1)


def image_share(config: Resolved) -> float:
    """Return the image share of embeddings by the untrained network of ``config``.

    It is the mean over ``SEEDS`` of ``evaluation.marker.measure`` on ``IMAGES`` training images, or
    all of them. Quarters of the textures came to .005 to .018, of Fashion-MNIST to .065 to .095. On
    the second LARS recovers, on the first nothing does.
    """
    device, data = pick_device(config.train.device), config.data
    size = data.size or config.views.size
    file, field = embedded.training_file(data), data.image_field
    read = loader.read_all(
        file, workers=data.workers, size=size, limit=IMAGES, decoder=data.decoder, image_field=field
    )
    return measure(read.images, config, SEEDS, device=device).y.mean
