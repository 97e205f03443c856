"""docs/gpu.md from the figures of a run on a GPU.

python -m benchmarks.gpu.report FOLDER [--output docs/gpu.md]
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any


def table(lines: list[dict[str, Any]]) -> str:
    """A Markdown table a step, and what failed."""
    parts = []
    steps = dict.fromkeys(line["step"] for line in lines if "step" in line)
    for step in steps:
        of_step = [line for line in lines if line.get("step") == step]
        parts.append("\n".join(_step(step, of_step)))
    misses = sum(line.get("verdict") == "MISS" for line in lines)
    failures = sum("failed" in line for line in lines)
    parts.append(f"{misses} missed, {failures} steps failed.")
    return "\n\n".join(parts)


def _step(step: str, lines: list[dict[str, Any]]) -> list[str]:
    seconds = sum(line.get("seconds", 0) for line in lines)
    out = [f"## {step} ({seconds:.0f} s)", "", "| what | measured | target | |"]
    out.append("| --- | --- | --- | --- |")
    for line in lines:
        if "what" in line:
            target = f"<= {_number(line['at_most'])}" if "at_most" in line else ""
            value = f"{_number(line['value'])} {line.get('unit', '')}".strip()
            verdict = line.get("verdict", "")
            out.append(f"| {line['what']} | {value} | {target} | {verdict} |")
        elif "failed" in line:
            out += ["", f"**Failed**: {_cause(line['failed'])}"]
    return out


def _cause(failed: str) -> str:
    """What stopped a step, and the error at the end of its log."""
    what, _, log = failed.partition(";")
    errors = re.findall(r"^\w+(?:Error|Exception|Interrupt)\b.*", log, re.MULTILINE)
    return "; ".join([what, *errors[-1:]])


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def document(lines: list[dict[str, Any]]) -> str:
    """The whole page."""
    head = lines[0]
    card = next(line["value"] for line in lines if line.get("what") == "card")
    return (
        "# What was seen on a GPU\n\n"
        f"`{head['command']}` on one {card}, {head['date']}. Every figure, "
        "misses too; `MISS` marks a target that was not met.\n\n" + table(lines) + "\n"
    )


def write(folder: Path, page: Path) -> None:
    """Make the page anew; what it says from the heading Notes on stays."""
    path = folder / "figures.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if "--rehearse" in lines[0]["command"]:
        sys.exit(f"{path}: a rehearsal's figures mean nothing; run it on a GPU.")
    before = page.read_text() if page.exists() else ""
    _, heading, notes = before.partition("\n## Notes\n")
    page.write_text(document(lines) + heading + notes)
    print(f"Written: {page}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/gpu.md"))
    args = parser.parse_args()
    write(args.folder, args.output)


if __name__ == "__main__":
    main()
