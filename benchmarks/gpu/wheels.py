"""What a bare GPU machine lacks for `python -m benchmarks.gpu`, brought as wheels.

    python -m benchmarks.gpu.wheels gather FOLDER       # with a network
    python -m benchmarks.gpu.wheels put FOLDER TARGET   # there, without

The machine has torch, Triton and perhaps another transformers. What a run of Axolotl
imports comes in the releases of requirements.txt. Nothing but pip is needed here.
"""

import argparse
import configparser
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What may be carried to such a machine is 64 MiB, with the repository.
MAX_BYTES = 48 * 2**20

# In the releases of requirements.txt; the loss head is compared with liger_kernel.
STACK = [
    *("axolotl", "transformers", "tokenizers", "trl", "peft", "datasets", "kernels"),
    *("megatron-core", "torchao", "liger_kernel", "pydantic", "pydantic_core"),
    *("annotated-types", "typing-inspection", "typing_extensions", "fsspec", "dill"),
    *("multiprocess", "addict", "fire", "termcolor", "evaluate", "posthog", "backoff"),
    *("distro", "python-dotenv", "fastcore", "pytest"),
]
# Published as sources, built here.
SOURCES = ["axolotl-contribs-lgpl", "axolotl-contribs-mit"]
# More losses to compare the loss head with; in no requirement.
PEERS = ["cut-cross-entropy==25.1.1", "verl==0.9.1"]
# Large, imported at the head of Axolotl's files, used by no run of the check.
STUBS = ["wandb", "bitsandbytes", "bitsandbytes/functional", "bitsandbytes/nn"]

STUB = '''"""Stands for a package that is imported here and never used."""

__version__ = "0"


class _Unused(type):
    def __getattr__(cls, name):
        return __getattr__(name)


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Unused(name, (), {})
'''


def pinned(names: list[str]) -> list[str]:
    """`name==release` of packages that requirements.txt names."""
    text = (ROOT / "requirements.txt").read_text()
    releases = dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE))
    return [f"{name}=={releases[name]}" for name in names]


def pip(*arguments: str | Path) -> None:
    """Run this interpreter's pip, quietly; stop where it fails."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*command, *map(str, arguments)]).returncode:
        sys.exit(
            f"pip {arguments[0]} failed, see above. gather needs a network and an "
            "empty folder, put needs Python 3.12 on x86-64 Linux."
        )


def gather(folder: Path) -> None:
    """Fill a folder with wheels for Python 3.12 on x86-64 Linux; needs a network."""
    names = pinned(STACK) + PEERS
    print(
        f"Fetching {len(names)} wheels into {folder}, building {len(SOURCES)}.",
        flush=True,
    )
    only = ["--only-binary=:all:", "--python-version=3.12"]
    for tag in ("manylinux2014", "manylinux_2_24", "manylinux_2_28"):
        only.append(f"--platform={tag}_x86_64")
    pip("download", "--no-deps", *only, "--dest", folder, *names)
    pip("wheel", "--no-deps", "--wheel-dir", folder, *pinned(SOURCES))
    check_size(folder)


def check_size(folder: Path, max_bytes: int = MAX_BYTES) -> None:
    """Print each wheel's size; stop where all are more than `max_bytes`."""
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.whl")}
    for name, size in sorted(sizes.items(), key=lambda item: item[1]):
        print(f"{size / 2**20:7.2f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total / 2**20:7.2f} MiB in {len(sizes)} wheels")
    if total > max_bytes:
        sys.exit(
            f"{folder} holds more than {max_bytes / 2**20:.0f} MiB. Gather into an "
            "empty folder, or leave the largest out of STACK and PEERS."
        )


def put(folder: Path, target: Path) -> None:
    """Unpack wheels, write stubs and declare the plugin; needs no network."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        sys.exit(f"{folder} holds no wheel. Fill it with `gather {folder}` first.")
    start = time.monotonic()
    alone = ["--no-index", "--no-deps", "--no-compile", "--upgrade"]
    pip("install", *alone, "--target", target, *wheels)
    for name in STUBS:
        path = target / name / "__init__.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(STUB)
    declare_plugin(target)
    print(f"# {len(wheels)} wheels in {time.monotonic() - start:.0f} s")
    print(f"export PYTHONPATH={target.resolve()}")


def declare_plugin(target: Path) -> None:
    """The entry points of setup.cfg, as an installation of this checkout has them."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    points = setup["options.entry_points"]
    text = "".join(f"[{group}]{points[group]}\n" for group in points)
    folder = target / "axolotl_psft-0.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text("Name: axolotl_psft\nVersion: 0\n")
    (folder / "entry_points.txt").write_text(text)


def main() -> None:
    summary, usage = (__doc__ or "").split("\n\n", maxsplit=1)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.wheels",
        description=summary,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    for command in (gather, put):
        sub = commands.add_parser(command.__name__, help=command.__doc__)
        sub.add_argument("folder", type=Path, help="of the wheels")
        sub.set_defaults(command=command)
    commands.choices["put"].add_argument(
        "target", type=Path, help="where they are unpacked"
    )
    arguments = vars(parser.parse_args())
    arguments.pop("command")(**arguments)


if __name__ == "__main__":
    main()
