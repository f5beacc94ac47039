"""The base of every configuration class: frozen, and strict about unknown keys."""

from pydantic import BaseModel, ConfigDict


class StrictConfig(BaseModel):
    """A frozen configuration whose unknown keys and bad values are errors that name the key."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)
