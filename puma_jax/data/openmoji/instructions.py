"""Instructions of the eight tasks, four for each."""

from __future__ import annotations

from puma_jax.data.demo.records import instructions_of
from puma_jax.data.mbeir import Instruction
from puma_jax.data.openmoji.catalogue import DATASET, DATASET_ID

_PROMPTS = {
    0: (
        "Find the drawing with this name.",
        "Show the drawing that is called this.",
        "Which drawing does this name mean?",
        "Find a picture of this.",
    ),
    1: (
        "Find the English name for this.",
        "Say this name in English.",
        "Translate this name into English.",
        "What is this called in English?",
    ),
    2: (
        "Find the country with these facts.",
        "Find the flag and facts of the country this is true of.",
        "Which country is this said of?",
        "Show the country that this describes.",
    ),
    3: (
        "Find the name of this drawing.",
        "What is this drawing called?",
        "Name what is drawn here.",
        "Say in English what this shows.",
    ),
    4: (
        "Find the same drawing in colour.",
        "Colour this line drawing.",
        "Which coloured drawing has these lines?",
        "Show this drawing with its colours.",
    ),
    6: (
        "Find the answer for the country of this flag.",
        "Answer the question about this flag's country.",
        "Find the sentence that answers this about the flag.",
        "What is the answer for this flag?",
    ),
    7: (
        "Find the drawing with this change.",
        "Change this drawing as described.",
        "Show the same drawing, but with this.",
        "Which drawing do you get with this edit?",
    ),
    8: (
        "Find the neighbour of this flag's country.",
        "Which country next to this flag's is meant?",
        "Find the flag and facts of the neighbour described.",
        "Show the country across the border that is meant.",
    ),
}


def instructions() -> list[Instruction]:
    """Return the instructions of all tasks."""
    return instructions_of(DATASET, DATASET_ID, _PROMPTS)
