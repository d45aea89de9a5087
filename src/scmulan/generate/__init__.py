"""Generation: sampling, speculative decoding, decoding in blocks."""
