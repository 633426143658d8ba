"""Free memory: the system's own figure, and control groups' limits built in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastbyol.data import memory

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Simulate 8 GiB available, no limits, and this process in /jobs/mine."""
    (tmp_path / "meminfo").write_text(
        f"MemTotal: 1 kB\nMemAvailable:   {8 * GIB // 1024} kB\nHugePages_Total: 0\n"
    )
    (tmp_path / "own").write_text("1:cpu:/elsewhere\n0::/jobs/mine\n")
    (tmp_path / "groups/jobs/mine").mkdir(parents=True)
    for name, path in (("MEMINFO", "meminfo"), ("OWN_CGROUP", "own"), ("CGROUPS", "groups")):
        monkeypatch.setattr(memory, name, tmp_path / path)
    return tmp_path / "groups"


def limit(group: Path, most: str, used: int, cache: int) -> None:
    (group / "memory.max").write_text(most + "\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\nactive_file 7\n")


def test_without_limits_it_is_what_the_system_has(machine: Path) -> None:
    assert memory.available_bytes(CPU) == 8 * GIB
    limit(machine / "jobs", "max", 3 * GIB, 0)
    assert memory.available_bytes(CPU) == 8 * GIB


@pytest.mark.parametrize("group", ["", "jobs", "jobs/mine"])
def test_the_tightest_group_counts_and_its_page_cache_is_free(machine: Path, group: str) -> None:
    limit(machine / "jobs", str(7 * GIB), 0, 0)
    limit(machine / group, str(4 * GIB), 3 * GIB, GIB // 2)
    assert memory.available_bytes(CPU) == GIB + GIB // 2


def test_an_overdrawn_group_has_nothing(machine: Path) -> None:
    limit(machine / "jobs/mine", str(GIB), 2 * GIB, 0)
    assert memory.available_bytes(CPU) == 0


def test_a_system_without_groups(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "OWN_CGROUP", machine / "none")
    assert memory.available_bytes(CPU) == 8 * GIB


def test_this_machine_has_some() -> None:
    total = int(memory.MEMINFO.read_text().split()[1]) * 1024
    assert 2**20 < memory.available_bytes(CPU) <= total
