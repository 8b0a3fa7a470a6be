"""The bytes that kernels may spill, by compiler and kernel, each with its reason: `aot_budget.json`."""

import json
from pathlib import Path


class Budget:
    """What one compiler's kernels may spill."""

    def __init__(self, compiler: str) -> None:
        self._allowed = json.loads(Path(__file__).with_name("aot_budget.json").read_text())[compiler]
        self._met: set[str] = set()

    def faults(self, kernel: str, spilled: int) -> list[str]:
        """Return a sentence where a kernel spills more bytes than it may."""
        entry = self._allowed.get(kernel, {"bytes": 0})
        if spilled:
            self._met.add(kernel)
        if spilled <= entry["bytes"]:
            return []
        return [f"{kernel}: spills {spilled} bytes, of which aot_budget.json allows {entry['bytes']}"]

    def unused(self) -> list[str]:
        """Return a sentence for each entry whose kernel spilled nothing, once all kernels were seen."""
        return [
            f"{kernel}: spills nothing now; take it out of aot_budget.json"
            for kernel in self._allowed
            if kernel not in self._met
        ]
