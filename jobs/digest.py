"""What is finished of studies, added to a digest in the repository: from any store, at any time, interrupted or not.

    python jobs/digest.py jobs/studies/smollm2_135m*.yaml --into docs/results/smollm2_135m.json --store STORE --data DIR

A result that is there already stays as it is. Exit codes as in `jobs/compress.py`.
"""

from __future__ import annotations

from sdft_ray.cli.app import run_command
from sdft_ray.cli.digest import digest

if __name__ == "__main__":
    run_command(digest)
