"""Compare the benchmarks of this checkout with those of another one, in turns.

    python tools/compare_speed.py OTHER_CHECKOUT NAME … [-n PAIRS] [-- OPTION …]

Runs ``scmulan bench NAME --quick`` here and there alternately (the order changes from pair to pair), with this Python.
For each figure of `FIGURES` it prints the ratio of the times, here over there (below 1 is faster): the geometric mean
over the pairs with its 95 % interval (Student's t of the logarithms), and the ratio of the fastest runs, which the
noise of a shared machine disturbs least. Do nothing else on the machine meanwhile.

The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
# Figures of each benchmark, as paths into its JSON; "/": cells or tokens per second, so more is faster.
FIGURES = {
    "tokenize": ["/cells_per_second", "/cells_per_second_log1p"],
    "corpus": ["/cells_per_second"],
    "loader": ["/cells_per_second_cold", "/cells_per_second_warm"],
    "train": ["mini.seconds_per_step", "large.seconds_per_step"],
    "annotate": ["/mini.cells_per_second", "by_words.300.seconds_per_cell.fp32"],
    "embed": ["/mini.cells_per_second", "by_words.300.seconds_per_cell.fp32"],
    "generate": [
        "/mini.words_per_second_by_draft.1",
        "/mini.words_per_second_by_draft.8",
        "/large.words_per_second.fp32.4",
    ],
    "attention": ["new_words.mini.1.milliseconds", "new_words.368M.4.milliseconds", "sentences.368M.185.milliseconds"],
}


def run(checkout: Path, name: str, options: list[str]) -> dict[str, Any]:
    """Run a benchmark of a checkout and return its JSON."""
    environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
    command = [sys.executable, "-m", "scmulan", "bench", name, "--quick", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=checkout, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)} in {checkout} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def seconds(found: dict[str, Any], figure: str) -> float:
    """Return the time of a figure, up to a factor."""
    value: Any = found
    for key in figure.removeprefix("/").split("."):
        value = value[key]
    return 1 / value if figure.startswith("/") else value


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="checkout to compare with")
    parser.add_argument("names", nargs="+", choices=FIGURES, metavar="NAME", help=", ".join(FIGURES))
    parser.add_argument("-n", "--pairs", type=int, default=8)
    arguments, options = parser.parse_known_args()
    ratios: dict[str, dict[str, list[float]]] = {}
    for name in arguments.names:
        logs: dict[str, list[float]] = {figure: [] for figure in FIGURES[name]}
        fastest: dict[str, tuple[float, float]] = dict.fromkeys(FIGURES[name], (np.inf, np.inf))
        for checkout in (ROOT, arguments.other.resolve()):
            run(checkout, name, options)  # compiles, and fills caches
        for pair in range(arguments.pairs):
            order = [ROOT, arguments.other.resolve()][:: 1 if pair % 2 else -1]
            found = {checkout: run(checkout, name, options) for checkout in order}
            for figure, values in logs.items():
                here, there = (seconds(found[checkout], figure) for checkout in (ROOT, arguments.other.resolve()))
                values.append(float(np.log(here / there)))
                fastest[figure] = min(fastest[figure][0], here), min(fastest[figure][1], there)
        ratios[name] = {}
        for figure, values in logs.items():
            mean = np.mean(values)
            half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1) if len(values) > 1 else np.inf
            ratio, low, high = (round(float(np.exp(x)), 3) for x in (mean, mean - half, mean + half))
            best = round(fastest[figure][0] / fastest[figure][1], 3)
            ratios[name][figure.removeprefix("/")] = {"mean": ratio, "interval": [low, high], "fastest": best}
            text = f"{ratio:.3f}  ({low:.3f} to {high:.3f})  fastest runs {best:.3f}"
            print(f"{name:10} {figure.removeprefix('/'):40} {text}", flush=True)
    print(json.dumps({"pairs": arguments.pairs, "ratios": ratios}))


if __name__ == "__main__":
    main()
