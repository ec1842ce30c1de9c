"""What tuners have in common: their options are immutable and an unknown key is an error."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class TunerOptions(BaseModel):
    """Options of a tuner."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
