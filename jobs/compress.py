"""`sdft compress` as the entry point of a cluster job: one recipe from end to end.

    python jobs/compress.py RECIPE --resources resources.yaml --store s3://bucket/sdft --progress json

Exit codes: 0 done, 1 a stage failed, 2 a mistake that the user can correct, 130 interrupted. What is finished stays in
the store, so that the same job, started again, continues.
"""

from __future__ import annotations

from sdft_ray.cli.app import compress, run_command

if __name__ == "__main__":
    run_command(compress)
