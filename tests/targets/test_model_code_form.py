"""The form `model-code`, loaded as a user loads it: every kind at every site, also where no weight carries it."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from austeer.compiler import (
    CheckpointError,
    Edit,
    Gate,
    Gated,
    Program,
    ProgramError,
    Rank1,
    Refused,
    Scale,
    Shift,
    interpret,
)
from austeer.compiler.checkpoint import Checkpoint
from austeer.compiler.facts import facts_of
from austeer.compiler.layout import Layout
from austeer.compiler.sites import SITES
from austeer.targets.checkpoint import Writing
from austeer.targets.model_code import VECTORS, CodePlan, load, plan, write
from tests.compiler.test_gates import gates
from tests.tiny import (
    CONFIGS,
    VARIANTS,
    VOCABULARY,
    Tiny,
    bare,
    fused,
    logits,
    on_disk,
    rewritten,
    scratch,
    sharded,
    tokens,
)

LLAMA, MIXTRAL = Tiny("llama"), Tiny("mixtral")

# What a user runs: transformers alone. Logits in one pass, and a continuation with the KV cache.
USER = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

ids = torch.tensor(eval(sys.argv[1]))
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
        continued = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    save_file({"logits": logits, "continued": continued}, folder + "/found")
assert not any(name.partition(".")[0] == "austeer" for name in sys.modules)
"""


@pytest.fixture(autouse=True)
def _own_module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies code that it runs to a cache: not to the user's."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def every_edit(tiny: Tiny, folder: Path) -> list[Edit]:
    """All kinds at all sites of all layers, two of each, sites against the flow of data; then the same gated."""
    rng, geometry = np.random.default_rng(0), layout_of(folder).facts.geometry
    edits: list[Edit] = []
    for layer, site, _ in (
        (layer, site, time) for layer in range(tiny.layers) for site in SITES[::-1] for time in "ab"
    ):
        if site == "neurons" and tiny.has_experts(layer):
            continue
        width = {"heads": geometry.heads, "neurons": geometry.neurons}.get(site, geometry.residual)
        taken = {unit for e in edits if isinstance(e, Scale) and (e.layer, e.site) == (layer, site) for unit in e.units}
        units = [unit for unit in rng.permutation(width).tolist() if unit not in taken][:4]
        edits.append(Scale(layer, site, units, rng.normal(size=4)))
        edits.append(Shift(layer, site, 0.3 * rng.normal(size=width)))
        if site in ("heads", "neurons"):
            edits.append(Rank1(layer, site, rng.normal(size=width), rng.normal(size=geometry.residual), 0.1))
    return [*edits, *gates(tiny)]


def layout_of(folder: Path) -> Layout:
    checkpoint = Checkpoint.open(folder)
    return Layout.of(checkpoint, facts_of(folder.name, checkpoint.config))


def compiled(made: Program, base: Path, name: str = "out") -> tuple[Path, CodePlan]:
    planned, out = plan(made, layout_of(base)), scratch() / name
    out.mkdir()
    write(planned, out, Writing())
    return out, planned


def everything(tiny: Tiny, base: Path | None = None) -> tuple[Path, Program]:
    """The model with every edit in it, and what they are."""
    base = base or on_disk(tiny)
    made = Program.of(every_edit(tiny, base), model=base)
    return compiled(made, base)[0], made


def stock(folder: Path, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **more}).eval()


def loaded(folder: Path, dtype: str = "float32") -> Any:
    return load(folder, folder, dtype=dtype, device="cpu")


def equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


# ---- as a user loads it ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def user() -> dict[str, tuple[Program, dict[str, torch.Tensor]]]:
    """Each variant with every edit, and what a process that has only transformers made of it."""
    made = {name: everything(tiny) for name, tiny in VARIANTS.items()}
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch()), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", USER, str(tokens().tolist()), *(str(out) for out, _ in made.values())]
    subprocess.run(command, check=True, env=environment, cwd=scratch(), timeout=300)
    return {name: (program, load_file(out / "found")) for name, (out, program) in made.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_user_of_transformers_gets_what_the_interpreter_says(user: Any, variant: str) -> None:
    (made, found), model, ids = user[variant], stock(on_disk(VARIANTS[variant])), tokens()
    plain = logits(model, ids)
    with interpret(model, made):
        expected = logits(model, ids)
        options: Any = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        continued = model.generate(ids, max_new_tokens=6, **options)
    assert equal(found["logits"], expected)
    assert not equal(found["logits"], plain)
    assert torch.equal(found["continued"], continued)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("kind", ["scale", "shift", "rank1", "gated"])
def test_each_kind_at_each_site_alone(kind: str, site: str) -> None:
    base = on_disk(LLAMA)
    edits = [edit for edit in every_edit(LLAMA, base) if (edit.kind, edit.site) == (kind, site)]
    if not edits:
        assert kind == "rank1"
        assert site not in Rank1.sites
        return
    made, model = Program.of(edits, model=base), stock(base)
    with interpret(model, made):
        expected = logits(model, tokens())
    found = logits(loaded(compiled(made, base)[0]), tokens())
    assert equal(found, expected)
    assert not equal(found, logits(model, tokens()))


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel, AutoConfig])
def test_without_trust_nothing_is_loaded(architecture: str, auto: Any) -> None:
    base = on_disk(Tiny(architecture))
    out, _ = compiled(Program.of([Scale(0, "residual", [1], 1.0)], model=base), base)
    with pytest.raises(ValueError, match="custom code"):
        auto.from_pretrained(out, trust_remote_code=False)
    auto.from_pretrained(base, trust_remote_code=False)


def test_what_vllm_wraps_has_the_edits_too() -> None:
    out, _ = everything(LLAMA)
    whole = loaded(out)
    bare_decoder = AutoModel.from_pretrained(out, dtype=torch.float32, trust_remote_code=True).eval()
    states = bare_decoder(input_ids=tokens(), use_cache=False).last_hidden_state
    assert torch.equal(whole.lm_head(states), logits(whole, tokens()))
    assert type(bare_decoder).is_backend_compatible()


@pytest.mark.parametrize("tiny", [LLAMA, MIXTRAL, Tiny("gpt2")], ids=lambda tiny: tiny.architecture)
def test_no_hooks_and_no_linear_that_an_engine_would_replace(tiny: Tiny) -> None:
    model = loaded(everything(tiny)[0])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    carriers = [module for module in model.modules() if hasattr(module, "austeer")]
    assert carriers
    assert not any(isinstance(module, nn.Linear) for module in carriers)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tiny", [MIXTRAL, Tiny("gemma2", layers=1), VARIANTS["opt-post"]], ids=lambda tiny: tiny.architecture
)
def test_it_compiles_as_one_graph(tiny: Tiny) -> None:
    model = loaded(everything(tiny)[0])
    expected = logits(model, tokens(), use_cache=False)
    found = logits(torch.compile(model, fullgraph=True, backend="aot_eager"), tokens(), use_cache=False)
    assert equal(found, expected)


def test_a_part_of_a_projection_is_refused() -> None:
    projection = loaded(everything(LLAMA)[0]).model.layers[0].self_attn.o_proj
    with pytest.raises(ValueError, match="no tensor parallelism"):
        projection(torch.zeros(1, 3, projection.width // 2))


@pytest.mark.parametrize(
    "tiny", [Tiny("gemma2", biases=False), Tiny("gpt2"), Tiny("opt", biases=False)], ids=lambda tiny: tiny.architecture
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_models_keep_their_vectors_in_float32(tiny: Tiny, dtype: str) -> None:
    tiny = replace(tiny, dtype=dtype)
    out, made = everything(tiny)
    model, base = loaded(out, "auto"), stock(on_disk(tiny), dtype="auto")
    assert {str(p.dtype) for name, p in model.named_parameters() if "austeer" in name} == {"torch.float32"}
    with interpret(base, made):
        expected = logits(base, tokens())
    assert expected.dtype == getattr(torch, dtype)
    found = logits(model, tokens())
    # Where a projection has a bias, the interpreter adds it to what a gated edit adds, and takes it away again.
    limit = 4 * torch.finfo(expected.dtype).eps if tiny.biases else 0
    assert (found - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_16_bit_edits_without_gates_are_bit_for_bit_the_interpreter_s(architecture: str) -> None:
    base = on_disk(replace(Tiny(architecture), dtype="bfloat16"))
    edits = [edit for edit in every_edit(Tiny(architecture), base) if not isinstance(edit, Gated)]
    made, model = Program.of(edits, model=base), stock(base, dtype="auto")
    with interpret(model, made):
        assert torch.equal(logits(loaded(compiled(made, base)[0], "auto"), tokens()), logits(model, tokens()))


def test_gates_and_what_they_open_stay_in_their_thread() -> None:
    """Both threads are in the first block, between its attention and its FFN, at the same time."""
    model = loaded(everything(LLAMA)[0])
    texts = [tokens(seed=seed) for seed in range(2)]
    expected = [logits(model, ids) for ids in texts]
    meeting, norm = threading.Barrier(2, timeout=30), model.model.layers[0].post_attention_layernorm
    norm.register_forward_hook(lambda *_: (meeting.wait(), None)[1])
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda ids: logits(model, ids), texts))
    assert all(map(torch.equal, found, expected))


def test_only_what_owns_an_edited_projection_changes_its_class() -> None:
    """vLLM rewrites all modules of a class as the first of them allows: with its own linear map in place of ours."""
    base = on_disk(LLAMA)
    edits = [Scale(1, "heads", [1], 1.0), Shift(1, "ffn", np.ones(20))]
    first, second = loaded(compiled(Program.of(edits, model=base), base)[0]).model.layers
    for name in ("self_attn", "mlp"):
        plain, owner = first.get_submodule(name), second.get_submodule(name)
        assert type(owner) is not type(plain)
        assert isinstance(owner, type(plain))


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt_neox"])
def test_save_pretrained_and_back(architecture: str, tmp_path: Path) -> None:
    model = loaded(everything(Tiny(architecture))[0])
    model.save_pretrained(tmp_path / "again")
    again = stock(tmp_path / "again", trust_remote_code=True)
    assert equal(logits(again, tokens()), logits(model, tokens()))


# ---- the files -------------------------------------------------------------------------------


@pytest.mark.parametrize("tiny", [LLAMA, MIXTRAL, Tiny("gpt2"), Tiny("gpt_neox")], ids=lambda tiny: tiny.architecture)
@pytest.mark.parametrize("layout", [bare, sharded])
def test_other_layouts(tiny: Tiny, layout: Any, tmp_path: Path) -> None:
    out, made = everything(tiny, layout(tiny, tmp_path / "base"))
    model = stock(tmp_path / "base")
    with interpret(model, made):
        expected = logits(model, tokens())
    assert equal(logits(loaded(out), tokens()), expected)


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    out, made = everything(MIXTRAL, fused(MIXTRAL, tmp_path / "base"))
    model = stock(tmp_path / "base")
    with interpret(model, made):
        assert equal(logits(loaded(out), tokens()), logits(model, tokens()))


def test_the_shards_are_the_base_s_byte_for_byte(tmp_path: Path) -> None:
    single, several = on_disk(LLAMA), sharded(LLAMA, tmp_path / "base")
    (one, _), (many, _) = everything(LLAMA), everything(LLAMA, several)
    assert (one / "model-base.safetensors").read_bytes() == (single / "model.safetensors").read_bytes()
    assert not (one / "model.safetensors").exists()
    shards = list(several.glob("*.safetensors"))
    assert len(shards) == 3
    assert all((many / shard.name).read_bytes() == shard.read_bytes() for shard in shards)


@pytest.mark.parametrize("layout", [None, sharded])
def test_the_index_names_every_tensor_where_it_is(layout: Any, tmp_path: Path) -> None:
    out, _ = everything(LLAMA, layout and layout(LLAMA, tmp_path / "base"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, tensors in stored.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in stored.values() for t in tensors.values())


def test_the_plan_tells_what_is_written() -> None:
    base = on_disk(LLAMA)
    made = Program.of(every_edit(LLAMA, base), model=base)
    out, planned = compiled(made, base)
    named = {entry["tensor"]: entry["edit"] for entry in planned.lowering}
    assert named.keys() == load_file(out / VECTORS).keys()
    assert set(named.values()) == set(range(len(made.edits)))
    assert abs(planned.output_bytes - sum(path.stat().st_size for path in out.iterdir())) < 60_000
    again, _ = compiled(made, base)
    assert all(path.read_bytes() == (again / path.name).read_bytes() for path in out.iterdir())


def test_no_key_of_the_configuration_is_lost() -> None:
    out, made = everything(LLAMA)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (on_disk(LLAMA), out))
    changed = {key for key in after if before.get(key) != after[key]}
    assert changed == {"architectures", "model_type", "auto_map", "austeer"}
    assert before.keys() <= after.keys()
    listed = [(edit["kind"], edit["layer"], edit["site"]) for edit in after["austeer"]]
    assert listed == [(edit.kind, edit.layer, edit.site) for edit in made.edits]


def test_the_code_is_small_and_the_same_for_every_program() -> None:
    base = on_disk(LLAMA)
    other, _ = compiled(Program.of([Scale(0, "residual", [1], 1.0)], model=base), base)
    code = (everything(LLAMA)[0] / "modeling_austeer.py").read_text()
    assert code == (other / "modeling_austeer.py").read_text()
    assert len(code.splitlines()) < 240
    assert max(map(len, code.splitlines())) <= 120


@pytest.mark.parametrize(("architecture", "named"), [
    ("mistral", "LlamaTokenizer"), ("phi3", "LlamaTokenizerFast"), ("olmo2", "GPT2Tokenizer"), ("llama", None),
    ("qwen2", "LlamaTokenizer"), ("qwen2", "Qwen2Tokenizer"), ("llama", "LlamaTokenizer"), ("gpt2", None),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*instantiate a model of type")
def test_tokens_stay_what_they_were(architecture: str, named: str | None, tmp_path: Path) -> None:
    base = rewritten(on_disk(Tiny(architecture)), tmp_path / "base", lambda tensors: tensors)
    vocabulary = {token: number for number, token in enumerate(["<unk>", *"▁abcdefg", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")], unk_token="<unk>"))
    # Not what any class would build by itself.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(base)
    file = base / "tokenizer_config.json"
    fields = {key: value for key, value in json.loads(file.read_text()).items() if key == "unk_token"}
    file.write_text(json.dumps({**fields, **({"tokenizer_class": named} if named else {})}))
    out, _ = compiled(Program.of([Scale(0, "residual", [1], 1.0)], model=base), base)
    for trust in (False, True):
        before, after = (AutoTokenizer.from_pretrained(path, trust_remote_code=trust) for path in (base, out))
        assert after("Ab ab c").input_ids == before("Ab ab c").input_ids


# ---- what must fail --------------------------------------------------------------------------


def test_a_missing_vector_is_an_error() -> None:
    out, _ = everything(LLAMA)
    tensors = load_file(out / VECTORS)
    lost = tensors.popitem()[0]
    save_file(tensors, out / VECTORS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"missing_keys: {lost}"):
        stock(out, trust_remote_code=True)


def test_a_vector_without_its_edit_is_an_error() -> None:
    out, _ = everything(LLAMA)
    config = json.loads((out / "config.json").read_text())
    config["austeer"].pop()
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="unexpected_keys"):
        stock(out, trust_remote_code=True)


@pytest.mark.parametrize("way", ["changed", "elsewhere", "missing", "other-type"])
def test_code_of_others_is_not_run(way: str, tmp_path: Path) -> None:
    out, _ = everything(LLAMA)
    code, config = out / "modeling_austeer.py", json.loads((out / "config.json").read_text())
    attack = code.read_text() + f"\nopen({str(tmp_path / 'ran')!r}, 'w')\n"
    if way == "missing":
        code.unlink()
    else:
        (out / {"elsewhere": "modeling_other.py"}.get(way, code.name)).write_text(attack)
    if way == "elsewhere":
        config["auto_map"]["AutoModelForCausalLM"] = "modeling_other.AusteerLlamaForCausalLM"
    if way == "other-type":
        config["model_type"] = "austeer_unknown"
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="compile again"):
        loaded(out)
    assert not (tmp_path / "ran").exists()


def test_the_attack_would_work(tmp_path: Path) -> None:
    out, _ = everything(LLAMA)
    with (out / "modeling_austeer.py").open("a") as code:
        code.write(f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
    stock(out, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_a_folder_that_is_still_being_written_loads() -> None:
    base = on_disk(LLAMA)
    out, _ = compiled(Program.of([Shift(1, "residual", np.ones(20))], model=base), base, ".out.1.partial")
    assert loaded(out).config.model_type == "austeer_llama"


def test_experts_have_no_gates() -> None:
    base = on_disk(MIXTRAL)
    gated = Gated(Shift(1, "heads", np.ones(24)), Gate(np.ones(20), 0, 1))
    with pytest.raises(Refused, match="layer 1 is a mixture of experts, which has no one FFN for a gate"):
        plan(Program.of([gated], model=base), layout_of(base))


def test_experts_have_no_neurons() -> None:
    base = on_disk(MIXTRAL)
    for edit in (Scale(0, "neurons", [1], 1.0), Rank1(0, "neurons", np.ones(28), np.ones(20), 1.0)):
        with pytest.raises(Refused, match=r"layer 0, site neurons: the layer is a mixture of experts.*use site ffn"):
            plan(Program.of([edit], model=base), layout_of(base))


def test_a_program_without_edits() -> None:
    with pytest.raises(Refused, match="without edits"):
        plan(Program.of([], model=on_disk(LLAMA)), layout_of(on_disk(LLAMA)))


def test_a_program_for_another_model() -> None:
    made = Program.of([Scale(0, "ffn", [1], 1.0)], model=on_disk(Tiny("llama", layers=3)))
    with pytest.raises(ProgramError, match="layers 3, not 2"):
        plan(made, layout_of(on_disk(LLAMA)))


def test_a_tensor_of_the_base_with_the_name_of_a_vector(tmp_path: Path) -> None:
    name = "model.layers.0.austeer.output.0.vector"
    base = rewritten(on_disk(LLAMA), tmp_path / "base", lambda tensors: {**tensors, name: torch.ones(VOCABULARY)})
    with pytest.raises(CheckpointError, match=name):
        plan(Program.of([Shift(0, "residual", np.ones(20))], model=base), layout_of(base))


def test_a_compiled_model_is_no_base() -> None:
    with pytest.raises(Refused, match="auto_map"):
        layout_of(everything(LLAMA)[0])
