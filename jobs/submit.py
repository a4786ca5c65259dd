"""`sdft submit` for people who work from a checkout: `python jobs/submit.py RECIPE --address URL`."""

from __future__ import annotations

import sys

from sdft_ray.cli.app import main

if __name__ == "__main__":
    sys.argv.insert(1, "submit")
    main()
