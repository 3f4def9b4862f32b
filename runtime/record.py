"""The base of everything that is written into a manifest."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of all manifest records: closed, and immutable once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
