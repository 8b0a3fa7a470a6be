"""Print the tables of README: of operations and backends, from what was compiled and run; of speeds, from what
`pytest bench --benchmark-json=bench/results/<name>.json` recorded.
"""

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
    "20th to 80th",
    "times as fast as",
    "eager",
    "peak memory",
    "share of floor",
)


def span(seconds: float) -> str:
    """Return a time with three significant digits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def rows(document: dict[str, Any]) -> list[dict[str, str]]:
    """Return one row for each measurement: cells by column, without those that were not measured."""
    table = []
    for entry in document["benchmarks"]:
        info = entry["extra_info"]
        if "op" not in info:
            continue
        baselines = [key.removeprefix("ratio_to_") for key in info if key.startswith("ratio_to_")]
        row = {
            "operation": f"`{info['op']}`",
            "case": info["case"],
            "direction": DIRECTIONS.get(info["direction"], info["direction"]),
            "median": span(entry["stats"]["median"]),
            "20th to 80th": f"{span(info['p20_s'])} to {span(info['p80_s'])}",
            "times as fast as": ", ".join(against(info, baseline) for baseline in baselines),
        }
        sides = ["ours", *baselines]
        if "eager_s" in info:
            row["eager"] = " / ".join(span(info["eager_s"][side]) for side in sides if side in info["eager_s"])
        if "peak_bytes" in info:
            found = [info["peak_bytes"][side] / 2**20 for side in sides if side in info["peak_bytes"]]
            row["peak memory"] = " / ".join(f"{size:.3g}" for size in found) + " MiB"
        if "share_of_floor" in info:
            row["share of floor"] = f"{info['share_of_floor']:.0%}"
        table.append(row)
    return table


def against(info: dict[str, Any], baseline: str) -> str:
    """Return the ratio to a baseline, with its time, and its first call where it compiles."""
    words = f"{baseline.replace('_', ' ')} **{info[f'ratio_to_{baseline}']:.1f}x** ({span(info[baseline + '_s'])}"
    if "compile" in baseline:
        words += f", first call {info['first_call_s'][baseline]:.0f} s"
    return words + ")"


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
        lines[0] += (
            " Rows with eager times are replays of CUDA graphs on both sides; the others are eager. Where several "
            "sides have a number, ours is the first."
        )
    table = rows(document)
    head = [column for column in COLUMNS if any(column in row for row in table)]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row.get(column, "") for column in head) + " |" for row in table]
    notes = [entry["extra_info"]["note"] for entry in document["benchmarks"] if "note" in entry["extra_info"]]
    return "\n".join(lines + (["", " ".join(notes)] if notes else []))


def operations() -> str:
    """Return which backend has which operation, where, and what of it has been compiled and run, by the records."""
    from deepmsi import backend  # the GPU script reads this file before the package is built

    compiled = {
        name: {kernel["op"] for kernel in json.loads((RESULTS / f"{name}.json").read_text())["kernels"]}
        for name in ("aot", "nvcc")
    }
    ran: set[str] = set()
    on_gpu = RESULTS / "bench_gpu.json"
    if on_gpu.exists():
        ran = {entry["extra_info"].get("op", "") for entry in json.loads(on_gpu.read_text())["benchmarks"]}

    def on_a_gpu(op: str, *, done: str, compiler: str) -> str:
        if op not in compiled[compiler]:
            return ""
        return "forward, backward" if op in ran else f"{done}, not run"

    lines = ["| operation | reference | `cpp` on CPU | `cpp` on CUDA | `triton` |", "|---|---|---|---|---|"]
    for op in backend.OPS:
        kernel = backend.KERNELS.get((op, "cpp"))
        cpu = ""
        if kernel is not None and "cpu" in kernel.devices:
            cpu = f"forward, backward; {', '.join(str(dtype).removeprefix('torch.') for dtype in kernel.dtypes)}"
        cuda = on_a_gpu(op, done="compiled", compiler="nvcc")
        triton = on_a_gpu(op, done="interpreted, compiled", compiler="aot")
        lines.append(f"| `{op}` | forward, backward | {cpu} | {cuda} | {triton} |")
    return "\n".join(lines)


def put(page: str, section: str, text: str) -> str:
    """Return a page with the text between the markers of a section."""
    begin, end = f"<!-- {section} -->", f"<!-- /{section} -->"
    if begin not in page or end not in page:
        raise SystemExit(f"the page has no section between {begin} and {end}")
    before, rest = page.split(begin, 1)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}"


def main() -> None:
    """Print the table of each result file, or write them between the markers of a Markdown file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="JSON files; default: all under bench/results")
    parser.add_argument("--into", type=Path, help="Markdown file whose `ops` and `bench` sections are replaced")
    arguments = parser.parse_args()
    files = arguments.files or sorted(RESULTS.glob("bench_*.json"))
    text = "\n\n".join(filter(None, (render(json.loads(f.read_text())) for f in files)))
    if arguments.into is None:
        print(text)
        return
    page = put(arguments.into.read_text(), "ops", operations())
    arguments.into.write_text(put(page, "bench", text))


if __name__ == "__main__":
    main()
