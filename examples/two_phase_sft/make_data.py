"""Small general data of four kinds, made up, as OpenAI chats.

python examples/two_phase_sft/make_data.py DIR
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

COUNT = 120
Chat = list[dict[str, Any]]


def chat(chance: random.Random) -> Chat:
    """Small talk."""
    name = chance.choice(["Ada", "Emmy", "Kurt", "Alan", "Grace"])
    return [_user(f"Hello, I am {name}."), _assistant(f"Hello {name}, what can I do for you?")]


def code(chance: random.Random) -> Chat:
    """What an expression comes to."""
    numbers = [chance.randint(0, 9) for _ in range(4)]
    return [_user(f"What does sorted({numbers}) return?"), _assistant(f"{sorted(numbers)}")]


def math(chance: random.Random) -> Chat:
    """Two questions on the same numbers."""
    one, two = chance.randint(10, 99), chance.randint(10, 99)
    return [
        _user(f"{one} + {two} = ?"), _assistant(f"{one + two}"),
        _user("And the difference?"), _assistant(f"{one - two}"),
    ]  # fmt: skip


def search(chance: random.Random) -> Chat:
    """A tool call, and the answer from what it has found."""
    city, people = chance.choice(["Ulm", "Brno", "Lund", "Graz"]), chance.randint(100, 999) * 1000
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": "search", "arguments": json.dumps({"for": city})},
    }
    return [
        _user(f"How many people live in {city}?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": f"{city}: {people} people"},
        _assistant(f"{people}"),
    ]


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def main(folder: Path) -> None:
    """Write ``KIND.jsonl`` for each kind."""
    kinds: tuple[Callable[[random.Random], Chat], ...] = (chat, code, math, search)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        chance = random.Random(kind.__name__)
        lines = [
            json.dumps({"id": f"{kind.__name__}-{number}", "messages": kind(chance)})
            for number in range(COUNT)
        ]
        (folder / f"{kind.__name__}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
