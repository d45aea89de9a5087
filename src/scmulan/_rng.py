"""Counter-based random numbers for compiled loops: SplitMix64 (Steele, Lea and Flood 2014).

The n-th number of a stream is a hash of the stream's key and n, so any number of it can be drawn without the ones
before, by any process, with the same bits. A loop that draws one after the other keeps the state instead::

    state = key
    state += GOLDEN  # before each number
    u = uniform(state)

numba notices changes of the module that holds a cached loop, not of what the loop calls: after a change here, delete
``__pycache__`` of the packages that draw.
"""

import numpy as np

from scmulan._numba import compiled

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""Increment of the state from one number to the next: 2⁶⁴ divided by the golden ratio."""
MAX_INVERSION_MEAN = 30
"""Mean up to which :func:`binomial` inverts the distribution term by term, exactly; beyond it, a normal is rounded."""
MAX_BERNOULLI_TRIALS = 8
"""Number of trials up to which :func:`binomial` draws each of them."""


@compiled()
def mix(state):
    """Hash 64 bits: the finaliser of SplitMix64. Any change of the state changes about half of the bits."""
    z = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@compiled()
def random_bits(key, index):
    """Return the 64 random bits number ``index`` (0, 1, …) of the stream of a key (uint64)."""
    return mix(key + GOLDEN * np.uint64(index + 1))


@compiled()
def uniform(state):
    """Return a uniform number in [0, 1), float64, of a state that its caller has advanced by :data:`GOLDEN`."""
    return float(mix(state) >> np.uint64(11)) * 2.0**-53


@compiled()
def stream_keys(key, indices):
    """Return the key of a stream of its own for each integer, uint64 ``[n]``."""
    out = np.empty(len(indices), dtype=np.uint64)
    for i in range(len(indices)):
        out[i] = random_bits(key, indices[i])
    return out


@compiled()
def uniforms(key, indices):
    """Return a uniform number in [0, 1) for each integer, float64 ``[n]``."""
    out = np.empty(len(indices))
    for i in range(len(indices)):
        out[i] = uniform(key + GOLDEN * np.uint64(indices[i] + 1))
    return out


@compiled()
def binomial(state, number, probability):
    """Draw a binomial number.

    Parameters
    ----------
    state : uint64
        Of the stream.
    number : int
        Trials.
    probability : float
        Probability of success.

    Returns
    -------
    state, hits
        The state after the draw, and the number of successes. Exact up to a mean of 30 (of the rarer outcome), beyond
        it a rounded normal.
    """
    if number <= MAX_BERNOULLI_TRIALS:
        hits = 0
        for _ in range(number):
            state += GOLDEN
            hits += uniform(state) < probability
        return state, hits
    p = min(probability, 1.0 - probability)
    if number * p <= MAX_INVERSION_MEAN:
        odds = p / (1.0 - p)
        term = (1.0 - p) ** number
        state += GOLDEN
        left = uniform(state)
        hits = 0
        while left > term and hits < number:
            left -= term
            hits += 1
            term *= odds * (number - hits + 1) / hits
    else:
        state += GOLDEN
        radius = np.sqrt(-2.0 * np.log(1.0 - uniform(state)))
        state += GOLDEN
        normal = radius * np.cos(2 * np.pi * uniform(state))
        hits = int(np.floor(number * p + np.sqrt(number * p * (1.0 - p)) * normal + 0.5))
        hits = min(max(hits, 0), number)
    return state, (hits if probability <= 0.5 else number - hits)
