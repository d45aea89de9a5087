"""Benchmarks, each beside yardsticks of the same run: GEMM ceilings, memory bandwidth, the release's way, other tools.

Each module has a function ``run`` that returns one JSON-ready dictionary with ``machine`` and its figures;
``scmulan bench NAME`` prints it as the last line. Optional dependencies are imported within functions.
"""
