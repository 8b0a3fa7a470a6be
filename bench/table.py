"""Print the tables of README from what `pytest bench --benchmark-json=bench/results/<name>.json` recorded."""

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DIRECTIONS = {"forward_backward": "forward + backward", "training_step": "training step"}

# In this order; a column is left out where no row has it.
COLUMNS = (
    "operation",
    "case",
    "direction",
    "median",
    "20th to 80th, ms",
    "baseline",
    "ratio",
    "against compile",
    "eager",
    "peak memory",
    "share of floor",
)


def milliseconds(seconds: float) -> str:
    """Return a time in milliseconds with three significant digits."""
    return f"{seconds * 1e3:.3g} ms"


def rows(document: dict[str, Any]) -> list[dict[str, str]]:
    """Return one row for each measurement and baseline: cells by column, without those that were not measured."""
    table = []
    for entry in document["benchmarks"]:
        info = entry["extra_info"]
        if "op" not in info:
            continue
        compiled = {}
        if "ratio_to_compile" in info:
            seconds = info["first_call_s"]["compile"]
            compiled = {"against compile": f"**{info['ratio_to_compile']:.1f}x** (compiles in {seconds:.0f} s)"}
        measured = {
            "operation": f"`{info['op']}`",
            "case": info["case"],
            "direction": DIRECTIONS.get(info["direction"], info["direction"]),
            "median": milliseconds(entry["stats"]["median"]),
            "20th to 80th, ms": f"{info['p20_s'] * 1e3:.3g} to {info['p80_s'] * 1e3:.3g}",
        }
        keys = sorted(k for k in info if k.startswith("ratio_to_") and k != "ratio_to_compile")
        if not keys:
            table.append(measured)
        for key in keys:
            baseline = key.removeprefix("ratio_to_")
            first = f" (first call {info['first_call_s'][baseline]:.0f} s)" if baseline.endswith("_compiled") else ""
            row = {
                **measured,
                "baseline": f"{baseline} {milliseconds(info[baseline + '_s'])}{first}",
                "ratio": f"**{info[key]:.1f}x**",
                **compiled,
            }
            if "eager_s" in info:
                ours, theirs = info["eager_s"]["ours"], info["eager_s"][baseline]
                row["eager"] = f"{milliseconds(ours)} against {milliseconds(theirs)}"
            if "peak_bytes" in info:
                ours, theirs = (info["peak_bytes"][side] / 2**20 for side in ("ours", baseline))
                row["peak memory"] = f"{ours:.3g} against {theirs:.3g} MiB"
            if "share_of_floor" in info:
                row["share of floor"] = f"{info['share_of_floor']:.0%}"
            table.append(row)
    return table


def render(document: dict[str, Any]) -> str:
    """Return a Markdown table with a line that says on what it was measured."""
    measured = [e["extra_info"] for e in document["benchmarks"] if "device" in e["extra_info"]]
    if not measured:
        return ""
    where = measured[0]
    types = " and ".join(dict.fromkeys(info["dtype"] for info in measured))
    on_gpu = where["instruction_set"].startswith("sm_")
    settings = ("TF32" if where["tf32"] else "no TF32") if on_gpu else f"{where['threads']} threads"
    lines = [
        f"Measured on {where['device']}, {where['clock']}, {settings}, {where['instruction_set']}, {types}, "
        f"torch {where['torch']}, load {where['load']}, {document['datetime'][:10]}.",
        "",
    ]
    if any("eager_s" in info for info in measured):
        lines[0] += " Rows with eager times are replays of CUDA graphs on both sides; the others are eager."
    table = rows(document)
    head = [column for column in COLUMNS if any(column in row for row in table)]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row.get(column, "") for column in head) + " |" for row in table]
    notes = [entry["extra_info"]["note"] for entry in document["benchmarks"] if "note" in entry["extra_info"]]
    return "\n".join(lines + (["", " ".join(notes)] if notes else []))


def main() -> None:
    """Print the table of each result file, or write them between the markers of a Markdown file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="JSON files; default: all under bench/results")
    parser.add_argument("--into", type=Path, help="Markdown file whose `<!-- bench -->` section is replaced")
    arguments = parser.parse_args()
    files = arguments.files or sorted(RESULTS.glob("bench_*.json"))
    text = "\n\n".join(filter(None, (render(json.loads(f.read_text())) for f in files)))
    if arguments.into is None:
        print(text)
        return
    begin, end = "<!-- bench -->", "<!-- /bench -->"
    page = arguments.into.read_text()
    if begin not in page or end not in page:
        raise SystemExit(f"{arguments.into} has no section between {begin} and {end}")
    before, rest = page.split(begin, 1)
    arguments.into.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}")


if __name__ == "__main__":
    main()
