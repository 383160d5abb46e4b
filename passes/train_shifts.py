"""train_shifts: pruned model, lost components and responses → the compensation with the least held-out loss."""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from austeer.compiler.activation_memory import all_affordable
from austeer.compiler.errors import CheckFailed
from austeer.compiler.forward import input_device
from austeer.compiler.hooked import widen
from austeer.compiler.live import live_facts, port
from austeer.compiler.progress import track
from austeer.compiler.response_loss import packs, places, recomputing, summed_loss
from austeer.compiler.responses import Response
from austeer.compiler.team import Team
from austeer.passes.head_shifts import HeadShifts
from austeer.passes.training_state import StateFile, TrainingState

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

WARM_UP = 0.05  # of the steps
EVALUATIONS = 16  # of the held-out loss, in the whole training
PATIENCE = 4  # evaluations without a better loss, after which it stops
STOP_TOKENS = 16_384  # of held-out text, for each evaluation
LEAST_EPOCHS, LEAST_STEPS = 3, 300  # where the user names no epochs: the paper's, and more where samples are few
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: Adam with warm-up and cosine. `lr` is a step as a share of a head's RMS output."""

    lr: float = 0.02
    epochs: int | None = None  # None: 3, and as many more as 300 steps need
    batch_size: int = 8  # samples of a step
    seed: int = 0

    def steps(self, samples: int) -> int:
        """The number of steps over so many samples."""
        needed = max(LEAST_EPOCHS, math.ceil(LEAST_STEPS / self._an_epoch(samples)))
        return (needed if self.epochs is None else self.epochs) * self._an_epoch(samples)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step: linear warm-up, then half a cosine down to 0."""
        warm = max(1, round(WARM_UP * steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2

    def batch(self, step: int, samples: int) -> list[int]:
        """The samples of a step: the same in every process and after every interruption."""
        epoch, place = divmod(step, self._an_epoch(samples))
        order = np.random.default_rng([self.seed, epoch]).permutation(samples)
        return order[place * self.batch_size : (place + 1) * self.batch_size].tolist()

    def _an_epoch(self, samples: int) -> int:
        return math.ceil(samples / self.batch_size)


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
    runner = _Runner(model, training.shifts, batch_tokens, team)
    watched = _first_tokens(stop, STOP_TOKENS)
    with runner.shifting():
        if not training.losses:
            _judge(training, runner, watched)
        for step in track(range(training.step, steps), "Training", steps - training.step):
            if training.stale:
                break
            _learn(training, runner, [fit[index] for index in schedule.batch(step, len(fit))])
            if training.step and training.step in training.losses:
                training.keep()  # not before it is known that a step can be made from there
            training.move(schedule.rate(step, steps))
            if training.step % every == 0 or training.step == steps:
                _judge(training, runner, watched)
    training.keep()
    return training.result()


def _learn(training: "_Training", runner: "_Runner", batch: Sequence[Response]) -> None:
    """The gradient of a batch."""
    loss = runner.backward(batch, training.trained)
    if not math.isfinite(loss):
        training.stop(f"the loss is {loss}", runner.suspects or batch)
    if not bool(training.gradient.isfinite().all()):
        training.stop("the gradient holds no numbers", batch)


def _judge(training: "_Training", runner: "_Runner", watched: Sequence[Response]) -> None:
    """The held-out loss."""
    loss = runner.loss(watched, training.trained)
    if not math.isfinite(loss):
        training.stop(f"the held-out loss is {loss}", runner.suspects or watched)
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


class _Runner:
    """Runs the model with the compensation at its heads, on this process's share of a batch."""

    def __init__(self, model: "PreTrainedModel", shifts: HeadShifts, batch_tokens: int, team: Team) -> None:
        self.model, self.shifts, self.batch_tokens, self.team = model, shifts, batch_tokens, team
        self.facts = live_facts(model)
        self.added: Mapping[int, Tensor] = {}
        self.suspects: list[Response] = []  # those of this process's last pass with which the loss became no number

    @contextmanager
    def shifting(self) -> Generator[None]:
        """Within the context every chosen head's output is compensated."""
        with ExitStack() as hooks:
            for layer in self.shifts.layers:
                place = port(self.model, self.facts, layer, "heads").module
                hooks.callback(place.register_forward_pre_hook(self._hook(layer)).remove)
            yield

    def loss(self, responses: Sequence[Response], trained: "Tensor") -> float:
        """Nats per own token, of all processes together."""
        import torch

        with torch.no_grad():
            self._compensate(trained)
            return self._mean(responses, lambda part: summed_loss(self.model, part))

    def backward(self, batch: Sequence[Response], trained: "Tensor") -> float:
        """The same, and its gradient added to that of what is trained."""
        tokens = _own(batch)

        def learn(part: Sequence[Response]) -> "Tensor":
            with self._sparing(part):
                self._compensate(trained)
                loss: Any = summed_loss(self.model, part, learning=True)
                (loss / tokens).backward()
            return loss.detach()

        mean = self._mean(batch, learn)
        assert trained.grad is not None
        self.team.add(trained.grad)
        return mean

    def _mean(self, responses: Sequence[Response], summed: "Callable[[Sequence[Response]], Tensor]") -> float:
        """The mean per own token of what every process sums over its share, `batch_tokens` at a time."""
        total, self.suspects = 0.0, []
        for part in packs(responses[self.team.rank :: self.team.size], self.batch_tokens):
            loss = float(summed(part))
            total += loss
            self.suspects += [] if math.isfinite(loss) else part
        return self.team.total(total) / _own(responses)

    def _compensate(self, trained: "Tensor") -> None:
        self.added = self.shifts.by_layer(self.shifts.compensation(trained), self.facts.geometry.heads)

    def _hook(self, layer: int) -> Callable[..., Any]:
        def hook(_: Any, args: tuple["Tensor", ...]) -> tuple["Tensor", ...]:
            x = args[0]
            return (widen(x) + self.added[layer].to(x.device)).to(x.dtype), *args[1:]

        return hook

    def _sparing(self, part: Sequence[Response]) -> AbstractContextManager[None]:
        """Blocks run again, instead of keeping activations for gradients, where these are too many."""
        tokens = len(part) * max(len(response.text) for response in part)
        return nullcontext() if all_affordable(self.model, tokens) else recomputing(self.model)


def _own(responses: Sequence[Response]) -> int:
    return sum(response.scored for response in responses)


def _first_tokens(responses: Sequence[Response], count: int) -> list[Response]:
    """Responses from the first on, until they hold so many tokens; at least one."""
    taken: list[Response] = []
    for response in responses:
        if taken and count <= 0:
            break
        taken.append(response)
        count -= len(response.text)
    return taken
