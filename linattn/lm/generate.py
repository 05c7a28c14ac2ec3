"""`linattn generate`: continue a text with a language model that `linattn train lm` trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from linattn._util.environment import pick_device
from linattn.errors import ArgumentError, CheckpointError
from linattn.lm.model import CausalLM
from linattn.lm.text import decode, encode
from linattn.lm.train import resumed_settings
from linattn.training.checkpoint import CHECKPOINT_NAME, read_checkpoint

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the run, the prompt, and the options of sampling."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run of `linattn train lm`")
    parser.add_argument("--prompt", default="\n", help="text to continue (default: a line break)")
    parser.add_argument("--count", type=int, default=500, help="characters to add (%(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest, 1 samples as learned (%(default)s)"
    )
    parser.add_argument("--top-k", type=int, help="sample among the K likeliest characters only")
    parser.add_argument("--top-p", type=float, help="sample among the fewest characters that add up to P")
    parser.add_argument("--stop", default="", metavar="CHARACTERS", help="end after the first of these characters")
    parser.add_argument(
        "--look-back", type=int, metavar="N", help="characters the model may look back on (default: its context)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the prompt, then each character as soon as it is drawn."""
    if not args.prompt:
        raise ArgumentError("--prompt is empty; accepted: at least one character to go on from")
    device = pick_device(args.device)
    model, alphabet = load(args.run / CHECKPOINT_NAME)
    model = model.to(device)
    prompt = encode(args.prompt, alphabet)[None].to(device)
    stream = model.stream(
        prompt,
        args.count,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        stop=encode(args.stop, alphabet).tolist(),
        look_back=model.config.context if args.look_back is None else args.look_back,
        generator=torch.Generator(device).manual_seed(args.seed),
    )
    print(args.prompt, end="", flush=True)
    for token in stream:
        print(decode(token[0].cpu(), alphabet), end="", flush=True)
    print()
    return 0


def load(path: Path) -> tuple[CausalLM, str]:
    """Load the model of a checkpoint in evaluation mode, and its alphabet.

    Raises:
        CheckpointError: there is none, or it is not of a language model that keeps its alphabet.
    """
    checkpoint = read_checkpoint(path)
    alphabet = checkpoint.get("settings", {}).get("alphabet")
    if not isinstance(alphabet, str):
        raise CheckpointError(
            f"the checkpoint {path} names no alphabet; accepted: one of `linattn train lm` of this version"
        )
    settings = resumed_settings(checkpoint, {}, path)
    model = CausalLM(settings.model_config(len(alphabet)))
    try:
        model.load_state_dict(checkpoint["model"])
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint {path} does not fit its own settings: {error}") from error
    return model.eval(), alphabet
