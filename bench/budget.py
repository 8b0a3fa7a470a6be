"""The bytes that kernels may spill, by compiler and kernel, each with its reason: `aot_budget.json`.

They are those of the compiler's version that `results/` has a record of. Another one places registers otherwise, for
better and for worse: what its kernels spill beyond that is told, and is no fault.
"""

import json
from pathlib import Path

_HERE = Path(__file__).parent
_RECORDS = {"triton": "aot.json", "nvcc": "nvcc.json"}


class Budget:
    """What one compiler's kernels may spill.

    Attributes:
        told: A sentence for each kernel that spills more under another version than that of the record.
    """

    def __init__(self, compiler: str, version: str, recording: bool = False) -> None:
        self._allowed = json.loads((_HERE / "aot_budget.json").read_text())[compiler]
        recorded = json.loads((_HERE / "results" / _RECORDS[compiler]).read_text())[compiler]
        self._other = None if recording or version == recorded else recorded
        self._met: set[str] = set()
        self.told: list[str] = []

    def faults(self, kernel: str, spilled: int) -> list[str]:
        """Return a sentence where a kernel spills more bytes than it may."""
        entry = self._allowed.get(kernel, {"bytes": 0})
        if spilled:
            self._met.add(kernel)
        if spilled <= entry["bytes"]:
            return []
        sentence = f"{kernel}: spills {spilled} bytes, of which aot_budget.json allows {entry['bytes']}"
        if self._other is None:
            return [sentence]
        self.told.append(f"{sentence} under {self._other}; no fault of another version")
        return []

    def unused(self) -> list[str]:
        """Return a sentence for each entry whose kernel spilled nothing, once all kernels were seen."""
        return [
            f"{kernel}: spills nothing now; take it out of aot_budget.json"
            for kernel in self._allowed
            if kernel not in self._met
        ]
