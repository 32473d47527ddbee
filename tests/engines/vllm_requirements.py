"""Print what a vLLM wheel needs, without the packages whose builds do not go with a CPU torch."""

import sys
from email.parser import Parser
from zipfile import ZipFile

from packaging.requirements import Requirement

LEFT_OUT = {"torchaudio", "torchvision", "torchcodec"}

with ZipFile(sys.argv[1]) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
for line in metadata.get_all("Requires-Dist"):
    requirement = Requirement(line)
    needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if needed and requirement.name not in LEFT_OUT:
        requirement.marker = None
        print(requirement)
