"""What restoring is compared with: biases that bring means back, and a LoRA of as many parameters."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from austeer.compiler.edits import Shift
from austeer.compiler.facts import ModelFacts, read_facts
from austeer.compiler.forward import run_texts
from austeer.compiler.interpreter import interpret
from austeer.compiler.live import live_facts, load_model, port, weight_of
from austeer.compiler.program import Program
from austeer.compiler.response_loss import summed_loss
from austeer.compiler.responses import Response
from austeer.compiler.sites import SiteName
from austeer.compiler.watch import See, watching
from austeer.passes.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Place: TypeAlias = tuple[int, SiteName]

OUTPUT_OF: dict[SiteName, SiteName] = {"heads": "attn", "neurons": "ffn"}  # by the input of each output projection


@dataclass(frozen=True)
class Learned:
    """A model with a trained adapter in it, and how many parameters that has."""

    model: Any
    parameters: int


def flap(dense: Path, pruned: Path, responses: Sequence[Response]) -> Program:
    """FLAP's bias (arXiv 2312.11983): what the removed weights of each output projection gave on average.

    (W - W') times the dense model's mean input over all tokens, all at once. The columns of a smaller W' are found
    among those of W by their bits.
    """
    model, slim = (load_model(folder, dtype="float32", device="cpu") for folder in (dense, pruned))
    facts = live_facts(model)
    means, shifts = _means(model, _places(facts, OUTPUT_OF), responses), list[Shift]()
    for (layer, site), mean in means.items():
        ports = port(model, facts, layer, site), port(slim, live_facts(slim), layer, site)
        before, after = (weight_of(at.module, transposed=facts.architecture.transposed) for at in ports)
        shifts.append(Shift(layer, OUTPUT_OF[site], ((before - _spread(after, before)) @ mean).numpy()))
    return Program.of(shifts, model=live_facts(slim).geometry)


def mean_compensation(dense: Path, pruned: Path, responses: Sequence[Response]) -> Program:
    """A bias after every output projection that gives it the mean output, over all tokens, of the dense model's.

    One after the other, each with all earlier ones in place; so that in the end every mean is the dense one.
    """
    model, shifts = load_model(pruned, dtype="float32", device="cpu"), list[Shift]()
    facts = live_facts(model)
    places = _places(facts, OUTPUT_OF.values())
    wanted = _means(load_model(dense, dtype="float32", device="cpu"), places, responses)
    for place in places:
        with interpret(model, Program.of(shifts, model=facts.geometry)):
            found = _means(model, [place], responses)
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


def _places(facts: ModelFacts, sites: Iterable[SiteName]) -> list[Place]:
    return [(layer, site) for layer, site in product(range(facts.geometry.layers), sites)]


def _means(model: "PreTrainedModel", places: Sequence[Place], responses: Sequence[Response]) -> "dict[Place, Tensor]":
    """The mean over all tokens of what passes each place, float32 [width] each."""
    sums: dict[Place, Any] = dict.fromkeys(places, 0.0)

    def add_to(place: Place) -> See:
        def see(passing: "Tensor") -> None:
            sums[place] = sums[place] + passing.flatten(0, -2).double().sum(0)

        return see

    facts = live_facts(model)
    with watching((port(model, facts, *place), add_to(place)) for place in places):
        for response in responses:
            run_texts(model, [response.text])
    tokens = sum(len(response.text) for response in responses)
    return {place: (total / tokens).float() for place, total in sums.items()}


def _spread(slim: "Tensor", full: "Tensor") -> "Tensor":
    """The columns of `slim` where `full` has them, zeros elsewhere; as it is where nothing was cut."""
    if slim.shape == full.shape:
        return slim
    places = {column.numpy().tobytes(): place for place, column in enumerate(full.T.contiguous())}
    spread = full.new_zeros(full.shape)
    spread[:, [places[column.numpy().tobytes()] for column in slim.T.contiguous()]] = slim
    return spread
