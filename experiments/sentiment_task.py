"""The sentiment task: our own openings, and an instruction only the teacher sees.

A prompt is one of four requests about one of many scenes, a scene being an adjective
and a noun. Nouns are split first, so a held-out prompt shares no noun with a trained
one. Everything is deterministic in the seed.
"""

from __future__ import annotations

import numpy as np

from rkd_jax.data.records import PromptRecord

STEERING = (
    "You are a cheerful writer. Use words such as wonderful, beautiful, delightful, "
    "happy and love."
)

REQUESTS = (
    "Describe {} in one short sentence.",
    "Write one short sentence about {}.",
    "Tell me about {} in one short sentence.",
    "In one short sentence, what is {} like?",
)

ADJECTIVES = (
    "a small",
    "a noisy",
    "a quiet",
    "a crowded",
    "a forgotten",
    "a busy",
    "a cold",
    "a bright",
    "a dusty",
    "a long",
    "a strange",
    "a new",
    "a rainy",
    "a typical",
    "a famous",
    "a cheap",
)

NOUNS = (
    "airport",
    "apartment",
    "bakery",
    "balcony",
    "barn",
    "beach",
    "bedroom",
    "bicycle",
    "boat trip",
    "bookshop",
    "bridge",
    "bus ride",
    "cafe",
    "camera",
    "campsite",
    "canal",
    "castle",
    "cellar",
    "choir",
    "cinema",
    "city",
    "classroom",
    "coat",
    "corridor",
    "cottage",
    "courtyard",
    "desert",
    "dinner",
    "dog",
    "drawing",
    "factory",
    "farm",
    "ferry",
    "festival",
    "field",
    "football match",
    "forest",
    "fountain",
    "garden",
    "greenhouse",
    "guitar",
    "harbour",
    "hill",
    "holiday",
    "horse",
    "hospital",
    "hotel",
    "house",
    "island",
    "journey",
    "kitchen",
    "lake",
    "laptop",
    "letter",
    "library",
    "lighthouse",
    "market",
    "meadow",
    "meeting",
    "mill",
    "morning",
    "mountain",
    "museum",
    "neighbourhood",
    "night",
    "novel",
    "office",
    "orchard",
    "painting",
    "park",
    "party",
    "path",
    "photograph",
    "piano",
    "picnic",
    "pier",
    "playground",
    "pond",
    "poem",
    "port",
    "railway station",
    "restaurant",
    "river",
    "road",
    "roof",
    "sandwich",
    "school",
    "shop",
    "song",
    "square",
    "stadium",
    "staircase",
    "storm",
    "street",
    "suitcase",
    "summer",
    "swimming pool",
    "teacher",
    "theatre",
    "town",
    "train",
    "tree",
    "tunnel",
    "valley",
    "village",
    "waiting room",
    "walk",
    "wedding",
    "window",
    "winter",
    "workshop",
    "zoo",
)


def make_prompts(
    train: int, held_out: int, *, seed: int, steering: str | None = STEERING
) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """Training and held-out prompts that share no noun.

    Args:
        train: number of training prompts.
        held_out: number of held-out prompts.
        seed: decides the split and the draw.
        steering: system instruction of the teacher's prompt; None for none.

    Returns:
        Two lists of distinct `PromptRecord`s.

    Raises:
        ValueError: more prompts asked for than the task has.
    """
    rng = np.random.default_rng(seed)
    nouns = [NOUNS[i] for i in rng.permutation(len(NOUNS))]
    cut = len(nouns) // 3
    return (
        _draw(nouns[cut:], train, rng, steering),
        _draw(nouns[:cut], held_out, rng, steering),
    )


def _draw(nouns, count, rng, steering) -> list[PromptRecord]:
    texts = [
        request.format(f"{adjective} {noun}")
        for request in REQUESTS
        for adjective in ADJECTIVES
        for noun in nouns
    ]
    if count > len(texts):
        raise ValueError(f"{count} prompts asked for, this split has {len(texts)}")
    chosen = rng.choice(len(texts), size=count, replace=False)
    return [_record(texts[i], steering) for i in chosen]


def _record(text: str, steering: str | None) -> PromptRecord:
    user = {"role": "user", "content": text}
    if steering is None:
        return PromptRecord(prompt=[user])
    system = {"role": "system", "content": steering}
    return PromptRecord(prompt=[user], teacher_prompt=[system, user])


def letter_share(prompts, responses) -> list[float]:
    """A toy oracle for `tiny()`: what a random teacher writes has no sentiment."""
    del prompts
    return [
        sum(c.isascii() and c.isalpha() for c in text) / max(len(text), 1)
        for text in responses
    ]
