"""Where a student goes: a folder behind fsspec or a repository of the hub, with its model card.

A destination is never emptied and no file in it is renamed or removed; what may be replaced, `release.push` decides.
"""
