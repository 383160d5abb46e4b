"""Training: against a loop written out by hand, and what happens where it is interrupted or finds no numbers."""

import math
import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from austeer.compiler import CheckFailed, interpret
from austeer.compiler.live import live_facts
from austeer.compiler.response_loss import mean_loss
from austeer.compiler.responses import Response
from austeer.compiler.team import Team
from austeer.passes import shifted_model
from austeer.passes import train_shifts as module
from austeer.passes.head_shifts import HeadShifts
from austeer.passes.schedule import Schedule
from austeer.passes.shifted_model import ShiftedModel
from austeer.passes.train_shifts import Trained, train_shifts
from austeer.passes.training_state import StateFile, TrainingState
from tests.passes.test_head_shifts import some_shifts
from tests.tiny import Tiny

TINY = Tiny("llama", layers=3, heads=4, kv_heads=2, head_dim=6, residual=20)
CHOSEN = [(0, 1), (2, 0), (2, 3)]  # none in layer 1
SCHEDULE = Schedule(lr=0.1, epochs=3, batch_size=4)
BROKEN = 60  # a token that stands in no sample


@cache
def shared_model() -> Any:
    return TINY.in_memory()


def responses(count: int, seed: int = 0, own: Sequence[int] = (5, 6, 7)) -> list[Response]:
    """Whose own tokens are of a few kinds, which a constant can make likelier."""
    generator = random.Random(seed)
    prefixes = [tuple(generator.randrange(1, 50) for _ in range(generator.randint(1, 5))) for _ in range(count)]
    owns = [tuple(generator.choices(own, k=generator.randint(1, 6))) for _ in range(count)]
    return [Response(*both, f"f:{i + 1}") for i, both in enumerate(zip(prefixes, owns, strict=True))]


FIT, STOP = responses(10), responses(5, seed=1)


def train(
    folder: Path,
    *,
    model: Any = None,
    schedule: Schedule = SCHEDULE,
    fit: Sequence[Response] = FIT,
    stop: Sequence[Response] = STOP,
    batch_tokens: int = 30,
    shifts: HeadShifts | None = None,
) -> Trained:
    file = StateFile(folder / "state", {"data": "d"})
    return train_shifts(
        model or shared_model(), shifts or some_shifts(CHOSEN, 6), fit, stop, schedule, file, batch_tokens=batch_tokens
    )


def interpreted(trained: Trained, values: torch.Tensor, samples: Sequence[Response]) -> float:
    """The mean loss with a program, as the interpreter runs it."""
    model = shared_model()
    with interpret(model, trained.shifts.program(values, live_facts(model).geometry)):
        return mean_loss(model, samples, 1000)


def plain_loss(model: Any, shifts: HeadShifts, values: torch.Tensor, samples: Sequence[Response]) -> torch.Tensor:
    """The mean loss of whole logits, text by text, with V·m + b added by hand; gradients pass."""
    k, dim = shifts.directions.shape[2], shifts.directions.shape[1]

    def added(layer: int) -> torch.Tensor:
        parts = [torch.zeros(dim) for _ in range(TINY.heads)]
        for row, (where, head) in enumerate(shifts.heads.tolist()):
            if where == layer:
                free = values[row, k:] + torch.from_numpy(shifts.directions[row]) @ values[row, :k]
                parts[head] = float(shifts.sizes[row]) * free
        return torch.cat(parts)

    hooks = [
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, args, layer=layer: (args[0] + added(layer),))
        for layer, block in enumerate(model.model.layers)
    ]
    nats = []
    for one in samples:
        whole = [*one.prefix, *one.own]
        logits = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        nats += [-logits[at - 1, whole[at]] for at in range(len(one.prefix), len(whole))]
    for hook in hooks:
        hook.remove()
    return torch.stack(nats).mean()


def same(one: Trained, other: Trained) -> bool:
    """To the last bit."""
    return torch.equal(one.best, other.best) and (one.step, dict(one.losses)) == (other.step, dict(other.losses))


def test_the_held_out_loss_falls_and_is_the_interpreters(tmp_path: Path) -> None:
    trained = train(tmp_path)
    assert trained.step == 9
    assert list(trained.losses) == list(range(10))
    best = trained.losses[trained.best_step]
    assert best < trained.losses[0] - 0.5
    assert best == min(trained.losses.values())
    assert interpreted(trained, trained.best, STOP) == pytest.approx(best, rel=1e-5)
    start = torch.from_numpy(trained.shifts.start)
    assert interpreted(trained, start, STOP) == pytest.approx(trained.losses[0], rel=1e-5)


def test_training_is_that_of_a_loop_by_hand(tmp_path: Path) -> None:
    """torch's Adam on the loss of whole logits. Warm-up and cosine are written out for these nine steps."""
    model, shifts = shared_model(), some_shifts(CHOSEN, 6)
    values = torch.from_numpy(shifts.start).requires_grad_()
    optimizer = torch.optim.Adam([values])
    held: list[float] = []
    for step in range(9):
        held.append(float(plain_loss(model, shifts, values, STOP).detach()))
        optimizer.zero_grad()
        plain_loss(model, shifts, values, [FIT[i] for i in SCHEDULE.batch(step, len(FIT))]).backward()
        optimizer.param_groups[0]["lr"] = 0.1 if step == 0 else 0.05 * (1 + math.cos(math.pi * (step - 1) / 8))
        optimizer.step()
    held.append(float(plain_loss(model, shifts, values, STOP).detach()))
    trained = train(tmp_path, shifts=shifts)
    assert list(trained.losses.values()) == pytest.approx(held, rel=1e-4)
    assert trained.best_step == 9
    assert_close(trained.best, values.detach(), rtol=1e-3, atol=1e-3)


def test_the_gradient_is_that_of_the_loss_by_hand() -> None:
    model, shifts = shared_model(), some_shifts(CHOSEN, 6)
    values = torch.from_numpy(shifts.start).requires_grad_()
    plain = plain_loss(model, shifts, values, FIT)
    plain.backward()
    found = torch.from_numpy(shifts.start).requires_grad_()
    found.grad = torch.zeros_like(found)
    runner = ShiftedModel(model, shifts, 12, Team())
    with runner.shifting():
        assert runner.backward(FIT, found) == pytest.approx(float(plain.detach()), rel=1e-5)
        assert runner.loss(FIT, found) == pytest.approx(float(plain.detach()), rel=1e-5)
    assert values.grad is not None
    assert values.grad.abs().max() > 1e-2
    assert_close(found.grad, values.grad, rtol=1e-4, atol=1e-6)


@dataclass(frozen=True)
class Part(Team):
    """One of several processes, which keeps to itself."""

    kept: list[float] = field(default_factory=list)

    def add(self, tensor: torch.Tensor) -> None:
        pass

    def total(self, value: float) -> float:
        self.kept.append(value)
        return value


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_shares_of_several_processes_add_up_to_the_whole(size: int, count: int) -> None:
    """Also where the last batch has fewer samples than there are processes."""
    model, shifts, batch = shared_model(), some_shifts(CHOSEN, 6), FIT[:count]

    def share(team: Team) -> tuple[float, torch.Tensor]:
        values = torch.from_numpy(shifts.start).requires_grad_()
        values.grad = torch.zeros_like(values)
        runner = ShiftedModel(model, shifts, 12, team)
        with runner.shifting():
            return runner.backward(batch, values), values.grad

    whole, gradient = share(Team())
    parts = [share(Part(rank, size)) for rank in range(size)]
    assert sum(loss for loss, _ in parts) == pytest.approx(whole, rel=1e-5)
    assert_close(torch.stack([part for _, part in parts]).sum(0), gradient, rtol=1e-4, atol=1e-6)
    assert [bool(part.any()) for _, part in parts] == [rank < count for rank in range(size)]


def test_how_many_tokens_pass_at_once_changes_rounding_alone(tmp_path: Path) -> None:
    trained = []
    for batch_tokens in (1, 25, 10_000):
        folder = tmp_path / str(batch_tokens)
        folder.mkdir()
        trained.append(train(folder, batch_tokens=batch_tokens))
    for other in trained[1:]:
        assert list(other.losses.values()) == pytest.approx(list(trained[0].losses.values()), rel=1e-5)
        assert_close(other.best, trained[0].best, rtol=1e-4, atol=1e-4)


def test_blocks_run_again_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train(tmp_path)
    (tmp_path / "state").unlink()
    runs: list[int] = []
    hook = shared_model().model.layers[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    schedule = Schedule(lr=0.1, epochs=1, batch_size=10)
    train(tmp_path, batch_tokens=10_000, schedule=schedule)
    assert len(runs) == 3  # the held-out loss before and after, and a step
    monkeypatch.setattr(shifted_model, "all_affordable", lambda *_: False)
    (tmp_path / "state").unlink()
    train(tmp_path, batch_tokens=10_000, schedule=schedule)
    hook.remove()
    assert len(runs) == 7
    (tmp_path / "state").unlink()
    again = train(tmp_path)
    assert list(again.losses.values()) == pytest.approx(list(plain.losses.values()), rel=1e-5)


def test_the_rate_rises_for_a_twentieth_of_the_steps_and_falls_as_half_a_cosine() -> None:
    rates = [Schedule(lr=0.5).rate(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert rates[5] == pytest.approx(0.5)
    assert rates[52] == pytest.approx(0.25 * (1 + math.cos(math.pi * 47 / 95)))
    assert rates[99] == pytest.approx(0.25 * (1 + math.cos(math.pi * 94 / 95)))
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert min(rates) > 0
    assert Schedule(lr=0.5).rate(0, 1) == 0.5


@pytest.mark.parametrize(
    ("samples", "epochs", "steps"), [(1600, None, 600), (80, None, 300), (1, None, 300), (81, 2, 22), (81, 0, 0)]
)
def test_the_number_of_steps(samples: int, epochs: int | None, steps: int) -> None:
    """Three epochs, or as many whole ones as 300 steps need."""
    assert Schedule(epochs=epochs, batch_size=8).steps(samples) == steps


def test_every_epoch_takes_every_sample_once_in_another_order() -> None:
    schedule = Schedule(batch_size=4, seed=3)
    epochs = [[schedule.batch(3 * epoch + place, 10) for place in range(3)] for epoch in range(2)]
    assert [[len(batch) for batch in epoch] for epoch in epochs] == [[4, 4, 2]] * 2
    orders = [[index for batch in epoch for index in batch] for epoch in epochs]
    assert [sorted(order) for order in orders] == [list(range(10))] * 2
    assert orders[0] != orders[1]
    assert schedule.batch(1, 10) == epochs[0][1]
    assert Schedule(batch_size=4, seed=4).batch(0, 10) != epochs[0][0]


def let_it_rise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out loss is how far training has come."""
    start = torch.from_numpy(some_shifts(CHOSEN, 6).start)
    monkeypatch.setattr(ShiftedModel, "loss", lambda _, __, values: 9 + float((values.detach() - start).norm()))


def test_it_stops_where_the_held_out_loss_only_rises_and_keeps_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_it_rise(monkeypatch)
    trained = train(tmp_path, schedule=Schedule(lr=0.1, epochs=20, batch_size=4))
    assert (trained.best_step, len(trained.losses)) == (0, 1 + module.PATIENCE)
    assert trained.step == list(trained.losses)[-1] == 4 * module.PATIENCE  # 60 steps, an evaluation after every 4th
    assert torch.equal(trained.best, torch.from_numpy(trained.shifts.start))


def test_it_goes_on_while_the_best_is_recent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of what was is kept, not the last."""
    told = iter([9.0, 9.5, 9.5, 9.5, 8.0, 8.5, 8.0, 8.5, 8.5, 7.0])
    seen: list[torch.Tensor] = []

    def loss(_: Any, __: Any, values: torch.Tensor) -> float:
        seen.append(values.detach().clone())
        return next(told)

    monkeypatch.setattr(ShiftedModel, "loss", loss)
    trained = train(tmp_path, schedule=Schedule(lr=0.1, epochs=4, batch_size=4))
    assert (trained.step, trained.best_step) == (8, 4)
    assert torch.equal(trained.best, seen[4])
    assert not torch.equal(trained.best, seen[8])


def interrupt_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    plain, done = StateFile.save, []

    def save(self: StateFile, state: TrainingState) -> None:
        plain(self, state)
        done.append(state.step)
        if len(done) == saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(StateFile, "save", save)


@pytest.mark.parametrize(("rising", "saves"), [(False, 1), (False, 2), (False, 3), (True, 2), (True, 4)])
def test_an_interrupted_training_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rising: bool, saves: int
) -> None:
    """Also after its last evaluation, and where early stopping ended it."""
    monkeypatch.setattr(module, "EVALUATIONS", 9 if rising else 3)
    if rising:
        let_it_rise(monkeypatch)
    whole = train(tmp_path)
    assert whole.step == (4 if rising else 9)
    (tmp_path / "state").unlink()
    with monkeypatch.context() as patch:
        interrupt_after(patch, saves)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    # What it started from lies in the state: an SVD on another machine may give other directions.
    resumed = train(tmp_path, shifts=some_shifts(CHOSEN, 6, seed=9))
    assert same(resumed, whole)
    assert (resumed.shifts.directions == whole.shifts.directions).all()


def test_an_interruption_between_evaluations_goes_back_to_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVALUATIONS", 3)
    whole = train(tmp_path)
    (tmp_path / "state").unlink()
    plain, moves = module._Training.move, []

    def move(self: Any, rate: float) -> None:
        moves.append(rate)
        if len(moves) == 5:
            raise KeyboardInterrupt
        plain(self, rate)

    monkeypatch.setattr(module._Training, "move", move)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    monkeypatch.setattr(module._Training, "move", plain)
    assert same(train(tmp_path), whole)


def broken_model() -> Any:
    model = deepcopy(shared_model())
    model.model.embed_tokens.weight.data[BROKEN] = torch.nan
    return model


def test_a_loss_that_is_no_number_stops_it_and_the_last_state_stays(tmp_path: Path) -> None:
    last = SCHEDULE.batch(2, len(FIT))[0]
    fit = list(FIT)
    fit[last] = Response((1, BROKEN), fit[last].own, fit[last].where)
    with pytest.raises(CheckFailed) as caught:
        train(tmp_path, model=broken_model(), fit=fit, batch_tokens=1)
    message = str(caught.value)
    assert f"after step 2: the loss is nan on the samples at f:{last + 1}; " in message
    assert f"the state after step 1 is kept in {tmp_path / 'state'}, and the same command goes on from it" in message
    kept = StateFile(tmp_path / "state", {"data": "d"}).load()
    assert kept is not None
    assert kept.step == 1
    assert all(math.isfinite(loss) for loss in kept.losses.values())
    slower = Schedule(lr=0.01, epochs=3, batch_size=4)
    resumed = train(tmp_path, fit=fit, schedule=slower)  # on a model without the fault
    assert resumed.step == 9
    assert {step: resumed.losses[step] for step in kept.losses} == dict(kept.losses)
    assert same(train(tmp_path, fit=fit, schedule=slower), resumed)


def test_a_step_too_large_never_replaces_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the held-out loss after it is a number still, as here: it is the next gradient that is none."""
    whole = train(tmp_path)
    (tmp_path / "state").unlink()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    kept = (tmp_path / "state").read_bytes()
    with pytest.raises(
        CheckFailed, match=r"after step 5: the gradient holds no numbers on .*; the state after step 4 is kept"
    ):
        train(tmp_path, schedule=Schedule(lr=1e38, epochs=3, batch_size=4))
    assert (tmp_path / "state").read_bytes() == kept
    assert same(train(tmp_path), whole)


def test_a_held_out_sample_without_a_number_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    stop = [*STOP, Response((1, BROKEN), (3,), "f:77")]
    with pytest.raises(CheckFailed, match="after step 0: the held-out loss is nan on the samples at f:77; nothing was"):
        train(tmp_path, model=broken_model(), stop=stop, batch_tokens=1)
    assert not (tmp_path / "state").exists()


def test_a_held_out_loss_that_is_no_number_is_not_kept_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([9.0, 8.0, 7.0, math.inf])
    with monkeypatch.context() as patch:
        patch.setattr(ShiftedModel, "loss", lambda *_: next(told))
        with pytest.raises(
            CheckFailed, match=r"after step 3: the held-out loss is inf on .*; the state after step 2 is"
        ):
            train(tmp_path)
    kept = StateFile(tmp_path / "state", {"data": "d"}).load()
    assert kept is not None
    assert (kept.step, kept.losses) == (2, {0: 9.0, 1: 8.0, 2: 7.0})


def test_a_gradient_without_numbers_is_told_from_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ShiftedModel.backward

    def backward(self: Any, batch: Any, trained: Any) -> float:
        loss = plain(self, batch, trained)
        trained.grad[0, 0] = torch.inf
        return loss

    monkeypatch.setattr(ShiftedModel, "backward", backward)
    with pytest.raises(
        CheckFailed, match=r"after step 0: the gradient holds no numbers on the samples at f:\d+, .*, …"
    ):
        train(tmp_path)


def test_the_model_is_as_before_and_has_no_gradients(tmp_path: Path) -> None:
    model = broken_model()
    before = deepcopy(model.state_dict())

    def untouched() -> bool:
        equal = all(
            torch.equal(before[name].nan_to_num(), now.nan_to_num()) for name, now in model.state_dict().items()
        )
        hooks = any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())
        return equal and not hooks and not any(p.requires_grad or p.grad is not None for p in model.parameters())

    train(tmp_path, model=model)
    assert untouched()
    (tmp_path / "state").unlink()
    with pytest.raises(CheckFailed):
        train(tmp_path, model=model, fit=[Response((BROKEN,), (3,), "f:1")])
    assert untouched()


def test_a_model_in_bfloat16_is_trained_in_float32(tmp_path: Path) -> None:
    model = deepcopy(shared_model()).to(torch.bfloat16)
    trained = train(tmp_path, model=model)
    assert trained.best.dtype == torch.float32
    assert trained.losses[trained.best_step] < trained.losses[0] - 0.5
    assert interpreted(trained, trained.best, STOP) == pytest.approx(trained.losses[trained.best_step], rel=0.05)


@pytest.mark.parametrize("made", [Tiny("gpt2"), Tiny("opt"), Tiny("gemma2"), Tiny("qwen3_moe")], ids=str)
def test_other_architectures_learn_too(tmp_path: Path, made: Tiny) -> None:
    model = made.in_memory()
    trained = train(tmp_path, model=model, shifts=some_shifts([(0, 0), (1, 2)], made.head_dim))
    assert trained.losses[trained.best_step] < trained.losses[0]
    with interpret(model, trained.shifts.program(trained.best, live_facts(model).geometry)):
        assert mean_loss(model, STOP, 1000) == pytest.approx(trained.losses[trained.best_step], rel=1e-5)


def test_held_out_text_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STOP_TOKENS", len(STOP[0].text) + 1)
    trained = train(tmp_path)
    assert interpreted(trained, trained.best, STOP[:2]) == pytest.approx(trained.losses[trained.best_step], rel=1e-5)
    assert module._first_tokens(STOP, 0) == STOP[:1]


def test_untrained_are_the_lost_components_alone() -> None:
    shifts = some_shifts(CHOSEN, 6)
    trained = Trained.untrained(shifts)
    assert (trained.step, trained.best_step, dict(trained.losses)) == (0, 0, {})
    assert torch.equal(trained.best, torch.from_numpy(shifts.start))
