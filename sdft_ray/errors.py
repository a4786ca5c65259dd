"""The error tree. A user can mend a `UserError`; anything else that escapes is a defect of ours.

    SdftError
    ├── UserError (also a ValueError)       shown as one line with a next step; exit code 2
    │   ├── RecipeError                     the recipe: unknown field, wrong value, missing file
    │   │   └── DivergenceError             training that left the finite numbers
    │   ├── ResourceError                   resources: too few CPUs, unknown accelerator, no memory
    │   ├── DataError                       seed or calibration set: empty, malformed, duplicate ids
    │   ├── ModelError                      checkpoint or tokenizer: corrupt, unsupported, mismatched
    │   ├── PlanError                       a pruning target that nothing can meet
    │   ├── StoreError                      store: not writable, full, damaged, unknown address
    │   ├── EvaluationError                 tasks: unknown name, data that cannot be had
    │   └── ServeError                      the service: keys, addresses, what it may not listen on
    └── StageError (also a RuntimeError)    a stage failed while it ran; its finished work is kept

Errors cross process borders on a cluster, so every one survives pickling with all its fields.
"""

from __future__ import annotations


class SdftError(Exception):
    """Root of everything that this package raises on purpose."""


class UserError(SdftError, ValueError):
    """Something the user can mend. `message` says what is wrong, `hint` what to do next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} → {self.hint}" if self.hint else self.message


class RecipeError(UserError):
    """The recipe cannot be read, or says something that cannot be meant."""


class DivergenceError(RecipeError):
    """Training left the finite numbers."""


class ResourceError(UserError):
    """The machines at hand cannot carry the smallest plan."""


class DataError(UserError):
    """A seed or calibration set is missing, empty or malformed."""


class ModelError(UserError):
    """A checkpoint or tokenizer is corrupt, unsupported or does not fit its partner."""


class PlanError(UserError):
    """No pruning plan meets the target."""


class StoreError(UserError):
    """The artifact store cannot be read or written."""


class EvaluationError(UserError):
    """An evaluation task is unknown, or its data cannot be had."""


class ServeError(UserError):
    """A service cannot be set up as asked, or would be open to anyone."""


class StageError(SdftError, RuntimeError):
    """A stage failed while it ran. `stage` names it; `__cause__` holds the reason where it is known."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(stage, reason)
        self.stage = stage
        self.reason = reason

    def __str__(self) -> str:
        return f"stage {self.stage} failed: {self.reason}"
