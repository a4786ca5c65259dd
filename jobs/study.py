"""`sdft study` as a job's entry point: `python jobs/study.py STUDY [--resources FILE] [--store URL]`."""

from __future__ import annotations

import sys

from sdft_ray.cli.app import main

if __name__ == "__main__":
    sys.argv.insert(1, "study")
    main()
