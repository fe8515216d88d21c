"""Print the requirements of lmdist with some of its extras, one per line, which an image installs in a layer below lmdist's.

python requirements.py train demo < pyproject.toml > requirements.txt
"""

import sys
import tomllib

project = tomllib.load(sys.stdin.buffer)["project"]
lines = [*project["dependencies"], *(line for extra in sys.argv[1:] for line in project["optional-dependencies"][extra])]
sys.stdout.write("\n".join(lines) + "\n")
