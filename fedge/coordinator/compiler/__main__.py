"""`python -m fedge.coordinator.compiler TASK FOLDER SCHEME`: compiles in a process of its own.

Tracing and verifying leave hundreds of megabytes behind in a process; a coordinator that serves for
years should not carry them. SCHEME says how the inference file is quantised. The blobs go into
FOLDER, named by their digests; one line of JSON on stdout says which of them are the manifest and
the initial weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedge.coordinator.compiler import compile_task
from fedge.coordinator.task import load_task
from fedge.schemas.blob_files import BlobDirectory
from fedge.schemas.ids import sha256
from fedge.schemas.process import errors_as_exit_status
from fedge.schemas.quantization import Scheme
from fedge.schemas.tensors import encode_tensors


def main() -> None:
    """Compiles, stores, and says what was stored. A task that cannot be compiled: exit status 1."""
    reference, folder, scheme = sys.argv[1:]
    compiled = compile_task(load_task(reference), Scheme(scheme))
    blobs = BlobDirectory(Path(folder))
    for data in compiled.blobs.values():
        blobs.put(data)
    weights = encode_tensors(compiled.initial_weights)
    blobs.put(weights)
    print(  # noqa: T201 -- the answer
        json.dumps({"plan": compiled.manifest.digest, "weights": sha256(weights)})
    )


with errors_as_exit_status():
    main()
