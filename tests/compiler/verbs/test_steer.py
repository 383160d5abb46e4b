"""steer on the demo model: found, searched, written, certified; and what it says where it does not help."""

import json
from pathlib import Path
from typing import Any

import pytest

from austeer.compiler import CheckFailed, InputError, OutputError, Program, Rank1, Refused, Shift, UsageError
from austeer.compiler.fidelity import Fidelity
from austeer.compiler.manifest import MANIFEST, PROGRAM, read_manifest
from austeer.compiler.pairs import read_pairs
from austeer.compiler.verbs.common import Settings
from austeer.compiler.verbs.demo import MODEL
from austeer.compiler.verbs.search_picture import draw_search
from austeer.compiler.verbs.steer import Steering, steer
from tests.tiny import Tiny, on_disk

CPU = Settings(device="cpu")
PAIRS, NEUTRAL = MODEL / "pairs.jsonl", MODEL / "neutral.txt"


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Steering:
    out = tmp_path_factory.mktemp("steer") / "out"
    return steer(str(MODEL), PAIRS, out, top_k=8, neutral=NEUTRAL, settings=CPU)


def test_the_search_helps_within_the_drift_limit(searched: Steering):
    found = searched.choice.search
    assert found is not None
    best = found.best
    assert best is not None
    assert best.effect is not None
    assert best.effect.accuracy >= found.base.accuracy + 0.1
    assert best.drift <= 0.1
    assert (searched.choice.k, searched.choice.alpha, searched.choice.drift) == (8, best.alpha, best.drift)
    assert (searched.choice.site, best.point["k"], best.point["site"]) == ("ffn", 8, "ffn")
    assert len(found.table) == 24


def test_the_manifest_records_the_search_and_no_text_or_path(searched: Steering):
    manifest = read_manifest(Path(searched.out))
    record = manifest["steer"]
    assert len(record["search"]["table"]) == len(searched.plain()["search"]["table"])
    assert record["pairs"]["fitted"] + record["pairs"]["held_out"] == len(read_pairs(PAIRS))
    assert 0.15 < record["pairs"]["held_out"] / len(read_pairs(PAIRS)) < 0.25
    text = (Path(searched.out) / MANIFEST).read_text()
    assert str(Path(searched.out).parent) not in text
    assert str(MODEL.parent) not in text
    assert Program.load(Path(str(searched.out)) / PROGRAM).model.name == MODEL.name
    assert not any(pair.prompt in text for pair in read_pairs(PAIRS))


def test_the_output_is_certified_and_carries_program_and_card(searched: Steering):
    out = Path(searched.out)
    assert searched.certificate is not None
    assert searched.certificate.passed
    assert searched.certificate.greedy_equal
    assert Program.load(out / PROGRAM) == searched.program
    card = (out / "README.md").read_text()
    assert "base_model: demo_model" in card
    assert "license: apache-2.0" in card  # the base's own
    assert searched.program.sha256 in card


def test_the_seed_decides_what_is_held_out(searched: Steering, tmp_path: Path):
    same = steer(str(MODEL), PAIRS, tmp_path / "a", top_k=8, neutral=NEUTRAL, program_only=True, settings=CPU)
    other = steer(
        str(MODEL), PAIRS, tmp_path / "b", top_k=8, neutral=NEUTRAL, program_only=True,
        settings=Settings(device="cpu", seed=1),
    )  # fmt: skip
    assert same.program == searched.program
    assert other.plain()["search"]["base"] != searched.plain()["search"]["base"]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Steering]:
    """Two sites, the search kept and drawn."""
    folder = tmp_path_factory.mktemp("several")
    report = steer(
        str(MODEL), PAIRS, folder / "out", site="attention, ffn", top_k=8, trials=8, neutral=NEUTRAL, program_only=True,
        study=folder / "study", picture=folder / "picture.svg", settings=CPU,
    )  # fmt: skip
    return folder, report


def test_of_several_sites_the_search_chooses_one(several: tuple[Path, Steering]):
    _, report = several
    found = report.choice.search
    assert found is not None
    assert {trial.point["site"] for trial in found.table} == {"heads", "ffn"}
    assert {edit.site for edit in report.program.edits} == {report.site} == {report.choice.site}
    record = json.loads(json.dumps(report.plain(), allow_nan=False))
    assert record["search"]["table"][0]["point"] == {"site": "ffn", "k": 8}


def test_a_kept_search_goes_on_and_is_refused_for_other_pairs(several: tuple[Path, Steering], tmp_path: Path):
    folder, report = several
    options = {"top_k": 8, "neutral": NEUTRAL, "program_only": True, "study": folder / "study", "settings": CPU}
    again = steer(str(MODEL), PAIRS, tmp_path / "a", site=["heads", "ffn"], trials=8, **options)
    assert again.program == report.program
    more = steer(str(MODEL), PAIRS, tmp_path / "b", site=["heads", "ffn"], trials=10, **options)
    assert len(more.plain()["search"]["table"]) == 10
    (tmp_path / "pairs.jsonl").write_text("\n".join(PAIRS.read_text().splitlines()[:-9]))
    with pytest.raises(InputError, match="another pairs; give the study of this search"):
        steer(str(MODEL), tmp_path / "pairs.jsonl", tmp_path / "c", site=["heads", "ffn"], trials=8, **options)
    with pytest.raises(InputError, match="another goal"):
        steer(str(MODEL), PAIRS, tmp_path / "c", site="ffn", **options)


def test_the_picture_marks_limit_base_and_winner(several: tuple[Path, Steering], tmp_path: Path):
    folder, report = several
    drawn = (folder / "picture.svg").read_text()
    assert all(word in drawn for word in ("limit 0.1", "chosen", "heads", "held-out accuracy"))
    assert report.choice.search is not None
    draw_search(report.choice.search, 0.1, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == drawn
    draw_search(report.choice.search, 0.1, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"picture": "pairs.jsonl"}, UsageError, "writes .png and .svg files"),
        ({"picture": "there.svg"}, OutputError, "exists already"),
        ({"picture": "gone/there.svg"}, OutputError, "no directory"),
        ({"picture": "new.svg", "top_k": 1, "alpha": 1.0}, UsageError, "nothing is left to search"),
        ({"study": "new", "top_k": 1, "alpha": 1.0}, UsageError, "nothing is left to search"),
        ({"trials": 0}, UsageError, "--trials must be at least 1"),
        ({"site": ("ffn", "magic")}, UsageError, "unknown site 'magic'"),
        ({"study": "there.svg"}, InputError, "no stored study"),
    ],
)
def test_options_of_the_search_that_cannot_be_meant(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
):
    (tmp_path / "there.svg").write_text("mine")
    paths = {name: tmp_path / options[name] for name in ("picture", "study") if name in options}
    with pytest.raises(error, match=message):
        steer(str(MODEL), PAIRS, tmp_path / "out", settings=CPU, neutral=NEUTRAL, **{**options, **paths})
    assert [path.name for path in tmp_path.iterdir()] == ["there.svg"]


def test_with_both_given_every_pair_localizes_and_neutral_text_is_sampled(tmp_path: Path):
    report = steer(str(MODEL), PAIRS, tmp_path / "out", top_k=5, alpha=1.0, settings=CPU)
    assert report.choice.search is None
    record = read_manifest(tmp_path / "out")["steer"]
    assert record["pairs"]["fitted"] == len(read_pairs(PAIRS))
    assert record["pairs"]["held_out"] == 0
    assert sum(len(edit["units"]) for edit in (e.plain() for e in report.program.edits)) == 5
    assert report.choice.drift > 0


def test_program_only_writes_a_program_even_for_the_residual_site(tmp_path: Path):
    report = steer(
        str(MODEL), PAIRS, tmp_path / "program", site="layer", top_k=2, alpha=0.5, program_only=True, settings=CPU
    )
    assert Program.load(tmp_path / "program") == report.program
    assert {edit.site for edit in report.program.edits} == {"residual"}
    assert [path.name for path in tmp_path.iterdir()] == ["program"]


def test_where_steering_does_not_help_nothing_is_written(tmp_path: Path):
    # The base prefers every positive already, so that nothing can be won.
    rows = [{"prompt": f"{pair.prompt}", "positive": " the", "negative": " carrot"} for pair in read_pairs(PAIRS)[:40]]
    easy = [{**row, "prompt": "Once upon a time there was", "positive": " a", "negative": f" {word}"} for row, word in
            zip(rows, ("carrot", "boots", "tree", "Tom") * 10, strict=True)]  # fmt: skip
    for number, row in enumerate(easy):
        row["prompt"] = f"{'Tom was happy. ' * (number + 1)}{row['prompt']}"
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, easy)))
    with pytest.raises(CheckFailed, match="does not help") as caught:
        steer(str(MODEL), tmp_path / "pairs.jsonl", tmp_path / "out", top_k=2, neutral=NEUTRAL, settings=CPU)
    assert "held-out accuracy of 1.000" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path):
    with pytest.raises(OutputError, match="exists"):
        steer(str(tmp_path / "no model"), PAIRS, tmp_path, settings=CPU)
    with pytest.raises(OutputError, match="no directory"):
        steer(str(tmp_path / "no model"), PAIRS, tmp_path / "gone" / "out", settings=CPU)


@pytest.fixture(scope="module")
def rank1(tmp_path_factory: pytest.TempPathFactory) -> Steering:
    out = tmp_path_factory.mktemp("steer2edit") / "out"
    return steer(str(MODEL), PAIRS, out, method="steer2edit", top_k=64, neutral=NEUTRAL, settings=CPU)


def test_steer2edit_is_searched_written_and_certified(rank1: Steering):
    found = rank1.choice.search
    assert found is not None
    assert found.best is not None
    assert found.best.effect is not None
    assert found.best.effect.accuracy > found.base.accuracy
    assert found.best.drift <= 0.1
    assert rank1.certificate is not None
    assert rank1.certificate.passed
    places = [(edit.layer, edit.site) for edit in rank1.program.edits]
    assert len(set(places)) == len(places)
    assert {type(edit) for edit in rank1.program.edits} == {Rank1}
    assert Program.load(Path(str(rank1.out)) / PROGRAM) == rank1.program


def test_rho_and_l1_ratio_say_how_many_and_how_strongly(rank1: Steering, tmp_path: Path):
    rho, l1_ratio = rank1.choice.rho, rank1.choice.l1_ratio
    assert rho is not None
    assert l1_ratio is not None
    options = {"method": "steer2edit", "neutral": NEUTRAL, "program_only": True, "settings": CPU}
    given = steer(str(MODEL), PAIRS, tmp_path / "a", rho=rho, l1_ratio=l1_ratio, **options)
    assert given.choice.search is None
    assert given.choice.alpha == pytest.approx(rank1.choice.alpha)
    record = rank1.plain()
    assert (record["method"], record["site"], record["top_k"]) == ("steer2edit", "heads and neurons", 64)
    assert (record["rho"], record["l1_ratio"]) == (rho, l1_ratio)
    assert read_manifest(Path(str(rank1.out)))["steer"]["rho"] == rho
    heads = steer(str(MODEL), PAIRS, tmp_path / "b", site="attention", rho=rho, l1_ratio=0.0, **options)
    assert {edit.site for edit in heads.program.edits} == {"heads"}


def test_fusion_shifts_every_layer_and_weighs_its_segments(tmp_path: Path):
    report = steer(
        str(MODEL), PAIRS, tmp_path / "out", method="fusion", segments=2, trials=6, neutral=NEUTRAL, settings=CPU
    )
    found = report.choice.search
    assert found is not None
    assert found.best is not None
    assert isinstance(found.best.effect, Fidelity)
    assert isinstance(found.base, Fidelity)
    assert found.best.effect.score > found.base.score
    assert found.best.drift <= 0.1
    assert set(found.best.point) == {"weight 1", "weight 2"}
    assert [(edit.layer, edit.site, type(edit)) for edit in report.program.edits] == [
        (layer, "residual", Shift) for layer in range(report.program.model.layers)
    ]
    assert report.certificate is not None
    assert report.certificate.passed
    assert read_manifest(tmp_path / "out")["steer"]["search"]["best"]["point"] == found.best.point


def test_fusion_with_a_given_weight_is_not_searched(tmp_path: Path):
    options = {"method": "fusion", "neutral": NEUTRAL, "program_only": True, "settings": CPU}
    report = steer(str(MODEL), PAIRS, tmp_path / "program", alpha=0.1, **options)
    assert report.choice.search is None
    assert report.choice.k == report.program.model.layers
    with pytest.raises(UsageError, match="must be from 1 to the"):
        steer(str(MODEL), PAIRS, tmp_path / "other", segments=99, **options)


def test_fusion_is_refused_where_one_layer_cannot_carry_it(tmp_path: Path):
    model = on_disk(Tiny("mixtral"))
    with pytest.raises(Refused, match="steering at site residual cannot be compiled"):
        steer(str(model), PAIRS, tmp_path / "out", method="fusion", settings=CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "unknown method 'magic': use one of austeer, steer2edit, fusion"),
        ({"method": "steer2edit", "site": "ffn"}, "edits the sites heads and neurons, not ffn"),
        ({"method": "steer2edit", "rho": 0.1}, "need each other"),
        ({"method": "steer2edit", "rho": 0.1, "l1_ratio": 1.0}, "from 0 to below 1"),
        ({"method": "steer2edit", "rho": 0.1, "l1_ratio": 0.5, "top_k": 4}, "one pair or the other"),
        ({"method": "steer2edit", "alpha": -1.0}, "above 0"),
        ({"method": "steer2edit", "top_k": 10**6}, "heads and neurons at site heads and neurons of all layers"),
        ({"rho": 0.1, "l1_ratio": 0.5}, "belong to --method steer2edit"),
        ({"segments": 2}, "belongs to --method fusion"),
        ({"method": "fusion", "top_k": 2}, "no meaning for --method fusion"),
        ({"method": "fusion", "site": "ffn"}, "edits the sites residual, not ffn"),
    ],
)
def test_options_of_one_method_that_do_not_fit(options: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(UsageError, match=message):
        steer(str(MODEL), PAIRS, tmp_path / "out", settings=CPU, **options)
    assert not any(tmp_path.iterdir())


def test_no_head_or_neuron_left_by_the_penalty(tmp_path: Path):
    with pytest.raises(CheckFailed, match="no head or neuron"):
        steer(
            str(MODEL), PAIRS, tmp_path / "out", method="steer2edit", rho=3.0, l1_ratio=0.9, neutral=NEUTRAL,
            settings=CPU,
        )  # fmt: skip
    assert not any(tmp_path.iterdir())


def test_neurons_of_nothing_but_experts_are_refused_before_a_model_runs(tmp_path: Path):
    model = on_disk(Tiny("mixtral"))
    with pytest.raises(Refused, match="steering at site neurons cannot be compiled"):
        steer(str(model), PAIRS, tmp_path / "out", method="steer2edit", site="neurons", settings=CPU)
