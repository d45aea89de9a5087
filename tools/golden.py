"""Record golden results through the command line and the public API, or compare with those recorded before.

    python tools/golden.py record  GOLDEN/ [--cells FILE.h5ad …] [--only PART …]
    python tools/golden.py compare GOLDEN/ [--cells FILE.h5ad …] [--only PART …]

A change that is meant to leave results as they are (a move, new names, another structure) leaves them so to the last
bit: record before it, compare after it, on the same machine. All work runs in float32 on one thread of the CPU, each
command in a process of its own. The parts are those of `PARTS`. ``--cells`` are three labelled h5ad files with an
``obs`` column ``label``; without it, three validation studies of ``shared/data`` beside the checkout.

The last line is one JSON object: how many results were compared, and which differ.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_CELLS = ("10x_pbmc_3tech", "baron2016_pancreas_human1", "komen_gtex_breast")
CELLS_PER_FILE = 100
# Sections and keys that are the same for both recipes; a loss of every step is compared.
RECIPE = """
name = "golden"
seed = 3
[model]
layers = 2
heads = 4
width = 64
set_state = true
value_spread = true
word_bias = true
bounded_genes = true
dropout = 0.1
[optimizer]
steps = 50
warmup_steps = 10
[run]
log_every = 1
validate_every = 25
precision = "fp32"
"""
WEIGHTED = """
[batches]
tasks = { annotate = 0.6, generate = 0.3, locate = 0.1 }
cells = 24
generate_cells = 8
pool = 4
positions = 16
label_power = 0.25
[objective]
name = "next_word"
value_weight = 1.0
"""
EPOCHS = """
[batches]
cells = 24
generate_cells = 8
order = "epoch"
positions = 16
[objective]
name = "published"
"""
COLUMNS = """
columns = { organ = "organ", region = "region", age = "age", sex = "sex", status = "status", technology = "tech", \
coarse_type = "coarse", fine_type = "label", donor = "donor" }
"""


def run(*command: str, cwd: Path) -> str:
    """Run a command on one thread and return its standard output."""
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    environment = os.environ | dict.fromkeys(threads, "1") | {"XDG_CACHE_HOME": str(cwd / "cache")}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=cwd, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def scmulan(cwd: Path, *arguments: object) -> str:
    """Run a verb of the command line."""
    return run("-m", "scmulan", *map(str, arguments), cwd=cwd)


def digest(array) -> str:
    """Hash an array's type, shape and bytes; of text, its JSON."""
    import numpy as np

    array = np.asarray(array)
    if array.dtype.kind in "OUT":
        content, kind = json.dumps([str(x) for x in array.ravel()]).encode(), "text"
    else:
        content, kind = np.ascontiguousarray(array).tobytes(), array.dtype.str
    return f"{kind}{list(array.shape)} {hashlib.sha256(content).hexdigest()[:20]}"


def results_of_h5ad(path: Path) -> dict[str, str]:
    """Return a digest of each column, array and matrix of a file of cells."""
    import anndata as ad
    import scipy.sparse as sp

    adata = ad.read_h5ad(path)
    found = {f"obs/{name}": digest(adata.obs[name].to_numpy()) for name in adata.obs}
    found |= {f"obsm/{name}": digest(array) for name, array in adata.obsm.items()}
    found["obs_names"], found["var_names"] = digest(adata.obs_names), digest(adata.var_names)
    for name, matrix in {"X": adata.X, **{f"layers/{k}": v for k, v in adata.layers.items()}}.items():
        if sp.issparse(matrix):
            matrix = matrix.tocsr()
            for part in ("data", "indices", "indptr"):
                found[f"{name}/{part}"] = digest(getattr(matrix, part))
        else:
            found[name] = digest(matrix)
    return found


def results_of_weights(path: Path) -> dict[str, str]:
    """Return a digest of each tensor of a safetensors file."""
    from safetensors.numpy import load_file

    return {name: digest(tensor) for name, tensor in load_file(path).items()}


def results_of_json(text: str, *, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the leaves of a JSON object but for some keys: seconds, paths, and hashes of files that hold these."""
    found = {}

    def walk(value, path):
        if isinstance(value, dict):
            for key, entry in value.items():
                if key not in without:
                    walk(entry, f"{path}/{key}")
        elif isinstance(value, list):
            for i, entry in enumerate(value):
                walk(entry, f"{path}/{i}")
        else:
            found[path] = json.dumps(value)

    walk(json.loads(text), "")
    return found


def annotate(cells: list[Path], work: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Annotate by every rule; perturb; smooth."""
    for rule in ("default", "stepwise", "release"):
        # Once before it counts: a process that compiles the loops may round otherwise than those that load them.
        scmulan(
            work,
            "annotate",
            cells[-1],
            "-o",
            work / f"first-{rule}.h5ad",
            "--rule",
            rule,
            "--precision",
            "fp32",
        )
    for path in cells:
        for rule in ("default", "stepwise", "release"):
            out = work / f"annotated-{rule}.h5ad"
            extra = ["--smooth"] if rule == "default" else []
            scmulan(
                work,
                "annotate",
                path,
                "-o",
                out,
                "--rule",
                rule,
                "--embed",
                *extra,
                "--precision",
                "fp32",
                "--force",
            )
            yield f"{path.stem}/{rule}", results_of_h5ad(out)
        out = work / "perturbed.h5ad"
        scmulan(
            work,
            "perturb",
            path,
            "-o",
            out,
            "--gene",
            "MS4A1=0",
            "--gene",
            "CD3D=9",
            "--precision",
            "fp32",
            "--force",
        )
        yield f"{path.stem}/perturbed", results_of_h5ad(out)


def embed(cells: list[Path], work: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Embed by both rules."""
    for path in cells:
        for rule in ("default", "release"):
            out = work / f"embedded-{rule}.h5ad"
            scmulan(work, "embed", path, "-o", out, "--rule", rule, "--precision", "fp32", "--force")
            yield f"{path.stem}/{rule}", results_of_h5ad(out)


def generate(cells: list[Path], work: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Generate by every rule in the genes of each file, with drafts and without."""
    asked = ("Blood", "B cell"), ("Pancreas", "pancreatic A cell"), ("Breast", "macrophage")
    for path, (organ, kind) in zip(cells, asked, strict=True):
        prompt = ["--set", f"organ={organ}", "--set", f"cell_type={kind}", "--seed", 7, "--genes-from", path]
        ways = [
            ("default", "auto", "sample"),
            ("default", "auto", "mean"),
            ("exact", "auto", "sample"),
            ("exact", 1, "mean"),
        ]
        for rule, draft, values in [*ways, ("release", "auto", "sample"), ("release", 4, "mean")]:
            out = work / "generated.h5ad"
            options = ["--rule", rule, "--draft", draft, "--values", values, "--max-words", 200]
            scmulan(work, "generate", "-o", out, *prompt, "-n", 8, *options, "--force")
            yield f"{path.stem}/{rule}-{draft}-{values}", results_of_h5ad(out)


def corpus(cells: list[Path], work: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Build a corpus, inspect and split it."""
    shutil.rmtree(work / "corpus", ignore_errors=True)
    scmulan(work, "corpus", "build", write_spec(cells, work), work / "corpus")
    for path in sorted((work / "corpus").rglob("*.safetensors")):
        yield str(path.relative_to(work)), results_of_weights(path)
    yield "vocabulary", results_of_json((work / "corpus" / "vocabulary.json").read_text(encoding="utf-8"))
    without = ("created", "seconds", "path", "bytes", "version", "sha256", "files", "inputs")
    yield (
        "inspect",
        results_of_json(scmulan(work, "corpus", "inspect", work / "corpus", "--json"), without=without),
    )
    (work / "split.toml").write_text('corpus = "corpus"\n[studies]\nvalidation = ["komen*"]\n', encoding="utf-8")
    scmulan(work, "corpus", "split", work / "split.toml")
    split = next(iter(sorted((work / "corpus").glob("split*.json"))), work / "split.json")
    yield "split", results_of_json(split.read_text(encoding="utf-8"), without=without)


def write_spec(cells: list[Path], work: Path) -> Path:
    """Write the text of a corpus of all files."""
    path = work / "spec.toml"
    studies = "".join(f'[[study]]\nfile = "{cell}"\n' for cell in cells)
    path.write_text(f"genes = 3000\nshard_cells = 100\n{COLUMNS}{studies}", encoding="utf-8")
    return path


def pretrain(cells: list[Path], work: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Train fifty steps on files in memory, and fifty on a corpus."""
    studies = [f'[[data.study]]\nfile = "{cell}"\n' for cell in cells[:2]]
    columns = COLUMNS.replace("columns =", "[data]\ncolumns =").replace(', donor = "donor"', "")
    held_out = f'[validation]\n[[validation.study]]\nfile = "{cells[2]}"\n'
    memory = RECIPE + WEIGHTED + "[vocabulary]\ngenes = 2000\n" + columns + "".join(studies) + held_out
    scmulan(work, "corpus", "build", write_spec(cells, work), work / "corpus-to-train", "--force")
    (work / "split-to-train.toml").write_text(
        'corpus = "corpus-to-train"\n[donors]\nvalidation = ["*1*"]\n', encoding="utf-8"
    )
    scmulan(work, "corpus", "split", work / "split-to-train.toml")
    disk = RECIPE + EPOCHS + f'[data]\ncorpus = "{work / "corpus-to-train"}"\n'
    for name, recipe in (("memory", memory), ("corpus", disk)):
        path, out = work / f"{name}.toml", work / f"run-{name}"
        path.write_text(recipe, encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        scmulan(work, "pretrain", path, "--out", out)
        log = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
        timed = ("words_per_second", "cells_per_second", "mfu", "seconds", "time")
        yield f"{name}/log", results_of_json(json.dumps([json.loads(line) for line in log]), without=timed)
        weights = sorted(out.rglob("model.safetensors"))
        yield f"{name}/weights", results_of_weights(weights[0])


def finetune(cells: list[Path], work: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Fine-tune the packaged model on the labels of a file."""
    out = work / "fine-tuned"
    options = ["--steps", 20, "--rate", "5e-4", "--seed", 2, "--validation-share", 0.2, "--force"]
    shutil.rmtree(out, ignore_errors=True)
    scmulan(work, "finetune", "mini", cells[0], "--labels", "label", "-o", out, *options)
    yield "weights", results_of_weights(out / "model.safetensors")
    yield "vocabulary", results_of_json((out / "vocabulary.json").read_text(encoding="utf-8"))


def evaluate(cells: list[Path], work: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Evaluate annotation beside its baseline, and generation."""
    data, train = ["--data", cells[0]], ["--train", cells[1], "--train", cells[2], "--train-labels", "label"]
    text = scmulan(work, "evaluate", "annotation", *data, "--labels", "label", "--smooth", *train, "--json")
    yield "annotation", results_of_json(text, without=("path", "seconds"))
    text = scmulan(work, "evaluate", "generation", "--data", cells[0], "--labels", "label", "-n", 12, "--json")
    yield "generation", results_of_json(text, without=("path", "seconds"))


API = """
import sys, anndata as ad, scmulan
work, *paths = sys.argv[1:]
model = scmulan.load("mini", device="cpu")
for i, path in enumerate(paths):
    adata = ad.read_h5ad(path)
    scmulan.tl.annotate(adata, model, precision="fp32")
    scmulan.tl.embed(adata, model, precision="fp32")
    scmulan.tl.smooth(adata)
    scmulan.tl.perturb(adata, model, {"CD3D": 0}, precision="fp32")
    del adata.uns
    adata.write_h5ad(f"{work}/api-{i}.h5ad")
for i, rule in enumerate(("default", "exact", "release")):
    made = scmulan.tl.generate(model, {"organ": "Blood", "cell_type": "B cell"}, n=10, seed=5, rule=rule, max_words=300)
    del made.uns
    made.write_h5ad(f"{work}/api-{rule}.h5ad")
"""


def api(cells: list[Path], work: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Run the verbs on AnnData in memory."""
    run("-c", API, str(work), *map(str, cells), cwd=work)
    for path in sorted(work.glob("api-*.h5ad")):
        yield path.stem, results_of_h5ad(path)


PARTS = {part.__name__: part for part in (annotate, embed, generate, corpus, pretrain, finetune, evaluate, api)}


def some_cells(paths: list[Path], work: Path) -> list[Path]:
    """Write a few cells of each file, spread evenly over it."""
    import anndata as ad
    import numpy as np

    written = []
    for path in paths:
        adata = ad.read_h5ad(path)
        adata = adata[np.unique(np.linspace(0, adata.n_obs - 1, CELLS_PER_FILE).astype(int))].copy()
        adata.write_h5ad(work / path.name)
        written.append(work / path.name)
    return written


def main() -> None:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", type=Path, nargs=3)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    beside = ROOT.parent / "shared" / "data" / "validation"
    sources = args.cells or [beside / f"{name}.h5ad" for name in DEFAULT_CELLS]
    missing = [str(path) for path in sources if not path.exists()]
    if missing:
        sys.exit(f"No such file: {', '.join(missing)}. Name three labelled h5ad files with --cells.")
    if args.action == "compare" and not args.folder.is_dir():
        sys.exit(
            f"{args.folder} holds no golden results; write them first: python tools/golden.py record {args.folder}"
        )
    args.folder.mkdir(parents=True, exist_ok=True)
    compared, different = 0, []
    with tempfile.TemporaryDirectory(prefix="golden-") as name:
        work = Path(name)
        cells = some_cells([path.resolve() for path in sources], work)
        for part in args.only:
            print(f"{part} …", file=sys.stderr, flush=True)
            found = {f"{part}/{k}/{what}": v for k, results in PARTS[part](cells, work) for what, v in results.items()}
            file = args.folder / f"{part}.json"
            # Texts name the folder of the moment.
            found = {key.replace(str(work), "ROOM"): value.replace(str(work), "ROOM") for key, value in found.items()}
            if args.action == "record":
                file.write_text(json.dumps(found, indent=0, sort_keys=True), encoding="utf-8")
                compared += len(found)
                continue
            known = json.loads(file.read_text(encoding="utf-8"))
            compared += len(known)
            for key in sorted(known.keys() | found.keys()):
                if known.get(key) != found.get(key):
                    different.append(key)
                    print(f"  {key}: was {known.get(key)}, is {found.get(key)}", file=sys.stderr)
    print(json.dumps({"golden": args.action, "results": compared, "different": different}))
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
