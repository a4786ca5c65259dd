"""The exception tree. A `UserError` can be corrected by the user; any other exception that escapes is a bug.

    SdftError
    ├── UserError (also a ValueError)       printed as one line with a next step; exit code 2
    │   ├── RecipeError                     the recipe: unknown field, wrong value, missing file
    │   │   └── DivergenceError             training diverged: values are not finite
    │   ├── ResourceError                   resources: too few CPUs, unknown accelerator, no memory
    │   ├── DataError                       seed or calibration set: empty, malformed, duplicate ids
    │   ├── ModelError                      checkpoint or tokenizer: corrupt, unsupported, mismatched
    │   ├── PlanError                       a pruning target that no plan meets
    │   ├── StoreError                      store: not writable, full, damaged, unknown address
    │   ├── EvaluationError                 tasks: unknown name, data not available
    │   └── ServeError                      the service: keys, addresses that it must not listen on
    └── StageError (also a RuntimeError)    a stage failed at run time; its finished work is kept

Exceptions cross process boundaries on a cluster, so all of them can be pickled with all their fields.
"""

from __future__ import annotations


class SdftError(Exception):
    """Base class of all exceptions that this package raises deliberately."""


class UserError(SdftError, ValueError):
    """An error that the user can correct. `message` says what is wrong, `hint` what to do next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} → {self.hint}" if self.hint else self.message


class RecipeError(UserError):
    """The recipe cannot be read, or has invalid values."""


class DivergenceError(RecipeError):
    """Training diverged: the loss or the weights are not finite."""


class ResourceError(UserError):
    """The available machines are too small for the work, even at its minimum."""


class DataError(UserError):
    """A seed or calibration set is missing, empty or malformed."""


class ModelError(UserError):
    """A checkpoint or tokenizer is corrupt, unsupported or does not match the other."""


class PlanError(UserError):
    """No pruning plan meets the target."""


class StoreError(UserError):
    """The artifact store cannot be read or written."""


class EvaluationError(UserError):
    """An evaluation task is unknown, or its data is not available."""


class ServeError(UserError):
    """A service cannot be started as configured, or would be open to anyone."""


class StageError(SdftError, RuntimeError):
    """A stage failed at run time. `stage` is its name; `__cause__` is the reason, if known.

    `hint` says what may help, "" where nobody knows. `log` is the file with what libraries printed, "" for none.
    """

    def __init__(self, stage: str, reason: str, hint: str = "", log: str = "") -> None:
        super().__init__(stage, reason, hint, log)
        self.stage = stage
        self.reason = reason
        self.hint = hint
        self.log = log

    def __str__(self) -> str:
        told = f"step {self.stage} failed: {self.reason}"
        return f"{told} (log: {self.log})" if self.log else told
