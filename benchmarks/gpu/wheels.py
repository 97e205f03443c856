"""What a bare GPU machine lacks for `python -m benchmarks.gpu`, brought as wheels.

    python -m benchmarks.gpu.wheels gather FOLDER       # with a network
    python -m benchmarks.gpu.wheels put FOLDER TARGET   # there, without

The machine has Python 3.12, torch, Triton and what they need; it may have another
transformers. Axolotl and what a run imports of it come in the releases of
requirements.txt. Only the standard library and pip are used here.
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

# In the releases of requirements.txt.
STACK = [
    *("axolotl", "transformers", "tokenizers", "trl", "peft", "datasets"),
    *("megatron-core", "torchao", "kernels", "fsspec", "dill", "multiprocess"),
    *("pydantic", "pydantic_core", "annotated-types", "typing-inspection"),
    *("typing_extensions", "addict", "fire", "termcolor", "evaluate", "posthog"),
    *("backoff", "distro", "python-dotenv", "fastcore", "pytest"),
    # The loss head is compared with it.
    "liger_kernel",
]
# Published as sources, built here.
SOURCES = ["axolotl-contribs-lgpl", "axolotl-contribs-mit"]
# Other losses over a vocabulary, for the loss head's comparison; in no requirement.
PEERS = ["cut-cross-entropy==25.1.1", "verl==0.9.1"]
# Imported by Axolotl at the head of its files, used by no run of the check, and large.
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


def pins(path: Path = ROOT / "requirements.txt") -> dict[str, str]:
    """The releases that requirements.txt names, by package."""
    found = re.findall(r"^([\w.-]+)==([\w.]+)", path.read_text(), re.MULTILINE)
    return dict(found)


def pinned(names: list[str]) -> list[str]:
    """`name==release` of packages in requirements.txt."""
    releases = pins()
    return [f"{name}=={releases[name]}" for name in names]


def pip(*arguments: str | Path) -> None:
    """Run this interpreter's pip."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*command, *map(str, arguments)], check=True)


def gather(folder: Path) -> None:
    """Fill a folder with wheels for Python 3.12 on x86-64 Linux; needs a network.

    Raises:
        SystemExit: they are more than MAX_BYTES.
    """
    wheels = pinned(STACK) + PEERS
    print(f"Fetching {len(wheels)} wheels into {folder}.", flush=True)
    tags = ("manylinux2014", "manylinux_2_24", "manylinux_2_28")
    platforms = [f"--platform={tag}_x86_64" for tag in tags]
    only = ["--only-binary=:all:", "--python-version=3.12", *platforms]
    pip("download", "--quiet", "--no-deps", *only, "--dest", folder, *wheels)
    print(f"Building {', '.join(SOURCES)}.", flush=True)
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", folder, *pinned(SOURCES))
    check_size(folder)


def check_size(folder: Path, max_bytes: int = MAX_BYTES) -> None:
    """Print what each wheel weighs; stop where all are more than `max_bytes`."""
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.whl")}
    for name, size in sorted(sizes.items(), key=lambda item: item[1]):
        print(f"{size / 2**20:7.2f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total / 2**20:7.2f} MiB in {len(sizes)} wheels")
    if total > max_bytes:
        sys.exit(
            f"{folder} holds {total / 2**20:.1f} MiB of wheels, more than "
            f"{max_bytes / 2**20:.0f}. Remove what an earlier gather left there, or "
            "leave the largest out of STACK or PEERS in benchmarks/gpu/wheels.py."
        )


def put(folder: Path, target: Path) -> None:
    """Unpack the wheels, write the stubs and declare the plugin; needs no network.

    Raises:
        SystemExit: `folder` holds no wheel.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        sys.exit(f"{folder} holds no wheel. Fill it with `gather {folder}` first.")
    start = time.monotonic()
    alone = ["--no-index", "--no-deps", "--no-compile", "--upgrade"]
    pip("install", "--quiet", *alone, "--target", target, *wheels)
    for name in STUBS:
        is_package = any(other.startswith(f"{name}/") for other in STUBS)
        path = target / (f"{name}/__init__.py" if is_package else f"{name}.py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(STUB)
    declare_plugin(target)
    seconds = time.monotonic() - start
    print(f"# {len(wheels)} wheels and {len(STUBS)} stubs in {seconds:.0f} s")
    print(f"export PYTHONPATH={target.resolve()}")


def declare_plugin(target: Path) -> None:
    """The entry points of setup.cfg, as an installation of this checkout has them."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    points = setup["options.entry_points"]
    folder = target / "axolotl_psft-0.dist-info"
    folder.mkdir(exist_ok=True)
    metadata = "Metadata-Version: 2.1\nName: axolotl_psft\nVersion: 0\n"
    (folder / "METADATA").write_text(metadata)
    text = "".join(f"[{group}]{points[group]}\n" for group in points)
    (folder / "entry_points.txt").write_text(text)


def main() -> None:
    summary, usage = (__doc__ or "").split("\n\n", maxsplit=1)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.wheels",
        description=summary,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=["gather", "put"])
    parser.add_argument("folder", type=Path, help="of the wheels")
    parser.add_argument("target", type=Path, nargs="?", help="where put unpacks them")
    arguments = parser.parse_args()
    if (arguments.target is None) == (arguments.action == "put"):
        parser.error("put takes FOLDER TARGET, gather takes FOLDER alone")
    if arguments.action == "gather":
        gather(arguments.folder)
    else:
        put(arguments.folder, arguments.target)


if __name__ == "__main__":
    main()
