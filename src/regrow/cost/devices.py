"""Named devices with their rates, memory and prices, from `devices.yaml`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import yaml
from pydantic import Field

from regrow.config import Config, parse
from regrow.errors import UserError, unknown

TABLE = Path(__file__).with_name("devices.yaml")


class Device(Config):
    """One device; what is not known is None."""

    title: str
    memory_gb: float = Field(gt=0)
    """Memory in units of 10⁹ bytes."""
    usable: float = Field(default=0.95, gt=0, le=1)
    """Share of the memory that a model may take."""
    bf16_tflops: float | None = None
    """10¹² operations per second of dense bf16 matrix products."""
    fp8_tflops: float | None = None
    """10¹² operations per second of dense fp8 matrix products."""
    bandwidth_gb_s: float = Field(gt=0)
    """10⁹ bytes per second that the memory delivers."""
    link_gb_s: float | None = None
    """10⁹ bytes per second to another device of the node."""
    network_gb_s: float | None = None
    """10⁹ bytes per second and device to another node."""
    price_usd_hour: tuple[float, float] | None = None
    """Lowest and highest price of an hour."""
    sources: dict[str, str]
    """Where the figures are from, with dates."""

    @property
    def bytes(self) -> float:
        """Bytes that a model may take."""
        return self.memory_gb * 1e9 * self.usable

    def money(self, hours: float) -> tuple[float, float] | None:
        """Lowest and highest price of `hours` on one device, in US dollars; None if unknown."""
        if self.price_usd_hour is None:
            return None
        low, high = self.price_usd_hour
        return low * hours, high * hours


@cache
def devices(table: Path = TABLE) -> dict[str, Device]:
    """All devices of a table; raises UserError for a table that cannot be read."""
    try:
        fields = yaml.safe_load(table.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{table} is no table of devices: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{table} is no table of devices: write a name and its figures")
    return {str(name): parse(Device, each, f"{table.name}.{name}") for name, each in fields.items()}


def find(name: str, table: Path = TABLE) -> Device:
    """The device of that name; raises UserError when there is none."""
    known = devices(table)
    if name not in known:
        raise unknown("device", name, known)
    return known[name]
