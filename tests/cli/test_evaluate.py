"""Commands evaluate and report: options reach the functions, results are printed."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def two_files(folder, make_cells):
    for i, name in enumerate(("one.h5ad", "two.h5ad")):
        adata = make_cells(120)
        adata.X.data[:] += i  # not the same cells
        adata.obs["batch"] = [f"b{j % 2}" for j in range(120)]
        adata.write_h5ad(name)
    return ["one.h5ad", "two.h5ad"]


def test_annotation(scmulan, tiny, two_files):
    command = ("evaluate", "annotation", "--model", tiny, "--labels", "label")
    both = scmulan(*command, "--data", *two_files, "--json")
    assert both.code == 0
    assert [file["name"] for file in both.json["files"]] == ["one", "two"]
    assert both.json["results"]["scmulan"]["all files"]["ontology"]["n"] == 240
    assert both.json == scmulan(*command, "--data", "one.h5ad", "--data", "two.h5ad", "--json").json
    smoothed = scmulan(*command, "--data", "one.h5ad", "--smooth", "--json").json["results"]
    assert list(smoothed) == ["scmulan", "scmulan, smoothed"]
    compared = scmulan(*command, "--data", "one.h5ad", "--train", "two.h5ad", "--lineages")
    assert compared.code == 0
    assert "logistic regression" in compared.out
    assert "training logistic regression" in compared.err
    assert "did you mean 'label'" in scmulan(*command[:-1], "lable", "--data", "one.h5ad").refused(logged=True)
    assert "none.h5ad: no such file" in scmulan(*command, "--data", "none.h5ad").refused(logged=True)
    assert (
        "one.h5ad: is to be tested and trained on"
        in scmulan(*command, "--data", *two_files, "--train", "one.h5ad").refused()
    )
    assert sorted(os.listdir()) == two_files


def test_integration(scmulan, tiny, two_files):
    # The computation takes long and is tested in tests/evaluate; here only options are passed on.
    command = ("evaluate", "integration", "--model", tiny, "--data", *two_files, "--labels", "label")
    few = scmulan(*command, "--max-cells", 90, "--seed", 3, "--kbet").refused(logged=True)
    assert "integration needs more than 90 labelled cells" in few
    assert "did you mean 'batch'" in scmulan(*command, "--batch", "bach").refused(logged=True)


def test_generation(scmulan, tiny, two_files):
    command = ("evaluate", "generation", "--model", tiny, "--labels", "label", "--data", "one.h5ad", "-n", 10)
    run = scmulan(*command, "--max-words", 50, "--json")
    assert run.code == 0
    assert run.json["parameters"]["max_words"] == 50
    assert run.json["files"][0]["name"] == "one"
    assert "expected FIELD=COLUMN" in scmulan(*command, "--field", "organ").refused()
    assert "colour" in scmulan(*command, "--field", "organ=colour").refused(logged=True)


def test_report(scmulan, folder, tiny, make_cells):
    make_cells().write_h5ad("in.h5ad")
    assert scmulan("annotate", "in.h5ad", "-o", "out.h5ad", "--model", tiny, "--embed").code == 0
    assert scmulan("generate", "-o", "new.h5ad", "-n", 5, "--set", "cell_type=B cell", "--model", tiny).code == 0
    options = ("--generated", "new.h5ad", "--model", tiny, "--title", "My <cells>")
    command = ("report", "out.h5ad", "-o", "page.html", *options)
    run = scmulan(*command)
    assert run.code == 0
    assert not run.err
    assert run.out == "written: page.html\n"
    page = Path("page.html").read_text()
    assert "My &lt;cells&gt;" in page
    assert "scmulan report out.h5ad -o page.html --generated new.h5ad" in page
    assert "exists already" in scmulan(*command).refused()
    assert scmulan(*command, "--force", "--json").json == {"output": "page.html"}


def test_what_report_refuses(scmulan, folder, cells):
    def error(*options):
        return scmulan("report", *options).refused()

    assert "run `scmulan annotate IN.h5ad -o OUT.h5ad` first" in error(cells, "-o", "page.html")
    assert "none.h5ad: no such file" in error("none.h5ad", "-o", "page.html")
    assert "ends in .html" in error(cells, "-o", "page.pdf")
    assert "is an input too" in error("page.html", "-o", "page.html")
    assert "no model 'nothing'" in error(cells, "-o", "page.html", "--model", "nothing")
    assert not os.listdir(folder)
