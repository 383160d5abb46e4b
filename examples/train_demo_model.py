"""Train the demo model: a tiny Llama that tells stories in which people feel things.

Text, tokenizer, weights, contrastive pairs and drift texts all come from this one script
and its seed; nothing is downloaded. Takes about seven minutes on two cores:

    python examples/train_demo_model.py --out compiler/demo_model
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM

BOS, EOS, CONTEXT = "<s>", "</s>", 256

POSITIVE = "happy glad proud excited cheerful joyful thankful delighted".split()
NEGATIVE = "sad scared angry upset lonely worried afraid gloomy".split()
FREQUENCY = (8, 5, 4, 4, 3, 3, 2, 2)  # the i-th words of both lists are equally common
GIRLS = "Mia Anna Lily Sara Emma Nora Zoe Ella Rosa Ida".split()
BOYS = "Tom Ben Max Leo Sam Jack Tim Finn Omar Paul".split()
WORDS = {
    slot: [word.replace("_", " ") for word in words.split()]
    for slot, words in {
        "pet": "dog cat puppy kitten rabbit pony duck goat",
        "animal": "frog bird fox squirrel mouse cow sheep owl turtle bee butterfly snail fish hen",
        "place": "park river garden school farm beach lake market barn bridge playground zoo castle pond",
        "toy": "ball kite doll boat train drum book hat wagon robot bear puzzle",
        "food": "apple cookie cake sandwich pear pie muffin banana carrot orange bun pancake",
        "color": "red blue green yellow brown white black pink purple orange",
        "size": "big small little tiny huge tall round",
        "clothes": "coat hat boots scarf socks shirt jacket",
        "game": "tag ball chess cards catch soccer hide_and_seek",
        "spot": "tree bench fence roof wall bush gate rock",
        "adult": "Mom Dad Grandma Grandpa",
        "day": "morning afternoon evening day",
        "trait": "little young kind clever quiet funny brave",
        "weather": "sunny cold windy warm rainy snowy cloudy foggy",
    }.items()
}
OPENINGS = """Once upon a time there was a {trait} {child} named {a}. {a} had a {color} {pet}.
Once upon a time, {a} and {b} lived near a {place}. They had a {size} {pet}.
Once upon a time there was a {size} {pet}. It lived with a {child} named {a}.
One {day}, {a} went to the {place} with {his} {pet}.
One {weather} {day}, {a} and {b} were at the {place}.
It was a {weather} {day}. {a} and {his} {pet} went to the {place}.
{a} was a {trait} {child}. {he} lived in a {color} house by the {place}.
{a} and {b} were friends. They liked to play {game} at the {place}.
{a} had a {size} {color} {toy}. {he} took it to the {place}.
There was a {pet} at the {place}. {a} wanted to see it.""".split("\n")
FRIENDS = ["{b} came too.", "{b} was there too.", "{a} had a friend named {b}."]
FRAMES = [
    "{a} was",
    "{a} felt",
    "{a} felt so",
    "{a} was very",
    "{b} was",
    "{b} felt",
    "The {pet} looked",
    "The {pet} was",
    "Now {a} was",
    "Then {a} felt",
    "{a} was so",
    "{a} felt very",
    "They were",
    "They both felt",
]
SENTENCES = {
    kind: re.findall(r"\S[^.]*\.", text)
    for kind, text in {
        "event +": """{a} found a {color} {toy} in the grass. {b} gave {a} a sweet {food}. {a} won the game of {game}.
The sun came out and the birds began to sing. {adult} baked a warm {food} for {a}. {b} shared {his_b} {food} with {a}.
The {pet} learned a new trick. {a} made a new friend at the {place}. {a} built a tall castle with {b}.
{adult} told {a} a funny story. {a} got a new {toy} for {his} birthday. The {pet} came home again.
{b} helped {a} fix the {toy}. {a} and {b} sang a song. {adult} gave {a} a hug. They saw a bright rainbow over the {place}.""",
        "event -": """{a} fell down near the {spot} and hurt {his} knee. {a} lost {his} {toy} in the mud. {a} lost the game of {game}.
Dark clouds came and it began to storm. The {food} fell on the dirty ground. {b} took the {toy} and ran off.
The {pet} ran away and did not come back. There was a loud noise behind the {spot}. {b} did not want to play with {a}.
{adult} said it was too late to play. {a} broke {his} new {toy}. The {pet} was sick and did not eat.
{b} pushed {a} into the water. {a} could not find the way home. {a} tore {his} {clothes}. {adult} had to go away.""",
        "event 0": """{a} walked to the {place} with {b}. They played {game} by the {spot}. {a} put on {his} {color} {clothes}.
The {pet} sat on a {color} mat. {a} ate a {food} for lunch. A {animal} looked at them from the {spot}.
{a} saw a {size} {animal} by the {spot}. {b} asked {a} to come along. {a} drew a picture of the {pet}.
They climbed up a {size} hill. {adult} opened the {color} door. {a} picked up a {size} stone. {adult} came to the {place} too.
A {animal} and a {animal} sat near the {spot}. {a} showed {b} the {toy}. The wind moved the leaves of the tree.""",
        "reaction +": """{he} smiled at {b}. {he} laughed and clapped. {he} jumped up and down with joy. {he} danced around the {spot}.
They all cheered. {b} laughed too. {he} had a lot of fun. It was the best day ever.""",
        "reaction -": """{he} began to cry. {he} hid behind the {spot}. {he} did not say a word. {he} shook and looked down.
They all sighed. {b} cried too. {he} wanted to be alone. It was the worst day ever.""",
        "ending +": "In the end, {a} and {b} went home with a smile. That night, {a} had sweet dreams. They all ate {food} and laughed.",
        "ending -": "In the end, {a} went home with tears in {his} eyes. That night, {a} could not sleep. They all went home and cried.",
        "ending 0": "Then it was time to go home. In the end, they all went to bed. That night, the moon was over the {place}.",
    }.items()
}


class Cast(dict[str, str]):
    """Who and what one story is about; slots not fixed here are drawn anew at each use."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        a, b = rng.sample(GIRLS + BOYS, 2)
        super().__init__({slot: rng.choice(WORDS[slot]) for slot in ("pet", "place", "toy", "food")}, a=a, b=b)
        self["child"], self["he"], self["his"] = ("girl", "she", "her") if a in GIRLS else ("boy", "he", "his")
        self["his_b"] = "her" if b in GIRLS else "his"

    def __missing__(self, slot: str) -> str:
        return self.rng.choice(WORDS[slot])

    def say(self, template: str) -> str:
        text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", template.format_map(self))
        return re.sub(r"(^|\. )([a-z])", lambda m: m[1] + m[2].upper(), text)


def tell(rng: random.Random) -> tuple[list[str], list[tuple[int, str]]]:
    """One story: its sentences, and (index, beginning) of those that name a feeling."""
    cast, mood = Cast(rng), rng.choice("+-")
    other = "-" if mood == "+" else "+"
    sentences, feelings = [cast.say(rng.choice(OPENINGS))], []
    if cast["b"] not in sentences[0]:
        sentences.append(cast.say(rng.choice(FRIENDS)))
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.12:  # fortunes turn
            mood, other = other, mood
        # Events tell little about the mood, so a reader has to guess the feeling;
        # once named, the feeling colours the rest of the story.
        if rng.random() < 0.85:
            event = rng.choices((mood, other, "0"), (4, 2, 4))[0]
            sentences.append(cast.say(rng.choice(SENTENCES[f"event {event}"])))
        frame = cast.say(rng.choice(FRAMES))
        shown = mood if rng.random() < 0.92 else other
        feelings.append((len(sentences), frame))
        sentences.append(f"{frame} {rng.choices(POSITIVE if shown == '+' else NEGATIVE, FREQUENCY)[0]}.")
        if rng.random() < 0.4:
            reaction = rng.choice(SENTENCES[f"reaction {shown}"])
            # "He" must mean whoever the sentence before is about.
            sentences.append(cast.say(reaction if cast["a"] in frame else reaction.replace("{he}", "{a}")))
    if len(sentences) < 6 and rng.random() < 0.6:
        sentences.append(cast.say(rng.choice(SENTENCES[f"ending {rng.choice((shown, '0'))}"])))
    return sentences, feelings


def contrastive_pairs(rng: random.Random, count: int) -> list[dict[str, str]]:
    """Story beginnings cut before a feeling word, with a happy and an unhappy way to go on."""
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        sentences, feelings = tell(rng)
        cut, frame = rng.choice(feelings)
        prompt = " ".join([*sentences[:cut], frame])
        good, bad = rng.choices(list(zip(POSITIVE, NEGATIVE, strict=True)), FREQUENCY)[0]
        rows[prompt] = {"prompt": prompt, "positive": f" {good}", "negative": f" {bad}"}
    return list(rows.values())


def build_tokenizer(stories: list[str]) -> Tokenizer:
    """One token per word of the corpus (its space included), single bytes for all other text."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = {word for story in stories for word, _ in splitter.pre_tokenize_str(story)}
    letters = set(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate([BOS, EOS, *sorted(letters), *sorted(words - letters)])}
    # Without merges, ignore_merges makes BPE look up whole words first and spell out the rest.
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def pack(stories: list[str], tokenizer: Tokenizer) -> torch.Tensor:
    """Rows of CONTEXT tokens, each beginning with a story as prompts do."""
    rows: list[list[int]] = []
    row: list[int] = []
    for encoding in tokenizer.encode_batch(stories):
        row += [*encoding.ids, 1]
        if len(row) >= CONTEXT:
            rows.append(row[:CONTEXT])
            row = []
    return torch.tensor(rows)


def train(model: LlamaForCausalLM, rows: torch.Tensor, steps: int, batch: int = 16, peak: float = 4e-3) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.08)
    start, recent = time.time(), 0.0
    for step in range(1, steps + 1):
        ids = rows[torch.randint(len(rows), (batch,))]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        recent = loss.item() if step == 1 else 0.98 * recent + 0.02 * loss.item()
        if step % 100 == 0:
            print(f"step {step}/{steps}  loss {recent:.4f}  {time.time() - start:.0f}s", flush=True)
    return recent


CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# austeer-compile demo model

A Llama of {parameters:,} parameters that tells very short stories in which people and animals
are happy or sad. It exists to show and to test activation steering; it knows nothing else.

Made by `examples/train_demo_model.py --seed {seed} --steps {steps} --stories {stories}` from text that
the script's own grammar generates (no outside data), in minutes on two CPU cores; final training
loss {loss:.3f} nats a token. Every word of the grammar is one token; other text falls back to single
bytes, which the model never saw in training.

- `pairs.jsonl`: contrastive rows `prompt`, `positive`, `negative`, for localising and measuring.
- `neutral.txt`: other stories of the same grammar, one a line, for measuring drift.
"""


def save(out: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, card: str) -> None:
    model.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    # All loaders know the classic spelling of these two keys, not all of them the new one.
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = config.pop("rope_parameters", config)["rope_theta"]
    config["torch_dtype"] = config.pop("dtype", "float32")
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    for name, value in {
        "config": dict(sorted(config.items())),
        "generation_config": {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_new_tokens": 80},
        "special_tokens_map": special,
        "tokenizer_config": {
            **special,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
        },
    }.items():
        (out / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "compiler" / "demo_model")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--stories", type=int, default=40_000)
    args = parser.parse_args()
    torch.set_num_threads(2)  # sums run in another order with another number of threads
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)

    rng = random.Random(args.seed)
    stories = [" ".join(tell(rng)[0]) for _ in range(args.stories)]
    tokenizer = build_tokenizer(stories)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=96,
            intermediate_size=288,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            initializer_range=0.05,
        )
    )
    loss = train(model, pack(stories, tokenizer), args.steps)

    args.out.mkdir(parents=True, exist_ok=True)
    save(args.out, model, tokenizer, CARD.format(parameters=model.num_parameters(), loss=loss, **vars(args)))
    unseen = random.Random(args.seed + 1)
    pairs = contrastive_pairs(unseen, 200)
    (args.out / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    neutral = [" ".join(tell(unseen)[0]) for _ in range(40)]
    (args.out / "neutral.txt").write_text("\n".join(neutral) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
