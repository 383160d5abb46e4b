"""What restoring is compared with: constants that restore means, and a LoRA of as many parameters."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from austeer.compiler.edits import Shift
from austeer.compiler.facts import ModelFacts, read_facts
from austeer.compiler.forward import run_texts
from austeer.compiler.hooked import first_of
from austeer.compiler.interpreter import interpret
from austeer.compiler.live import load_model, port
from austeer.compiler.program import Program
from austeer.compiler.response_loss import summed_loss
from austeer.compiler.responses import Response
from austeer.compiler.sites import SiteName
from austeer.passes.train_shifts import Schedule

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Judge: TypeAlias = "Callable[[PreTrainedModel], list[float]]"  # the losses of the held-out texts

OUTPUTS: tuple[SiteName, ...] = ("attn", "ffn")


def mean_compensation(dense: Path, pruned: Path, responses: Sequence[Response]) -> Program:
    """FLAP's bias (arXiv 2312.11983), for pruning of any kind: after every output projection, what its mean lost.

    Each bias is the mean output of the dense model's projection over all tokens, minus that of the pruned model's with
    all earlier biases in place; so that in the end each projection has the dense mean. FLAP's own is W times the
    mean of the removed inputs, all at once.
    """
    model, facts = load_model(dense, dtype="float32", device="cpu"), read_facts(dense)
    places = [(layer, site) for layer in range(facts.geometry.layers) for site in OUTPUTS]
    wanted = _mean_outputs(model, facts, places, responses)
    model, facts = load_model(pruned, dtype="float32", device="cpu"), read_facts(pruned)
    found = Program.of([], model=facts.geometry)
    for place in places:
        with interpret(model, found):
            (mean,) = _mean_outputs(model, facts, [place], responses)
        found = Program.of([*found.edits, Shift(*place, wanted[places.index(place)] - mean)], model=facts.geometry)
    return found


def lora(
    pruned: Path, fit: Sequence[Response], schedule: Schedule, rank: int, judge: Judge
) -> "tuple[PreTrainedModel, list[float]]":
    """A LoRA of PEFT on the attention's output projections, trained as shifts are: (the model, its losses)."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    model, facts = load_model(pruned, dtype="float32", device="cpu"), read_facts(pruned)
    torch.manual_seed(schedule.seed)
    name = facts.architecture.attn_out.name
    config = LoraConfig(r=rank, target_modules=rf".*\.{name}", fan_in_fan_out=facts.architecture.transposed)
    model: Any = inject_adapter_in_model(config, model)
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, steps = torch.optim.Adam(learned), schedule.steps(len(fit))
    for step in range(steps):
        batch = [fit[index] for index in schedule.batch(step, len(fit))]
        optimizer.zero_grad()
        loss: Any = summed_loss(model, batch, learning=True) / sum(response.scored for response in batch)
        loss.backward()
        optimizer.param_groups[0]["lr"] = schedule.rate(step, steps)
        optimizer.step()
    return model, judge(model)


def _mean_outputs(
    model: "PreTrainedModel", facts: ModelFacts, places: Sequence[tuple[int, SiteName]], responses: Sequence[Response]
) -> "list[Tensor]":
    """The mean over all tokens of what each place gives, [width] each."""
    sums: dict[tuple[int, SiteName], Any] = dict.fromkeys(places, 0)

    def hook(place: tuple[int, SiteName]) -> Callable[..., None]:
        def see(_: Any, __: Any, output: Any) -> None:
            sums[place] = sums[place] + first_of(output).flatten(0, -2).double().sum(0)

        return see

    hooks = [port(model, facts, *place).module.register_forward_hook(hook(place)) for place in places]
    for response in responses:
        run_texts(model, [response.text])
    for one in hooks:
        one.remove()
    tokens = sum(len(response.text) for response in responses)
    return [(total / tokens).float() for total in sums.values()]
