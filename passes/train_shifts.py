"""train_shifts: pruned model, lost components and responses → the compensation with the least held-out loss."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from austeer.compiler.errors import CheckFailed
from austeer.compiler.forward import input_device
from austeer.compiler.progress import track
from austeer.compiler.response_loss import places
from austeer.compiler.responses import Response
from austeer.compiler.team import Team
from austeer.passes.head_shifts import HeadShifts
from austeer.passes.schedule import Schedule
from austeer.passes.shifted_model import ShiftedModel
from austeer.passes.training_state import StateFile, TrainingState

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

EVALUATIONS = 16  # of the held-out loss, in the whole training
PATIENCE = 4  # evaluations without a better loss, after which it stops
STOP_TOKENS = 16_384  # of held-out text, for each evaluation
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam


@dataclass(frozen=True, eq=False)
class Trained:
    """What to add, the best of what was trained [n, k + dim], and the held-out losses by step that chose it."""

    shifts: HeadShifts
    best: "Tensor"
    losses: Mapping[int, float]
    step: int

    @property
    def best_step(self) -> int:
        """The first step after which the held-out loss was least."""
        return min(self.losses, key=self.losses.__getitem__, default=0)

    @staticmethod
    def untrained(shifts: HeadShifts) -> "Trained":
        """Lost components alone."""
        import torch

        return Trained(shifts, torch.from_numpy(shifts.start), {}, 0)


def train_shifts(
    model: "PreTrainedModel",
    shifts: HeadShifts,
    fit: Sequence[Response],
    stop: Sequence[Response],
    schedule: Schedule,
    file: StateFile,
    *,
    batch_tokens: int,
    team: Team = Team(),  # noqa: B008 (frozen)
) -> Trained:
    """Trains the compensation of the chosen heads, everything else frozen, on the loss of the responses' own tokens.

    A step's samples pass `batch_tokens` at a time, and their gradients are added. The processes of a team share them,
    with the same result up to the order of sums. The state at each evaluation of `stop` is kept, and training goes on
    from it. Raises CheckFailed where a loss is no number; the last state from which a step could be made stays kept.
    """
    training = _Training.of(model, shifts, file, team)
    steps = schedule.steps(len(fit))
    every = max(1, math.ceil(steps / EVALUATIONS))
    shifted = ShiftedModel(model, training.shifts, batch_tokens, team)
    watched = _first_tokens(stop, STOP_TOKENS)
    with shifted.shifting():
        if not training.losses:
            _judge(training, shifted, watched)
        for step in track(range(training.step, steps), "Training", steps - training.step):
            if training.stale:
                break
            _learn(training, shifted, [fit[index] for index in schedule.batch(step, len(fit))])
            if training.step and training.step in training.losses:
                training.keep()  # not before it is known that a step can be made from there
            training.move(schedule.rate(step, steps))
            if training.step % every == 0 or training.step == steps:
                _judge(training, shifted, watched)
    training.keep()
    return training.result()


def _learn(training: "_Training", shifted: "ShiftedModel", batch: Sequence[Response]) -> None:
    """The gradient of a batch."""
    loss = shifted.backward(batch, training.trained)
    if not math.isfinite(loss):
        training.stop(f"the loss is {loss}", shifted.suspects or batch)
    if not bool(training.gradient.isfinite().all()):
        training.stop("the gradient holds no numbers", batch)


def _judge(training: "_Training", shifted: "ShiftedModel", watched: Sequence[Response]) -> None:
    """The held-out loss."""
    loss = shifted.loss(watched, training.trained)
    if not math.isfinite(loss):
        training.stop(f"the held-out loss is {loss}", shifted.suspects or watched)
    training.judge(loss)


class _Training:
    """A training as it goes: what is trained, its optimiser, and the best so far."""

    def __init__(self, shifts: HeadShifts, trained: "Tensor", file: StateFile, team: Team) -> None:
        import torch

        self.shifts, self.trained, self.file, self.team = shifts, trained.requires_grad_(), file, team
        self.trained.grad = torch.zeros_like(trained)
        self.best = trained.detach().clone()
        self.optimizer = torch.optim.Adam([self.trained])
        self.step = self.kept = 0  # done; and how many of them the state on disk has
        self.losses: dict[int, float] = {}

    @staticmethod
    def of(model: "PreTrainedModel", shifts: HeadShifts, file: StateFile, team: Team) -> "_Training":
        """At its start, or where its state was kept."""
        import torch

        device, state = input_device(model), team.share(file.load)
        if state is None:
            return _Training(shifts, torch.from_numpy(shifts.start).to(device), file, team)
        array = {name: torch.from_numpy(value).to(device) for name, value in state.arrays.items()}
        shifts = HeadShifts(**{name: state.arrays[name] for name in shifts.arrays()})
        made = _Training(shifts, array["trained"], file, team)
        moments = {name: array[name] for name in MOMENTS}
        made.optimizer.state[made.trained] = {"step": torch.tensor(float(state.step)), **moments}
        made.best, made.losses = array["best"], dict(state.losses)
        made.step = made.kept = state.step
        return made

    @property
    def gradient(self) -> "Tensor":
        """Of what is trained."""
        assert self.trained.grad is not None
        return self.trained.grad

    @property
    def stale(self) -> bool:
        """Whether the last evaluations brought nothing."""
        return sum(step > self.result().best_step for step in self.losses) >= PATIENCE

    def move(self, rate: float) -> None:
        """One step down the gradient, which is then forgotten."""
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.gradient.zero_()
        self.step += 1

    def judge(self, loss: float) -> None:
        """Takes a held-out loss, and remembers the best."""
        if not self.losses or loss < min(self.losses.values()):
            self.best = self.trained.detach().clone()
        self.losses[self.step] = loss

    def keep(self) -> None:
        """Writes what it needs to go on from here."""
        held = {"trained": self.trained, "best": self.best}
        held |= {name: self.optimizer.state[self.trained][name] for name in MOMENTS}
        arrays = {name: value.detach().cpu().numpy() for name, value in held.items()}
        if self.team.leads:
            self.file.save(TrainingState(self.step, {**arrays, **self.shifts.arrays()}, self.losses))
        self.kept = self.step

    def stop(self, what: str, samples: Sequence[Response]) -> NoReturn:
        """Ends the training, and says where that was and from where it can go on."""
        state = f"the state after step {self.kept} is kept in {self.file.path}, and the same command goes on from it"
        error = CheckFailed(
            f"training stopped after step {self.step}: {what} on the samples at {places(samples)}; "
            f"{state if self.kept else 'nothing was kept yet'}; use a smaller --lr, or look at these samples"
        )
        self.team.stop(error)

    def result(self) -> Trained:
        """The best."""
        return Trained(self.shifts, self.best, self.losses, self.step)


def _first_tokens(responses: Sequence[Response], count: int) -> list[Response]:
    """Responses from the first on, until they hold so many tokens; at least one."""
    taken: list[Response] = []
    for response in responses:
        if taken and count <= 0:
            break
        taken.append(response)
        count -= len(response.text)
    return taken
