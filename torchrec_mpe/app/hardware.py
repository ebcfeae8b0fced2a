"""What machine this is, from what the operating system says."""

import platform
from pathlib import Path


def cpu_fields() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def cpu_name() -> str:
    """The processor's name, or at least its architecture."""
    return cpu_fields().get("model name") or platform.processor() or platform.machine()
