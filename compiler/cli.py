"""The command line: parses, calls a verb, prints its report. Everything heavy is imported inside the commands."""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from austeer.compiler.errors import AusteerError

if TYPE_CHECKING:
    from austeer.compiler.verbs.common import Settings

Command = TypeVar("Command", bound=Callable[..., Any])

MODEL_HELP = "MODEL is a folder in Hugging Face layout or a Hub id."


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="austeer-compile")
def main() -> None:
    """Compiles activation steering into the weights of a language model.

    The result is a standalone checkpoint that any stock inference engine serves, with no hooks.
    """


def options(*decorators: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several click options as one decorator, in the order given."""
    return lambda command: functools.reduce(lambda made, option: option(made), reversed(decorators), command)


OUT = click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Where the result goes; must not exist.",
)
REVISION = click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub model.")
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, all else on stderr.")
TARGET = click.option(
    "--target", help="The engine to compile for, as `targets` lists them; default: transformers, for gguf llama.cpp."
)
FORM = click.option(
    "--form",
    type=click.Choice(["checkpoint", "lora", "gguf", "model-code"]),
    default="checkpoint",
    show_default=True,
    help="What to write.",
)
APPROXIMATE = click.option(
    "--approximate", is_flag=True,
    help="Compile what no weights do exactly too, as near as they come: Scale at residual, and gates whose neurons are "
    "fitted or have no biases. It is measured, and said everywhere.",
)  # fmt: skip
FINDING = options(
    click.option("--chat", is_flag=True, help="Put the prompts into the model's chat template."),
    click.option("--system", metavar="TEXT", help="System message, with --chat."),
    click.option("--raw", is_flag=True, help="Use an instruct model without its template, and without a notice."),
    click.option("--program-only", is_flag=True, help="Write the program, not a checkpoint."),
)
RUN = options(
    click.option("--device", default="auto", help="auto, cpu, cuda[:N], mps, or spread (over all accelerators)."),
    click.option(
        "--dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto",
        help="What models run in; auto: as stored, but float32 on a CPU if it fits, and for the certificate; restore: "
        "as stored, but float16 as bfloat16, and float32 for the certificate.",
    ),
    click.option("--batch-tokens", type=click.IntRange(1), default=4096, help="Tokens of a forward pass."),
    click.option("--max-length", type=click.IntRange(2), help="Tokens of a text; default: the model's, at most 2048."),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True),
)  # fmt: skip


class TopHeads(click.ParamType[Any]):
    """A number of heads, or all."""

    name = "heads"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A whole number, or "all" as it is."""
        try:
            return value if value == "all" else int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor all", param, ctx)


def settings(arguments: dict[str, Any]) -> "Settings":
    """Takes the run options out of a command's arguments."""
    from austeer.compiler.tokens import Chat
    from austeer.compiler.verbs.common import Settings

    taken = {name: arguments.pop(name) for name in ("device", "dtype", "batch_tokens", "max_length", "seed")}
    chat, system, raw = (arguments.pop(name, None) for name in ("chat", "system", "raw"))
    if (system and not chat) or (raw and chat):
        raise click.UsageError("--system needs --chat" if system else "--chat and --raw exclude each other")
    return Settings(**taken, chat=Chat(system) if chat else None, raw=bool(raw))


def reporting(command: Callable[..., Any]) -> Callable[..., None]:
    """Runs a verb, prints its report or its error, and exits with its code."""

    @functools.wraps(command)
    def run(*, as_json: bool, **arguments: Any) -> None:
        try:
            report = command(**arguments)
        except (AusteerError, OSError) as error:
            message = str(error) or type(error).__name__
            if as_json:
                click.echo(json.dumps({"error": message}))
            click.echo(f"Error: {message}", err=True)
            sys.exit(getattr(error, "exit_code", 1))
        if report is None:  # another process of the same job reports
            return
        if as_json:
            click.echo(json.dumps(report.plain(), allow_nan=False))
        else:
            from austeer.compiler.verbs.show import show

            show(report)
        sys.exit(0 if getattr(report, "passed", True) else 1)

    return run


@main.command(epilog=MODEL_HELP)
@click.argument("model")
@click.option("--pairs", required=True, type=click.Path(path_type=Path), help="JSON Lines: prompt, positive, negative.")
@OUT
@click.option(
    "--method",
    type=click.Choice(["austeer", "steer2edit", "fusion"]),
    default="austeer",
    show_default=True,
    help="austeer scales units; steer2edit adds rank-1 edits of heads and neurons; fusion shifts every layer.",
)
@click.option(
    "--site",
    multiple=True,
    help="heads (attention), attn, neurons, ffn or residual (layer), or several, of which the search chooses; "
    "default: ffn; steer2edit: heads and neurons; fusion: residual.",
)
@click.option("--top-k", type=int, help="Units (steer2edit: heads and neurons) to edit; default: searched.")
@click.option("--alpha", type=float, help="Strength; default: searched.")
@click.option("--rho", type=float, help="steer2edit: penalty of its elastic net, with --l1-ratio; default: searched.")
@click.option("--l1-ratio", type=float, help="steer2edit: the l1 part of that penalty, from 0 to below 1.")
@click.option("--segments", type=int, help="fusion: segments of layers with a weight each; default: one weight.")
@click.option(
    "--max-drift",
    type=float,
    default=0.1,
    show_default=True,
    help="Mean KL to the base on neutral text, nats per token.",
)
@click.option("--trials", type=int, help="Trials of the search; default: 16, and 8 more for each site to choose from.")
@click.option("--study", type=click.Path(path_type=Path), help="Keep the search in this file, and go on with it.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw effect against drift: a .png or .svg file.")
@click.option("--neutral", type=click.Path(path_type=Path), help="Neutral texts; default: sampled from the model.")
@FINDING
@click.option("--adaptive", is_flag=True, help="Let every edit act only where a gate, fitted to texts, is open.")
@click.option(
    "--when",
    type=click.Path(path_type=Path),
    help="Texts or pairs for which gates open; default: the pairs' negative sides.",
)
@click.option(
    "--unless", type=click.Path(path_type=Path), help="Those for which they close; default: the positive sides."
)
@click.option(
    "--gate-neurons", type=click.IntRange(2), default=256, show_default=True, help="Neurons of a layer for its gates."
)
@click.option(
    "--neurons",
    type=click.Choice(["append", "reuse"]),
    default="append",
    show_default=True,
    help="Where those go: all FFNs get wider, or the least contributing neurons go.",
)
@APPROXIMATE
@TARGET
@FORM
@REVISION
@RUN
@JSON
@reporting
def steer(**arguments: Any) -> Any:
    """Find what tells good from bad answers inside the model, edit it, and write the steered checkpoint."""
    from austeer.compiler.verbs.steer import steer as verb

    chosen = settings(arguments)
    return verb(settings=chosen, **arguments)


@main.command(epilog="PRUNED and the dense MODEL are folders in Hugging Face layout or Hub ids.")
@click.argument("pruned")
@click.option("--dense", metavar="MODEL", required=True, help="The model that was pruned.")
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), help="JSON Lines: prompt and response, or text."
)
@OUT
@click.option(
    "--pairs",
    type=click.Path(path_type=Path),
    help="JSON Lines: prompt, positive, negative, to find the heads that matter by; default: made of --data.",
)
@click.option("--top-heads", type=TopHeads(), metavar="K|all", help="Heads to restore; default: half of them.")
@click.option("--components", type=int, default=10, show_default=True, help="Lost components of a head to start from.")
@click.option("--epochs", type=int, help="0: lost components alone. Default: 3, and more where samples are few.")
@click.option(
    "--lr", type=float, default=0.02, show_default=True, help="Adam's step, as a share of a head's RMS output."
)
@click.option("--batch-size", type=int, default=8, show_default=True, help="Samples of a step.")
@click.option(
    "--head-map",
    type=click.Path(path_type=Path),
    help="JSON: for each layer the dense heads that were kept; default: told by the weights.",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Keep the training in this file, and go on with it; default: beside OUT, until that is written.",
)
@click.option("--picture", type=click.Path(path_type=Path), help="Draw heads and layers: a .png or .svg file.")
@FINDING
@TARGET
@FORM
@REVISION
@click.option("--dense-revision", metavar="REV", help="Branch, tag or commit of a dense Hub model.")
@RUN
@JSON
@reporting
def restore(**arguments: Any) -> Any:
    """Bring back what pruning lost, as constants of attention heads, and write the restored checkpoint.

    Every zero stays zero. To train on several GPUs: accelerate launch -m austeer.compiler.cli restore ...; in several
    processes on CPUs: torchrun --nproc-per-node N -m austeer.compiler.cli restore ...
    """
    from austeer.compiler.verbs.restore import restore as verb

    chosen = settings(arguments)
    return verb(settings=chosen, **arguments)


@main.command(epilog=MODEL_HELP)
@click.argument("model")
@click.argument("programs", metavar="PROGRAM...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Where the checkpoint goes; must not exist.")
@click.option("--texts", type=click.Path(path_type=Path), help="Texts or pairs to certify the result on.")
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
@APPROXIMATE
@TARGET
@FORM
@REVISION
@RUN
@JSON
@reporting
def build(**arguments: Any) -> Any:
    """Compile programs into a model and write the checkpoint."""
    from austeer.compiler.verbs.build import build as verb

    if arguments["out"] is None and not arguments["dry_run"]:
        raise click.UsageError("-o OUT is missing (or use --dry-run)")
    chosen = settings(arguments)
    return verb(settings=chosen, **arguments)


@main.command("import", epilog=MODEL_HELP)
@click.argument("artefact", metavar="ARTIFACT", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="The model the artefact steers.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The program; must not exist.")
@click.option("--site", help="What the vectors are added to, or the scores rank, where the artefact does not say.")
@click.option("--layers", metavar="LIST", help="Only these, as the artefact counts them, such as 10-15,20.")
@click.option("--strength", type=float, default=1.0, show_default=True, help="Multiplies what the artefact does.")
@click.option("--top-k", type=int, help="AUSteer scores: units to scale.")
@click.option("--alpha", type=float, help="AUSteer scores: strength.")
@REVISION
@JSON
@reporting
def import_command(**arguments: Any) -> Any:
    """Turn the steering of another tool into a program.

    Reads control vectors (.gguf) of repeng and llama.cpp, CAST's .svec, vectors of steering-lite and steering-vectors
    and LoFiT parameters (.safetensors), head shifts (.npy), PEFT LoRA and IA3 adapters, AUSteer's all_scores.pt and
    Steer2Edit's rank-1 .pt.
    """
    from austeer.compiler.verbs.importing import import_artefact

    return import_artefact(**arguments)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--text", "as_text", is_flag=True, help="Print the program's text form, which build accepts.")
@JSON
@reporting
def inspect(path: Path, *, as_text: bool) -> Any:
    """Explain a program or a compiled checkpoint."""
    from austeer.compiler.verbs.inspect import inspect as verb

    return verb(path, text=as_text)


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", metavar="MODEL", help="The base model; default: the one the checkpoint names.")
@click.option(
    "--texts",
    type=click.Path(path_type=Path),
    help="Texts or pairs to measure on; default: sampled from the base.",
)
@click.option("--engine", "engines", metavar="NAME", multiple=True, help="Load OUT in this engine too; repeatable.")
@RUN
@JSON
@reporting
def verify(**arguments: Any) -> Any:
    """Check a compiled checkpoint: its bytes against its base, its numbers against the interpreter."""
    from austeer.compiler.verbs.verify import verify as verb

    chosen = settings(arguments)
    return verb(settings=chosen, **arguments)


@main.command()
@click.argument("name", required=False)
@JSON
@reporting
def targets(name: str | None) -> Any:
    """Show which engine keeps which edit of which architecture, and in what form."""
    from austeer.compiler.verbs.targets import targets as verb

    return verb(name)


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("repo_id")
@click.option("--public", is_flag=True, help="A new repository is public, and a public one may be pushed to.")
@click.option("--dry-run", is_flag=True, help="Show what would happen to each file and change nothing.")
@JSON
@reporting
def push(**arguments: Any) -> Any:
    """Send a compiled checkpoint to the Hub, in one commit; a new repository is private."""
    from austeer.compiler.verbs.push import push as verb

    return verb(**arguments)


@main.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Keep the compiled checkpoint here.")
@JSON
@reporting
def demo(**arguments: Any) -> Any:
    """Do the whole job, offline, on the small model that ships with the project."""
    from austeer.compiler.verbs.demo import demo as verb

    return verb(**arguments)


if __name__ == "__main__":
    main()
