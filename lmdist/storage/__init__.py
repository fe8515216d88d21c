"""Files that lmdist writes and reads: atomic writes, locks, checksums, JSON of an expected shape, distrustful reading.

Data folders, run folders and bundles are all written and read through these. Nothing here knows what the files mean.
"""
