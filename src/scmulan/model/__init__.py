"""The network and its files: what turns words into hidden states, and how a model is stored.

Torch may enter here. Nothing in this room reads cells or knows about AnnData; a model folder is the only thing
on disk it writes.
"""
