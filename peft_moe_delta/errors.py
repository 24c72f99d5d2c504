"""Every error this package raises on purpose. Messages say what failed, what was expected, what to do."""


class PeftMoeDeltaError(ValueError):
    """Base of all errors of this package. A `ValueError`, as PEFT's own configuration errors are."""


class LanguageError(PeftMoeDeltaError):
    """A language is unknown, missing, or placed in the wrong group."""


class PlanError(PeftMoeDeltaError):
    """Expert counts, groups, `top_k` or layers do not fit together."""


class ArchitectureError(PeftMoeDeltaError):
    """The host model has no MLP block that can become experts, or its weights cannot be used as they are."""


class CheckpointError(PeftMoeDeltaError):
    """A file is missing, truncated, of the wrong shape, or belongs to another model."""


class GraftError(PeftMoeDeltaError):
    """A post-training delta cannot be applied, or the result would not be exact."""


class DataError(PeftMoeDeltaError):
    """A text file, a task file or a batch does not hold what its reader needs."""


class RecipeError(PeftMoeDeltaError):
    """A recipe file has an unknown field, a missing field or a value that cannot be used."""


class HubError(PeftMoeDeltaError):
    """The Hub refuses an upload, or cannot be reached."""


class CardError(PeftMoeDeltaError):
    """A model card would say what is not known to be true."""


class ServingError(PeftMoeDeltaError):
    """A server cannot be reached, fails, or cannot be started."""
