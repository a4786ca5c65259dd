"""Send a recipe to a Ray cluster as a job, and watch it with the same view as a local run."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft_ray.errors import ResourceError, StoreError
from sdft_ray.evaluation.task_files import ORIGIN
from sdft_ray.evaluation.task_inputs import task_inputs
from sdft_ray.progress import Event, open_view, parse_event, seconds
from sdft_ray.progress.plain import TELL_EVERY_S
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.stages.graph import steps
from sdft_ray.stages.sources import task_places
from sdft_ray.store.atomic import replacing
from sdft_ray.store.fingerprint import fingerprint
from sdft_ray.store.store import Store

CARRIED_BYTES = 64 * 2**20
"""Files and folders of a recipe up to this size travel with the job; larger ones must be where the cluster is."""

NO_AGENT = (
    "wait until the job agent of the head node is running; if it does not start, another Ray on that node uses port "
    "52365: `ray start --dashboard-agent-listen-port=0` takes a free port"
)

_PLACES = (
    ("teacher", "model"),
    ("teacher", "config"),
    ("seed_set", "source"),
    ("calibration", "source"),
    ("forgetting", "source"),
    ("forgetting", "embedding"),
    ("gates",),
)


def submit(
    recipe: Recipe,
    address: str,
    *,
    store: str,
    resources: Path | None = None,
    name: str | None = None,
    view: Any = "auto",
    follow: bool = True,
) -> int:
    """Submit and, when following, wait. Returns 0 on success and 1 on failure of the job.

    Job ids are `<run>-<attempt>`, because Ray never takes an id twice; what an earlier attempt finished is reused
    from the store. Raises `ResourceError` when no Ray dashboard answers at `address`.
    """
    from ray.job_submission import JobSubmissionClient

    name = name or recipe.name
    if "://" not in store and not Path(store).is_absolute():
        raise StoreError(
            f"store {store} is a relative path, and a Ray job runs elsewhere", "give an absolute path or a URL"
        )
    try:
        client = JobSubmissionClient(address)
        attempt = _next_attempt(client, name)
    except (ConnectionError, RuntimeError) as reason:
        why = str(reason).splitlines()[0]
        raise ResourceError(
            f"no Ray dashboard at {address}: {why}", "check the address, and that Ray is running"
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        bundle(recipe, Path(folder), Store(store))
        command = ["compress", "recipe.yaml", "--store", store, "--name", name, "--progress", "json"]
        if resources is not None:
            shutil.copy(resources, Path(folder) / "resources.yaml")
            command += ["--resources", "resources.yaml"]
        job_id = _send(
            client,
            entrypoint=f"python -m sdft_ray.cli {shlex.join(command)}",
            submission_id=f"{name}-{attempt}",
            runtime_env={"working_dir": folder},
        )
    if not follow:
        print(f"submitted {job_id}")
        return 0
    return asyncio.run(_follow(client, job_id, [step.name for step in steps(recipe)], view))


def _send(client: Any, *, patience_s: float = 60.0, **job: Any) -> str:
    """Submit a job; its id. A cluster that has just come up is asked for a while: it takes no jobs at first.

    Raises `ResourceError` when the cluster refuses.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return client.submit_job(**job)
        except RuntimeError as reason:
            without_agent = "No available agent" in str(reason)
            if not without_agent or time.monotonic() > deadline:
                why = str(reason).strip().splitlines()[0].rstrip(".")
                then = NO_AGENT if without_agent else "see the Ray dashboard, and try again"
                raise ResourceError(f"the cluster does not accept the job: {why}", then) from None
        time.sleep(1.0)


def bundle(recipe: Recipe, folder: Path, store: Store) -> None:
    """Write `recipe.yaml` into a folder, and put the small files that it names where the cluster finds them.

    That is the store, under their digest, where it is a shared disk. Otherwise they travel in the job's own folder,
    which Ray unpacks on every node.
    """
    data = recipe.model_dump(mode="python")
    for *parts, field in _PLACES:
        holder = data[parts[0]] if parts else data
        if holder is None:
            continue  # a part that this recipe leaves out
        value = holder[field]
        if value is None or not Path(value).exists() or _size(Path(value)) > CARRIED_BYTES:
            continue
        source = Path(value)
        if store.is_local:
            holder[field] = str(_kept(source, store))
        else:
            holder[field] = "./" + "_".join([*parts, field, source.name])
            _copy(source, folder / holder[field])
    data["evaluate"] |= _carried_tasks(recipe, folder, store)
    (folder / "recipe.yaml").write_text(Recipe.parse(data).to_yaml(), encoding="utf-8")


def _carried_tasks(recipe: Recipe, folder: Path, store: Store) -> dict[str, str]:
    """Carry the folder of task files with all files that its tasks read elsewhere, and of the data sets what is read.

    Files from elsewhere keep their place to each other in a tree that stands for the root of this machine.
    """
    places, carried = task_places(recipe), {}
    if places.include is None and places.data is None:
        return {}
    read = task_inputs(recipe.evaluate.shots, places)
    if places.include is not None:
        include = Path(os.path.abspath(places.include))
        files = [*(path for path in include.rglob("*") if path.is_file()), *read.outside]
        if _sum(files) <= CARRIED_BYTES:
            note = {ORIGIN: json.dumps({"working_dir": str(places.working_dir)})} if read.outside else {}
            base = Path(include.anchor) if read.outside else include.parent
            tree = _tree("evaluate_include", files, base, note, folder, store)
            carried["include"] = str(tree / include.relative_to(base))
    if places.data is not None and read.data and _sum(read.data) <= CARRIED_BYTES:
        carried["data"] = str(_tree("evaluate_data", read.data, places.data, {}, folder, store))
    return carried


def _tree(name: str, files: Sequence[Path], base: Path, texts: Mapping[str, str], folder: Path, store: Store) -> Path:
    """Copies of files in the same places below a folder of their own, and texts beside them; where the cluster has it.

    In the store it is found under the digest of the whole.
    """
    content = {path.relative_to(base).as_posix(): path for path in files}
    if not store.is_local:
        _write_tree(folder / name, content, texts)
        return Path(f"./{name}")
    digests = {place: store.outside_digest(path) for place, path in content.items()}
    target = Path(store.url) / "carried" / fingerprint([digests, dict(texts)])[:16] / name
    if not target.exists():
        with replacing(target) as partial:
            _write_tree(partial, content, texts)
    return target


def _write_tree(tree: Path, content: Mapping[str, Path], texts: Mapping[str, str]) -> None:
    for place, path in content.items():
        (tree / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tree / place)
    for place, text in texts.items():
        (tree / place).write_text(text, encoding="utf-8")


def _kept(source: Path, store: Store) -> Path:
    target = Path(store.url) / "carried" / store.outside_digest(source)[:16] / source.name
    if not target.exists():
        with replacing(target) as partial:
            _copy(source, partial)
    return target


def _copy(source: Path, target: Path) -> None:
    copy = shutil.copytree if source.is_dir() else shutil.copy
    copy(source, target)


def _sum(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _size(path: Path) -> int:
    return _sum(file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


def _next_attempt(client: Any, name: str) -> int:
    taken = {job.submission_id for job in client.list_jobs() if job.submission_id}
    return next(number for number in range(1, len(taken) + 2) if f"{name}-{number}" not in taken)


async def _follow(client: Any, job_id: str, names: list[str], view: Any) -> int:
    """Feed the job's events to a view until it ends; show the rest of its log when it failed."""
    rest: list[str] = []
    with open_view(view, names) as shown:
        await _until_it_runs(client, job_id, lambda text: shown.handle(Event("message", detail=text)))
        async for line in _lines(client.tail_job_logs(job_id)):
            event = parse_event(line)
            if event is not None:
                shown.handle(event)
            elif line.strip():
                rest.append(line)
    status = client.get_job_status(job_id)
    while not status.is_terminal():
        await asyncio.sleep(0.5)
        status = client.get_job_status(job_id)
    succeeded = status.value == "SUCCEEDED"
    for line in rest if succeeded else rest[-20:]:
        print(line)
    print(f"job {job_id}: {status.value.lower()}")
    return 0 if succeeded else 1


async def _until_it_runs(
    client: Any, job_id: str, tell: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic
) -> None:
    """Wait while the job is pending, as for a node that has yet to come up, and say so every 45 s."""
    began = told = clock()
    while client.get_job_status(job_id).value == "PENDING":
        if clock() - told >= TELL_EVERY_S:
            told = clock()
            tell(f"job {job_id} waits for the cluster, {seconds(told - began)} so far")
        await asyncio.sleep(0.5)


async def _lines(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    """Whole lines from chunks that end anywhere."""
    kept = ""
    async for chunk in chunks:
        *whole, kept = (kept + chunk).split("\n")
        for line in whole:
            yield line
    if kept:
        yield kept
