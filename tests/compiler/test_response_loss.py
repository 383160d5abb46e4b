"""The loss of responses, against transformers' own logits and a cross entropy written out by hand."""

import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from austeer.compiler import CheckFailed, UsageError, response_loss
from austeer.compiler.live import block_of, live_facts
from austeer.compiler.response_loss import mean_loss, packs, places, recomputing, summed_loss
from austeer.compiler.responses import Response
from tests.shared import TINY, tiny


def some_responses(count: int = 7) -> list[Response]:
    """Of many lengths; every third has no prefix."""
    generator = random.Random(1)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(generator.randrange(1, 64) for _ in range(generator.randint(low, high)))

    return [Response(tokens(1, 6) if i % 3 else (), tokens(2, 9), f"f:{i + 1}") for i in range(count)]


def by_hand(model: Any, response: Response) -> torch.Tensor:
    """-log softmax of each own token of one response alone, at the position before it."""
    whole = [*response.prefix, *response.own]
    logits = model(input_ids=torch.tensor([whole])).logits[0].double()
    places = [at for at in range(len(response.prefix), len(whole)) if at > 0]
    return torch.stack([logits[at - 1].logsumexp(0) - logits[at - 1, whole[at]] for at in places])


@pytest.mark.parametrize("name", TINY)
def test_only_the_responses_own_tokens_count(name: str) -> None:
    model, responses = tiny(name), some_responses()
    alone = torch.cat([by_hand(model, one) for one in responses])
    assert float(summed_loss(model, responses)) == pytest.approx(float(alone.sum()), rel=2e-5)
    for batch_tokens in (1, 30, 10_000):  # whatever is padded to whatever length
        assert mean_loss(model, responses, batch_tokens) == pytest.approx(float(alone.mean()), rel=2e-5)


def test_the_soft_cap_of_logits_counts() -> None:
    model, capped = deepcopy(tiny("gemma2")), some_responses(3)
    before = mean_loss(model, capped, 100)
    model.config.final_logit_softcapping = None
    assert mean_loss(model, capped, 100) != pytest.approx(before, rel=0.1)


def gradient(model: Any, loss_of: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """(loss, its gradient) by a constant that is added to the input of a block's output projection."""
    facts = live_facts(model)
    added = torch.full((facts.geometry.heads,), 0.1, requires_grad=True)
    place = block_of(model, facts, 0).get_submodule(facts.architecture.attn_out.name)
    hook = place.register_forward_pre_hook(lambda _, args: (args[0] + added, *args[1:]))
    try:
        loss = loss_of()
        loss.backward()
    finally:
        hook.remove()
    assert added.grad is not None
    return float(loss.detach()), added.grad


def learned(model: Any, responses: list[Response]) -> tuple[float, torch.Tensor]:
    return gradient(model, lambda: summed_loss(model, responses, learning=True))


@pytest.mark.parametrize("name", TINY)
def test_gradients_are_those_of_the_loss_by_hand(name: str) -> None:
    model, responses = tiny(name), some_responses(3)
    loss, found = learned(model, responses)
    plain, wanted = gradient(model, lambda: torch.stack([by_hand(model, one).sum() for one in responses]).sum())
    assert loss == pytest.approx(plain, rel=2e-5)
    assert wanted.abs().max() > 0.1
    assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", TINY)
def test_blocks_that_run_again_give_the_same_gradients(name: str) -> None:
    model, responses = tiny(name), some_responses(4)
    loss, plain = learned(model, responses)
    with recomputing(model):
        same, recomputed = learned(model, responses)
    assert same == loss
    assert_close(recomputed, plain, rtol=1e-4, atol=1e-5)


def test_blocks_do_run_again_and_are_as_before_afterwards() -> None:
    model = deepcopy(tiny("llama"))
    block = model.model.layers[1]
    runs: list[int] = []
    block.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    with recomputing(model):
        learned(model, some_responses(2))
    assert len(runs) == 2
    learned(model, some_responses(2))
    assert len(runs) == 3
    assert "forward" not in vars(block)


def test_a_forward_of_the_blocks_own_is_kept() -> None:
    """As accelerate's hooks set it."""
    model = deepcopy(tiny("llama"))
    block = model.model.layers[0]
    block.forward = own = block.forward
    with recomputing(model):
        assert block.forward is not own
    assert vars(block)["forward"] is own


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt-post"])
def test_logits_come_in_blocks_without_a_difference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, responses = tiny(name), some_responses()
    loss, whole = learned(model, responses)
    sizes: list[int] = []
    plain = response_loss.logits

    def watched(model: Any, states: torch.Tensor) -> torch.Tensor:
        sizes.append(len(states))
        return plain(model, states)

    monkeypatch.setattr(response_loss, "logits", watched)
    monkeypatch.setattr(response_loss, "LOGIT_VALUES", 3 * 64)
    pieces, found = learned(model, responses)
    assert max(sizes) == 3
    assert sum(sizes) == 2 * sum(one.scored for one in responses)  # once for the loss, again for the gradients
    assert pieces == pytest.approx(loss, rel=1e-6)
    assert_close(found, whole, rtol=1e-4, atol=1e-5)


def test_without_learning_nothing_is_kept_for_gradients() -> None:
    model = deepcopy(tiny("llama")).requires_grad_()
    assert not summed_loss(model, some_responses(2)).requires_grad


def test_bfloat16_is_near_float32() -> None:
    model, responses = tiny("llama"), some_responses()
    half = deepcopy(model).to(torch.bfloat16)
    assert summed_loss(half, responses).dtype == torch.float32
    assert mean_loss(half, responses, 100) == pytest.approx(mean_loss(model, responses, 100), rel=0.05)


def test_a_loss_that_is_no_number_names_its_samples() -> None:
    model = deepcopy(tiny("llama"))
    model.model.embed_tokens.weight.data[63] = torch.nan
    responses = [Response((1,), (2, 3, 4), "f:1"), Response((1,), (63, 3), "f:2"), Response((1,), (5,), "f:3")]
    with pytest.raises(CheckFailed, match=r"the loss is nan on the samples at f:2: "):
        mean_loss(model, responses, 1)
    assert mean_loss(model, responses[::2], 1) > 0


def test_a_text_beyond_the_models_positions_is_refused() -> None:
    with pytest.raises(UsageError, match="--max-length"):
        mean_loss(tiny("llama"), [Response((1,), (2,) * 200, "f:1")], 100)


def test_packs_hold_every_response_once_even_where_texts_are_equal() -> None:
    same = [Response((1,), (2, 3), "f:1"), Response((1, 2), (3,), "f:2"), Response((1,), (2, 3), "f:3")]
    responses = [*some_responses(), *same]
    packed = packs(responses, 12)
    assert sorted(one.where for pack in packed for one in pack) == sorted(one.where for one in responses)
    assert {id(one) for pack in packed for one in pack} == {id(one) for one in responses}
    assert all(len(pack) == 1 or len(pack) * max(len(one.text) for one in pack) <= 12 for pack in packed)


def test_places_names_three_and_says_that_there_are_more() -> None:
    responses = some_responses(4)
    assert places(responses[:3]) == "f:1, f:2, f:3"
    assert places(responses) == "f:1, f:2, f:3, …"
