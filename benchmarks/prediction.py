"""Is ``bitring predict`` right? Steps of ``DataParallel`` as predicted and as measured, on one node and between hosts.

    python benchmarks/prediction.py [--work FOLDER] [--results FOLDER]

For each place, a node of 2 ranks or emulated hosts (hosts.py; needs root): ``bitring bench compress`` measures the
machine and its network there, ``bitring bench train`` the steps, and ``bitring predict``'s model says from the former
and the layers' shapes alone what the latter should be. The machine is measured before the steps and after them, since
a shared one's speed drifts, and predicted is the mean of both. A set-up is a place, a model and an exchange. What was
measured stays in the work folder, and is not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bitring.commands._pictures import COLORS, figure, plain
from bitring.commands._predict import PAYS_FROM, advice
from bitring.models.architecture import layer_table
from bitring.training.prediction.cluster import Cluster, read_machine
from bitring.training.prediction.predict import Prediction, predict

HERE = Path(__file__).resolve().parent
WITHIN = 0.25
BITRING = Path(sys.executable).with_name("bitring")


class Place(NamedTuple):
    """``rate``: as hosts.py takes it; None for one node without emulation. ``models``, ``exchanges``: tried there."""

    name: str
    hosts: int
    ranks_per_host: int
    rate: str | None
    models: tuple[str, ...]
    exchanges: tuple[str, ...]

    @property
    def ranks(self) -> int:
        """Of all hosts."""
        return self.hosts * self.ranks_per_host


SMALL = ("exact", "mpi", "onebit", "sign", "linear", "bfloat16", "topk", "threshold", "powersgd")
PLACES = (
    Place("one node of 2 ranks", 1, 2, None, ("googlenet", "resnet50"), SMALL),
    Place("4 hosts, 100 Mbit/s", 4, 1, "100mbit", ("googlenet",), SMALL),
    Place("4 hosts, 1 Gbit/s", 4, 1, "1gbit", ("googlenet",), SMALL),
    Place("4 hosts, 1 Gbit/s", 4, 1, "1gbit", ("resnet50", "alexnet"), ("exact", "onebit", "powersgd")),
    Place("2 hosts of 2 ranks, 1 Gbit/s", 2, 2, "1gbit", ("googlenet",), SMALL),
    Place("2 hosts, 2.5 Gbit/s", 2, 1, "2.5gbit", ("googlenet", "resnet50"), ("exact", "onebit", "linear", "powersgd")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "prediction")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    advices: list[dict[str, Any]] = []
    machine: dict[str, Any] = {}
    for place in PLACES:
        for model in place.models:
            before = measure(asked.work, place, "compress", f"before-{model}", "--dtype", "float32")
            steps = measure(
                asked.work,
                place,
                *("train", model, "--model", model, "--samples", "9", "--exchanges", ",".join(place.exchanges)),
            )
            after = measure(asked.work, place, "compress", f"after-{model}", "--dtype", "float32")
            machine = json.loads(after.read_text(encoding="utf-8"))["machine"]
            seconds = {
                each["exchange"]: each["seconds"] for each in json.loads(steps.read_text(encoding="utf-8"))["results"]
            }
            tried = [each for each in predicted(place, model, (before, after)) if each.exchange in seconds]
            rows += [compared(place, model, each, seconds[each.exchange]) for each in tried]
            exact = min(seconds[name] for name in ("exact", "mpi") if name in seconds)
            lossy = min(s for name, s in seconds.items() if name not in ("exact", "mpi"))
            said = advice(tried, Cluster(place.ranks, place.hosts))
            advices.append(
                {
                    "place": place.name,
                    "model": model,
                    "advice": said,
                    "measured": exact / lossy,
                    "right": right(said, exact / lossy),
                }
            )
    ours = [row for row in rows if row["exchange"] != "mpi"]
    good = sum(abs(row["error"]) <= WITHIN for row in ours)
    for row in rows:
        print(
            f"{row['place']:<30}{row['model']:<11}{row['exchange']:<10}{row['predicted'] * 1e3:>9.1f} ms predicted"
            f"{row['measured'] * 1e3:>9.1f} ms measured  {row['error']:+.0%}"
        )
    for each in advices:
        print(f"{each['place']}, {each['model']}: {'right' if each['right'] else 'WRONG'}: {each['advice']}")
    print(f"{good} of {len(ours)} set-ups within {WITHIN:.0%} (the library's own Allreduce, by the textbook, apart)")
    kept = {
        "benchmark": "prediction",
        "machine": {key: machine[key] for key in ("processor", "cores_of_node", "system", "versions")},
        "within": WITHIN,
        "set_ups": len(ours),
        "set_ups_within": good,
        "rows": rows,
        "advice": advices,
    }
    target = asked.results / "prediction.json"
    target.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    draw(rows, target.with_suffix(".png"))
    print(f"kept in {target}")


def predicted(place: Place, model: str, files: Sequence[Path]) -> list[Prediction]:
    """The mean of what each of the machine's files leads to."""
    found: list[list[Prediction]] = []
    for path in files:
        machine = read_machine(path)
        bandwidth = (machine.bandwidth or 1.0) / machine.wire  # measured was what payloads get
        cluster = Cluster(place.ranks, place.hosts, bandwidth, machine.latency or 0.0)
        found.append(predict(layer_table(model), cluster, machine, compute=0.0))
    return [
        dataclasses.replace(same[0], seconds=statistics.mean(each.seconds for each in same))
        for same in zip(*found, strict=True)
    ]


def compared(place: Place, model: str, predicted: Prediction, measured: float) -> dict[str, Any]:
    return {
        "place": place.name,
        "model": model,
        "exchange": predicted.exchange,
        "predicted": predicted.seconds,
        "measured": measured,
        "error": predicted.seconds / measured - 1,
    }


def measure(work: Path, place: Place, what: str, name: str, *options: str) -> Path:
    """The file of a ``bitring bench`` there; made unless it exists. ``name`` tells it from others."""
    label = "-".join((what, place.name, name)).replace("/", "").replace(", ", "-").replace(" ", "-")
    path = work / f"{label}.json"
    if not path.exists():
        bench = [str(BITRING), "bench", what, *options, "--json", str(path)]
        if place.rate is None:
            start = [str(BITRING.with_name("mpirun")), "-n", str(place.ranks)]
        else:
            start = [sys.executable, str(HERE / "hosts.py"), "--hosts", str(place.hosts)]
            start += ["--ranks-per-host", str(place.ranks_per_host), "--rate", place.rate, "--"]
        print(f"{place.name}: bitring bench {what} {' '.join(options)}", flush=True)
        subprocess.run([*start, *bench], check=True)
    return path


def right(said: str, ratio: float) -> bool:
    """Whether the advice agrees with ``ratio``, the best compressed exchange's measured speed over the best exact."""
    return said.startswith("Compression does not pay") == (ratio < PAYS_FROM)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Predicted by measured seconds, a point a set-up."""
    picture = figure(6.4, 5.2)
    axes = picture.subplots()
    plain(axes)
    places = list(dict.fromkeys(row["place"] for row in rows))
    for color, place in zip(COLORS, places, strict=False):
        points = [(row["measured"], row["predicted"]) for row in rows if row["place"] == place]
        axes.plot(*zip(*points, strict=True), "o", color=color, markersize=5, label=place)
    ends = [min(row["measured"] for row in rows) / 1.5, max(row["measured"] for row in rows) * 1.5]
    axes.plot(ends, ends, color="0.4", linewidth=0.9)
    axes.fill_between(
        ends, [(1 - WITHIN) * x for x in ends], [(1 + WITHIN) * x for x in ends], color="0.92", linewidth=0
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("measured seconds per step")
    axes.set_ylabel("predicted seconds per step")
    axes.legend(frameon=False, fontsize=9)
    axes.set_title(f"Grey: within {WITHIN:.0%}", fontsize=9)
    picture.savefig(path)


if __name__ == "__main__":
    main()
