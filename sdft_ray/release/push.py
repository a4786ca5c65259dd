"""Release a student: send its weights, config and tokenizer, unchanged, and a model card to the hub or a folder.

Every file is compared with its digest before anything is sent. Files at the destination are replaced only if they
belong to the same student. The record `sdft_recovery.json` is written last and marks a complete release; after an
interruption, push again, and files that have arrived are not sent twice. On the hub, a release is one commit.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdft_ray.errors import StoreError, UserError
from sdft_ray.evaluation.recovery import Recovery
from sdft_ray.models.checkpoint import INDEX_FILE
from sdft_ray.models.companions import is_companion
from sdft_ray.models.licence import Licence, find_licence
from sdft_ray.pipeline.run import Run
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.release.card_facts import CardFacts, Origin, card_facts, teacher_origin
from sdft_ray.release.files import Destination, ReleaseFile, Watch
from sdft_ray.release.folder import Folder
from sdft_ray.release.hub import SCHEME, Repository
from sdft_ray.release.model_card import model_card
from sdft_ray.report.run.model import ReportData
from sdft_ray.report.run.trainings import student_manifest
from sdft_ray.statistics.estimate import plain
from sdft_ray.store.fingerprint import file_digest, fingerprint
from sdft_ray.store.manifest import Manifest

CARD, RECIPE, RECORD = "README.md", "sdft_recipe.yaml", "sdft_recovery.json"


@dataclass(frozen=True)
class ReleasedFile:
    """A file of a release. `sent` is False if the destination already had it."""

    name: str
    num_bytes: int
    sha256: str
    sent: bool


@dataclass(frozen=True)
class Release:
    """A completed release. `num_bytes` counts the files that were sent."""

    url: str
    files: tuple[ReleasedFile, ...]
    num_bytes: int


@dataclass(frozen=True)
class PreparedRelease:
    """A checked release: `pieces` in the order of sending; `changed` are those that the destination lacks."""

    destination: Destination
    pieces: tuple[ReleaseFile, ...]
    changed: tuple[ReleaseFile, ...]

    @property
    def pushed(self) -> Release:
        """The result after sending."""
        names = {piece.name for piece in self.changed}
        files = tuple(ReleasedFile(p.name, p.num_bytes, p.sha256, p.name in names) for p in self.pieces)
        return Release(self.destination.url, files, sum(piece.num_bytes for piece in self.changed))

    def send(self, watch: Watch = lambda name, num_bytes: None) -> Release:
        """Send the changed files. Raises `StoreError`; files that have arrived by then stay."""
        if self.changed:
            self.destination.send(self.changed, watch)
        return self.pushed


def push(
    run: Run,
    student: str,
    destination: str,
    *,
    private: bool = True,
    revision: str | None = None,
    dry_run: bool = False,
    anyway: bool = False,
) -> Release:
    """Send a student of a finished run to `hf://OWNER/NAME`, to a URL that fsspec can write, or to a local folder.

    `private` and `revision` (a branch) apply to the hub. `dry_run` checks everything, including the destination, and
    sends nothing. A student outside the release bounds of its recipe is refused unless `anyway`. Raises `UserError`.
    """
    ready = prepare(run, student, destination, private=private, revision=revision, anyway=anyway)
    return ready.pushed if dry_run else ready.send()


def prepare(
    run: Run,
    student: str,
    destination: str,
    *,
    private: bool = True,
    revision: str | None = None,
    anyway: bool = False,
) -> PreparedRelease:
    """All checks of `push`, without sending."""
    recipe = run.recipe
    manifest = _student(run, recipe, student)
    data = run.report_data()
    judged = data.retention.judgements.get(student)
    if judged is not None and not judged.releasable and not anyway:
        message = f"{student} does not meet the release bounds of its recipe: {' '.join(judged.reasons)}"
        raise UserError(message, "give --anyway to release it nevertheless")
    releasable, reasons = (judged.releasable, judged.reasons) if judged is not None else (None, ())
    target = _open(destination, private, revision)
    model = _model_files(run, manifest)
    facts = card_facts(
        recipe, run.store, run.manifests, student, files=[piece.name for piece in model],
        licence=_licence(run, recipe, model),
    )  # fmt: skip
    card = model_card(data, student, facts, repository=target.repository, releasable=releasable, reasons=reasons)
    record = _record(run, student, data, facts, {"passed": releasable, "reasons": list(reasons)})
    written = _written(model, facts.recipe.to_yaml(), card, record)
    return PreparedRelease(target, (*model, *written), _changed(target, model, written))


def _student(run: Run, recipe: Recipe, student: str) -> Manifest:
    if "report" not in run.manifests:
        raise StoreError(f"run {run.name} is incomplete: its report is not in {run.store.url}", "run its recipe again")
    known = [name for name in (*recipe.train.arms, *recipe.merged) if student_manifest(run.manifests, name)]
    manifest = student_manifest(run.manifests, student) if student in known else None
    if manifest is None:
        raise StoreError(f"run {run.name} has no student {student!r}", f"it has {', '.join(known) or 'none'}")
    return manifest


def _open(destination: str, private: bool, revision: str | None) -> Destination:
    if destination.startswith(SCHEME):
        return Repository(destination, private=private, revision=revision)
    if not private:
        raise UserError(
            "--public applies only to the Hugging Face Hub",
            f"set the permissions of {Folder(destination).url} yourself",
        )
    if revision is not None:
        raise UserError("revision applies only to the Hugging Face Hub", "leave it out, or push to hf://OWNER/NAME")
    return Folder(destination)


def _model_files(run: Run, manifest: Manifest) -> tuple[ReleaseFile, ...]:
    """The student's files, each compared with its digest. Raises `StoreError` for a damaged file or a link outside."""
    directory = run.store.path(manifest.address)
    pieces = []
    for name, entry in manifest.files.items():
        if not (name in ("config.json", INDEX_FILE) or name.endswith(".safetensors") or is_companion(name)):
            continue
        path = directory / name
        if not _is_inside(path, directory) or file_digest(path) != entry.sha256:
            message = f"{manifest.address} is damaged: {name} does not match its digest"
            raise StoreError(message, "remove that folder and run the recipe again")
        pieces.append(ReleaseFile(name, entry.num_bytes, entry.sha256, path))
    names = {piece.name for piece in pieces}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise StoreError(f"{manifest.address} has no model to release", "`sdft show NAME` lists the students of a run")
    return tuple(pieces)


def _is_inside(path: Path, directory: Path) -> bool:
    """Whether it is a regular file inside the directory, not a link, whatever its name in the manifest."""
    try:
        return stat.S_ISREG(path.lstat().st_mode) and path.resolve().is_relative_to(directory.resolve())
    except OSError:
        return False


def _written(model: Sequence[ReleaseFile], recipe: str, card: str, record: dict[str, Any]) -> tuple[ReleaseFile, ...]:
    """Recipe, card and record, in this order: the record lists the digests of all other files."""
    texts = (ReleaseFile.of_text(RECIPE, recipe), ReleaseFile.of_text(CARD, card))
    files = {piece.name: {"sha256": piece.sha256, "num_bytes": piece.num_bytes} for piece in (*model, *texts)}
    complete = {**record, "student_sha256": _identity(model), "files": files}
    return (
        *texts,
        ReleaseFile.of_text(RECORD, json.dumps(complete, indent=1, ensure_ascii=False, allow_nan=False) + "\n"),
    )


def _licence(run: Run, recipe: Recipe, model: Sequence[ReleaseFile]) -> Licence | None:
    """The licence of the teacher; if the teacher has a licence file, the student's files include a copy."""
    origin = teacher_origin(recipe, run.manifests)
    teacher = Path(recipe.teacher.model)
    folders = [teacher] if teacher.is_absolute() else []
    config = next(piece.content for piece in model if piece.name == "config.json")
    assert isinstance(config, Path)
    return find_licence([*folders, config.parent], origin.name or None, origin.commit or None)


def _record(run: Run, student: str, data: ReportData, facts: CardFacts, release: dict[str, Any]) -> dict[str, Any]:
    """The content of the model card as JSON values; fractions are in [0, 1]."""
    recovery, retention = data.recovery.get(student), data.retention.students.get(student)
    report = run.manifests["report"]
    return {
        "run": run.name,
        "student": student,
        "created": report.created,
        "teacher": _known(facts.teacher),
        "seed_set": _known(facts.seed_set),
        "release": release,
        "recovery": _recovery_json(recovery) if recovery else None,
        "recovery_chance_corrected": plain(retention.chance_corrected.mean) if retention else None,
        "scores": {model: _scores(facts, model) for model in ("teacher", "pruned", student) if model in facts.scores},
        "sizes": data.sizes.model_dump() if data.sizes else None,
        "selection": data.selection,
        "addresses": {step: manifest.address for step, manifest in run.manifests.items()},
        "versions": dict(facts.versions),
    }


def _recovery_json(recovery: Recovery) -> dict[str, Any]:
    parts = {name: plain(getattr(recovery, name)) for name in ("mean", "tasks", "tuned", "off_domain")}
    return {**parts, "min": recovery.min.value}


def _known(origin: Origin) -> dict[str, str]:
    return {name: value for name, value in asdict(origin).items() if value}


def _scores(facts: CardFacts, model: str) -> dict[str, Any]:
    fields = ("metric", "filter", "num_fewshot", "value", "stderr", "n", "chance")
    return {
        task: {
            **{name: getattr(score, name) for name in fields},
            "written": asdict(score.written) if score.written else None,
        }
        for task, score in facts.scores[model].tasks.items()
    }


def _identity(model: Sequence[ReleaseFile]) -> str:
    """One digest of all model files, equal for equal students."""
    return fingerprint({piece.name: piece.sha256 for piece in model})


def _changed(
    target: Destination, model: Sequence[ReleaseFile], written: Sequence[ReleaseFile]
) -> tuple[ReleaseFile, ...]:
    """The pieces to send. Raises `StoreError` if the destination has files that do not belong to this student.

    A text that a push writes (recipe, card) may be replaced if it is unchanged since the last push, by its record.
    """
    pieces = (*model, *written)
    there = set(target.names())
    foreign = sorted(there - {piece.name for piece in pieces})
    if foreign:
        raise _other(target, f"{foreign[0]} does not belong to this student")
    changed = tuple(piece for piece in pieces if piece.name not in there or not target.holds(piece))
    differing = {piece.name for piece in changed} & there
    if other := sorted(differing & {piece.name for piece in model}):
        raise _other(target, f"{other[0]} differs")
    recorded = _recorded(target, _identity(model)) if RECORD in there else {}
    for name in sorted(differing - {RECORD}):
        if hashlib.sha256(target.read(name)).hexdigest() != recorded.get(name, {}).get("sha256"):
            message = f"{name} in {target.url} was changed after the last push"
            raise StoreError(message, "copy it to another place and remove it there, then push again")
    return changed


def _recorded(target: Destination, identity: str) -> dict[str, Any]:
    """The files of the last push of this student to the destination, from its record: name -> size and digest."""
    text = target.read(RECORD)
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if not isinstance(record, dict) or record.get("student_sha256") != identity:
        raise _other(target, f"{RECORD} belongs to another student")
    return record["files"] if isinstance(record.get("files"), dict) else {}


def _other(target: Destination, why: str) -> StoreError:
    return StoreError(f"{target.url} has other content: {why}", "choose an empty destination or a new name")
