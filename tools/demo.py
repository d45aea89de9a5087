"""Demo: annotate, embed and generate with the packaged model, then write a report.

    python tools/demo.py OUT_FOLDER [--input MY.h5ad]

Runs the commands that it prints, in one process. Without ``--input``, the cells are 700 blood cells that come with
scanpy and that the model was not trained on.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import anndata as ad

from scmulan.cli.__main__ import main as scmulan

N_GENERATED = 100


def run(*arguments: str) -> None:
    """Print a command and run it; exit if it fails."""
    print(f"\n$ scmulan {shlex.join(arguments)}", flush=True)
    code = scmulan(arguments)
    if code:
        sys.exit(code)


def prompt_options(annotated: Path) -> list[str]:
    """Return options that prompt for the most common type, of confident cells if there are any."""
    obs = ad.read_h5ad(annotated, backed="r").obs
    confident = obs[obs["scmulan_cell_type_status"] == "confident"]
    types = (confident if len(confident) else obs)["scmulan_cell_type"]
    return ["--set", f"cell_type={types.value_counts().idxmax()}"]


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--input", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    out = {name: str(args.folder / name) for name in ("annotated.h5ad", "predictions.csv", "generated.h5ad")}
    report = str(args.folder / "report.html")
    cells = args.input
    if cells is None:
        cells = args.folder / "pbmc68k_reduced.h5ad"
        subprocess.run([sys.executable, str(Path(__file__).with_name("demo_input.py")), str(cells)], check=True)
    annotated, table, generated = out.values()
    run("annotate", str(cells), "-o", annotated, "--embed", "--table", table, "--force")
    prompt = prompt_options(Path(annotated))
    run("generate", "-o", generated, *prompt, "-n", str(N_GENERATED), "--genes-from", annotated, "--force")
    run("report", annotated, "--generated", generated, "-o", report, "--force")
    print("\nThe demo's files:")
    for path in (*out.values(), report):
        print(f"  {path}")


if __name__ == "__main__":
    main()
