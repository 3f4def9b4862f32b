"""Sizes in bytes on the command line."""

from __future__ import annotations

import click


class _ByteSize(click.ParamType[int]):
    """A number of bytes, such as 4GiB or 500MB."""

    name = "size"
    UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}  # noqa: RUF012

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).strip().lower()
        number = text.rstrip("bgikm")
        try:
            return int(float(number) * self.UNITS[text[len(number) :]])
        except (ValueError, KeyError, OverflowError):
            self.fail(f"{value!r}: expected a number of bytes such as 4GiB or 500MB", param, ctx)


BYTES = _ByteSize()
