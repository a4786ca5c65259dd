"""Release a student: weights, config and tokenizer as they are, with a model card, to the hub or a folder.

Nothing is sent before every file agrees with its digest, and nothing that a destination holds is replaced unless it is
this very student. The record `sdft_recovery.json` is written last, so that a push which was cut off shows: push again,
and what arrived is not sent twice. On the hub all files come in one commit.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sdft_ray.errors import StoreError, UserError
from sdft_ray.models.licence import Licence, find_licence
from sdft_ray.pipeline.run import Run
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.release.card_facts import CardFacts, Origin, card_facts, teacher_origin
from sdft_ray.release.folder import Folder
from sdft_ray.release.hub import SCHEME, Repository
from sdft_ray.release.model_card import model_card
from sdft_ray.release.piece import Destination, Piece, Watch
from sdft_ray.report.run.model import ReportData
from sdft_ray.report.run.training import student_manifest
from sdft_ray.store.fingerprint import file_digest, fingerprint
from sdft_ray.store.manifest import Manifest

CARD, RECIPE, RECORD = "README.md", "sdft_recipe.yaml", "sdft_recovery.json"
_GIVEN_AWAY = (
    "*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
    "additional_chat_templates/*", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""What of a student's artifact is the model; its training history, for one, is not."""


@dataclass(frozen=True)
class SentFile:
    """A file of a release. `sent` is False where the destination holds it already."""

    name: str
    num_bytes: int
    sha256: str
    sent: bool


@dataclass(frozen=True)
class Pushed:
    """Where a student lies now. `num_bytes` counts the files that were sent."""

    url: str
    files: tuple[SentFile, ...]
    num_bytes: int


@dataclass(frozen=True)
class Prepared:
    """A release that is checked and ready: `pieces` in the order of sending, of which `changed` are to be sent."""

    destination: Destination
    pieces: tuple[Piece, ...]
    changed: tuple[Piece, ...]

    @property
    def pushed(self) -> Pushed:
        """What there is once it is sent."""
        names = {piece.name for piece in self.changed}
        files = tuple(SentFile(p.name, p.num_bytes, p.sha256, p.name in names) for p in self.pieces)
        return Pushed(self.destination.url, files, sum(piece.num_bytes for piece in self.changed))

    def send(self, watch: Watch = lambda name, num_bytes: None) -> Pushed:
        """Raises `StoreError`; what arrived until then stays."""
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
) -> Pushed:
    """Send a student of a finished run to `hf://OWNER/NAME`, to a URL that fsspec can write, or to a local folder.

    `private` and `revision` (a branch) are for the hub. `dry_run` checks everything, the destination included, and
    sends nothing. A student that missed the release bounds of its recipe is refused, unless `anyway`. Raises
    `UserError`.
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
) -> Prepared:
    """All of `push` but the sending."""
    recipe = run.recipe
    manifest = _student(run, recipe, student)
    data = run.report_data()
    judged = data.retention.judgements.get(student)
    if judged is not None and not judged.releasable and not anyway:
        told = f"{student} did not meet the release bounds of its recipe: {' '.join(judged.reasons)}"
        raise UserError(told, "say --anyway to release it")
    releasable, reasons = (judged.releasable, judged.reasons) if judged is not None else (None, ())
    place = _open(destination, private, revision)
    model = _model_files(run, manifest)
    facts = card_facts(
        recipe, run.store, run.manifests, student, files=[piece.name for piece in model],
        licence=_licence(run, recipe, model),
    )  # fmt: skip
    card = model_card(data, student, facts, repository=place.repository, releasable=releasable, reasons=reasons)
    record = _record(run, student, data, facts, {"passed": releasable, "reasons": list(reasons)})
    written = _written(model, facts.recipe.to_yaml(), card, record)
    return Prepared(place, (*model, *written), _changed(place, model, written))


def _student(run: Run, recipe: Recipe, student: str) -> Manifest:
    if "report" not in run.manifests:
        raise StoreError(f"run {run.name} is not whole: its report is not in {run.store.url}", "run the recipe again")
    known = [name for name in (*recipe.train.arms, *recipe.merged) if student_manifest(run.manifests, name)]
    manifest = student_manifest(run.manifests, student) if student in known else None
    if manifest is None:
        raise StoreError(f"run {run.name} has no student {student!r}", f"it has {', '.join(known) or 'none'}")
    return manifest


def _open(destination: str, private: bool, revision: str | None) -> Destination:
    if destination.startswith(SCHEME):
        return Repository(destination, private=private, revision=revision)
    if not private:
        raise UserError("--public is for the hub", f"who may read {Folder(destination).url} is set where it lies")
    if revision is not None:
        raise UserError("a revision is for the hub", "leave it out, or push to hf://OWNER/NAME")
    return Folder(destination)


def _model_files(run: Run, manifest: Manifest) -> tuple[Piece, ...]:
    """The student's files, each compared with its digest. Raises `StoreError` for one that is damaged or strays."""
    directory = run.store.path(manifest.address)
    pieces = []
    for name, entry in manifest.files.items():
        if not any(PurePosixPath(name).match(pattern) for pattern in _GIVEN_AWAY):
            continue
        path = directory / name
        if not _lies_in(path, directory) or file_digest(path) != entry.sha256:
            told = f"{manifest.address} is damaged: {name} differs from its digest"
            raise StoreError(told, "remove that folder and run the recipe again")
        pieces.append(Piece(name, entry.num_bytes, entry.sha256, path))
    names = {piece.name for piece in pieces}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise StoreError(f"{manifest.address} holds no model to release", "see sdft show")
    return tuple(pieces)


def _lies_in(path: Path, directory: Path) -> bool:
    """Whether it is an ordinary file that really is in the directory, whatever the manifest calls it."""
    try:
        return stat.S_ISREG(path.lstat().st_mode) and path.resolve().is_relative_to(directory.resolve())
    except OSError:
        return False


def _written(model: Sequence[Piece], recipe: str, card: str, record: dict[str, Any]) -> tuple[Piece, ...]:
    """Recipe, card and record, in this order: the record says what the others were."""
    made = (Piece.of_text(RECIPE, recipe), Piece.of_text(CARD, card))
    files = {piece.name: {"sha256": piece.sha256, "num_bytes": piece.num_bytes} for piece in (*model, *made)}
    whole = {**record, "student_sha256": _identity(model), "files": files}
    return (*made, Piece.of_text(RECORD, json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n"))


def _licence(run: Run, recipe: Recipe, model: Sequence[Piece]) -> Licence | None:
    """The teacher's: the student's files hold a copy of its licence where it has one."""
    origin = teacher_origin(recipe, run.manifests)
    teacher = Path(recipe.teacher.model)
    folders = [teacher] if teacher.is_absolute() else []
    here = next(piece.content for piece in model if piece.name == "config.json")
    assert isinstance(here, Path)
    return find_licence([*folders, here.parent], origin.name or None, origin.commit or None)


def _record(run: Run, student: str, data: ReportData, facts: CardFacts, release: dict[str, Any]) -> dict[str, Any]:
    """What the card says, for machines; fractions are in [0, 1]."""
    recovered, kept = data.recovery.get(student), data.retention.students.get(student)
    made = run.manifests["report"]
    return {
        "run": run.name,
        "student": student,
        "created": made.created,
        "teacher": _known(facts.teacher),
        "seed_set": _known(facts.seed_set),
        "release": release,
        "recovery": recovered.model_dump() if recovered else None,
        "recovery_chance_corrected": kept.chance_corrected.mean.model_dump() if kept else None,
        "scores": {model: _scores(facts, model) for model in ("teacher", "pruned", student) if model in facts.scores},
        "sizes": data.sizes.model_dump() if data.sizes else None,
        "selection": data.selection,
        "addresses": {step: manifest.address for step, manifest in run.manifests.items()},
        "versions": dict(facts.versions),
    }


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


def _identity(model: Sequence[Piece]) -> str:
    """One digest of all model files: two students are the same where it is."""
    return fingerprint({piece.name: piece.sha256 for piece in model})


def _changed(place: Destination, model: Sequence[Piece], written: Sequence[Piece]) -> tuple[Piece, ...]:
    """What is to be sent. Raises `StoreError` where something else than (a part of) this student lies there.

    Of the texts that a push writes, one may be replaced if it is as the last push to there left it, by its record.
    """
    pieces = (*model, *written)
    there = set(place.names())
    stray = sorted(there - {piece.name for piece in pieces})
    if stray:
        raise _other(place, f"{stray[0]} is no part of this student")
    changed = tuple(piece for piece in pieces if piece.name not in there or not place.holds(piece))
    differing = {piece.name for piece in changed} & there
    if spoilt := sorted(differing & {piece.name for piece in model}):
        raise _other(place, f"{spoilt[0]} differs")
    recorded = _recorded(place, _identity(model)) if RECORD in there else {}
    for name in sorted(differing - {RECORD}):
        if hashlib.sha256(place.read(name)).hexdigest() != recorded.get(name, {}).get("sha256"):
            told = f"{name} in {place.url} was not written by the last push"
            raise StoreError(told, "keep a copy of it elsewhere and remove it there, then push again")
    return changed


def _recorded(place: Destination, identity: str) -> dict[str, Any]:
    """The files of the last push of this student to there, as its record lists them."""
    text = place.read(RECORD)
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if not isinstance(record, dict) or record.get("student_sha256") != identity:
        raise _other(place, f"{RECORD} is of another student")
    return record["files"] if isinstance(record.get("files"), dict) else {}


def _other(place: Destination, why: str) -> StoreError:
    return StoreError(f"{place.url} holds something else: {why}", "choose an empty destination, or a new name")
