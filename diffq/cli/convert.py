"""`diffq convert`: a file of the earlier package to one of this."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffq.cli.common import (
    Subparsers,
    add_codec,
    add_command,
    check_output,
    megabytes,
    note,
    print_json,
    progress,
    say,
)
from diffq.errors import ConfigError
from diffq.reports.text import printable

if TYPE_CHECKING:
    from torch import nn

    from diffq.format.container import Codec
    from diffq.storage.writing import PathLike

_DESCRIPTION = """\
Reads what the earlier diffq package (0.1 to 0.2.4) saved, and writes a file of this one: the same
levels, bitwidths and ranges under the names of the model. Nothing in the old file is run. Such
files have no names, so the model is needed; it must list its parameters as it did then. They have
no buffers either: those are stored as the factory makes them.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "convert",
        run,
        "a file of the earlier diffq package to one of this",
        _DESCRIPTION,
        "diffq convert old.th new.diffq --model mymodels:make_model\n"
        "diffq convert package.th new.diffq --model mymodels:Net --key state\n"
        "diffq convert old.th new.diffq --model mymodels:Net --set min_size=0.2",
    )
    parser.add_argument("file", metavar="OLD", help="what the earlier package's state was saved to")
    parser.add_argument("out", metavar="NEW", help="the file to write, such as model.diffq")
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODULE:FACTORY",
        help="a function or class that makes the model without arguments; modules of the "
        "current directory are found, and are run",
    )
    parser.add_argument("--key", help="where the state is in the file, if nested, such as state")
    parser.add_argument(
        "--set",
        type=_pair,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of the earlier quantizer that the file does not hold, as JSON "
        "(repeatable)",
    )
    parser.add_argument(
        "--stand-in",
        action="append",
        default=[],
        metavar="MODULE.CLASS",
        help="a class that the file names and that is to be left out (repeatable)",
    )
    add_codec(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    check_output(args.out, args.file)
    with progress(args) as report:
        report(f"making {printable(args.model)}", 0, 0)
        model = make_model(args.model)
        report(f"converting {printable(args.file)}", 0, 0)
        summary = convert(
            args.file,
            args.out,
            model,
            key=args.key,
            settings=dict(args.set),
            stand_ins=args.stand_in,
            codec=args.codec,
        )
    if summary["buffers"]:
        names = printable(", ".join(summary["buffers"][:5])) + ", ..." * (
            len(summary["buffers"]) > 5
        )
        note(args, f"the old file holds no buffers; these are as the factory makes them: {names}")
    if args.json:
        print_json(summary)
    elif not args.quiet:
        say(
            f"{printable(args.out)}: {megabytes(summary['bytes'])}, {summary['tensors']} tensors, "
            f"{summary['quantized']} of them quantized"
        )
    return 0


def convert(
    source: PathLike | Mapping[str, Any],
    target: PathLike,
    model: nn.Module,
    *,
    key: str | None = None,
    settings: Mapping[str, Any] | None = None,
    stand_ins: Iterable[str] = (),
    codec: Codec = "rans",
) -> dict[str, Any]:
    """Writes a legacy state to a file of ours, atomically.

    Args:
        source: as in `load_legacy`.
        target: the file to write.
        model: a plain model of the architecture; it stays as it is.
        key: as in `load_legacy`.
        settings: as in `load_legacy`.
        stand_ins: as in `load_legacy`.
        codec: as in `diffq.save`.

    Returns:
        What was written: `file`, `bytes`, `tensors`, `quantized`, and the names of the
        `buffers`, which are those of the model.

    Raises:
        StateError: as in `load_legacy`.
        MismatchError: as in `load_legacy`, or the model has parametrizations.
        ConfigError: as in `load_legacy`.
        OSError: a file cannot be read or written.
    """
    from diffq.format.container import encode_parts
    from diffq.format.kinds.base import QuantizedRecord
    from diffq.storage.legacy.load import legacy_snapshot
    from diffq.storage.writing import write_file

    snapshot = legacy_snapshot(source, model, key=key, settings=settings, stand_ins=stand_ins)
    parts = encode_parts(snapshot.records, snapshot.aliases, codec=codec)
    size = write_file(target, parts)
    quantized = [r for r in snapshot.records.values() if isinstance(r, QuantizedRecord)]
    return {
        "file": os.fspath(target),
        "bytes": size,
        "tensors": len(snapshot.records),
        "quantized": len(quantized),
        "buffers": [name for name, _ in model.named_buffers() if name in snapshot.records],
    }


def make_model(spec: str) -> nn.Module:
    """What the factory of "module:factory" returns.

    Raises:
        ConfigError: there is no such module or factory, or it makes no model.
    """
    from torch import nn

    module_name, _, path = spec.partition(":")
    if not module_name or not path:
        raise ConfigError(f"--model must have the form module:factory, got {spec!r}.")
    here = os.getcwd()
    # An installed command does not look into the current directory by itself.
    sys.path.insert(0, here)
    try:
        factory: Any = import_module(module_name)
        for attribute in path.split("."):
            factory = getattr(factory, attribute)
        model = factory if isinstance(factory, nn.Module) else factory()
    except (Exception, SystemExit) as error:  # The module is the user's.
        raise ConfigError(
            f"--model {spec} must be a function or class that makes the model without "
            f"arguments, but it raised {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(here)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"--model {spec} must make a torch.nn.Module, got {type(model).__name__}."
        )
    return model


def _pair(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        raise argparse.ArgumentTypeError(
            f"needs the form NAME=VALUE with a JSON value, such as min_size=0.2, got {text!r}"
        ) from None
