"""Training as a page shows it: read from a run folder alone, also while others write there.

Nothing here writes, and nothing but known files of the folder is read.
"""
