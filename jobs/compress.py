"""`sdft compress` as the entry point of a cluster job: one recipe from end to end.

    python jobs/compress.py RECIPE --resources resources.yaml --store s3://bucket/sdft --progress json

Exit codes: 0 success, 1 a step failed, 2 an error that the user can correct, 130 interrupted. Finished work stays in
the store: submit the same job again to continue.
"""

from __future__ import annotations

from sdft_ray.cli.app import compress, run_command

if __name__ == "__main__":
    run_command(compress)
