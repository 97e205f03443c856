"""Axolotl's command line in a rank of a real launch, whose rank 1 gets a signal.

Arguments: the configuration, the signal's number, a file to touch with it.
"""

import os
import sys
from pathlib import Path
from typing import Any

from axolotl.cli.train import do_cli

from tests.faults import at_step


def main() -> None:
    config, number, mark = sys.argv[1:]

    def disturb(trainer: Any) -> None:
        Path(mark).touch()
        os.kill(os.getpid(), int(number))

    if os.environ["RANK"] == "1":
        at_step(6, "training_step", disturb)
    do_cli(config=config)


if __name__ == "__main__":
    main()
