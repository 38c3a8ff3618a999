"""How many layers were made and how many were there: what the cache of layers is worth."""

from dataclasses import dataclass

from prometheus_client import Counter

_layers = Counter("ekiben_image_layers_total", "Layers of images, by outcome: made, reused.", ["outcome"])
_bytes = Counter("ekiben_image_layer_bytes_total", "Bytes of layers of images, by outcome: made, reused.", ["outcome"])


@dataclass
class Tally:
    """Counts since the process began."""

    made: int = 0
    made_bytes: int = 0
    reused: int = 0
    reused_bytes: int = 0

    def count(self, size_bytes: int, *, made: bool) -> None:
        """One layer of an image, made or found."""
        outcome = "made" if made else "reused"
        _layers.labels(outcome).inc()
        _bytes.labels(outcome).inc(size_bytes)
        if made:
            self.made += 1
            self.made_bytes += size_bytes
        else:
            self.reused += 1
            self.reused_bytes += size_bytes


TALLY = Tally()
"""Of this process, as its metrics are."""
