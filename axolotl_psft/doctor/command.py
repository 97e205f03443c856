"""`axolotl psft-doctor`: the command line, of which page.py does the work.

Axolotl imports this for its own --help, so nothing here imports torch.
"""

from typing import Any

import click
from axolotl.cli.config_options import AXOLOTL_CONFIG_CLI_OPTIONS
from axolotl.cli.utils.args import add_options_from_config_options, filter_none_kwargs


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--num-processes",
    type=click.IntRange(min=1),
    help="GPUs of the run, as in accelerate launch. Default: tensor_parallel_size.",
)
@add_options_from_config_options(AXOLOTL_CONFIG_CLI_OPTIONS)
@filter_none_kwargs
def doctor(config: str, num_processes: int = 1, **overrides: Any) -> None:
    """Check a YAML with a `psft:` block before it costs anything.

    Tells what is refused and what is warned of, which rows of local data files are at
    fault, how many samples, tokens, optimizer steps and windows an epoch has, whether
    the clip can act, and what memory and scoring take. Reads no weights. Tokenized data
    stay where the run will look for them.

    Keys of the YAML are overridden as in `axolotl train`: --learning-rate 1e-6.

    Exit status: 0, or 1 where something is WRONG.
    """
    from axolotl_psft.doctor.page import examine

    num_wrong = examine(config, num_processes, overrides)
    click.echo(f"\n{num_wrong or 'Nothing'} wrong.")
    raise SystemExit(bool(num_wrong))


for _option in doctor.params[2:]:
    # Some hundred: in --help nobody would find this command's own.
    _option.hidden = True  # type: ignore[attr-defined]
