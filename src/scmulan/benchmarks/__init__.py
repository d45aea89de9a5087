"""How fast it is, beside yardsticks of the same run: GEMM ceilings, memory bandwidth, the release's way, other tools.

Each benchmark is a function that returns one JSON-ready dictionary with ``benchmark``, ``machine`` and its figures;
``scmulan bench NAME`` prints it as the last line. Extras may be imported, within functions.
"""
