"""The registered chat formats, one module per model family."""

from collections.abc import Mapping
from types import MappingProxyType

from megatron_klong.trajectory.formats.glm45 import Glm45Format
from megatron_klong.trajectory.formats.qwen3 import Qwen3Format
from megatron_klong.trajectory.render import ChatFormat

FORMATS: Mapping[str, ChatFormat] = MappingProxyType(
    {chat_format.name: chat_format for chat_format in (Glm45Format(), Qwen3Format())}
)
"""By the name that `klong data tokenize --renderer` takes."""


def chat_format(name: str) -> ChatFormat:
    """The registered format of that name.

    Raises:
        ValueError: there is none; names those there are.
    """
    if name not in FORMATS:
        raise ValueError(
            f"renderer {name!r} is not registered (there are: {', '.join(FORMATS)}); a chat template "
            "that rewrites earlier turns cannot be split without one"
        )
    return FORMATS[name]
