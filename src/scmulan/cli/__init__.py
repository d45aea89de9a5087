"""Command line: one module per command, whose options are the annotated parameters of its function.

Only options, progress and texts about results belong here. The work is done by other packages, which a command imports
when it runs, so that help and version load neither torch nor pandas.
"""
