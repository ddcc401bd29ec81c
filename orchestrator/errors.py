"""What only a control plane can run into; the root of the hierarchy is `launch.errors.TuneyardError`."""

from __future__ import annotations

from launch.errors import ContractError, DataError, SpecError, SpecErrors, TuneyardError

__all__ = [
    "ConflictError",
    "ContractError",
    "DataError",
    "DoctorError",
    "DoesNotFitError",
    "ExecutorError",
    "IllegalTransitionError",
    "ImpossibleGangError",
    "LeaseLostError",
    "NotFoundError",
    "SettingsError",
    "SpecError",
    "SpecErrors",
    "StoreError",
    "TuneyardError",
    "UnauthorizedError",
    "YardError",
]


class NotFoundError(TuneyardError):
    """No such job, attempt or rank."""

    code = "not-found"


class ConflictError(TuneyardError):
    """The thing exists, but not in a state in which this can be done to it."""

    code = "conflict"


class ImpossibleGangError(SpecError):
    """No placement on this cluster, even an idle one, holds the gang: it would wait for ever."""

    code = "impossible-gang"


class DoesNotFitError(SpecError):
    """No node of this cluster, even an idle one, has the memory that the job needs: it would wait for ever."""

    code = "does-not-fit"


class IllegalTransitionError(TuneyardError):
    """A bug in the control plane: a state was asked to become one that its table does not allow."""

    code = "illegal-transition"


class LeaseLostError(TuneyardError):
    """Another controller acts on this database; this one must not."""

    code = "lease-lost"


class StoreError(TuneyardError):
    """The database cannot be used: absent, unreachable, or of another version."""

    code = "database"


class ExecutorError(TuneyardError):
    """Processes could not be started, reached or ended."""

    code = "executor"


class YardError(TuneyardError):
    """No yard answers, or it answers with an error of its own."""

    code = "yard-unreachable"


class UnauthorizedError(TuneyardError):
    """The token is missing or wrong."""

    code = "unauthorized"


class SettingsError(SpecError):
    """An environment variable of the yard has a value that it cannot have."""

    code = "bad-setting"


class DoctorError(TuneyardError):
    """Something this machine lacks stops Tuneyard from working."""

    code = "doctor"
