"""`sdft study` as the entry point of a cluster job: many recipes that share artifacts, and one curve.

    python jobs/study.py STUDY --resources resources.yaml --store s3://bucket/sdft --progress json

Exit codes, and how to continue, as in `jobs/compress.py`.
"""

from __future__ import annotations

from sdft_ray.cli.app import run_command
from sdft_ray.cli.study import study

if __name__ == "__main__":
    run_command(study)
