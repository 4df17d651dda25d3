"""What ``structure`` picks for the layers of known networks, by bandwidth: the quickest exchange for each weight.

    python benchmarks/structure.py --json FILE      needs no MPI launcher

8 hosts of one rank, 32 samples per rank, 20 µs per message. One row per network, one column per bandwidth: how many
weights travel densely, as factors, or at one bit where that is allowed; and seconds of all exchanges, one after the
other, against dense ones alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import bitring
from bitring.models.architecture import architectures
from bitring.training.prediction.cluster import Cluster

NETWORKS = ("vgg16", "alexnet")
GBITS = (1, 10, 40, 100)
RANKS, BATCH, LATENCY = 8, 32, 20e-6


def main() -> None:
    """Print, and keep the results."""
    parser = argparse.ArgumentParser(description="What structure picks, by network and bandwidth.")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    results = []
    for network in NETWORKS:
        layers = architectures.get(network)().layers()
        shapes = {name: shape for layer in layers for name, shape in layer.parameters if len(shape) > 1}
        for encoder in ("none", "onebit"):
            for gbit in GBITS:
                cluster = Cluster(RANKS, RANKS, gbit * 1.25e8, LATENCY)
                picked = bitring.Structure(batch=BATCH, encoder=encoder).pick(shapes, cluster)
                ways = {name: min(each.seconds, key=each.seconds.__getitem__) for name, each in picked.items()}
                counts = {way: sum(each == way for each in ways.values()) for way in sorted(set(ways.values()))}
                seconds = sum(min(each.seconds.values()) for each in picked.values())
                dense = sum(each.seconds["exact"] for each in picked.values())
                results.append(
                    {
                        "network": network,
                        "encoder": encoder,
                        "gbit": gbit,
                        "ways": ways,
                        "seconds": seconds,
                        "dense": dense,
                    }
                )
                print(f"{network} {gbit} Gbit/s, encoder {encoder}: {counts}, {seconds:.3f} s, dense {dense:.3f} s")
    if asked.json is not None:
        asked.json.write_text(
            json.dumps({"benchmark": "structure", "results": results}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
