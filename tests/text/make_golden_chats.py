"""Writes golden_chats.json: what the official templates make of the fixed conversations.

python -m tests.text.make_golden_chats DIRECTORY_WITH_THE_OFFICIAL_TEMPLATES
"""

import json
import sys
from pathlib import Path

from qwen35_jax.text import ChatTemplate
from tests.text.conversations import CHATS, FLAVOURS

GOLDEN = Path(__file__).with_name("golden_chats.json")


def main(directory: Path) -> None:
    official = {flavour: ChatTemplate((directory / name).read_text("utf-8"), source=name) for flavour, name in FLAVOURS.items()}
    golden = {
        name: {str(flavour): template.render(messages, **kwargs) for flavour, template in official.items()}
        for name, (messages, kwargs) in CHATS.items()
    }
    GOLDEN.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
