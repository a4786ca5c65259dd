"""Where a release goes: a folder behind fsspec or a repository of the hub. They read and write what they are handed.

A destination is never emptied and no file in it is renamed or removed; what may be replaced, `sdft_ray.push` decides.
"""
