"""Energy: counters that begin anew, those that are parts of others, and none at all."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from regrow import stage_dir
from regrow.config import Config
from regrow.runtime import energy
from regrow.runtime.energy import Counter, Meter


class Nothing(Config):
    """A stage without fields."""


def zone(folder: Path, name: str, uj: int, size: int = 10_000_000) -> Path:
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{size}\n")
    return folder


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "powercap")
    monkeypatch.setattr(energy, "NVML", "no-such-library.so")
    return tmp_path / "powercap"


def test_packages_and_memory_are_counted_once(powercap: Path) -> None:
    package = zone(powercap / "intel-rapl:0", "package-0", 9_000_000)
    zone(powercap / "intel-rapl:0:0", "core", 5_000_000)
    memory = zone(powercap / "intel-rapl:0:1", "dram", 1_000_000)
    zone(powercap / "intel-rapl:1", "psys", 1_000_000)
    zone(powercap / "intel-rapl-mmio:0", "package-0", 9_000_000)
    meter = Meter()
    meter.start()
    (package / "energy_uj").write_text("9500000")
    meter.update()
    (package / "energy_uj").write_text("2000000")  # began anew at 10 J
    (memory / "energy_uj").write_text("1250000")
    energy = meter.stop()["energy"]
    assert energy["meters"] == ["RAPL package-0", "RAPL dram"]
    assert energy["joules"] == pytest.approx(0.5 + 2.5 + 0.25, abs=0.06)


def test_counters_are_read_during_the_work(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "EVERY", 0.01)
    values = iter([8.0, 2.0, 8.0, 2.0, *[2.0] * 10_000])  # two turns that two looks would miss
    monkeypatch.setattr(energy, "_rapl", lambda: [Counter("x", lambda: next(values), 10.0)])
    meter = Meter()
    meter.start()
    assert not meter.stopped.wait(0.3)
    assert meter.stop()["energy"]["joules"] == 4.0 + 6.0 + 4.0


def test_an_unreadable_counter_gives_no_figure(powercap: Path) -> None:
    broken = zone(powercap / "intel-rapl:0", "package-0", 1)
    (broken / "energy_uj").unlink()  # as for who is not root
    meter = Meter()
    meter.start()
    assert meter.stop() == {}


class Driver:
    """NVML of two GPUs, the second of which has no counter."""

    def __init__(self) -> None:
        self.millijoules = 5_000

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, number: int, handle: Any) -> int:  # noqa: N802
        handle._obj.value = number + 1
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, value: Any) -> int:  # noqa: N802
        if handle.value == 2:
            return 3  # not supported
        value._obj.value = self.millijoules
        return 0


def test_the_visible_gpus_are_counted(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    meter = Meter()
    meter.start()
    driver.millijoules += 2_500
    assert meter.stop() == {"energy": {"joules": 2.5, "meters": ["NVML GPU 0"]}}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    meter = Meter()
    meter.start()
    assert meter.stop() == {}


def test_a_stage_records_its_energy(powercap: Path, tmp_path: Path) -> None:
    package = zone(powercap / "intel-rapl:0", "package-0", 1_000_000)
    with stage_dir.StageDir(tmp_path / "out", "profile", Nothing(), {}):
        (package / "energy_uj").write_text("4000000")
    manifest = stage_dir.read(tmp_path / "out")
    assert manifest is not None
    assert manifest["energy"] == {"joules": 3.0, "meters": ["RAPL package-0"]}
    (package / "energy_uj").unlink()
    with stage_dir.StageDir(tmp_path / "other", "profile", Nothing(), {}):
        pass
    assert "energy" not in (stage_dir.read(tmp_path / "other") or {})
