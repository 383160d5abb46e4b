"""What restoring is compared with: constants that restore means, and a LoRA of as many parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from austeer.compiler.edits import Shift
from austeer.compiler.facts import read_facts
from austeer.compiler.forward import run_texts
from austeer.compiler.hooked import first_of
from austeer.compiler.interpreter import interpret
from austeer.compiler.live import live_facts, load_model, port
from austeer.compiler.program import Program
from austeer.compiler.response_loss import summed_loss
from austeer.compiler.responses import Response
from austeer.compiler.sites import SiteName
from austeer.passes.train_shifts import Schedule

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Place: TypeAlias = tuple[int, SiteName]

OUTPUTS: tuple[SiteName, ...] = ("attn", "ffn")


@dataclass(frozen=True)
class Learned:
    """A model with a trained adapter in it, and how many parameters that has."""

    model: Any
    parameters: int


def mean_compensation(dense: Path, pruned: Path, responses: Sequence[Response]) -> Program:
    """FLAP's bias (arXiv 2312.11983), for pruning of any kind: after every output projection, what its mean lost.

    Each bias is the mean output of the dense model's projection over all tokens, minus that of the pruned model's with
    all earlier biases in place; so that in the end each projection has the dense mean. FLAP's own is W times the
    mean of the removed inputs, all at once.
    """
    facts = read_facts(pruned)
    places: list[Place] = [(layer, site) for layer in range(facts.geometry.layers) for site in OUTPUTS]
    wanted = _mean_outputs(load_model(dense, dtype="float32", device="cpu"), places, responses)
    model, shifts = load_model(pruned, dtype="float32", device="cpu"), list[Shift]()
    for place in places:
        with interpret(model, Program.of(shifts, model=facts.geometry)):
            found = _mean_outputs(model, [place], responses)
        shifts.append(Shift(*place, (wanted[place] - found[place]).numpy()))
    return Program.of(shifts, model=facts.geometry)


def lora(pruned: Path, responses: Sequence[Response], schedule: Schedule, parameters: int) -> Learned:
    """A LoRA by PEFT on the attention's output projections, of about so many parameters, trained as shifts are."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    model, facts = load_model(pruned, dtype="float32", device="cpu"), read_facts(pruned)
    torch.manual_seed(schedule.seed)
    rank = max(1, round(parameters / (facts.geometry.layers * (facts.geometry.heads + facts.geometry.residual))))
    target = rf".*\.{facts.architecture.attn_out.name}"
    config = LoraConfig(r=rank, target_modules=target, fan_in_fan_out=facts.architecture.transposed)
    model: Any = inject_adapter_in_model(config, model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, steps = torch.optim.Adam(trained), schedule.steps(len(responses))
    for step in range(steps):
        batch = [responses[index] for index in schedule.batch(step, len(responses))]
        loss: Any = summed_loss(model, batch, learning=True) / sum(response.scored for response in batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = schedule.rate(step, steps)
        optimizer.step()
    return Learned(model, sum(weight.numel() for weight in trained))


def _mean_outputs(
    model: "PreTrainedModel", places: Sequence[Place], responses: Sequence[Response]
) -> "dict[Place, Tensor]":
    """The mean over all tokens of what each place gives, float32 [width] each."""
    sums: dict[Place, Any] = dict.fromkeys(places, 0.0)

    def watch(place: Place) -> Callable[..., None]:
        def see(_: Any, __: Any, output: Any) -> None:
            sums[place] = sums[place] + first_of(output).flatten(0, -2).double().sum(0)

        return see

    facts = live_facts(model)
    hooks = [port(model, facts, *place).module.register_forward_hook(watch(place)) for place in places]
    for response in responses:
        run_texts(model, [response.text])
    for hook in hooks:
        hook.remove()
    tokens = sum(len(response.text) for response in responses)
    return {place: (total / tokens).float() for place, total in sums.items()}
