"""Train and evaluate SAM-Path with Dynamic Focal Attention, and compare it with its baselines.

python -m train prepare synthetic DATA     write a data set
python -m train prepare bcss SOURCE DATA   write one from published files (also crag, bdsa)
python -m train check DATA                 validate one
python -m train fit PRESET --data DATA     train a checkpoint
python -m train import-sampath PRESET CKPT RUN --data DATA
                                           convert a SAM-Path checkpoint
python -m train evaluate RUN --data DATA   score it
python -m train compare PRESET --data DATA train and report the paper's comparison
python -m train pretrain PRESET --data SLIDES --out RUN
                                           pretrain an encoder across magnifications
python -m train magnification PRESET --data SLIDES --out OUT
                                           compare encoders across magnifications
"""

import inspect
import os
import signal
import sys
from typing import Annotated, Any, Never

import tyro

from serve.contract.errors import FocalPathError as ServeError
from serve.contract.errors import message_of
from serve.contract.interrupts import ending_signals, safe_interrupts
from serve.contract.printing import printing
from train.commands.comparison import Compare, RowChoice
from train.commands.data import Check, Prepare, prepare_command
from train.commands.fitting import Evaluate, Fit, ImportSampath, Predict
from train.commands.presets import choices, read_config, with_biases
from train.commands.pretraining import Magnification, Pretrain
from train.comparison.methods import all_rows
from train.errors import FocalPathError
from train.model.class_bias import STRATEGIES
from train.settings import BiasName, Settings


def _commands(config: Settings | None) -> Any:
    """All subcommands; those of `prepare` are as many as there are converters now."""
    fit, compare = Fit.command(config), Compare.command(config)
    import_sampath = ImportSampath.command(config)
    return (
        Annotated[prepare_command(), tyro.conf.subcommand("prepare", description=Prepare.__doc__)]
        | Annotated[Check, tyro.conf.subcommand("check")]
        | Annotated[fit, tyro.conf.subcommand("fit", description=with_biases(Fit))]
        | Annotated[
            import_sampath,
            tyro.conf.subcommand("import-sampath", description=inspect.getdoc(ImportSampath)),
        ]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Predict, tyro.conf.subcommand("predict")]
        | Annotated[compare, tyro.conf.subcommand("compare", description=with_biases(Compare))]
        | Annotated[Pretrain, tyro.conf.subcommand("pretrain")]
        | Annotated[Magnification, tyro.conf.subcommand("magnification")]
    )


class _Ended(KeyboardInterrupt):
    """A signal of `ending_signals`, handled as Ctrl-C is."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _end(number: int, _: object) -> Never:
    raise _Ended(number)


def _after_interrupt(command: object) -> str:
    """What an interrupted command leaves behind, and how to continue."""
    match command:
        case Fit(out=out) | Pretrain(out=out) if (last := out / "last.ckpt").is_file():
            return f"add --resume to continue from {last}, the last finished epoch"
        case Fit() | Pretrain():
            return "no epoch was finished, so there is nothing to resume"
        case Compare():
            return "repeat the command to continue; finished runs are not repeated"
        case Prepare():
            return "a data set is written whole or not at all"
    return "repeat the command"


def _parsed(arguments: list[str]) -> Any:
    """The command that the arguments name."""
    settings, arguments = read_config(arguments)
    return tyro.cli(
        _commands(settings),
        args=arguments,
        prog="python -m train",
        description=(__doc__ or "").partition("\n")[0],
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.OmitSubcommandPrefixes,
            tyro.conf.CascadeSubcommandArgs,
        ),
        registry=choices({BiasName: list(STRATEGIES), RowChoice: list(all_rows())}),
    )


@printing()
def main() -> None:
    """Run one command; a user's mistake ends with one line and exit status 1.

    An interrupt ends with one line and the shell's status for its signal.
    """
    for number in ending_signals():
        signal.signal(number, _end)
    command = None
    try:
        with safe_interrupts():
            command = _parsed(sys.argv[1:])
            command.run()
    except (FocalPathError, ServeError) as error:  # of a file that serving's code reads
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.filename is None:  # of no file that the user could look at
            raise
        sys.exit(f"error: {message_of(error)}")
    except BaseException as error:
        interrupt = _interrupt_before(error)
        if interrupt is None:
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"interrupted; {_after_interrupt(command)}", file=sys.stderr)
        sys.exit(128 + (interrupt.number if isinstance(interrupt, _Ended) else signal.SIGINT))


def _interrupt_before(error: BaseException | None) -> KeyboardInterrupt | None:
    """The interrupt that led to an error, if any.

    Lightning turns it into exit status 1, and torch into an error where the processes that load
    tiles got the signal, too.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error
