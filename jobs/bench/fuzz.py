"""Requests made from the service's own OpenAPI schema, good and bad: none may be answered with 5xx, none may hang.

    python jobs/bench/fuzz.py [--quick] [--cases 5000]

The real service with vLLM and the laboratory's teacher, asked by schemathesis in all its phases. `cases` in the last
line, which is JSON, is how many requests were sent, `failures` how many of them were answered with 5xx or not within
30 s; the service has to answer an ordinary chat at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from jobs.bench.serve import MODEL, server
from sdft_ray.serving.load import chat_body, press


def fuzz(url: str, folder: Path, examples: int, seed: int) -> tuple[int, int]:
    """One run of schemathesis: requests sent, failures found."""
    report = folder / f"report-{seed}.ndjson"
    command = [
        "st", "run", f"{url}/openapi.json", "--checks", "not_a_server_error", "--max-examples", str(examples),
        "--workers", "4", "--request-timeout", "30", "--seed", str(seed), "--continue-on-failure",
        "--report", "ndjson", "--report-ndjson-path", str(report), "--generation-database", "none",
    ]  # fmt: skip
    command[0] = str(Path(sys.executable).with_name("st"))
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)
    if done.returncode not in (0, 1) or not report.exists():
        raise SystemExit(f"schemathesis did not run:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    text = report.read_text(encoding="utf-8")
    if done.returncode:
        print(done.stdout[-3000:])
    return text.count('"status_code":'), done.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="300 requests")
    parser.add_argument("--cases", type=int, default=5000)
    options = parser.parse_args()
    num_required = 300 if options.quick else options.cases
    num_cases = num_failures = seed = 0
    with tempfile.TemporaryDirectory() as place, server("ours", limits={"max_output_tokens": 8}) as (url, _, _):
        while num_cases < num_required:
            sent, failed = fuzz(url, Path(place), min(300, num_required), seed)
            num_cases, num_failures, seed = num_cases + sent, num_failures + failed, seed + 1
            print(f"{num_cases:,} requests, {num_failures} runs with failures", flush=True)
        body = chat_body(MODEL, "How many?", max_tokens=4)
        last = asyncio.run(press(f"{url}/v1", lambda _: body, clients=1, num_requests=1))
        assert last.statuses == {200: 1}, last.statuses
    figures = {"ratio": num_failures / seed, "bound_ratio": 0.0, "cases": num_cases, "failures": num_failures}
    print(json.dumps({"benchmark": "fuzz", **figures}))


if __name__ == "__main__":
    main()
