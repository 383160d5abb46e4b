"""compose: several programs as one, which does what running one within the other does."""

import numpy as np
import pytest

from austeer.compiler import Edit, Gate, Gated, Program, ProgramError, Rank1, Scale, Shift, UsageError, interpret
from austeer.compiler.facts import Geometry
from austeer.passes.compose import compose
from tests.tiny import Tiny, load, logits, on_disk, program, tokens

MODEL = Geometry("m", "llama", layers=2, residual=3, heads=4, neurons=6)


def of(*edits: Edit, model: Geometry = MODEL) -> Program:
    return Program(model, edits)


def test_one_program_is_itself() -> None:
    made = of(Scale(0, "ffn", [1], 1), Shift(0, "ffn", [1, 2, 3]))
    assert compose([made]) == (made, ())


def test_no_program_is_an_error() -> None:
    with pytest.raises(UsageError, match="no program given"):
        compose([])


def test_programs_for_different_models_do_not_go_together() -> None:
    with pytest.raises(ProgramError, match="does not fit"):
        compose([of(), of(model=Geometry("m", "llama", 2, 3, 4, 7))])


def test_the_name_of_the_model_is_the_first_one_s() -> None:
    made, _ = compose([of(), of(model=Geometry("other", "llama", 2, 3, 4, 6))])
    assert made.model == MODEL


def test_edits_at_different_places_are_kept_in_order() -> None:
    edits = [Scale(1, "ffn", [1], 1), Shift(0, "ffn", [1, 2, 3]), Scale(0, "heads", [1], 1)]
    assert compose([of(*edits[:2]), of(*edits[2:])]) == (of(*edits), ())


def test_factors_multiply_with_a_note() -> None:
    first = of(Scale(0, "ffn", [0, 1], [1.0, 0.5]), Scale(1, "ffn", [0], 1))
    made, notes = compose([first, of(Scale(0, "ffn", [2, 1], [3.0, 1.0]))])
    assert made == of(Scale(1, "ffn", [0], 1), Scale(0, "ffn", [0, 1, 2], [1.0, 2.0, 3.0]))
    assert notes == ("layer 0, site ffn: edited by several programs; the factors multiply",)


def test_factors_that_cancel_leave_nothing() -> None:
    made, notes = compose([of(Scale(0, "ffn", [0], [1.0])), of(Scale(0, "ffn", [0], [-0.5]))])
    assert made.edits == ()
    assert len(notes) == 1


def test_shifts_pass_through_the_scales_that_follow() -> None:
    made, _ = compose([of(Shift(0, "ffn", [1, 1, 1])), of(Scale(0, "ffn", [0], 1), Shift(0, "ffn", [0, 0, 5]))])
    assert made == of(Scale(0, "ffn", [0], 1), Shift(0, "ffn", [2, 1, 6]))


def test_rank1_terms_are_never_merged() -> None:
    term = Rank1(0, "heads", [1, 0, 0, 0], [1, 0, 0], 1)
    assert compose([of(term), of(term)]) == (of(term, term), ())
    made, _ = compose([of(term, Scale(0, "heads", [0], 1)), of(term, Scale(0, "heads", [1], 1))])
    assert made == of(term, term, Scale(0, "heads", [0, 1], 1))


def test_factors_too_large_together_are_refused() -> None:
    huge = of(Scale(0, "ffn", [0], 1e30))
    with pytest.raises(ProgramError, match="nan or infinity"):
        compose([huge, huge])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
def test_composition_is_one_interpreter_within_the_other(architecture: str) -> None:
    # Different sites apply in data-flow order, also those of different programs: a Rank1 of the second comes
    # before an edit of its projection's output by the first. So no Rank1 in the second.
    tiny = Tiny(architecture)
    model, ids = load(on_disk(tiny)), tokens()
    first, other = program(tiny, seed=1), program(tiny, seed=2)
    second = Program(other.model, tuple(edit for edit in other.edits if not isinstance(edit, Rank1)))
    made, notes = compose([first, second])
    assert notes
    with interpret(model, first), interpret(model, second):
        nested = logits(model, ids)
    with interpret(model, made):
        found = logits(model, ids)
    assert (found - nested).abs().max() <= 1e-5 * nested.abs().max()
    with interpret(model, first):
        assert (logits(model, ids) - nested).abs().max() > 0.01 * nested.abs().max()


def test_composition_of_three_multiplies_all_factors() -> None:
    made, _ = compose([of(Scale(0, "ffn", [0], gamma)) for gamma in (1.0, 0.5, -0.5)])
    (edit,) = made.edits
    assert isinstance(edit, Scale)
    assert np.allclose(1 + edit.gamma, 2 * 1.5 * 0.5)


def test_gated_edits_are_kept_beside_what_is_merged() -> None:
    gate = Gate([1, 2, 3], 0.5, 2.0)
    gated = [Gated(Scale(0, "ffn", [1], 1), gate), Gated(Shift(0, "ffn", [1, 2, 3]), gate)]
    made, notes = compose([of(Scale(0, "ffn", [1], 1), gated[0]), of(gated[1], Scale(0, "ffn", [1], 1))])
    assert made == of(*gated, Scale(0, "ffn", [1], 3))
    assert len(notes) == 1
    made, notes = compose([of(gated[0]), of(gated[1])])
    assert (made, notes) == (of(*gated), ())
