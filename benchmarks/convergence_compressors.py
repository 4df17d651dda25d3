"""What each compressor costs in accuracy: the CNN on Fashion-MNIST, 4 ranks, several seeds.

    python benchmarks/convergence_compressors.py [--seeds 3] [--epochs 2] [--work FOLDER] [--results FOLDER]
                                                 [--only MODE:COMPRESSION ...]

Every registered compressor in the mode ``sync``, every other mode in which all ranks make equally many steps exact and
with 1-bit, all from the same starts and with the same batches as the exact ``sync``. A run that was interrupted goes on
from its last checkpoint in the work folder; one that is complete is not repeated; the results are written anew after
each. A full sweep takes about an hour on two cores. ``--only`` runs these and the exact ``sync`` that they are compared
with; the rows of all others stay as they are in the results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

from convergence_fashion_mnist import HERE, machine, train

import bitring
from bitring.training.mode import FreeMode, modes

EXACT = ("sync", "none")
COMMON_STEPS = [mode for mode in bitring.modes() if mode != "sync" and not issubclass(modes.get(mode), FreeMode)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "convergence-compressors")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--only", nargs="+", metavar="MODE:COMPRESSION", help="as in sync:onebit")
    asked = parser.parse_args()
    cases = [EXACT, *(("sync", name) for name in bitring.compressors())]
    cases += [(mode, name) for mode in COMMON_STEPS for name in ("none", "onebit")]
    target = asked.results / "convergence-compressors.json"
    order = {case: number for number, case in enumerate(cases)}
    others: list[dict[str, Any]] = []
    if asked.only:
        wanted = {EXACT, *(tuple(case.split(":", 1)) for case in asked.only)}
        if unknown := wanted - set(cases):
            parser.error(f"unknown: {sorted(unknown)}; known: {' '.join(map(':'.join, cases))}")
        cases = [case for case in cases if case in wanted]
        if target.exists():
            kept = json.loads(target.read_text(encoding="utf-8"))["rows"]
            others = [each for each in kept if (each["mode"], each["compression"]) not in wanted]
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {case: [] for case in cases}
    for seed in range(asked.seeds):
        for mode, name in cases:
            folder = asked.work / f"{mode}-{name}-{seed}"
            try:
                run = train(name, asked.ranks, asked.epochs, folder, "--mode", mode, "--seed", str(seed))
            except subprocess.CalledProcessError as error:  # it diverged, say
                run = {"summary": None, "history": [], "error": f"status {error.returncode}"}
            runs[mode, name].append(run)
            rows = [*others, *(row(case, made, runs[EXACT]) for case, made in runs.items() if made)]
            rows.sort(key=lambda each: order[each["mode"], each["compression"]])
            kept = {"benchmark": "convergence-compressors", "machine": machine(), "epochs": asked.epochs, "rows": rows}
            target.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    for each in rows:
        print(line(each))
    draw(rows, target.with_suffix(".png"))
    print(f"kept in {target}")


def row(case: tuple[str, str], made: list[dict[str, Any]], exact: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies, and their gap to the exact exchange's, in points, over the seeds that both have finished."""
    pairs = [(a["summary"], b["summary"]) for a, b in zip(made, exact, strict=False) if a["summary"] and b["summary"]]
    gaps = [100 * (mine["test_accuracy"] - theirs["test_accuracy"]) for mine, theirs in pairs]
    return {
        "mode": case[0],
        "compression": case[1],
        "test_accuracy": [mine["test_accuracy"] for mine, _ in pairs],
        "gap_in_points": gaps,
        "mean_gap": statistics.mean(gaps) if gaps else None,
        "bytes_ratio": statistics.mean(b["bytes_sent"] / a["bytes_sent"] for a, b in pairs) if pairs else None,
        "seconds": [mine["seconds"] for mine, _ in pairs],
        "failed": [run["error"] for run in made if "error" in run],
        "history": [[epoch["test_accuracy"] for epoch in run["history"]] for run in made],
    }


def line(row: dict[str, Any]) -> str:
    name = f"{row['mode']:<16}{row['compression']:<20}"
    if row["mean_gap"] is None:
        return f"{name}failed: {', '.join(row['failed'])}"
    accuracy = statistics.mean(row["test_accuracy"])
    failed = f"  {len(row['failed'])} failed" if row["failed"] else ""
    return f"{name}{accuracy:7.2%}  {row['mean_gap']:+.2f} points  bytes 1/{row['bytes_ratio']:.1f}{failed}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Gaps, a point a seed."""
    from bitring.commands._pictures import COLORS, figure, plain

    shown = [each for each in rows if each["mean_gap"] is not None]
    picture = figure(9, 0.32 * len(shown) + 1.2)
    axes = picture.subplots()
    plain(axes)
    for place, each in enumerate(shown):
        axes.plot(each["gap_in_points"], [place] * len(each["gap_in_points"]), "o", color=COLORS[0], markersize=4)
        axes.plot([each["mean_gap"]], [place], "|", color="0.1", markersize=14)
    axes.set_yticks(range(len(shown)), [f"{each['mode']}, {each['compression']}" for each in shown], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="0.7", linewidth=0.8)
    axes.set_xlabel("test accuracy less that of the exact exchange, points; | is the mean")
    picture.savefig(path)


if __name__ == "__main__":
    main()
