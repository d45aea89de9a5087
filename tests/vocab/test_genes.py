"""Gene names to vocabulary genes: the table, the match, what is refused and what is warned about."""

import gzip
import json
import time
import warnings
from collections import defaultdict

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scmulan.errors import GeneError
from scmulan.resources import read_text
from scmulan.vocab.gene_table import foreign_species
from scmulan.vocab.genes import CoverageWarning, GeneTable, choose_names, match_genes

TABLE = GeneTable.load()
RELEASE: list[str] = json.loads(read_text("vocabulary_release.json"))["genes"]
MARKERS = ["CD3E", "MS4A1", "NKG7", "LYZ", "CD14", "FCGR3A", "PPBP", "HLA-DRA", "MATR3", "CST3", "GNLY", "C1orf162"]

SMALL = GeneTable(
    "symbol\tensembl\tprevious\taliases\tlocus_type\n"
    "AAA1\tENSG00000000001|ENSG00000000011\tOLD1|BOTH\tNICK1|SHARED\tgene with protein product\n"
    "BBB2\tENSG00000000002\t\tOLD1A|SHARED|AAA1|BOTH|Mixed1|Mix-Ed2\tgene with protein product\n"
    "CCC-3\t\tSPLIT\t7SK\tunknown\n"
    "DDD4\t\tSPLIT\tMIXED1\tunknown\n"
)


@pytest.mark.parametrize(
    ("name", "symbol", "how"),
    [
        ("AAA1", "AAA1", "approved"),  # also an alias of BBB2: approved wins
        ("BOTH", "AAA1", "previous"),  # also an alias of BBB2: previous wins
        ("NICK1", "AAA1", "alias"),
        (" NICK1 ", "AAA1", "alias"),
        ("SHARED", None, "ambiguous"),
        ("SPLIT", None, "ambiguous"),
        ("ENSG00000000011", "AAA1", "ensembl"),
        ("ENSG00000000002.17", "BBB2", "ensembl"),
        ("ENSG00000000002.17_PAR_Y", "BBB2", "ensembl"),
        ("WHATEVER_ENSG00000000002", "BBB2", "ensembl"),
        ("AAA1_ENSG00000000099", "AAA1", "approved"),  # the id is retired, the symbol is not
        ("ENSG00000000099", None, "unknown"),
        ("ccc-3", "CCC-3", "case"),
        ("nick1", "AAA1", "case"),
        ("mixed1", None, "ambiguous"),  # MIXED1 and Mixed1 are two genes
        ("MIXED1", "DDD4", "alias"),
        ("Aaa1", None, "unknown"),  # a mouse gene
        ("CCC.3", "CCC-3", "punctuation"),
        ("Mix.Ed2", "BBB2", "punctuation"),
        ("ccc.3", "CCC-3", "punctuation"),
        ("AAA1-1", "AAA1", "suffix"),
        ("AAA1.12", "AAA1", "suffix"),
        ("CCC.3.1", "CCC-3", "suffix"),
        ("OLD1.1", "AAA1", "suffix"),
        ("7SK.2", None, "unknown"),  # copies of a repeated gene, known by an alias, are their own genes
        ("AAA1-01", None, "unknown"),
        ("", None, "unknown"),
        ("NOSUCH", None, "unknown"),
    ],
)
def test_a_name_means_one_gene_or_none(name, symbol, how):
    result = SMALL.explain(name)
    assert (result.symbol, result.how) == (symbol, how)
    assert SMALL.resolve([name]) == [symbol]


def test_an_ambiguous_name_tells_what_it_could_be():
    assert SMALL.explain("SHARED").candidates == ("AAA1", "BBB2")
    assert set(TABLE.explain("QARS").candidates) == {"EPRS1", "QARS1"}


def test_the_packaged_table_knows_names_of_the_field():
    names = ["SEPT2", "CTGF", "FAM129A", "C1ORF112", "HLA.DRA", "PD-1", "ENSG00000198851.10", "MATR3-1", "T", "MT.ND3"]
    expected = ["SEPTIN2", "CCN2", "NIBAN1", "FIRRM", "HLA-DRA", "PDCD1", "CD3E", "MATR3", "TBXT", "MT-ND3"]
    assert TABLE.resolve(names) == expected
    assert TABLE.resolve(["Cd3e", "mt-Nd3", "Ms4a1", "1", "ENSMUSG00000032093"]) == [None] * 5
    assert TABLE.locus_types["CD3E"] == "gene with protein product"


def test_every_approved_symbol_is_itself():
    assert TABLE.resolve(TABLE.symbols) == TABLE.symbols


def test_no_mouse_spelling_of_a_human_symbol_is_taken_for_it():
    mouse = [symbol.capitalize() for symbol in TABLE.symbols if symbol.isupper() and symbol.capitalize() != symbol]
    taken = [name for name, symbol in zip(mouse, TABLE.resolve(mouse), strict=True) if symbol == name.upper()]
    # HGNC itself lists a few such spellings as aliases (``Cdc7``); no rule of ours may add to them.
    assert {TABLE.explain(name).how for name in taken} <= {"alias", "previous"}
    assert len(taken) < 0.01 * len(mouse)


def test_resolving_a_whole_genome_costs_no_more_than_loading_the_table_a_few_times():
    text = read_text("genes.tsv.gz")
    load, resolve = [], []
    names = [*TABLE.symbols[:20_000], *(f"RP11-{i}P{i % 17}.{i % 9}" for i in range(15_000))]
    for _ in range(3):
        start = time.process_time()
        table = GeneTable(text)
        load.append(time.process_time() - start)
        start = time.process_time()
        table.resolve(names)
        resolve.append(time.process_time() - start)
    assert min(resolve) < 20 * min(load)


def test_columns_follow_the_vocabulary_also_where_it_holds_old_names():
    vocabulary = ["NIBAN1", "CTGF", "RP11-34P13.7", "MS4A1"]
    names = ["MS4A1", "CCN2", "FAM129A", "RP11.34P13.7", "CD3E", "NOSUCH", "QARS", "ENSG00000156738.18"]
    match = match_genes(names, vocabulary)
    assert match.columns.dtype == np.int32
    assert match.columns.tolist() == [3, 1, 0, 2, -1, -1, -1, 3]
    assert match.found == vocabulary and match.missing == []
    assert match.renamed == {"CCN2": "CTGF", "FAM129A": "NIBAN1", "RP11.34P13.7": "RP11-34P13.7"}
    assert match.duplicates == {"MS4A1": ["MS4A1", "ENSG00000156738.18"]}
    assert (match.outside, match.unknown, list(match.ambiguous)) == (["CD3E"], ["NOSUCH"], ["QARS"])
    assert match.id_type == "mixed"


def test_an_exact_name_wins_over_the_approved_symbol():
    # FAM129A was renamed NIBAN1; a vocabulary with both keeps them apart.
    match = match_genes(["NIBAN1", "FAM129A"], ["FAM129A", "NIBAN1"])
    assert match.columns.tolist() == [1, 0]
    # Where two tokens are one gene, a third name of it goes to the approved one.
    assert match_genes(["C1orf24"], ["FAM129A", "NIBAN1"]).columns.tolist() == [1]


@pytest.mark.parametrize(
    ("names", "id_type"),
    [
        (MARKERS, "symbol"),
        (["ENSG00000198851.10", "ENSG00000156738"], "ensembl"),
        (["ENSG00000198851", "MS4A1"], "mixed"),
    ],
)
def test_the_kind_of_names_is_told(names, id_type):
    assert match_genes(names, MARKERS, min_genes=1, warn_below=0).id_type == id_type


def test_report_is_json_and_summary_says_what_matters():
    match = match_genes([*MARKERS, "FAM129A", "NOSUCH", "MATR3-1", "QARS"], [*MARKERS, "NIBAN1"])
    report = json.loads(json.dumps(match.report(umi_fraction=0.98765)))
    assert report["vocabulary_genes"] == 13 and report["input_genes"] == 16 and report["matched_columns"] == 14
    assert report["umi_share"] == 0.9877 and report["fraction_of_vocabulary"] == 1.0
    assert report["renamed"] == {"count": 2, "examples": ["FAM129A → NIBAN1", "MATR3-1 → MATR3"]}
    assert report["ambiguous"]["examples"] == ["QARS → EPRS1, QARS1"]
    assert report["unknown"] == {"count": 1, "examples": ["NOSUCH"]}
    assert match.report()["umi_share"] is None
    assert len(match_genes(TABLE.symbols, RELEASE).report()["missing"]["examples"]) <= 20
    assert match.summary(0.98765) == (
        "13 of 13 vocabulary genes found (100%) among 16 symbols in var_names; they hold 98.8% of the UMIs.\n"
        "Under another name 2, in several columns (summed) 1, ambiguous and left out 1, unknown 1."
    )


@pytest.mark.parametrize("panel", [219, 433])
def test_a_targeted_panel_is_accepted_with_a_warning(panel):
    # A panel holds marker genes, many of which are in the vocabulary; here one in five is.
    shared = RELEASE[:: 2000 // (panel // 5)]
    others = np.random.default_rng(panel).permutation(sorted(set(TABLE.symbols) - set(RELEASE)))
    names = [*shared, *others[: panel - len(shared)]]
    with pytest.warns(CoverageWarning, match=r"panel\.h5ad: \d+ of 2,000 vocabulary genes found \(\d%\)"):
        match = match_genes(names, RELEASE, source="panel.h5ad")
    assert 20 <= len(match.found) < 120


def test_thresholds_are_the_callers():
    half = RELEASE[:900]
    with pytest.warns(CoverageWarning):
        match_genes(half, RELEASE)
    with pytest.raises(GeneError, match="900 of the model's 2,000 genes found, 901 needed"):
        match_genes(half, RELEASE, min_genes=901)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        match_genes(half, RELEASE, warn_below=0.45)
        match_genes(RELEASE[:1], RELEASE, min_genes=1, warn_below=0)
        match_genes(["gene1"], RELEASE, min_genes=0, warn_below=0)


def mouse_symbols():
    return [symbol.capitalize() for symbol in TABLE.symbols if symbol.isupper()]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Cd3e", "Ms4a1", "Lyz2", "Nkg7", "H19", "Xist"], "looks like mouse genes; .* are human: map orthologs first"),
        (mouse_symbols(), "looks like mouse genes; scmulan's vocabularies are human: map orthologs first"),
        ([f"ENSMUSG{i:011d}.3" for i in range(500)], "looks like mouse genes"),
        ([f"ENSRNOG{i:011d}" for i in range(500)], "looks like rat genes"),
        ([f"ENSABCG{i:011d}" for i in range(500)], "looks like another species' genes"),
        ([symbol.lower() for symbol in RELEASE], "looks like zebrafish or frog genes; .* write them in capitals"),
        ([str(i) for i in range(1, 9000)], r"numbers \(1, 2, 3: Entrez ids or a lost index\)"),
        (
            [f"gene_{i}" for i in range(900)],
            "0 of the model's 2,000 genes found, 20 needed; its 900 names in var_names",
        ),
        ([], "it has no genes at all"),
    ],
)
def test_other_names_are_refused_in_one_line(names, message):
    with pytest.raises(GeneError, match=message) as caught:
        match_genes(names, RELEASE, source="cells.h5ad")
    assert str(caught.value).startswith("cells.h5ad") and "\n" not in str(caught.value)


def test_mouse_genes_are_refused_whatever_the_threshold():
    with pytest.raises(GeneError, match="looks like mouse genes"):
        match_genes(mouse_symbols(), RELEASE, min_genes=0, warn_below=0)


def test_human_cells_with_mouse_cells_among_them_are_read_as_human_with_a_warning():
    mouse = mouse_symbols()[:9000]
    with pytest.warns(CoverageWarning, match=r"xenograft\.h5ad: [89],\d+ of .* names are mouse genes") as caught:
        match = match_genes([*TABLE.symbols, *mouse], RELEASE, source="xenograft.h5ad")
    assert len(caught) == 1 and "left out" in str(caught[0].message)
    matched = match.columns[len(TABLE.symbols) :]
    assert (matched >= 0).mean() < 0.01


def test_species_are_counted_by_their_names():
    assert foreign_species(["CD3E", "C1orf112", "Gene1", "RP11-34P13.7", "LOC100288069"], TABLE) is None
    found = foreign_species(["Cd3e", "Ms4a1", "cd4", "CD8A"], TABLE)
    assert found is not None and (found.species, found.count, found.examples) == ("mouse", 2, ("Cd3e", "Ms4a1"))
    zebrafish = foreign_species(["si:ch211-214p13.4", "zgc:113337", "cd4"], TABLE)
    assert zebrafish is not None and zebrafish.count == 3


def test_names_are_taken_from_where_most_of_them_are_known():
    ids = ["ENSG00000198851", "ENSG00000156738", "ENSG00000105374"]
    var = pd.DataFrame(
        {"gene_ids": ids, "feature_types": pd.Categorical(["Gene Expression"] * 3), "n_cells": [3, 4, 5]},
        index=["0", "1", "2"],
    )
    assert choose_names(var) == (ids, "gene_ids")
    var["gene_symbols"] = pd.Categorical(["CD3E", "MS4A1", None])
    assert choose_names(var) == (ids, "gene_ids")
    assert choose_names(var, ["CD3E", "NKG7"]) == (ids, "gene_ids")
    # A clone is known to the vocabulary alone.
    var["feature_name"] = ["CD3E", "MS4A1", "RP11-34P13.7"]
    assert choose_names(var, ["CD3E", "MS4A1", "RP11-34P13.7"])[1] == "feature_name"
    match = match_genes(var, ["MS4A1", "NKG7"])
    assert (match.where, match.id_type, match.columns.tolist()) == ("gene_ids", "ensembl", [-1, 0, 1])
    assert match.summary().endswith("Ensembl ids in var['gene_ids'].")


def test_the_index_is_taken_unless_a_column_does_better():
    var = pd.DataFrame({"gene_ids": ["ENSG00000198851", "ENSG00000156738"]}, index=["CD3E", "MS4A1"])
    assert choose_names(var) == (["CD3E", "MS4A1"], "index")
    assert choose_names(pd.DataFrame(index=["x", "y"])) == (["x", "y"], "index")
    gaps = pd.DataFrame({"symbol": ["CD3E", np.nan, "MS4A1"]}, index=["a", "b", "c"])
    assert choose_names(gaps) == (["CD3E", "", "MS4A1"], "symbol")
    assert choose_names(gaps.astype("category")) == (["CD3E", "", "MS4A1"], "symbol")


def test_mouse_genes_with_human_orthologs_beside_them_are_accepted():
    var = pd.DataFrame({"human_symbol": RELEASE}, index=[symbol.capitalize() for symbol in RELEASE])
    match = match_genes(var, RELEASE)
    assert match.where == "human_symbol" and match.fraction_of_vocabulary == 1


names_in_the_wild = st.one_of(
    st.sampled_from(TABLE.symbols),
    st.sampled_from(
        [*RELEASE, "QARS", "MUM1", "FAM129A", "CTGF", "ENSG00000198851.3", "HLA.DRA", "Cd3e", "cd3e", "7SK.1"]
    ),
    st.text(max_size=12),
)


@settings(deadline=None)
@given(st.lists(names_in_the_wild, max_size=60), st.randoms(use_true_random=False))
def test_every_column_is_accounted_for_and_order_does_not_matter(names, random):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        try:
            match = match_genes(names, RELEASE, min_genes=0)
        except GeneError:
            return  # by chance the names of another species
        order = list(range(len(names)))
        random.shuffle(order)
        shuffled = match_genes([names[i] for i in order], RELEASE, min_genes=0)
    assert len(match.columns) == len(names)
    assert sorted([*match.found, *match.missing]) == sorted(RELEASE)
    assert match.found == [RELEASE[i] for i in np.unique(match.columns[match.columns >= 0])]
    ambiguous = [name for name in names if name in match.ambiguous]
    matched = int((match.columns >= 0).sum())
    assert matched + len(match.outside) + len(match.unknown) + len(ambiguous) == len(names)
    assert sum(len(found) - 1 for found in match.duplicates.values()) == matched - len(match.found)
    np.testing.assert_array_equal(shuffled.columns, match.columns[order])


@settings(deadline=None)
@given(st.sampled_from(TABLE.symbols), st.integers(1, 99), st.sampled_from("-."))
def test_a_made_unique_name_is_its_base_unless_it_is_a_gene_itself(symbol, number, mark):
    result = TABLE.explain(f"{symbol}{mark}{number}")
    assert (
        result.how in ("approved", "previous", "alias", "ambiguous", "punctuation", "case") or result.symbol == symbol
    )


def reference(shared, name):
    text = gzip.decompress((shared / "data" / "refs" / name).read_bytes()).decode()
    return [line.split("\t") for line in text.splitlines()[1:]]


@pytest.mark.shared
def test_the_table_agrees_with_other_copies_of_hgnc_and_ensembl(shared):
    genes = defaultdict(set)
    for name, symbol, *_ in reference(shared, "hgnc_symbols.tsv.gz"):
        genes[name].add(symbol)
    approved = set.union(*genes.values())
    # The copies differ in age: a symbol that is approved there may be a previous one here.
    same = [symbol for symbol in approved if symbol in TABLE.locus_types]
    known = [symbol for symbol in approved if TABLE.explain(symbol).how != "unknown"]
    print(f"approved: {len(same)} of {len(approved)} the same, {len(known)} known")
    assert len(same) >= 0.99 * len(approved)

    agree, disagree = 0, []
    for name, symbols in genes.items():
        result = TABLE.explain(name)
        here = {result.symbol} if result.symbol else set(result.candidates)
        there = {TABLE.explain(symbol).symbol or symbol for symbol in symbols}
        if name in approved or result.how not in ("previous", "alias", "ambiguous"):
            continue
        if here & there:
            agree += 1
        else:
            disagree.append((name, sorted(here), sorted(symbols)))
    print(f"previous and alias: {agree} agree, {len(disagree)} do not: {disagree[:20]}")
    assert agree > 40_000
    assert agree >= 0.99 * (agree + len(disagree)), disagree[:20]

    rows = [(identifier, symbol) for identifier, symbol in reference(shared, "ensembl_symbols.tsv.gz")]
    pairs = [(i, TABLE.resolve([i])[0], TABLE.explain(symbol).symbol) for i, symbol in rows]
    both = [pair for pair in pairs if pair[1]]
    wrong = [pair for pair in both if pair[1] != pair[2]]
    print(f"Ensembl: {len(both)} of {len(rows)} ids known, {len(wrong)} of them another gene: {wrong[:20]}")
    assert len(both) > 0.95 * len(rows)
    assert len(wrong) < 0.01 * len(both), wrong[:20]


@pytest.mark.shared
def test_real_files_are_matched_and_what_r_did_to_names_is_undone(shared):
    folder = shared / "data" / "train"
    whole = match_genes(ad.read_h5ad(folder / "10x_pbmc4k.h5ad", backed="r").var, RELEASE)
    assert len(whole.found) >= 1998
    assert whole.renamed["CYR61"] == "CCN1" and "RGS5.1" in whole.duplicates["RGS5"]
    with pytest.warns(CoverageWarning):
        dots = match_genes(ad.read_h5ad(folder / "ding2019_pbmc1.h5ad", backed="r").var, RELEASE)
    assert dots.renamed["HLA.DRB1"] == "HLA-DRB1"
    with pytest.warns(CoverageWarning):
        process_group = match_genes(ad.read_h5ad(folder / "kang2018_pbmc_labelled.h5ad", backed="r").var, RELEASE)
    assert process_group.renamed["TXNIP_ENSG00000117289"] == "TXNIP" and len(process_group.unknown) < 5
