"""The command line: one module per verb, its options as the types of its signature.

Only what talks to a person may enter here: options, progress, sentences about results. Work is done by the other
rooms, which a verb imports when it runs, so that help and version load neither torch nor a table.
"""
